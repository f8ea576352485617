"""What the engine is asked for, and what it gives.

Shapes: K codebooks, F frames.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol, get_args

import torch
from torch import Tensor

from mmllm.checkpoints.settings import Sampling
from mmllm.data.samples.document import Document
from mmllm.inference.pacing import Pace

KVDtype = Literal["auto", "bfloat16", "int8"]
Speculation = Literal["none", "lookup", "draft", "ngram"]
EarlyStopping = bool | Literal["never"]
FinishReason = Literal["stop", "length", "cancelled"]
"""`stop`: the text has ended, by its end or a stop string, or speech has said its text. `length`: it met its bound."""


class Constraint(Protocol):
    """What a text may be, told token by token; one of these belongs to one row. See `mmllm.inference.constraints`."""

    def allowed(self) -> Tensor:
        """Bool [num_text]: ids that may come next. At least one of them is True."""
        ...

    def accept(self, token_id: int) -> None:
        """Moves on by an id that was drawn; an end is not told."""
        ...


class ConstraintMaker(Protocol):
    """A constraint that is compiled: it makes the state of each row that is drawn under it."""

    def begin(self) -> Constraint:
        """At the text's beginning."""
        ...


@dataclass(frozen=True)
class TextRequest:
    """A prompt to continue with text.

    Attributes:
        prompt: as `mmllm.data.samples.documents.build_prompt` writes it.
        sampling: how ids are drawn.
        max_new_tokens: at most so many, the end included.
        min_new_tokens: no end is drawn before so many.
        number: with the sampling's seed it decides what is drawn, whatever is answered beside it.
        stop: strings before which the text ends.
        stop_ids: ids that end it, beside the model's own.
        logit_bias: is added to logits, by id.
        constraint: what the text may be; None: anything.
        num_logprobs: of each drawn id the log-probability (before temperature and what else chooses), and those of
            so many most probable ones beside it; None: no log-probabilities.
        prompt_logprobs: also of the prompt's own text tokens; its prefix is then not taken from the cache.
        num_beams: texts that are gone on with side by side, of which the most probable one is given; 1: no search. The
            search is as transformers' is; nothing is left to chance, and updates come when it has ended.
        length_penalty: of a text that has ended the log-probability is divided by its length to this power.
        early_stopping: of the search: True ends it when `num_beams` texts have ended; False when none of those that
            go on is better by its length now; "never" when none can become better.
    """

    prompt: Document
    sampling: Sampling = field(default_factory=Sampling)
    max_new_tokens: int = 128
    min_new_tokens: int = 0
    number: int = 0
    stop: tuple[str, ...] = ()
    stop_ids: tuple[int, ...] = ()
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    constraint: ConstraintMaker | None = None
    num_logprobs: int | None = None
    prompt_logprobs: bool = False
    num_beams: int = 1
    length_penalty: float = 1.0
    early_stopping: EarlyStopping = False

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens is {self.max_new_tokens}; it must be at least 1")
        if not 0 <= self.min_new_tokens <= self.max_new_tokens:
            raise ValueError(
                f"min_new_tokens is {self.min_new_tokens}; it must be from 0 to max_new_tokens, {self.max_new_tokens}"
            )
        if any(not text for text in self.stop):
            raise ValueError("a stop string is empty; give text, or leave it out")
        if self.num_logprobs is not None and self.num_logprobs < 0:
            raise ValueError(f"num_logprobs is {self.num_logprobs}; it must be 0 or more, or None for none")
        self._check_beams()

    def _check_beams(self) -> None:
        if not 1 <= self.num_beams <= MAX_BEAMS:
            raise ValueError(f"num_beams is {self.num_beams}; it must be from 1 to {MAX_BEAMS}")
        if not abs(self.length_penalty) <= _MAX_LENGTH_PENALTY:
            raise ValueError(
                f"length_penalty is {self.length_penalty}; it must be from -{_MAX_LENGTH_PENALTY} to "
                f"{_MAX_LENGTH_PENALTY}"
            )
        if self.early_stopping not in (True, False, "never"):
            raise ValueError(f"early_stopping is {self.early_stopping!r}; it must be true, false or 'never'")
        if self.num_beams == 1:
            return
        if self.sampling.temperature > 0 and self.sampling.top_k != 1:
            raise ValueError(
                f"num_beams is {self.num_beams} and temperature {self.sampling.temperature}; a beam search draws "
                f"nothing: set temperature to 0"
            )
        if self.stop:
            raise ValueError(
                f"num_beams is {self.num_beams} beside stop strings, which a beam search doesn't look for; give "
                f"stop_ids, or leave them out"
            )


@dataclass(frozen=True)
class SpeechRequest:
    """A text to speak.

    Attributes:
        prompt: as `mmllm.data.samples.documents.build_prompt` writes it, or with a recording's frames behind, as
            `mmllm.inference.voices.begin` does: these are gone on from, and left out.
        samplings: how units are drawn: one for all codebooks, or one for each; the first one's seed counts.
        max_frames: at most; None, with a pointer alone: as many as the letters may last.
        pace: how the pointer moves.
        number: as of a `TextRequest`.
        logprobs: also give each position's log-probability.
    """

    prompt: Document
    samplings: tuple[Sampling, ...]
    max_frames: int | None = None
    pace: Pace = field(default_factory=Pace)
    number: int = 0
    logprobs: bool = False

    def __post_init__(self) -> None:
        if self.max_frames is not None and self.max_frames < 1:
            raise ValueError(f"max_frames is {self.max_frames}; it must be at least 1")
        if any(sampling.has_penalties for sampling in self.samplings):
            raise ValueError("a sampling of speech has penalties, which are of text; leave them out")


