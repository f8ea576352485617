"""What `mmllm data align` does: trains an aligner on speech with its texts, and writes when each word is said.

Shapes: T samples.
"""

from __future__ import annotations

import json
import logging
import random
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from mmllm.data.rows.bad_rows import BadRows, is_of_machine
from mmllm.data.rows.column_names import ColumnNames
from mmllm.data.rows.forms import read_rows
from mmllm.data.rows.media import Media, media_source
from mmllm.data.rows.rows import Row
from mmllm.data.rows.split import write_manifest
from mmllm.training.aligner_training import AlignerTraining, known_characters, known_words, train_aligner
from mmllm_tokenizers.aligner import Aligner, AlignerConfig, AlignerNetwork
from mmllm_tokenizers.alignment import WordTime, moved, read_words, text_words
from mmllm_tokenizers.audio import load_audio

ALIGNER_FOLDER, BAD_ROWS_FILE = "aligner", "bad_rows.jsonl"
MAX_TRAINING_MINUTES = 120.0
"""Of sound that an aligner is trained on, drawn at random; it needs no more, and its spectra are held in memory."""
MAX_SECONDS = 60.0
"""Longer sounds are left out and named, as `mmllm data build` does: a path through twice as long a sound and text takes
four times the memory."""
MAX_TRAINING_SECONDS = 30.0
"""Longer sounds are aligned but not trained on: a batch holds about twenty seconds."""
_CHUNK = 256
_NUM_BINS = 5
_RATES = (8000, 16000)
_LOOKED_AT = 20
"""Sounds whose rates say what the aligner hears."""

Tick = Callable[[int, int], None]
_logger = logging.getLogger(__name__)


@dataclass
class _Told:
    """What happened to the rows."""

    bad: list[dict[str, str]] = field(default_factory=list)
    had_words: int = 0
    replaced: list[dict[str, str]] = field(default_factory=list)
    """Rows whose `words` were no times of their text's words."""
    others: int = 0
    """Rows that are no sound with a text."""
    aligned: list[list[WordTime]] = field(default_factory=list)
    spoken_seconds: float = 0.0
    """From the first to the last word of each row."""
    num_letters: int = 0

    def leave_out(self, row: Row, reason: object) -> None:
        """Notes a row without word times."""
        _logger.info("no word times for %s: %s", row.where, reason)
        self.bad.append(_named(row, reason))


def _named(row: Row, reason: object) -> dict[str, str]:
    return {"id": row.id, "where": row.where, "reason": str(reason)}


def align(
    inputs: Sequence[str],
    out: str,
    aligner: str | None = None,
    training: AlignerTraining | None = None,
    min_confidence: float = 0.0,
    max_bad_fraction: float = 0.05,
    form: str = "auto",
    media: str | None = None,
    columns: ColumnNames | None = None,
    tick_of: Callable[[str], Tick] = lambda what: lambda done, total: None,
    max_seconds: float = MAX_SECONDS,
) -> dict[str, Any]:
    """Writes each input as `OUT/NAME.jsonl`, its rows of sound with `words`, and the aligner that found them.

    Rows that have `words` keep them, where these are times of their text's words; others are aligned, and named in
    `OUT/bad_rows.jsonl` since their `words` are replaced. Rows whose words can't be told stay without, and are named
    there; rows whose sound can't be read or is too long are left out, and named there too. Rows of other kinds stay as
    they are. The aligner and the names are written before too many bad rows are an error.

    Args:
        inputs: manifests and inputs of other forms, with sounds and what is said in them.
        out: folder of the new manifests, whose paths are relative to it, and of `aligner/`.
        aligner: folder of a trained aligner; None: one is trained on the rows.
        training: how; not used with `aligner`.
        min_confidence: rows whose words' mean confidence is lower stay without words.
        max_bad_fraction: more rows that can't be read are an error.
        form: of the inputs; "auto": told from each.
        media: what their paths are relative to; by default each input's folder.
        columns: what their columns are called here, and their types.
        tick_of: makes what is told how many of something are done.
        max_seconds: longer sounds can't be used.

    Returns:
        `rows`, `aligned`, `had_words`, `replaced_words` (named), `without_words` (named), `skipped` (can't be read),
        `other_rows`, `words`, `letters_per_second`, `confidence` (`mean`, and `words` by fifths), `manifests`,
        `aligner`, `lag_seconds`.

    Raises:
        FileNotFoundError, ValueError: an input or the aligner can't be used, two inputs have one name, or no row is a
            sound with a text.
    """
    if not max_seconds > 0:
        raise ValueError(f"max_seconds is {max_seconds}; it must be positive")
    if not 0 <= min_confidence <= 1:
        raise ValueError(f"min_confidence is {min_confidence}; it must lie in [0, 1]")
    bad = BadRows(max_bad_fraction)
    outputs = _outputs(inputs, Path(out))
    rows_of = {name: read_rows(name, bad, form, media, columns) for name in inputs}
    rows, num_unread = [row for rows in rows_of.values() for row in rows], len(bad.reasons)
    spoken = [row for row in rows if row.kind == "audio"]
    if not spoken:
        raise ValueError(f"there is no sound with a text in {', '.join(inputs)}; give manifests of speech")
    folder = aligner or str(Path(out) / ALIGNER_FOLDER)
    if aligner is not None:
        used = Aligner.load(aligner)
    else:
        used = _trained(spoken, training or AlignerTraining(), tick_of, max_seconds)
        used.save(folder)
    told, tick = _Told(), tick_of("rows")
    Path(out).mkdir(parents=True, exist_ok=True)
    num_done = 0
    for name, path in outputs.items():
        written: list[Row] = []
        for start in range(0, len(rows_of[name]), _CHUNK):
            chunk = rows_of[name][start : start + _CHUNK]
            written += _aligned(chunk, used, bad, min_confidence, max_seconds, told)
            num_done += len(chunk)
            tick(num_done, len(rows))
        write_manifest(written, path)
    lines = [
        *told.bad,
        *told.replaced,
        *({"where": reason.partition(": ")[0], "reason": reason.partition(": ")[2]} for reason in bad.reasons),
    ]
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    (Path(out) / BAD_ROWS_FILE).write_text(text, encoding="utf-8")
    bad.check(len(rows) + num_unread, ", ".join(inputs))
    return {
        "rows": len(rows), "aligned": len(told.aligned), "had_words": told.had_words,
        "replaced_words": len(told.replaced),
        "without_words": len(told.bad), "skipped": bad.reasons, "other_rows": told.others, **_counts(told),
        "manifests": [str(path) for path in outputs.values()], "aligner": folder,
        "lag_seconds": used.config.lag_seconds,
    }  # fmt: skip


