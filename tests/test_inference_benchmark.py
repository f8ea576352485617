"""benchmarks/inference.py and serve.py: their rounds and intervals, their peer, their listener, and all of both."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pytest
import torch

from mmllm.checkpoints.folder import save_model
from mmllm.inference.api import Model
from mmllm.inference.engine.engine import Engine
from mmllm.inference.engine.requests import TextRequest, TextResult
from mmllm.model.multimodal import MultimodalModel
from mmllm_tokenizers.pointer import PointerRule
from tests.inference_fixtures import make_model, make_tokenizer
from tests.serving_fixtures import GENERATION, served

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "benchmarks"))  # its files import each other, as scripts do

pytest.importorskip("transformers", reason="needs the transformers extra")

import inference  # noqa: E402
import inference_material  # noqa: E402
import inference_peers  # noqa: E402
import inference_rounds  # noqa: E402
import serve  # noqa: E402
import serve_load  # noqa: E402

KEYS = [
    "measure", "case", "value", "unit", "peer", "peer_value", "ratio", "interval", "rounds", "machine", "commit",
]  # fmt: skip


@pytest.fixture(scope="module")
def model() -> Model:
    """With convolutions, which transformers doesn't have, and a pointer."""
    tokenizer = make_tokenizer(pointer=PointerRule())
    config = make_model(tokenizer).config
    decoder = dataclasses.replace(config.decoder, moe_layers="all", conv_size=3)
    torch.manual_seed(3)
    made = MultimodalModel(dataclasses.replace(config, decoder=decoder))
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if parameter.dim() > 1 and not name.startswith("vision"):
                parameter.normal_(std=0.25)
    return Model(made.eval(), tokenizer, generation=GENERATION)


@pytest.fixture(scope="module")
def folder(model: Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("bench") / "model", model.model, model.tokenizer, generation=GENERATION)


# --- rounds and rows -------------------------------------------------------------------------------------------------


def test_functions_take_turns_and_the_first_round_does_not_count():
    called: list[str] = []
    seconds = inference_rounds.alternate({name: lambda name=name: called.append(name) for name in "ab"}, 4)
    assert [len(each) for each in seconds.values()] == [4, 4]
    assert [sorted(called[place : place + 2]) for place in range(0, 10, 2)] == [["a", "b"]] * 5
    assert len({tuple(called[place : place + 2]) for place in range(0, 10, 2)}) == 2


def test_an_interval_is_of_pairs_of_rounds():
    rng = np.random.default_rng(0)
    busy = rng.uniform(1, 5, 15)  # both are slow in the same rounds
    low, high = inference_rounds.ratio_interval((2 * busy).tolist(), busy.tolist()) or (0, 0)
    assert low == pytest.approx(2) and high == pytest.approx(2)
    low, high = inference_rounds.ratio_interval((2 * busy).tolist(), rng.permutation(busy).tolist()) or (0, 0)
    assert low < 1.8 and high > 2.2
    low, high = inference_rounds.ratio_interval(busy.tolist(), None) or (0, 0)
    assert low < np.median(busy) < high
    assert inference_rounds.ratio_interval([1, 2], None) is None


def test_rows_that_are_measured_again_replace_their_earlier_ones(tmp_path):
    path = tmp_path / "rows.json"
    for value in (3.0, 4.0):
        report = inference_rounds.Report(path, "here")
        report.add("decode", "batch 1", "tokens/s", [value] * 3, {"other": [2.0] * 3, "another": [4.0] * 3})
        report.add("errors", "all", "requests", [0.0])
    rows = json.loads(path.read_text())
    assert all(list(row) == KEYS for row in rows)
    assert [(row["peer"], row["ratio"], row["interval"]) for row in rows] == [
        ("other", 2.0, [2.0, 2.0]), ("another", 1.0, [1.0, 1.0]), (None, None, None),
    ]  # fmt: skip


# --- the peer --------------------------------------------------------------------------------------------------------