Request = TextRequest | SpeechRequest
MAX_BEAMS = 64
_MAX_LENGTH_PENALTY = 10


@dataclass(frozen=True)
class Cost:
    """What a request took."""

    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    """Of the prompt's, those that were found in the cache."""
    num_new_tokens: int = 0
    """Ids drawn, the end included; of speech its positions of units."""
    first_seconds: float = 0.0
    """From being submitted to the first id."""
    seconds: float = 0.0
    """From being submitted to the end."""


@dataclass(frozen=True)
class TextResult:
    """A text that was written."""

    ids: tuple[int, ...]
    """Without the end; the ids of a stop string are left in."""
    text: str
    """Without the stop string that ended it."""
    finish_reason: FinishReason
    logprobs: tuple[float, ...] | None = None
    """Of each id, and of the end behind the last one where one was drawn, in nats."""
    top_logprobs: tuple[dict[int, float], ...] | None = None
    """Of each of these places the most probable ids."""
    prompt_logprobs: tuple[float | None, ...] | None = None
    """Of each position of the prompt; None: nothing goes before it, or it is no text."""
    stop: str | None = None
    """The stop string that ended it."""
    end_id: int | None = None
    """The id that ended it, which is no part of it; None: another thing did."""
    beam_score: float | None = None
    """Of a beam search: the text's log-probability, its rules included, by its length; None: there was none."""
    cost: Cost = field(default_factory=Cost)


@dataclass(frozen=True)
class SpokenUnits:
    """What was said."""

    codes_KF: Tensor
    """int64 on the CPU: the folder's K codebooks, pattern undone."""
    pointer_F: Tensor | None = None
    """int64, which letter of `Spelling.of(text)` each frame says; None: the model has no pointer."""
    num_bounded: int = 0
    """Letters that lasted as long as they may."""
    is_whole: bool = True
    """False: it was stopped, or ran into the bound of frames, before its end."""
    logprobs: tuple[float, ...] | None = None
    """Of each position that was drawn, in nats, before temperature and what else chooses: the sum over its codebooks;
    fillers and ends that are forced count nothing."""
    cost: Cost = field(default_factory=Cost)


Result = TextResult | SpokenUnits


@dataclass(frozen=True)
class TextUpdate:
    """More of a text, in whole characters: all updates' texts together are the result's."""

    text: str
    ids: tuple[int, ...]
    """Drawn since the last update; some may be of text that is still held back."""
    logprobs: tuple[float, ...] | None = None
    top_logprobs: tuple[dict[int, float], ...] | None = None


@dataclass(frozen=True)
class UnitsUpdate:
    """Frames that are final: all updates' codes together are the result's."""

    codes_KF: Tensor
    pointer_F: Tensor | None = None


@dataclass(frozen=True)
class EngineConfig:
    """Bounds of an engine, and what it gives up for speed or for the same bits.

    Attributes:
        max_rows: requests that are answered at once.
        max_cached_tokens: positions of all running rows together; None: no bound but memory. A row that would pass it
            waits, or makes the youngest row wait, which then goes on where it was.
        max_length: positions of a prompt and its text together; None: any number.
        prefill_tokens: prompts' positions that are computed in one step beside the rows that run.
        block_size: positions of a block of the prefix cache.
        prefix_cache_bytes: of blocks that no row uses; 0: prompts share nothing.
        kv_dtype: in which keys and values are kept: "auto", as they are computed; in fewer bits more rows have room,
            but steps take longer.
        speculation: how ids are guessed, of which the model verifies several at once: looked up in the prompt and the
            text so far ("lookup"), in a table too of what the model wrote before ("ngram"), or drafted by a smaller
            model ("draft"). What is greedy stays the same.
        most_drafts: ids that are guessed at once for a row.
        speculative_rows: where more rows run, nothing is guessed: their steps are well used.
        deterministic: rows are computed one by one and whole, by the model's own layers, so that nothing beside a row
            changes a bit of it, and a prompt's log-probabilities are those that training computes of it alone.
    """

    max_rows: int = 64
    max_cached_tokens: int | None = None
    max_length: int | None = None
    prefill_tokens: int = 4096
    block_size: int = 32
    prefix_cache_bytes: int = 256 * 2**20
    kv_dtype: KVDtype = "auto"
    speculation: Speculation = "none"
    most_drafts: int = 16
    speculative_rows: int = 4
    deterministic: bool = False

    def __post_init__(self) -> None:
        for name, choices in (("speculation", get_args(Speculation)), ("kv_dtype", get_args(KVDtype))):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} is {getattr(self, name)!r}; choose {', '.join(choices)}")
        if self.deterministic and self.speculation != "none":
            raise ValueError(
                f"deterministic is set and speculation is {self.speculation!r}, which computes as many positions at "
                f"once as turn out to pay; leave one of them out"
            )
        for name in ("max_rows", "prefill_tokens", "block_size", "most_drafts", "speculative_rows"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.prefix_cache_bytes < 0:
            raise ValueError(f"prefix_cache_bytes is {self.prefix_cache_bytes}; it must be 0 or more")
        for name, least in (("max_cached_tokens", 1), ("max_length", 2)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name} is {value}; it must be at least {least}, or None")


def no_codes(num_codebooks: int) -> Tensor:
    """Codes of no frame."""
    return torch.zeros(num_codebooks, 0, dtype=torch.int64)
