"""What `mmllm serve` bears: `python benchmarks/serve.py --model DIR [--json F] [--quick]`.

`errors`, `tail`: 64 clients, 5,000 streamed requests (captions, transcripts, texts): those that were not answered to
their end, and p99 ÷ p50 of the first token.
`memory after`: resident bytes after 10,000 requests, against those after 500.
`overload`: a minute of ten times as many requests as it answers: answers other than 200 and 429.
`streams without a gap`: 16 clients ask for speech at once and listen in real time. A gap is a piece that comes over
100 ms after what was there has been heard. How many are served without one, of the worst of some rounds; with a gap, or
with another answer than 429, should be none.
`streamed equals`: the share of 200 answers, text and sound, that are the same to the byte when they are streamed.

The server is a process of its own on a free port, with its defaults (but for what follows --serve); the clients are
here, on the same machine. --quick takes small sizes, to see that all of it works: its numbers mean nothing.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import itertools
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from inference_material import Material, material, png, wav
from inference_rounds import Report, machine, versions
from serve_load import MODEL, Ask, Heard, Outcome, ServerProcess, clients_of, closed_loop, listen, press, stream, whole

ERRORS = (RuntimeError, ImportError, ValueError, OSError, httpx.HTTPError)
"""What goes wrong in one measure and doesn't stop the next."""


@dataclass(frozen=True)
class Sizes:
    """How much is asked.

    Attributes:
        clients: at once.
        requests: of `errors` and `tail`.
        before: after so many requests memory is looked at first.
        after: and after so many again.
        overload_seconds: of pressure.
        connections: on which it comes.
        capacity_requests: by which the usual number of answers a second is told.
        listeners: that listen at once.
        rounds: in which they do.
        answers: that are compared.
        beside: at once.
        rest_seconds: before memory is looked at.
    """

    clients: int = 64
    requests: int = 5000
    before: int = 500
    after: int = 10_000
    overload_seconds: float = 60.0
    connections: int = 512
    capacity_requests: int = 1000
    listeners: int = 16
    rounds: int = 5
    answers: int = 200
    beside: int = 4
    rest_seconds: float = 0.5


QUICK = Sizes(
    clients=4, requests=12, before=4, after=16, overload_seconds=0.3, connections=16, capacity_requests=8, listeners=3,
    rounds=1, answers=6, beside=2, rest_seconds=0.05,
)  # fmt: skip


class Bench:
    """A model that is served, and what its clients send.

    Args:
        model: folder of the model.
        found: what is seen, heard and said.
        work: folder for logs.
        report: where rows go.
        sizes: how much is asked.
        threads: of the server's PyTorch.
        options: more of its command.
        max_tokens: of each written answer.
    """

    def __init__(
        self, model: Path, found: Material, work: Path, report: Report, sizes: Sizes, threads: int,
        options: Sequence[str], max_tokens: int,
    ) -> None:  # fmt: skip
        self.model, self.found, self.work = model, found, work
        self.report, self.sizes = report, sizes
        self.threads, self.options, self.max_tokens = threads, options, max_tokens

    def serve(self) -> ServerProcess:
        """A new server."""
        return ServerProcess(self.model, self.work, self.threads, self.options)

    def written(self, url: str, streamed: bool) -> list[Ask]:
        """Requests for text of each kind that the model can, in turn: no two of one kind are the same."""
        kinds = [[self._text(text, streamed) for text in self.found.texts]]
        told = self.told(url)
        modalities = told["input_modalities"]
        if "image" in modalities:
            data = [base64.b64encode(png(picture)).decode() for picture in self.found.pictures]
            parts = [{"type": "image_url", "image_url": {"url": f"data:image/png;base64,{each}"}} for each in data]
            kinds.append([self._chat([part], streamed) for part in parts])
        if "audio" in modalities:
            data = [base64.b64encode(wav(sound)).decode() for sound in self.found.heard(told["max_heard_seconds"])]
            parts = [{"type": "input_audio", "input_audio": {"data": each, "format": "wav"}} for each in data]
            kinds.append([self._chat([part], streamed) for part in parts])
        return [ask for asks in zip(*kinds, strict=False) for ask in asks]

    def told(self, url: str) -> dict[str, Any]:
        """What the server says of the model."""
        return httpx.get(f"{url}/v1/models/{MODEL}", trust_env=False, timeout=30).raise_for_status().json()

    def _text(self, text: str, streamed: bool) -> Ask:
        prompt = " ".join(text.split()[:20])
        body = {"model": MODEL, "prompt": prompt, "max_tokens": self.max_tokens, "stream": streamed}
        return Ask("/v1/completions", body)

    def _chat(self, parts: list[Any], streamed: bool) -> Ask:
        messages = [{"role": "user", "content": parts}]
        body = {"model": MODEL, "messages": messages, "max_tokens": self.max_tokens, "stream": streamed}
        return Ask("/v1/chat/completions", body)