def test_the_twin_is_what_transformers_computes_and_the_model_stays(model, tmp_path):
    before = {name: tensor.clone() for name, tensor in model.model.state_dict().items()}
    ours, folder = inference_peers.twin(model, tmp_path)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.model.state_dict().items())
    assert ours.model.config.decoder.conv_size == 3
    assert json.loads((folder / "config.json").read_text())["model_type"] == "mixtral"
    peer = inference_peers.Transformers(folder, ours)
    pictures = inference_material.made(3).pictures
    prompts = [
        ours.continuation_prompt(["a red circle"]), ours.continuation_prompt(["two"]), ours.caption_prompt(pictures[0])
    ]  # fmt: skip
    requests = [TextRequest(prompt, max_new_tokens=12, min_new_tokens=12) for prompt in prompts]
    engine = Engine(ours.model, ours.tokenizer)
    wanted = [result.ids for result in engine.run(requests) if isinstance(result, TextResult)]
    own = [
        result.ids for result in Engine(model.model, model.tokenizer).run(requests) if isinstance(result, TextResult)
    ]
    assert wanted != own  # what the convolutions do is not nothing
    for way in peer.ways:
        peer.way = way
        assert peer.agree(wanted, lambda: peer.generate(prompts, 12, False)) is None, way
        assert peer.first(prompts) == [ids[0] for ids in wanted]
    ended = [TextRequest(prompt, max_new_tokens=40) for prompt in prompts]
    wanted = [result.ids for result in engine.run(ended) if isinstance(result, TextResult)]
    assert peer.agree(wanted, lambda: peer.generate(prompts, 40, True)) is None


def test_a_peer_that_writes_other_ids_is_not_timed(folder, tmp_path, monkeypatch, capsys):
    right = inference_peers.Transformers.generate

    def wrong(*arguments: Any) -> list[list[int]]:
        ids = right(*arguments)
        ids[-1][-1] += 1
        return ids

    monkeypatch.setattr(inference_peers.Transformers, "generate", wrong)
    path = tmp_path / "rows.json"
    options = ["--quick", "--threads", "1", "--only", "decode 100M", "--json", str(path)]
    inference.main(["--model", str(folder), *options])
    assert {row["peer"] for row in json.loads(path.read_text())} == {"ours in float32"}
    assert "NOT TIMED: transformers' row 0 of 1 has other ids from id 3 of 4 on" in capsys.readouterr().out


# --- listeners -------------------------------------------------------------------------------------------------------


def test_the_latest_piece_is_that_of_a_player():
    assert serve_load.latest([(5.0, 1.0), (5.5, 1.0), (7.0, 1.0)]) == 0
    assert serve_load.latest([(5.0, 0.5), (5.7, 1.0), (6.6, 1.0)]) == pytest.approx(0.2)
    rng = np.random.default_rng(0)
    for _ in range(20):
        arrivals = np.cumsum(rng.integers(1, 200, 12))
        lengths = rng.integers(20, 150, 12)
        pieces = [(arrival / 1000, length / 1000) for arrival, length in zip(arrivals, lengths, strict=True)]
        assert serve_load.latest(pieces) == pytest.approx(_longest_silence(arrivals, lengths) / 1000)


def _longest_silence(arrivals: np.ndarray, lengths: np.ndarray) -> int:
    """Millisecond by millisecond: a player that begins with the first piece and is silent when it has nothing."""
    place = left = silent = longest = 0
    now = int(arrivals[0])
    while place < len(arrivals) or left:
        while place < len(arrivals) and arrivals[place] <= now:
            left += int(lengths[place])
            place += 1
        silent = 0 if left else silent + 1
        longest = max(longest, silent)
        left = max(0, left - 1)
        now += 1
    return longest