def _outputs(inputs: Sequence[str], out: Path) -> dict[str, Path]:
    """The manifest that is written of each input."""
    outputs: dict[str, Path] = {}
    for name in inputs:
        path = out / f"{Path(name).resolve().stem}.jsonl"
        if path in outputs.values() or path.name == BAD_ROWS_FILE:
            raise ValueError(f"{name} would be written to {path}, as something else is; rename it, or align it apart")
        if path.exists() and path.samefile(name):
            raise ValueError(f"{name} would be overwritten; give another folder as --out")
        outputs[name] = path
    return outputs


# ------------------------------------------------------------------------------------------------------------ training
def _trained(
    rows: Sequence[Row], training: AlignerTraining, tick_of: Callable[[str], Tick], max_seconds: float
) -> Aligner:
    all_texts = [row.text for row in rows]
    characters = known_characters(all_texts)
    if not characters:
        raise ValueError("the texts of the sounds have no letter or digit; there is nothing to align")
    order = random.Random(training.seed).sample(list(rows), len(rows))
    ears = Aligner(
        AlignerNetwork(AlignerConfig(characters, _sample_rate(order, max_seconds), words=known_words(all_texts)))
    )
    mels: list[Tensor] = []
    texts: list[str] = []
    seconds_left = 60 * MAX_TRAINING_MINUTES
    for row in order:
        if not text_words(row.text) or seconds_left <= 0:
            continue
        try:
            wave_CT, rate = _load(row.audio, max_seconds)
        except (ValueError, OSError) as error:
            if is_of_machine(error):
                raise
            continue  # named when it is aligned
        if wave_CT.shape[1] <= MAX_TRAINING_SECONDS * rate:
            mels.append(ears.mel(wave_CT, rate).half())
            texts.append(row.text)
            seconds_left -= wave_CT.shape[1] / rate
    if not mels:
        raise ValueError(
            f"none of {len(rows)} sounds can be read, has words and lasts at most {MAX_TRAINING_SECONDS:g} s, so no "
            f"aligner can be trained; cut long sounds at their pauses, or give --aligner"
        )
    what = "seconds of training" if training.steps is None else "training steps"
    return train_aligner(ears.config, mels, texts, training, tick_of(what))


def _sample_rate(rows: Sequence[Row], max_seconds: float) -> int:
    """The higher rate where most of the sounds have it, the lower one of telephone speech and the demo's."""
    rates = []
    for row in rows[:_LOOKED_AT]:
        try:
            rates.append(_load(row.audio, max_seconds)[1])
        except (ValueError, OSError) as error:
            if is_of_machine(error):
                raise
    low, high = _RATES
    return high if 2 * sum(rate >= high for rate in rates) > len(rates) else low


def _load(media: Media | None, max_seconds: float) -> tuple[Tensor, int]:
    assert media is not None
    return load_audio(media_source(media), name=str(media), max_seconds=max_seconds)


