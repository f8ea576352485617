"""What a model wrote, with how it came to be: texts that know their tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

from mmllm.inference.engine.requests import FinishReason, TextResult, TextUpdate


@dataclass(frozen=True, eq=False, repr=False)
class Completion(str):
    """A text that a model wrote.

    It is a string, and prints, compares and hashes as its text: answers go back into prompts and conversations, into
    JSON and CSV files, patterns and metrics, all of which take strings. What strings make of it (`strip`, slices, `+`)
    are plain ones.

    Attributes:
        text: itself, as a plain string.
        ids: its tokens, without the end; those of a stop string are among them.
        finish_reason: "stop": it has ended; "length": it ran into `max_new_tokens`; "cancelled": it was stopped.
        logprobs: of each id the log-probability, in nats, and of the end behind the last one where one was drawn:
            those of the model itself, before temperature and what else chooses. None: they weren't asked for.
        top_logprobs: at each of these places the most probable ids, with their log-probabilities.
        prompt_logprobs: of each position of the prompt; None where nothing goes before it, or it is no text.
        stop: the stop string that ended it.
        seconds: from being asked to the end.
        num_prompt_tokens: positions of the prompt, those of pictures and sounds included.
        num_cached_tokens: of these, those that an earlier prompt had in common.
    """

    text: str
    ids: tuple[int, ...] = ()
    finish_reason: FinishReason = "stop"
    logprobs: tuple[float, ...] | None = None
    top_logprobs: tuple[dict[int, float], ...] | None = None
    prompt_logprobs: tuple[float | None, ...] | None = None
    stop: str | None = None
    seconds: float = 0.0
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0

    def __new__(cls, text: str, *_: object, **__: object) -> Self:
        """The string; the rest is `__init__`'s."""
        return super().__new__(cls, text)

    @staticmethod
    def of(result: TextResult) -> Completion:
        """What the engine gave, as it is handed on."""
        return Completion(
            text=result.text,
            ids=result.ids,
            finish_reason=result.finish_reason,
            logprobs=result.logprobs,
            top_logprobs=result.top_logprobs,
            prompt_logprobs=result.prompt_logprobs,
            stop=result.stop,
            seconds=result.cost.seconds,
            num_prompt_tokens=result.cost.num_prompt_tokens,
            num_cached_tokens=result.cost.num_cached_tokens,
        )

    @property
    def confidence(self) -> float | None:
        """The mean probability of its tokens, the end included where it was drawn: 1 where the model had no doubt.

        None where log-probabilities weren't asked for, or nothing was drawn.
        """
        return math.fsum(map(math.exp, self.logprobs)) / len(self.logprobs) if self.logprobs else None

    @property
    def mean_logprob(self) -> float | None:
        """The mean log-probability of its tokens, by which `best_of` chooses."""
        return math.fsum(self.logprobs) / len(self.logprobs) if self.logprobs else None


@dataclass(frozen=True, eq=False, repr=False)
class TextPiece(str):
    """More of a text that is being written, in whole characters: a string, as `Completion` is one.

    Attributes:
        text: itself, as a plain string; "" where what was drawn doesn't make a character yet.
        ids: what was drawn since the last piece.
        logprobs: of each id; see `Completion`.
        top_logprobs: likewise.
    """

    text: str
    ids: tuple[int, ...] = ()
    logprobs: tuple[float, ...] | None = None
    top_logprobs: tuple[dict[int, float], ...] | None = None

    def __new__(cls, text: str, *_: object, **__: object) -> Self:
        """The string; the rest is `__init__`'s."""
        return super().__new__(cls, text)

    @staticmethod
    def of(update: TextUpdate) -> TextPiece:
        """What the engine told, as it is handed on."""
        return TextPiece(update.text, update.ids, update.logprobs, update.top_logprobs)


def best_first(completions: Sequence[Completion]) -> list[Completion]:
    """Completions of one prompt by their mean log-probability; among equals, the one that was drawn first.

    (The mean, not the sum: that of a longer text is lower whatever it says.)
    """
    return sorted(completions, key=lambda each: math.inf if each.mean_logprob is None else -each.mean_logprob)
