"""Preference data: what rows say, what is refused and how it is told, and that ranks and workers change nothing."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mmllm.batch import IGNORE, AnswerBatch
from mmllm.checkpoints.folder import save_model
from mmllm.data.loading.preference_rows import AnswerWriter, read_row
from mmllm.data.loading.preferences import PreferenceDataModule
from mmllm.data.rows.bad_rows import ManifestError
from mmllm.data.samples.document import Document
from mmllm.data.samples.documents import build_document, build_prompt, default_transform
from mmllm.data.samples.sample import Sample
from mmllm.data.samples.stored import pack_codes
from mmllm_tokenizers.folder import TokenizerFolder
from mmllm_tokenizers.pointer import PointerRule
from tests.inference_fixtures import make_model, make_tokenizer
from tests.preference_fixtures import make_data, message, pair, pairs_file, text_model, write_rows

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return text_model(tmp_path_factory.mktemp("base") / "model")


def row_of(value: dict[str, Any]) -> Any:
    return read_row(json.dumps(value), "file:1", Path("/files"))


GOOD = pair(1)


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ({**GOOD, "rejected": GOOD["chosen"]}, "chosen and rejected are equal"),
        ({**GOOD, "prompt": []}, "its prompt is empty"),
        ({**GOOD, "prompt": [message("user", "")]}, "its prompt is empty"),
        ({**GOOD, "prompt": [*GOOD["prompt"], message("assistant", "so")]}, "its prompt ends with the assistant"),
        ({**GOOD, "chosen": [message("user", "more")]}, "'chosen' is of user; it must be one message of the assistant"),
        ({**GOOD, "chosen": []}, "'chosen' is of no message"),
        ({**GOOD, "chosen": [message("assistant", "")]}, "'chosen' is empty"),
        ({**GOOD, "prompt": [message("user", "a"), message("user", "b")]}, "roles out of turn: user, user"),
        ({**GOOD, "prompt": [message("wizard", "a")]}, "a role: system, user, assistant"),
        ({**GOOD, "task": "sing"}, "unknown task 'sing'"),
        ({"prompt": GOOD["prompt"], "chosen": GOOD["chosen"]}, "has no 'rejected'"),
        ({"prompt": GOOD["prompt"]}, "a pair has prompt, chosen and rejected"),
        ({"prompt": GOOD["prompt"], "completion": GOOD["chosen"], "label": "yes"}, "'label' is \"yes\""),
        ({**GOOD, "prompt": "words"}, "plain text has its place in the task"),
        ({**GOOD, "task": "caption"}, "the task caption has one of the user's with one picture"),
        ({**GOOD, "prompt": [message("user", [{"type": "image"}])]}, "an image without a path, and 'images' has 0"),
        ({**GOOD, "images": ["a.png"]}, "has 1 images, but 0 places"),
        ({**GOOD, "prompt": [message("user", [{"type": "video", "video": "a"}])]}, "of type text, image or audio"),
        ({**GOOD, "chosen": [message("assistant", [{"type": "image", "image": "a"}])]}, "chat is text alone"),
        ({**GOOD, "chosen": [{**message("assistant", "a"), "tool_calls": [1]}]}, "calls tools"),
        ({**GOOD, "tools": [{"name": "ocr"}]}, "has 'tools', which have no place here"),
        ({**GOOD, "margin": "much"}, "'margin' is \"much\"; a number is wanted"),
        ({**GOOD, "margin": float("nan")}, "'margin' is NaN"),
        ({**GOOD, "margin": 10**400}, "'margin' is 1000"),
        ({**GOOD, "margin": 1e308}, "'margin' is 1e+308; a number is wanted"),
    ],
)
def test_rows_that_say_nothing_to_learn_are_refused(value: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError) as caught:
        row_of(value)
    assert reason in str(caught.value)


@pytest.mark.parametrize("line", ["[1]", "{", "[" * 100_000, '"text"', "null"])
def test_a_line_that_is_no_row_is_refused(line: str) -> None:
    with pytest.raises(ValueError, match=r"is no JSON|a JSON object is wanted"):
        read_row(line, "file:1", Path())


def test_a_pair_without_a_prompt_begins_with_what_its_sides_share() -> None:
    asked = [message("user", "a"), message("assistant", "b"), message("user", "c")]
    row = row_of({"chosen": [*asked, message("assistant", "d")], "rejected": [*asked, message("assistant", "e")]})
    assert [each.text for each in row.prompt] == ["a", "b", "c"]
    assert [each.text for each in row.answers] == ["d", "e"]


def test_bad_rows_are_named_counted_and_bounded(model: Path, tmp_path: Path, caplog: Any) -> None:
    rows = [pair(number) for number in range(20)]
    rows[4] = {**rows[4], "rejected": rows[4]["chosen"]}
    path = write_rows(tmp_path / "pairs.jsonl", rows)
    with caplog.at_level(logging.WARNING):
        files = make_data(path, model, max_bad_fraction=0.1).files("train")
    assert files is not None and len(files) == 19
    assert f"{path}:5: chosen and rejected are equal" in caplog.text
    with pytest.raises(ManifestError, match="1 of 20 rows can't be used"):
        make_data(path, model, max_bad_fraction=0.0).files("train")
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(ValueError, match="there are no rows to train on"):
        make_data(tmp_path / "empty.jsonl", model).files("train")
    with pytest.raises(ManifestError, match='set form to "answers"'):
        kto = {"prompt": GOOD["prompt"], "completion": GOOD["chosen"], "label": True}
        make_data(write_rows(tmp_path / "kto.jsonl", [kto]), model).files("train")


def test_what_fails_when_it_is_read_is_left_out_named_and_bounded(model: Path, tmp_path: Path, caplog: Any) -> None:
    """Answers that are too long, and pictures that aren't there: both sides of their pair are left out."""
    rows = [pair(number) for number in range(4)]
    rows[1] = {**rows[1], "chosen": [message("assistant", "one two " * 40)]}
    rows[2] = {**rows[2], "chosen": [message("assistant", "one  two")], "rejected": [message("assistant", "one  two ")]}
    path = write_rows(tmp_path / "pairs.jsonl", rows)
    data = make_data(path, model, max_bad_fraction=0.5)
    with caplog.at_level(logging.WARNING):
        batch = next(iter(data.train_dataloader()))
    assert batch.num_answers == 6 and sorted(batch.group_A.tolist()) == [0, 0, 1, 1, 2, 2]
    assert f"left out {path}:2: prompt and answer have" in caplog.text and "sequence_length is 64" in caplog.text
    long = [pair(number) for number in range(30)]
    long = [{**row, "chosen": [message("assistant", "one two " * 40)]} for row in long]
    data = make_data(write_rows(tmp_path / "long.jsonl", long), model)
    with pytest.raises(ValueError, match="rows failed, more than max_bad_fraction"):
        for _ in data.train_dataloader():
            pass


