"""Draws several answers to each row of a manifest: deterministic, and going on where it stopped.

What is drawn depends on the seed, the row's place and the answer's number alone. Rows are drawn in groups, whole ones
of which are written; so what was interrupted goes on with the same groups, and the file is the same to the byte.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmllm.data.rows.bad_rows import BadRows
from mmllm.data.rows.column_names import ColumnNames
from mmllm.data.rows.forms import read_rows
from mmllm.data.rows.rows import Row
from mmllm.data.samples.stored import pack_codes
from mmllm.evaluation.preferences.candidates import TASKS, Candidate, CandidateRow
from mmllm.evaluation.preferences.prompts import MediaFiles, document_of, messages_of, reference_of, rows_of_task
from mmllm.inference.api import Model
from mmllm.inference.engine.engine import Engine
from mmllm.inference.engine.requests import EngineConfig, Request, SpokenUnits, TextResult
from mmllm.inference.pacing import Pace
from mmllm.inference.speaking import SpeechOptions, speech_options
from mmllm.inference.text_settings import MAX_TRIES, TextOptions, text_options
from mmllm.inference.voting import draw_number

_ROWS_OF_ENGINE = 4
"""So many times the engine's rows are asked at once: few stand idle while the last ones of a group are answered."""


@dataclass(frozen=True)
class SamplingConfig:
    """How candidates are drawn.

    Attributes:
        task: which rows are asked, and how.
        num_candidates: drawn a row; equal ones are kept once, and counted.
        temperature: of text, or of all codebooks of speech.
        top_p: draw among the fewest of this probability together.
        seed: of all draws.
        max_new_tokens: of a text; None: the model's default.
        max_seconds: of speech; None: as long as its text takes, or the model's default.
        variation: of speech with a pointer, how much the time of each letter is left to chance.
        limit: the first so many rows; None: all.
        batch_size: answers drawn at once.
        deterministic: each answer is computed by itself, so that nothing beside it changes a bit of it.
        max_bad_fraction: more rows that can't be asked are an error.
    """

    task: str
    num_candidates: int = 8
    temperature: float = 1.0
    top_p: float | None = None
    seed: int = 0
    max_new_tokens: int | None = None
    max_seconds: float | None = None
    variation: float | None = None
    limit: int | None = None
    batch_size: int = 64
    deterministic: bool = False
    max_bad_fraction: float = 0.05

    def __post_init__(self) -> None:
        if self.task not in TASKS:
            raise ValueError(f"task is {self.task!r}; choose one of {', '.join(TASKS)}")
        if not 1 <= self.num_candidates <= MAX_TRIES:
            raise ValueError(f"n is {self.num_candidates}; it must be from 1 (a pair needs 2) to {MAX_TRIES}")
        if not self.temperature > 0:
            raise ValueError(f"temperature is {self.temperature}, at which all candidates are the same; give 1, say")
        for name in ("limit", "batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1")
        of_text, of_speech = {"max_new_tokens"}, {"max_seconds", "variation"}
        for name in of_text if self.task == "speak" else of_speech:
            if getattr(self, name) is not None:
                raise ValueError(f"{name} is given, which the task {self.task!r} hasn't; leave it out")

    @property
    def group_rows(self) -> int:
        """Rows that are drawn, and written, together."""
        return max(1, _ROWS_OF_ENGINE * self.batch_size // self.num_candidates)


@dataclass(frozen=True)
class Drawn:
    """What was drawn."""

    num_rows: int
    num_found: int
    """Rows that the file had already."""
    num_candidates: int
    """Different ones, of all rows."""
    num_duplicates: int
    """Answers that were equal to one before."""
    num_failed: int
    """Rows that couldn't be asked."""

    def lines(self, out: str | Path) -> list[str]:
        """To print."""
        return [
            f"{out}: {self.num_candidates:,} different candidates of {self.num_rows:,} rows "
            f"({self.num_found:,} rows were there already)",
            f"duplicates: {self.num_duplicates:,}; rows that couldn't be asked: {self.num_failed:,}",
        ]


def sample_candidates(
    model: Model,
    manifest: str | Path,
    out: str | Path,
    config: SamplingConfig,
    source: dict[str, Any] | None = None,
    form: str = "auto",
    columns: ColumnNames | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Drawn:
    """Draws candidates for the rows of a manifest.

    Args:
        model: that draws.
        manifest: rows of any form; those of other tasks are left out.
        out: the file of candidates, which is gone on with; sounds go into a folder beside it, settings beside it too.
        config: how.
        source: what tells the model apart, such as `weights_digest` gives; kept with the settings.
        form: of the manifest; "auto": told from it.
        columns: what its columns are called.
        progress: called with the numbers of rows that are done, and in all.

    Raises:
        ValueError: no row fits the task, too many can't be asked, or the file was drawn with other settings.
    """
    out = Path(out)
    if out.suffix != ".jsonl":
        raise ValueError(f"out is {out}; candidates are JSON, one row a line: name a file that ends in .jsonl")
    bad = BadRows(config.max_bad_fraction)
    asked = read_rows(manifest, bad, form, columns=columns, is_asked=True)
    rows = rows_of_task(asked, config.task, str(manifest))[: config.limit]
    out.parent.mkdir(parents=True, exist_ok=True)
    _check_settings(out, config, source or {}, rows)
    found = _whole_rows(out, config.group_rows, len(rows))
    for row in found:
        if row.error is not None:  # an earlier start's count too
            bad.add(rows[row.place].where, row.error)
    drawer = _Drawer(model, config, out)
    for start in range(len(found), len(rows), config.group_rows):
        group = drawer.draw(rows[start : start + config.group_rows], start, bad)
        with out.open("ab") as stream:
            stream.write("".join(row.to_line() for row in group).encode())
        found += group
        if progress is not None:
            progress(len(found), len(rows))
    num_failed = sum(row.error is not None for row in found)
    bad.check(len(rows), str(manifest))
    num_different = sum(len(row.candidates) for row in found)
    num_drawn = sum(row.num_drawn for row in found)
    return Drawn(len(rows), drawer.num_before(found), num_different, num_drawn - num_different, num_failed)


class _Drawer:
    """Draws groups of rows."""

    def __init__(self, model: Model, config: SamplingConfig, out: Path) -> None:
        self._model, self._config = model, config
        self._folder, self._files = out.parent, out.with_suffix("")
        self._media = MediaFiles(self._files)
        self._num_rows = 0
        engine = EngineConfig(max_rows=config.batch_size, deterministic=config.deterministic)
        self._engine = Engine(model.model, model.tokenizer, engine)
        settings = {"temperature": config.temperature, "seed": config.seed}
        if config.top_p is not None:
            settings["top_p"] = config.top_p
        self._text: TextOptions | None = None
        self._speech: SpeechOptions | None = None
        if config.task == "speak":
            model.prompter.need_speech()
            given = {name: getattr(config, name) for name in ("max_seconds", "variation")}
            settings |= {name: value for name, value in given.items() if value is not None}
            has_pointer = model.model.pointer is not None
            if config.variation is not None and not has_pointer:
                raise ValueError("variation is given, but this model has no pointer into what it says; leave it out")
            self._speech = speech_options(settings, model.generation, has_pointer)
        else:
            if config.max_new_tokens is not None:
                settings["max_new_tokens"] = config.max_new_tokens
            self._text = text_options(settings, model.generation, model.tokenizer)

    def num_before(self, found: Sequence[CandidateRow]) -> int:
        """Rows that weren't drawn here."""
        return len(found) - self._num_rows

    def draw(self, rows: Sequence[Row], start: int, bad: BadRows) -> list[CandidateRow]:
        """Rows with their candidates; those that can't be asked say why, and are named in `bad`."""
        config = self._config
        asked: list[list[Request] | str] = []
        for place, row in enumerate(rows, start):
            try:
                asked.append(self._requests(row, place))
            except (OSError, ValueError) as error:
                bad.add(row.where, error)
                asked.append(" ".join(str(error).split()))
        results = iter(self._engine.run([request for each in asked if isinstance(each, list) for request in each]))
        drawn = []
        for place, (row, each) in enumerate(zip(rows, asked, strict=True), start):
            if isinstance(each, str):
                drawn.append(CandidateRow(row.id, config.task, [], (), {"id": row.id}, each))
                continue
            messages = messages_of(row, config.task, self._folder, self._media)
            reference = reference_of(row, config.task, self._folder, self._media)
            made = [self._candidate(next(results), row, place, number) for number in range(config.num_candidates)]
            drawn.append(CandidateRow(row.id, config.task, messages, tuple(self._different(made)), reference))
        self._num_rows += len(rows)
        return drawn

    def _requests(self, row: Row, place: int) -> list[Request]:
        numbers = [draw_number(place, number) for number in range(self._config.num_candidates)]
        if self._speech is not None:
            speaker = self._model.speaker
            (first,) = speaker.requests(row.text, None, self._speech)
            first = dataclasses.replace(first, logprobs=True)
        else:
            assert self._text is not None
            (first,) = self._text.requests(document_of(row, self._config.task, self._model), None)
        longest = self._model.generation.max_length
        if longest is not None and first.prompt.num_tokens >= longest:
            raise ValueError(f"its prompt has {first.prompt.num_tokens} positions, and the model learnt {longest}")
        return [dataclasses.replace(first, number=number) for number in numbers]

    def _candidate(self, result: Any, row: Row, place: int, number: int) -> tuple[Any, Candidate, Any]:
        """What tells whether two are equal, the candidate, and what of it is yet to be written to files."""
        match result:
            case TextResult():
                assert result.logprobs is not None
                num_tokens, logprob = len(result.logprobs), sum(result.logprobs)
                whole = result.finish_reason == "stop"
                return result.text, Candidate(result.text, num_tokens, logprob, is_whole=whole), None
            case SpokenUnits():
                stem = self._files / f"{place:06d}-{number}"
                names = [str(stem.with_suffix(suffix).relative_to(self._folder)) for suffix in (".npz", ".wav")]
                assert result.logprobs is not None
                num_frames = result.codes_KF.shape[1]
                made = Candidate(row.text, num_frames, sum(result.logprobs), 1, result.is_whole, *names)
                return result.codes_KF.numpy().tobytes(), made, result
        raise AssertionError(f"an engine gave {type(result).__name__}")

    def _different(self, made: Sequence[tuple[Any, Candidate, Any]]) -> Iterator[Candidate]:
        """Equal ones once, with their number; sounds are written."""
        counts: dict[Any, int] = {}
        for key, _, _ in made:
            counts[key] = counts.get(key, 0) + 1
        for key, candidate, sound in made:
            if (count := counts.pop(key, None)) is None:
                continue
            if sound is not None:
                self._write(sound, candidate)
            yield dataclasses.replace(candidate, count=count)

    def _write(self, sound: SpokenUnits, candidate: Candidate) -> None:
        audio = self._model.tokenizer.require_audio()
        assert candidate.codes is not None and candidate.sound is not None and self._speech is not None
        path = self._folder / candidate.codes
        path.parent.mkdir(parents=True, exist_ok=True)
        pointer_F = None if sound.pointer_F is None else sound.pointer_F.numpy()
        path.write_bytes(pack_codes(sound.codes_KF.numpy(), audio.hash, audio.frame_rate, pointer_F))
        pace = self._speech.pace or Pace()
        self._model.speaker.waveform(sound, candidate.text, pace, None).save(self._folder / candidate.sound)


def weights_digest(folder: str | Path, adapter: str | None = None) -> dict[str, Any]:
    """What tells a model's weights, and an adapter's, from others."""
    folder = Path(folder)
    parts = sorted(folder.glob("*.safetensors"))
    if adapter is not None:
        parts += sorted((folder / "adapters" / adapter).glob("*.safetensors"))
    digest = hashlib.sha256()
    for part in parts:
        with part.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return {"weights": digest.hexdigest()[:32], "adapter": adapter}


# ---- what was there before


def _check_settings(out: Path, config: SamplingConfig, source: dict[str, Any], rows: Sequence[Row]) -> None:
    """Writes the settings beside the file, or refuses others than those with which it was begun.

    Raises:
        ValueError: they differ.
    """
    path = out.with_suffix(".settings.json")
    ids = hashlib.sha256("\n".join(row.id for row in rows).encode()).hexdigest()[:32]
    settings = {**dataclasses.asdict(config), **source, "rows": ids}
    if out.exists() and out.stat().st_size:
        if not path.exists():
            raise ValueError(f"{out} is there, but not {path.name}, how it was drawn; name another file")
        before = json.loads(path.read_text(encoding="utf-8"))
        for name, value in settings.items():
            if before.get(name) != value:
                raise ValueError(
                    f"{out} was begun with {name} {before.get(name)!r}, and now it is {value!r}; go on with the same "
                    f"settings, model and manifest, or name another file"
                )
        return
    path.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def _whole_rows(out: Path, group_rows: int, num_rows: int) -> list[CandidateRow]:
    """The rows of all groups that were written whole; what lies behind them is cut off the file."""
    if not out.exists():
        return []
    lines = out.read_bytes().splitlines(keepends=True)
    whole = [line for line in lines if line.endswith(b"\n")]
    count = len(whole) if len(whole) == num_rows else len(whole) - len(whole) % group_rows
    if count < len(lines):
        with out.open("r+b") as stream:
            stream.truncate(sum(map(len, lines[:count])))
    return [CandidateRow.from_line(line, place, out.name) for place, line in enumerate(lines[:count])]