# --- load ------------------------------------------------------------------------------------------------------------


def load(bench: Bench, wanted: Sequence[str]) -> None:
    """`errors`, `tail` and `memory after`, of one server."""
    sizes = bench.sizes
    marks = [sizes.before, sizes.requests, *([sizes.after] if "memory after" in wanted else [])]
    with bench.serve() as server:
        asks = itertools.cycle(bench.written(server.url, True))
        outcomes, memory = asyncio.run(_loaded(server, asks, sizes, marks))
    measured = outcomes[: sizes.requests]
    wrong = [outcome for outcome in outcomes if not outcome.is_good]
    case = f"{sizes.clients} clients, {len(outcomes):,} requests"
    bench.report.add("errors", case, "requests", [float(len(wrong))])
    if wrong:
        reasons = Counter(outcome.error or f"status {outcome.status}: {outcome.text[:200]}" for outcome in wrong)
        print("\n".join(f"  {count} of {reason}" for reason, count in reasons.most_common(5)))
    firsts = np.array([outcome.first_seconds for outcome in measured if outcome.is_good])
    if len(firsts):
        middle, late = np.percentile(firsts, [50, 99])
        print(f"first token: p50 {middle:.3f} s, p99 {late:.3f} s, latest {firsts.max():.3f} s")
        case = f"{sizes.clients} clients, {len(measured):,} requests"
        bench.report.add("tail", case, "p99 / p50", [float(late / middle)], interval=_tail_interval(firsts))
    if "memory after" in wanted:
        mib = [each / 2**20 for each in memory]
        peer = {f"after {sizes.before:,}": [mib[0]]}
        bench.report.add("memory after", f"{sizes.after:,} requests", "MiB", [mib[-1]], peer)


def _tail_interval(firsts_N: np.ndarray) -> list[float]:
    """95% of p99 ÷ p50, by resampling requests."""
    rng = np.random.default_rng(0)
    tails = []
    for _ in range(500):
        middle, late = np.percentile(rng.choice(firsts_N, len(firsts_N)), [50, 99])
        tails.append(late / middle)
    return [float(each) for each in np.percentile(tails, [2.5, 97.5])]


async def _loaded(
    server: ServerProcess, asks: Iterator[Ask], sizes: Sizes, marks: Sequence[int]
) -> tuple[list[Outcome], list[int]]:
    """What came of requests, and the server's memory after so many of them, when none is running."""
    outcomes: list[Outcome] = []
    memory = []
    async with clients_of(server.url, sizes.clients) as client:
        for mark in marks:
            outcomes += await closed_loop(client, asks, sizes.clients, mark - len(outcomes))
            await asyncio.sleep(sizes.rest_seconds)
            memory.append(server.memory)
    return outcomes, memory


def overload(bench: Bench, wanted: Sequence[str]) -> None:
    """Ten times as many requests a second as are answered usually."""
    sizes = bench.sizes
    with bench.serve() as server:
        asks = bench.written(server.url, False)
        rate, counts, after = asyncio.run(_pressed(bench, server, asks))
    sent = sum(counts.values())
    others = sum(count for status, count in counts.items() if status not in ("200", "429"))
    times = sent / sizes.overload_seconds / rate
    told = ", ".join(f"{count:,} of {status}" for status, count in counts.most_common())
    print(f"overload: {rate:.1f} requests/s are answered usually; {times:.1f} times as many were sent: {told}")
    if not after.is_good:
        raise RuntimeError(f"after the overload a request got status {after.status}: {after.error or after.text}")
    case = f"{sizes.overload_seconds:g} s of 10×"
    bench.report.add("overload", case, "other answers", [float(others)])
    bench.report.add("overload", f"{case}: as they were sent", "times", [times])