@pytest.mark.parametrize("settings", [{"form": "rows"}, {"batch_size": 0}, {"max_bad_fraction": 2.0},
                                      {"replay_sequences": 2}, {"num_workers": -1}])  # fmt: skip
def test_settings_are_checked(model: Path, settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(settings))):
        PreferenceDataModule("pairs.jsonl", model, **settings)


# ------------------------------------------------------------------------------------------------------------- writing
def targets_of(document: Document) -> list[int]:
    return document.token_ids_T[document.targets_T].tolist()


def test_each_task_is_written_as_the_model_is_asked(tmp_path: Path) -> None:
    """The prompt is `build_prompt`'s, and the targets are the answer and its end alone."""
    folder = make_tokenizer()
    rng = np.random.default_rng(0)
    picture = rng.integers(0, 256, (20, 24, 3), dtype=np.uint8)
    Image.fromarray(picture).save(tmp_path / "a.png")
    codes_KF = rng.integers(0, 12, (3, 6))
    (tmp_path / "a.npz").write_bytes(pack_codes(codes_KF, folder.require_audio().hash, folder.frame_rate))
    writer = AnswerWriter(folder, default_transform(folder), 200)
    image = {"type": "image", "image": "a.png"}
    cases: list[tuple[str, Any, Document]] = [
        ("caption", [image], build_prompt("caption", folder, image=tmp_path / "a.png")),
        ("question", [image, "how many"],
         build_prompt("question", folder, segments=[{"image": tmp_path / "a.png"}], question="how many")),
        ("chat", ["look", image], build_prompt("chat", folder, segments=["look", {"image": tmp_path / "a.png"}])),
        ("text", "one two", build_prompt("text", folder, text="one two")),
    ]  # fmt: skip
    answers = [[message("assistant", text)] for text in ("two", "three blue")]
    for task, content, prompt in cases:
        value = {"task": task, "prompt": [message("user", content)], "chosen": answers[0], "rejected": answers[1]}
        row = read_row(json.dumps(value), "file:1", tmp_path)
        document = writer.document(row, row.answers[1])
        assert document.token_ids_T[: prompt.num_tokens].tolist() == prompt.token_ids_T.tolist(), task
        end = folder.text.end_ids[0]
        assert targets_of(document) == [*folder.text.encode("three blue"), end], task
        assert len(document.images) == len(prompt.images)
    said = [[message("assistant", [{"type": "audio", "audio": name}])] for name in ("a.npz", "b.npz")]
    value = {"task": "speak", "voice": "ann", "prompt": [message("user", "one two")], "chosen": said[0],
             "rejected": said[1]}  # fmt: skip
    row = read_row(json.dumps(value), "file:1", tmp_path)
    document = writer.document(row, row.answers[0])
    sample = Sample("said", "one two", codes_KF=codes_KF, metadata={"speaker": "ann"})  # of a key whose voice is kept
    wanted = build_document(sample, "speak", folder)
    for name in ("token_ids_T", "targets_T", "modality_T", "codes_TK"):
        assert np.array_equal(getattr(document, name), getattr(wanted, name)), name
    with pytest.raises(FileNotFoundError):
        writer.document(row, row.answers[1])