def test_pressure_counts_every_kind_of_answer():
    answers = [b"200 OK", b"429 Too Many Requests", b"500 Internal Server Error", None]

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError):
            while head := await reader.readuntil(b"\r\n\r\n"):
                length = int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0])
                number = json.loads(await reader.readexactly(length))["number"]
                if answers[number] is None:  # it hangs up
                    break
                writer.write(b"HTTP/1.1 %b\r\nContent-Length: 2\r\n\r\n{}" % answers[number])
        writer.close()

    async def pressed() -> Counter[str]:
        async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
            url = "http://{}:{}".format(*server.sockets[0].getsockname())
            asks = [serve_load.Ask("/", {"number": number}) for number in range(4)]
            return await serve_load.press(url, asks, rate=400, seconds=0.1, connections=3)

    counts = asyncio.run(pressed())
    assert set(counts) == {"200", "429", "500", "IncompleteReadError"}
    assert max(counts.values()) - min(counts.values()) <= 1 and 4 <= sum(counts.values()) <= 40


# --- all of it -------------------------------------------------------------------------------------------------------


def test_inference_gives_all_its_measures(folder, tmp_path, capsys):
    path = tmp_path / "rows.json"
    inference.main(["--model", str(folder), "--quick", "--threads", "1", "--json", str(path)])
    rows, printed = json.loads(path.read_text()), capsys.readouterr().out
    assert "made on the spot" in printed
    assert all(list(row) == KEYS and row["value"] > 0 for row in rows)
    assert {row["measure"] for row in rows} == {
        "greedy decode", "decode 100M", "first token", "continuous", "speculative", "shared prefix", "transcribe",
        "speak", "streamed equals",
    }  # fmt: skip
    peers = {(row["measure"], row["peer"]) for row in rows if row["peer"] is not None}
    assert peers >= {("greedy decode", "transformers"), ("first token", "transformers"), ("speculative", "plain"),
                     ("continuous", "static batches of 2"), ("shared prefix", "the first request")}  # fmt: skip
    assert [row["value"] for row in rows if row["measure"] == "streamed equals"] == [1.0, 1.0]
    assert "NOT TIMED" not in printed, printed


def test_what_goes_wrong_in_one_measure_is_told_and_the_next_is_run(folder, tmp_path, monkeypatch, capsys):
    import inference_sound

    def fails(bench: inference.Bench) -> None:
        raise ValueError("no such sound")

    monkeypatch.setitem(inference_sound.MEASURES, "transcribe", fails)
    path = tmp_path / "rows.json"
    options = ["--quick", "--threads", "1", "--json", str(path), "--only", "transcribe", "speak"]
    inference.main(["--model", str(folder), *options])
    assert {row["measure"] for row in json.loads(path.read_text())} == {"speak"}
    assert "not run: transcribe: ValueError: no such sound" in capsys.readouterr().out


def test_serve_gives_all_its_measures(folder, tmp_path, monkeypatch, capsys, model):
    with served(model, name=serve_load.MODEL) as server:

        @contextlib.contextmanager
        def running(bench: serve.Bench) -> Iterator[Any]:
            yield SimpleNamespace(url=server.url, memory=psutil.Process().memory_info().rss)

        monkeypatch.setattr(serve.Bench, "serve", running)
        path = tmp_path / "rows.json"
        serve.main(["--model", str(folder), "--quick", "--threads", "1", "--json", str(path)])
    rows, printed = json.loads(path.read_text()), capsys.readouterr().out
    assert all(list(row) == KEYS for row in rows) and "not run" not in printed, printed
    values: dict[str, list[float]] = {}
    for row in rows:
        values.setdefault(row["measure"], []).append(row["value"])
    assert list(values) == list(serve.MEASURES)
    assert values["errors"] == [0] and values["overload"][0] == 0 and values["streamed equals"] == [1.0, 1.0]
    assert sum(values["streams without a gap"]) == serve.QUICK.listeners


def test_a_server_is_started_asked_and_ended(folder, tmp_path):
    report = inference_rounds.Report(None, "here")
    found = inference_material.made(4)
    options = ["--max_rows", "1", "--max_queue", "1"]
    bench = serve.Bench(folder, found, tmp_path, report, serve.QUICK, 1, options, 4)
    serve.load(bench, ["errors", "memory after"])
    rows = {row["measure"]: row for row in report.rows}
    assert rows["memory after"]["value"] > 50 and rows["memory after"]["peer"] == "after 4"
    assert rows["errors"]["value"] > 0  # four clients are too many for it: they are told so, and these are counted