async def _pressed(bench: Bench, server: ServerProcess, asks: Sequence[Ask]) -> tuple[float, Counter[str], Outcome]:
    sizes = bench.sizes
    loop = asyncio.get_running_loop()
    async with clients_of(server.url, sizes.clients) as client:
        began = loop.time()
        left = iter(range(sizes.capacity_requests))

        async def one() -> None:
            for number in left:
                outcome = await whole(client, asks[number % len(asks)])
                if not outcome.is_good:
                    raise RuntimeError(f"a request got status {outcome.status}: {outcome.error or outcome.text}")

        await asyncio.gather(*(one() for _ in range(sizes.clients)))
        rate = sizes.capacity_requests / (loop.time() - began)
        counts = await press(server.url, asks, 10 * rate, sizes.overload_seconds, sizes.connections)
        return rate, counts, await whole(client, asks[0])


# --- sound -----------------------------------------------------------------------------------------------------------


def without_a_gap(bench: Bench, wanted: Sequence[str]) -> None:
    """Clients that listen in real time."""
    sizes = bench.sizes
    with bench.serve() as server:
        told = bench.told(server.url)
        if "audio" not in told["output_modalities"]:
            raise ValueError("the model does not speak")
        rounds = asyncio.run(_heard(bench, server.url, told["voices"]))
    smooth = [sum(each.is_smooth for each in heard) for heard in rounds]
    refused = [sum(each.status == 429 for each in heard) for heard in rounds]
    others = [len(heard) - good - full for heard, good, full in zip(rounds, smooth, refused, strict=True)]
    for heard, good, full in zip(rounds, smooth, refused, strict=True):
        served = [each for each in heard if each.status == 200]
        worst = max((each.late_seconds for each in served), default=0.0)
        length = float(np.mean([each.seconds for each in served])) if served else 0.0
        errors = Counter(each.error or f"status {each.status}" for each in heard if each.status not in (200, 429))
        print(f"  {good} without a gap, {full} refused; latest piece {1e3 * worst:.0f} ms; {length:.1f} s of sound each"
              f"{f'; {dict(errors)}' if errors else ''}")  # fmt: skip
    case = f"of {sizes.listeners} clients, worst of {len(rounds)} rounds"
    bench.report.add("streams without a gap", case, "clients", [float(min(smooth))])
    bench.report.add("streams without a gap", f"{case}: with a gap or an error", "clients", [float(max(others))])


async def _heard(bench: Bench, url: str, voices: Sequence[str]) -> list[list[Heard]]:
    said, sizes = bench.found.said, bench.sizes
    rounds = []
    async with clients_of(url, sizes.listeners) as client:
        for turn in range(sizes.rounds + 1):
            asks = []
            for number in range(sizes.listeners):
                place = turn * sizes.listeners + number
                text = " ".join(said[(2 * place + each) % len(said)] for each in range(2))
                body = {"model": MODEL, "input": text, "response_format": "pcm", "seed": place}
                if voices:
                    body["voice"] = voices[place % len(voices)]
                asks.append(Ask("/v1/audio/speech", body))
            heard = await asyncio.gather(*(listen(client, ask) for ask in asks))
            if turn:  # the first one warms up
                rounds.append(list(heard))
    return rounds


def streamed_equals(bench: Bench, wanted: Sequence[str]) -> None:
    """Answers of every kind, streamed and whole, some at once; half of them are speech."""
    sizes = bench.sizes
    with bench.serve() as server:
        asks = bench.written(server.url, True)
        is_spoken = "audio" in bench.told(server.url)["output_modalities"]
        count = sizes.answers // 2 if is_spoken else sizes.answers
        pairs = [Ask(ask.path, {**ask.body, "seed": number, "temperature": 0.8 if number % 3 else 0.0})
                 for number, ask in enumerate(itertools.islice(itertools.cycle(asks), count))]  # fmt: skip
        shares = {"texts": asyncio.run(_same(server.url, pairs, sizes.beside))}
        if is_spoken:
            pairs = [_spoken(bench.found.said[number % len(bench.found.said)], number) for number in range(count)]
            shares["sounds"] = asyncio.run(_same(server.url, pairs, sizes.beside))
    for what, outcomes in shares.items():
        case = f"HTTP, {len(outcomes)} {what}, {sizes.beside} at once"
        bench.report.add("streamed equals", case, "share", [float(np.mean(outcomes))])