def test_a_pointer_comes_with_the_codes_or_from_times(tmp_path: Path) -> None:
    folder = make_tokenizer(pointer=PointerRule())
    codes_KF = np.random.default_rng(0).integers(0, 12, (3, 8))
    data = pack_codes(codes_KF, folder.require_audio().hash, folder.frame_rate)
    (tmp_path / "a.npz").write_bytes(data)
    words = [{"word": "one", "start": 0.0, "end": 0.01}, {"word": "two", "start": 0.01, "end": 0.03}]
    by_times = {"type": "audio", "audio": "a.npz", "words": words}
    writer = AnswerWriter(folder, default_transform(folder), 200)

    def written(part: dict[str, Any]) -> Document:
        value = {"task": "speak", "prompt": [message("user", "one two")], "completion": [message("assistant", [part])],
                 "label": True}  # fmt: skip
        row = read_row(json.dumps(value), "file:1", tmp_path)
        return writer.document(row, row.answers[0])

    timed = written(by_times)
    assert timed.pointer is not None
    start = int(np.flatnonzero(timed.pointer.places_T >= 0)[0])
    pointer_F = timed.pointer.places_T[start : start + 8]
    with np.load(tmp_path / "a.npz") as arrays:
        np.savez(tmp_path / "b.npz", pointer=pointer_F, **arrays)
    stored = written({"type": "audio", "audio": "b.npz"})
    assert stored.pointer is not None
    for name in ("places_T", "ages_T", "advances_T", "letters_L"):
        assert np.array_equal(getattr(stored.pointer, name), getattr(timed.pointer, name)), name
    with pytest.raises(ValueError, match="'pointer'"):
        written({"type": "audio", "audio": "a.npz"})
    with np.load(tmp_path / "a.npz") as arrays:
        np.savez(tmp_path / "c.npz", pointer=pointer_F[:5], **arrays)
    with pytest.raises(ValueError, match="it is of another sound or text"):
        written({"type": "audio", "audio": "c.npz"})


# ------------------------------------------------------------------------------------------------------------- batches
def answers_of(folder: TokenizerFolder, batch: AnswerBatch) -> dict[tuple[str, bool], int]:
    """Each answer's words, and whether it is chosen; how often."""
    found: dict[tuple[str, bool], int] = {}
    for answer in range(batch.num_answers):
        ids = batch.packed.labels_BT[batch.answer_BT == answer]
        assert (ids != IGNORE).all()
        key = folder.text.decode(ids.tolist()), bool(batch.is_chosen_A[answer])
        found[key] = found.get(key, 0) + 1
    return found


@pytest.mark.parametrize("form", ["pairs", "answers"])
def test_ranks_and_workers_change_nothing(model: Path, tmp_path: Path, form: Any, monkeypatch: Any) -> None:
    from mmllm.data.loading import preferences

    path = pairs_file(tmp_path, 9)
    folder = TokenizerFolder.load(model)

    def steps(rank: int, world_size: int, num_workers: int) -> list[dict[tuple[str, bool], int]]:
        monkeypatch.setattr(preferences, "rank_of", lambda module: (rank, world_size))
        data = make_data(path, model, form=form, num_workers=num_workers, steps_per_epoch=5)
        return [answers_of(folder, batch) for batch in data.train_dataloader()]

    whole = steps(0, 1, 0)
    assert steps(0, 1, 2) == whole
    halves = [steps(rank, 2, 0) for rank in range(2)]
    for step, wanted in enumerate(whole):
        together: dict[tuple[str, bool], int] = {}
        for half in halves:
            for key, count in half[step].items():
                together[key] = together.get(key, 0) + count
        assert together == wanted
    everything = [key for step in whole for key in step]
    assert len(set(everything)) == 18, "every row comes in the first two epochs"


