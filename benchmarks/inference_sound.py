"""The measures of inference.py that hear, speak and stream."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from mmllm.inference.api import TextTask
from mmllm.inference.speaking import SpeechSettings
from mmllm.inference.text_settings import TextSettings

if TYPE_CHECKING:
    from inference import Bench

MINUTES = 10
NUM_ANSWERS = 200


def transcribe(bench: Bench) -> None:
    """Seconds of computing a second of speech."""
    bench.model.prompter.need_hearing()
    seconds = 1.0 if bench.quick else 60.0 * MINUTES
    sound = bench.material.long_sound(seconds)
    more: TextSettings = {"max_new_tokens": 4} if bench.quick else {}
    found = bench.alternate({"ours": lambda: bench.model.transcribe(sound, **more)}, 3)["ours"]
    case = f"{seconds / 60:g} minutes"
    bench.report.add("transcribe", case, _factor(bench), [each / seconds for each in found])


def speak(bench: Bench) -> None:
    """Seconds of computing a second of speech, and seconds to the first of it."""
    bench.model.prompter.need_speech()
    count = 2 if bench.quick else 5
    texts = bench.material.said[:count]
    factors, firsts = [], []
    for number in range(bench.num_rounds(5) + 1):
        settings = _speech(bench, number)
        with bench.seconds() as taken:
            spoken = [bench.model.speak(text, **settings).seconds for text in texts]
        waits = []
        for text in texts:
            with bench.seconds() as wait:
                stream = bench.model.stream("speak", text, **settings)
                next(stream, None)
            stream.close()
            waits += wait
        if number:  # the first one warms up
            factors.append(taken[0] / sum(spoken))
            firsts.append(float(np.median(waits)))
    bench.report.add("speak", f"{count} sentences, one by one", _factor(bench), factors)
    bench.report.add("speak", "to the first sound", "s" if bench.clock == "wall" else "s of CPU", firsts)


def streamed_equals(bench: Bench) -> None:
    """Answers of every kind, streamed and whole; half of them are speech."""
    model, found = bench.model, bench.material
    count = 6 if bench.quick else NUM_ANSWERS
    short: TextSettings = {"max_new_tokens": 6} if bench.quick else {}
    kinds: list[Callable[[int], bool]] = []
    if model.model.config.vision is not None:
        kinds.append(lambda n: _same_text(bench, "caption", found.pictures[n % len(found.pictures)], n, short))
    kinds.append(lambda n: _same_text(bench, "generate", " ".join(found.texts[n % len(found.texts)].split()[:20]),
                                      n, short))  # fmt: skip
    num_spoken = 0
    if model.model.config.audio is not None:
        sounds = found.heard(model.generation.max_heard_seconds)
        kinds.append(lambda n: _same_text(bench, "transcribe", sounds[n % len(sounds)], n, short))
        num_spoken = count // 2
    num_written = count - num_spoken
    written = [kinds[number % len(kinds)](number) for number in range(num_written)]
    spoken = [_same_sound(bench, found.said[n % len(found.said)], n) for n in range(num_spoken)]
    for what, outcomes in (("texts", written), ("sounds", spoken)):
        if outcomes:
            bench.report.add("streamed equals", f"{len(outcomes)} {what}", "share", [float(np.mean(outcomes))])


def _same_text(bench: Bench, task: TextTask, given: Any, number: int, settings: TextSettings) -> bool:
    """Every third answer is greedy, the others are drawn."""
    drawn: TextSettings = {**settings, "seed": number, "temperature": 0.8 if number % 3 else 0.0}
    stream: Any = bench.model.stream
    pieces = list(stream(task, given, **drawn))
    whole = getattr(bench.model, task)(given, **drawn)
    ids = tuple(token_id for piece in pieces for token_id in piece.ids)
    return "".join(pieces).encode() == whole.encode() and ids == tuple(whole.ids)


def _same_sound(bench: Bench, text: str, number: int) -> bool:
    settings = _speech(bench, number)
    streamed = b"".join(piece.samples.tobytes() for piece in bench.model.stream("speak", text, **settings))
    return streamed == bench.model.speak(text, **settings).samples.tobytes()


def _speech(bench: Bench, seed: int) -> SpeechSettings:
    return {"seed": seed, "max_seconds": 0.1} if bench.quick else {"seed": seed}


def _factor(bench: Bench) -> str:
    return "s/s" if bench.clock == "wall" else "s of CPU/s"


MEASURES: dict[str, Callable[[Bench], None]] = {
    "transcribe": transcribe,
    "speak": speak,
    "streamed equals": streamed_equals,
}
