"""Few-shot prompts of evaluation: training rows with their answers, in front of the row that is asked.

Brown et al. 2020 (arXiv:2005.14165); with pictures, Alayrac et al. 2022 (arXiv:2204.14198). Shots are documents as
training has them, anchor included, as those of `mmllm.inference.reasoning.few_shot` are of a model without a chat
template. Each row has shots of its own: a function of the manifest, the seed and the row's id.
"""

from __future__ import annotations

import os
import random
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np

from mmllm.data.expressions import compile_filter
from mmllm.data.rows.bad_rows import BadRows, ManifestError, is_of_machine
from mmllm.data.rows.column_names import ColumnNames
from mmllm.data.rows.filtered import filtered
from mmllm.data.rows.forms import read_rows
from mmllm.data.rows.media import Media, media_file, media_source, sound_seconds
from mmllm.data.rows.rows import Row, row_media
from mmllm.data.samples.document import Document
from mmllm.data.samples.documents import build_answer
from mmllm.data.samples.sample import Segment
from mmllm.evaluation.results import KIND_OF_TASK
from mmllm.inference.inputs import as_audio
from mmllm.inference.prompting import Prompter
from mmllm.inference.prompts import behind_shots, join


@dataclass(frozen=True)
class ShotsConfig:
    """What is shown.

    Attributes:
        manifest: of rows to draw from, of any form; those of other kinds, and those without an answer, are left out.
        num_shots: in front of each row.
        max_length: positions of a prompt and its answer: the longest shots are left out until they have room, and
            counted. None: as the model says, by the length of training's sequences.
        filter: which rows, as a recipe's `filter`; None: all.
    """

    manifest: str | Path
    num_shots: int
    max_length: int | None = None
    filter: str | None = None

    def __post_init__(self) -> None:
        if self.num_shots < 1:
            raise ValueError(f"num_shots is {self.num_shots}; it must be at least 1 (without shots, leave them out)")
        if self.max_length is not None and self.max_length < 2:
            raise ValueError(f"max_length is {self.max_length}; it must be at least 2")
        if self.filter is not None:
            compile_filter(self.filter)

    @property
    def name(self) -> str:
        """What rows are of, in messages."""
        return str(self.manifest) if self.filter is None else f"{self.manifest} where {self.filter}"