def test_mismatched_answers_are_of_another_row(model: Path, tmp_path: Path) -> None:
    folder = TokenizerFolder.load(model)
    rows = [{**pair(number), "chosen": [message("assistant", f"yes {number}")],
             "rejected": [message("assistant", f"no {number}")]} for number in range(6)]  # fmt: skip
    data = make_data(write_rows(tmp_path / "pairs.jsonl", rows), model, form="answers", batch_size=12)
    batch = next(iter(data.train_dataloader()))
    assert batch.mismatched is not None and batch.mismatched.num_answers == 12
    for answer in range(12):
        other = batch.mismatched
        row, place = divmod(int(other.last_A[answer]), other.packed.token_ids_BT.shape[1])
        is_own = other.packed.document_ids_BT[row] == other.packed.document_ids_BT[row, place]
        text = folder.text.decode(other.packed.token_ids_BT[row][is_own].tolist())
        numbers = [int(word) for word in text.replace("he said", "").split() if word.isdigit()]
        asked = [int(w) for w in pair(numbers[-1])["prompt"][-1]["content"].split() if w.isdigit()]
        assert numbers[:-1] != asked or not asked, text


def test_margins_go_along_and_rows_without_a_reference_are_left_out(model: Path, tmp_path: Path, caplog: Any) -> None:
    path = write_rows(tmp_path / "pairs.jsonl", [{**pair(number), "margin": number / 2} for number in range(4)])
    data = make_data(path, model, max_bad_fraction=0.5)
    batch = next(iter(data.loader("train", seed=None)))
    assert batch.margin_A.tolist() == (batch.group_A / 2).tolist()
    references_N2 = np.zeros((4, 2), dtype=np.float32)
    references_N2[2, 1] = np.nan  # it couldn't be read when the reference was asked
    data.take_references("train", references_N2)
    with caplog.at_level(logging.WARNING):
        batch = next(iter(data.loader("train", seed=None)))
    assert batch.num_answers == 6 and batch.reference_A.tolist() == [0.0] * 6
    assert f"left out {path}:3: what the reference says isn't known" in caplog.text


def test_documents_never_see_each_other(model: Path, tmp_path: Path) -> None:
    """An answer's log-probability is the same packed and alone."""
    from mmllm.checkpoints.folder import load_model
    from mmllm.losses.answers import sum_by_answer, target_logprobs

    net = load_model(model).model
    path = pairs_file(tmp_path, 6)
    together = next(iter(make_data(path, model, batch_size=6, sequence_length=128).loader("train", seed=None)))
    assert together.packed.token_ids_BT.shape[0] < 6, "several share a sequence"
    alone = [batch for batch in make_data(path, model, batch_size=1, sequence_length=40).loader("train", seed=None)]
    with torch.no_grad():
        sums = []
        for batch in (together, *alone):
            found = target_logprobs(net, net(batch.packed), batch)
            sums.append(sum_by_answer(found.logprobs_M, found.answer_M, batch.num_answers))
    for answer in range(12):
        group, is_chosen = int(together.group_A[answer]), together.is_chosen_A[answer]
        own = sums[1 + group][alone[group].is_chosen_A == is_chosen]
        assert float(own) == pytest.approx(float(sums[0][answer]), abs=1e-4)


def test_replay_of_another_tokenizer_is_refused(model: Path, tmp_path: Path) -> None:
    folder = make_tokenizer()
    save_model(tmp_path / "other", make_model(folder), folder)
    source = {"name": "text", "kind": "text", "shards": "none-*.tar", "weight": 1.0}
    recipe = {"seed": 0, "tokenizer": str(tmp_path / "other"), "sequence_length": 48, "sources": [source]}
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    data = make_data(pairs_file(tmp_path), model, replay_recipe=str(tmp_path / "recipe.yaml"), replay_sequences=1)
    with pytest.raises(ValueError, match="replay the recipe of this model"):
        data.train_dataloader()