# ------------------------------------------------------------------------------------------------------------ aligning
def _aligned(
    rows: Sequence[Row], aligner: Aligner, bad: BadRows, min_confidence: float, max_seconds: float, told: _Told
) -> list[Row]:
    """The rows that can be read, those of sound with their words where these can be told."""
    kept: dict[int, Row] = {}
    mels: dict[int, Tensor] = {}
    durations: dict[int, float] = {}
    for place, row in enumerate(rows):
        if row.kind != "audio":
            told.others += 1
            kept[place] = row
        elif row.metadata.get("words") is not None and _own_error(row) is None:
            told.had_words += 1
            kept[place] = row
        else:
            try:
                wave_CT, rate = _load(row.audio, max_seconds)
            except (ValueError, OSError) as error:
                if is_of_machine(error):
                    raise
                bad.add(row.where, error)
            else:
                mels[place], durations[place] = aligner.mel(wave_CT, rate), wave_CT.shape[1] / rate
    found = aligner.align(list(mels.values()), [rows[place].text for place in mels])
    for place, words in zip(mels, found, strict=True):
        words = words if isinstance(words, ValueError) else moved(words, 0.0, durations[place])
        kept[place] = _with_words(rows[place], words, min_confidence, told)
    return [kept[place] for place in sorted(kept)]


def _own_error(row: Row) -> str | None:
    """What keeps a row's `words` from being times of its text's words; None: nothing, or it has none."""
    if row.metadata.get("words") is None:
        return None
    try:
        read_words(row.metadata["words"], row.text, row.where)
    except ValueError as error:
        return str(error).removeprefix(f"{row.where}: ")
    return None


def _with_words(row: Row, words: list[WordTime] | ValueError, min_confidence: float, told: _Told) -> Row:
    if isinstance(words, ValueError):
        return _without_words(row, str(words), told)
    confidence = sum(word.confidence or 0.0 for word in words) / len(words)
    if confidence < min_confidence:
        reason = f"its words have a mean confidence of {confidence:.2f}, below {min_confidence:g}"
        return _without_words(row, reason, told)
    own_error = _own_error(row)
    if own_error is not None:
        _logger.info("words of %s are replaced: %s", row.where, own_error)
        told.replaced.append(_named(row, f"its words were replaced by times: {own_error}"))
    told.aligned.append(words)
    told.spoken_seconds += words[-1].end - words[0].start
    told.num_letters += sum(len(word.word) for word in words)
    return replace(row, metadata={**row.metadata, "words": [word.to_json() for word in words]})


def _without_words(row: Row, reason: str, told: _Told) -> Row:
    """The row, named; a list in its column would be taken for times, and goes; anything else stays."""
    own_error = _own_error(row)
    told.leave_out(row, reason if own_error is None else f"{reason}; its own words are no times: {own_error}")
    is_kept = row.metadata.get("words") is not None and not isinstance(row.metadata["words"], list)
    return replace(row, metadata={key: value for key, value in row.metadata.items() if key != "words" or is_kept})


# ------------------------------------------------------------------------------------------------------------- telling
def _counts(told: _Told) -> dict[str, Any]:
    confidences = [word.confidence or 0.0 for words in told.aligned for word in words]
    bins = Counter(min(int(confidence * _NUM_BINS), _NUM_BINS - 1) for confidence in confidences)
    return {
        "words": len(confidences),
        "letters_per_second": round(told.num_letters / told.spoken_seconds, 2) if told.spoken_seconds else None,
        "confidence": {
            "mean": round(sum(confidences) / len(confidences), 3) if confidences else None,
            "words": {f"{i / _NUM_BINS:g}-{(i + 1) / _NUM_BINS:g}": bins[i] for i in range(_NUM_BINS)},
        },
        "reasons": dict(Counter(_kind_of(line["reason"]) for line in told.bad)),
    }


def _kind_of(reason: str) -> str:
    """A reason without what is the row's own."""
    for sign, kind in (("it lasts", "too short for its text"), ("was not trained on", "unknown characters"),
                       ("no word", "nothing to say in the text"), ("mean confidence", "low confidence")):  # fmt: skip
        if sign in reason:
            return kind
    return "words that do not fit the text"


def align_lines(told: Mapping[str, Any]) -> Iterator[str]:
    """What `align` returned, as lines to read."""
    counts = [
        ("rows", told["rows"]), ("aligned", told["aligned"]), ("had words", told["had_words"]),
        ("had other words, replaced", told["replaced_words"]),
        ("without words", told["without_words"]), ("of other kinds", told["other_rows"]),
        ("can't be read, left out", len(told["skipped"])),
    ]  # fmt: skip
    for name, count in counts:
        yield f"{name:<28}{count:>10,}"
    for kind, count in told["reasons"].items():
        yield f"  {kind:<26}{count:>10,}"
    yield f"{'words':<28}{told['words']:>10,}"
    if told["words"]:
        yield f"{'letters a second':<28}{told['letters_per_second']:>10}"
        yield f"{'mean confidence':<28}{told['confidence']['mean']:>10}"
        for name, count in told["confidence"]["words"].items():
            bar = "#" * round(40 * count / told["words"])
            yield f"  words of {name:<17}{count:>10,}  {bar}".rstrip()
    for path in told["manifests"]:
        yield f"wrote {path}"
    yield f"aligner {told['aligner']}"
    if told["without_words"] or told["replaced_words"] or told["skipped"]:
        names = Path(told["manifests"][0]).parent / BAD_ROWS_FILE
        yield f"rows without words, and those whose words were replaced, are named in {names}"