def _spoken(text: str, seed: int) -> Ask:
    messages = [{"role": "user", "content": text}]
    audio = {"format": "pcm16"}
    body = {"model": MODEL, "messages": messages, "modalities": ["text", "audio"], "audio": audio, "seed": seed}
    return Ask("/v1/chat/completions", {**body, "stream": True})


async def _same(url: str, asks: Sequence[Ask], num_clients: int) -> list[bool]:
    """Of each request whether its answer is the same, to the byte, streamed or not."""
    same: dict[int, bool] = {}
    left = iter(enumerate(asks))
    async with clients_of(url, num_clients) as client:

        async def one() -> None:
            for number, ask in left:
                streamed = await stream(client, ask)
                at_once = await whole(client, Ask(ask.path, {**ask.body, "stream": False}))
                for outcome in (streamed, at_once):
                    if not outcome.is_good:
                        raise RuntimeError(f"status {outcome.status}: {outcome.error or outcome.text[:300]}")
                is_spoken = "modalities" in ask.body
                same[number] = _bytes(streamed.text, is_spoken) == _bytes(at_once.text, is_spoken)

        await asyncio.gather(*(one() for _ in range(num_clients)))
    return [same[number] for number in range(len(asks))]


def _bytes(text: str, is_spoken: bool) -> bytes:
    """Of text, or of sound in base64, whose pieces each end as base64 does."""
    if not is_spoken:
        return text.encode()
    return b"".join(base64.b64decode(piece) for piece in _base64_pieces(text))


def _base64_pieces(text: str) -> Iterator[str]:
    """Pieces that were encoded one by one: padding ends each of them that has any."""
    begin = 0
    for place in range(4, len(text) + 1, 4):
        if text[place - 1] == "=" or place == len(text):
            yield text[begin:place]
            begin = place


MEASURES: dict[str, Callable[[Bench, Sequence[str]], None]] = {
    "errors": load,
    "tail": load,
    "memory after": load,
    "overload": overload,
    "streams without a gap": without_a_gap,
    "streamed equals": streamed_equals,
}


def main(argv: Sequence[str] | None = None) -> None:
    """See --help."""
    parser = argparse.ArgumentParser(
        description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, required=True, metavar="DIR", help="model folder")
    parser.add_argument("--json", type=Path, metavar="FILE", help="file for the rows; those already in it are kept")
    parser.add_argument("--only", nargs="+", action="extend", choices=list(MEASURES), metavar="MEASURE",
                        help=", ".join(MEASURES))  # fmt: skip
    parser.add_argument("--data", type=Path, metavar="RUN", help="a quickstart's folder, whose held-out rows are taken")
    parser.add_argument("--quick", action="store_true", help="small sizes, to see that it works")
    parser.add_argument("--threads", type=int, default=2, help="of the server's PyTorch")
    parser.add_argument("--serve", default="", metavar="OPTIONS", help='of the server: --serve "--max_rows 16"')
    args = parser.parse_args(argv)
    sizes = QUICK if args.quick else Sizes()
    found = material(args.data, args.model, 8 if args.quick else 1024)
    report = Report(args.json, machine(args.threads))
    print(f"{args.model}, {found.source}; {report.machine}; {versions('torch', 'httpx', 'fastapi', 'uvicorn')}")
    wanted = list(dict.fromkeys(args.only or MEASURES))
    with tempfile.TemporaryDirectory() as work:
        bench = Bench(args.model, found, Path(work), report, sizes, args.threads, args.serve.split(),
                      4 if args.quick else 32)  # fmt: skip
        for function in dict.fromkeys(MEASURES[name] for name in wanted):
            names = [name for name in wanted if MEASURES[name] is function]
            print(f"{', '.join(names)} …", file=sys.stderr, flush=True)
            try:
                function(bench, names)
            except ERRORS as error:
                report.missing[", ".join(names)] = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
    report.finish()


if __name__ == "__main__":
    main()