class RowShots:
    """Draws shots for rows, puts them in front of prompts, and counts.

    Args:
        rows: to draw from.
        task: one of `results.SHOT_TASKS`.
        config: how many.
        seed: of the draws.
        prompter: of the model.
        longest_seconds: of a sound that is shown by itself; None: not known.
        max_length: of the model; that of `config` stands in its place.
        bad: takes rows that were drawn and can't be shown; more of them than it allows are an error.

    Raises:
        ManifestError: there are too few rows, or the filter reads a key that none has, or can't be asked of one.
    """

    def __init__(
        self,
        rows: Sequence[Row],
        task: str,
        config: ShotsConfig,
        seed: int,
        prompter: Prompter,
        longest_seconds: float | None,
        max_length: int | None,
        bad: BadRows,
    ) -> None:
        answered = [row for row in rows if row.kind == KIND_OF_TASK[task] and _is_answered(row)]
        self._rows = answered if config.filter is None else filtered(answered, config.filter, config.manifest)
        if len(self._rows) < config.num_shots:
            raise ManifestError(
                f"{config.name} has {len(self._rows)} rows that can be shown with their answers for the task "
                f"{task!r}, and num_shots is {config.num_shots}; ask for fewer, or give another manifest"
            )
        self._task, self._config, self._seed = task, config, seed
        self._prompter, self._longest_seconds = prompter, longest_seconds
        self._max_length = max_length if config.max_length is None else config.max_length
        self._alike: dict[Hashable, list[int]] = {}
        for place, row in enumerate(self._rows):
            for key in _keys(row):
                self._alike.setdefault(key, []).append(place)
        self._bad, self._num_bad_before = bad, len(bad.reasons)
        self._documents: dict[int, Document | None] = {}
        self._num_shown: dict[tuple[str, str], int] = {}

    @classmethod
    def read(
        cls,
        config: ShotsConfig,
        task: str,
        seed: int,
        prompter: Prompter,
        longest_seconds: float | None,
        max_length: int | None,
        max_bad_fraction: float = 0.05,
        form: str = "auto",
        columns: ColumnNames | None = None,
    ) -> RowShots:
        """Of the manifest's rows; pictures and sounds are read when they are drawn.

        Raises:
            FileNotFoundError: there is no such manifest.
            ManifestError: too many of its rows are bad, or there are too few.
        """
        bad = BadRows(max_bad_fraction)
        rows = read_rows(config.manifest, bad, form, columns=columns)
        return cls(rows, task, config, seed, prompter, longest_seconds, max_length, bad)

    def before(self, rows: Sequence[Row], prompts: Sequence[Document], room: int) -> list[Document]:
        """Prompts behind their shots.

        Args:
            rows: that the prompts ask.
            prompts: without shots.
            room: tokens that come behind a prompt.

        Raises:
            ManifestError: too many of the rows that were drawn can't be shown, or too few are left for a prompt.
            ValueError: there is no prompt that has room for a shot.
        """
        drawn = [self._drawn(row) for row in rows]
        self._bad.check(len(self._documents), self._config.name, self._num_bad_before)
        made, counts = [], []
        for shots, prompt in zip(drawn, prompts, strict=True):
            lengths = [shot.num_tokens for shot in shots]
            document, kept = behind_shots(lengths, partial(_joined, shots, prompt), room, self._max_length)
            made.append(document)
            counts.append(len(kept))
        if counts and not any(counts):
            longest = min(prompt.num_tokens for prompt in prompts)
            raise ValueError(
                f"no prompt has room for a shot of {self._config.name}: prompts have {longest} positions at least, "
                f"their answers {room}, and there are {self._max_length} in all, as training's sequences had; raise "
                f"max_length, or ask without shots"
            )
        for row, count in zip(rows, counts, strict=True):
            self._num_shown.setdefault((row.id, row.where), count)  # of controls, which come later, it may be another
        return made

    def told(self) -> dict[str, Any]:
        """What was shown, for who wants it again."""
        return {
            "manifest": str(self._config.manifest),
            "num_shots": self._config.num_shots,
            "seed": self._seed,
            "max_length": self._max_length,
            "filter": self._config.filter,
        }

    def scores(self) -> dict[str, Any]:
        """What every score of few-shot prompts is to be read beside."""
        counts = list(self._num_shown.values())
        scores = {
            "num_shots": self._config.num_shots,
            "mean_shots_shown": float(np.mean(counts)),
            "num_rows_with_fewer_shots": sum(count < self._config.num_shots for count in counts),
        }
        return scores | ({"num_skipped_shots": len(self._bad.reasons)} if self._bad.reasons else {})

    def _drawn(self, row: Row) -> list[Document]:
        return [cast("Document", self._documents[place]) for place in self._places(row)]

    def _places(self, row: Row) -> list[int]:
        """The first rows of a random order that can be shown, without those that tell what is asked."""
        seen = {place for key in _keys(row) for place in self._alike.get(key, ())}
        rng = random.Random(f"shots {self._seed} {row.id}")
        found: list[int] = []
        while len(found) < self._config.num_shots and len(seen) < len(self._rows):
            place = rng.randrange(len(self._rows))
            if place not in seen:
                seen.add(place)
                if self._document(place) is not None:
                    found.append(place)
        if len(found) < self._config.num_shots:
            raise ManifestError(
                f"{self._config.name} has {len(found)} rows that can be shown in front of {row.where or 'row'} "
                f"({row.id}): neither the row itself nor others of its pictures and sounds, nor such as can't be "
                f"read; num_shots is {self._config.num_shots}: ask for fewer"
            )
        return found

    def _document(self, place: int) -> Document | None:
        """A shot; None where it can't be shown, which is counted."""
        if place not in self._documents:
            row = self._rows[place]
            try:
                self._documents[place] = self._written(row)
            except (OSError, ValueError, RuntimeError) as error:
                if is_of_machine(error):
                    raise
                self._bad.add(row.where, error)
                self._documents[place] = None
        return self._documents[place]

    def _written(self, row: Row) -> Document:
        prompter = self._prompter
        match self._task:
            case "caption":
                prompt = prompter.caption(cast("Any", media_source(cast("Media", row.image))))
                answer = build_answer("caption", prompter.tokenizer, row.text)
            case "transcribe":
                sound = cast("Media", row.audio)
                seconds, longest = sound_seconds(sound), self._longest_seconds
                if longest is not None and seconds > longest:
                    raise ValueError(f"its sound lasts {seconds:.1f} s; the model hears {longest:g} s at once")
                (codes_KF,) = prompter.codes([as_audio(cast("Any", media_source(sound)))])
                prompt = prompter.transcript(codes_KF)
                answer = build_answer("transcribe", prompter.tokenizer, row.text)
            case _:
                prompt = prompter.question(prompt_segments(row), str(row.metadata["question"]))
                answer = build_answer("question", prompter.tokenizer, str(row.metadata["answer"]))
        return join([prompt, answer])


def prompt_segments(row: Row) -> list[Segment]:
    """A row's prompt as the model takes it."""
    return [
        Segment(
            segment.get("text"),
            media_source(segment["image"]) if "image" in segment else None,
            media_source(segment["audio"]) if "audio" in segment else None,
        )
        for segment in row.segments
    ]


def _joined(shots: Sequence[Document], prompt: Document, kept: Sequence[int]) -> Document:
    return join([*(shots[shot] for shot in kept), prompt])


def _is_answered(row: Row) -> bool:
    return row.kind != "interleaved" or ("question" in row.metadata and "answer" in row.metadata)


def _keys(row: Row) -> Iterator[Hashable]:
    """What a row has alike with those that tell its answer: its id, its pictures and sounds, or all that it says.

    Files are told by their real paths: two manifests may spell one file's path in two ways.
    """
    yield "id", row.id
    media = [_real(each) for _, each in row_media(row)]
    yield from (("media", each) for each in media)
    if not media:
        said = tuple(segment.get("text") for segment in row.segments)
        yield "said", row.text, said, str(row.metadata.get("question"))


def _real(media: Media) -> str:
    file = Path(os.path.realpath(media_file(media)))
    return str(file if isinstance(media, Path) else replace(media, file=file))
