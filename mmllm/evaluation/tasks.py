"""Runs a model over held-out rows and scores what it says: captions, transcripts, speech, answers, text.

Every score comes with its number of rows `n`, a 95% bootstrap interval `…_ci`, and the control beside which it is to
be read: the same model blind (its image or sound hidden), or shuffled inputs.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np

from mmllm.data.rows.bad_rows import BadRows, ManifestError
from mmllm.data.rows.column_names import ColumnNames
from mmllm.data.rows.forms import read_rows
from mmllm.data.rows.media import Media, media_source, sound_seconds
from mmllm.data.rows.readable import readable_rows
from mmllm.data.rows.rows import Row, row_media
from mmllm.data.samples.documents import Segment
from mmllm.evaluation.captions import caption_matches, count_attributes, names_heldout_pairs, reference_scene
from mmllm.evaluation.metrics import (
    Edits,
    bootstrap_interval,
    character_edits,
    cider_d,
    error_rate,
    exact_match,
    word_edits,
)
from mmllm.evaluation.perplexity import bits_of_documents
from mmllm.evaluation.results import KIND_OF_TASK, TASKS, Prediction, TaskResult
from mmllm.inference.api import Model
from mmllm.inference.inputs import AudioPart, as_audio

_logger = logging.getLogger(__name__)

PROMPTS_A_ROW = {"caption": 1, "transcribe": 1, "speak": 3, "interleaved": 3, "text": 1}
"""Of a row and its controls; no blind captions and transcripts: their prompts are nearly all alike, so asked once."""
SPEECH_MARGIN = 1.5
"""Synthesis is stopped at this many times the length of the longest real sound of the rows."""
MIN_SPEECH_SECONDS = 2.0
NUM_CONTINUATIONS = 6
CONTINUATION_TOKENS = 80


def evaluate(
    model: Model,
    task: str,
    rows_or_manifest: Sequence[Row] | str | Path,
    batch_size: int = 64,
    limit: int | None = None,
    seed: int = 0,
    media_dir: str | Path | None = None,
    sequence_length: int = 512,
    max_bad_fraction: float = 0.05,
    progress: Callable[[int, int], None] | None = None,
    form: str = "auto",
    columns: ColumnNames | None = None,
) -> TaskResult:
    """Scores a model on one task.

    Args:
        model: as `mmllm.load` gives it.
        task: "caption", "transcribe", "speak", "interleaved" or "text".
        rows_or_manifest: rows, or the input to read them from, of any form; those of other kinds are left out.
        batch_size: prompts at once.
        limit: at most so many rows of each set (test, held-out pairs, held-out voices), drawn at random by `seed`.
        seed: of that draw, of the shuffled controls, of sampling and of the bootstrap.
        media_dir: where the WAVs of "speak" are written; None writes none and scores them from memory.
        sequence_length: for "text", the window in which tokens are predicted: the length of training's sequences.
        max_bad_fraction: more unusable rows than this are an error; fewer are named, counted and left out.
        progress: called with the numbers of prompts answered so far, controls included, and (about) in all.
        form: of the input; "auto": told from it.
        columns: what its columns are called here, and their types.

    Returns:
        Scores under the keys of report.json, and one record a row.

    Raises:
        ValueError: an unknown task, no rows for it, too many that can't be read, or a model that lacks the sense.
        FileNotFoundError: no such manifest.
    """
    if task not in TASKS:
        raise ValueError(f"task is {task!r}; choose one of {', '.join(TASKS)}")
    if limit is not None and limit < 1:
        raise ValueError(f"limit is {limit}; it must be at least 1, or None for all rows")
    bad = BadRows(max_bad_fraction)
    is_manifest = isinstance(rows_or_manifest, str | Path)
    name = str(rows_or_manifest) if is_manifest else "the rows"
    if is_manifest:
        rows = read_rows(cast("str | Path", rows_or_manifest), bad, form, columns=columns)
    else:
        rows = list(rows_or_manifest)
    rows = [row for row in cast("list[Row]", rows) if row.kind == KIND_OF_TASK[task]]
    if task == "interleaved":
        rows = [row for row in rows if "question" in row.metadata]
    if not rows:
        wanted = "rows with segments, a question and an answer" if task == "interleaved" else (
            f"{KIND_OF_TASK[task]} rows")  # fmt: skip
        raise ManifestError(f"{name} has no {wanted}, which the task {task!r} needs; give another manifest or task")
    unreadable = BadRows(max_bad_fraction)
    rows = readable_rows(_limited(rows, limit, seed), unreadable, name)
    rows = _short_enough(rows, model.generation.max_heard_seconds, unreadable, name)
    if progress is not None:
        model.progress = _summed(progress, PROMPTS_A_ROW[task] * len(rows))
    match task:
        case "caption":
            result = evaluate_captions(model, rows, batch_size, seed)
        case "transcribe":
            result = evaluate_transcripts(model, rows, batch_size, seed)
        case "speak":
            result = evaluate_speech(model, rows, batch_size, seed, Path(media_dir) if media_dir else None)
        case "interleaved":
            result = evaluate_answers(model, rows, batch_size, seed)
        case _:
            result = evaluate_text(model, rows, batch_size, seed, sequence_length)
    if bad.reasons or unreadable.reasons:
        result.scores["num_skipped_rows"] = len(bad.reasons) + len(unreadable.reasons)
    return result


def _summed(progress: Callable[[int, int], None], num_all: int) -> Callable[[int], None]:
    """Takes what was done since the last call, and gives what was done so far."""
    num_done = 0

    def add(count: int) -> None:
        nonlocal num_done
        num_done += count
        progress(min(num_done, num_all), num_all)

    return add


# ------------------------------------------------------------------------------------------------------------- rows
def _group(row: Row) -> str:
    """The set in which a row is scored."""
    if row.metadata.get("heldout_pairs"):
        return "heldout_pairs"
    return "heldout_voices" if row.metadata.get("heldout_voice") else "test"


def _limited(rows: list[Row], limit: int | None, seed: int) -> list[Row]:
    """At most `limit` rows of each set, drawn at random, in their order."""
    if limit is None:
        return rows
    kept: set[int] = set()
    for group in ("test", "heldout_pairs", "heldout_voices"):
        places = [place for place, row in enumerate(rows) if _group(row) == group]
        kept.update(random.Random(f"limit {seed} {group}").sample(places, min(limit, len(places))))
    return [rows[place] for place in sorted(kept)]


def _short_enough(rows: list[Row], max_seconds: float | None, bad: BadRows, name: str) -> list[Row]:
    """The rows whose sounds the model can hear; the others are named in `bad`."""
    if max_seconds is None:
        return rows
    kept, since = [], len(bad.reasons)
    for row in rows:
        longest = max((sound_seconds(media) for kind, media in row_media(row) if kind == "audio"), default=0.0)
        if longest <= max_seconds:
            kept.append(row)
        else:
            bad.add(row.where, f"its sound lasts {longest:.1f} s; the model hears {max_seconds:g} s at once")
    bad.check(len(rows), name, since)
    return kept


def _max_new_tokens(model: Model, references: Sequence[str]) -> int:
    """Enough for twice the longest reference, so that a model that rambles is stopped."""
    longest = max(len(model.tokenizer.text.encode(reference)) for reference in references)
    return max(16, 2 * longest + 2)


def _mean_scores(key: str, values: Sequence[float] | np.ndarray, seed: int) -> dict[str, Any]:
    return {key: float(np.mean(values)), f"{key}_ci": bootstrap_interval(values, seed=seed)}


def _rate_scores(key: str, edits: Sequence[Edits], seed: int) -> dict[str, Any]:
    interval = bootstrap_interval([e.errors for e in edits], [e.length for e in edits], seed=seed)
    return {key: error_rate(edits), f"{key}_ci": interval}


# --------------------------------------------------------------------------------------------------------- captions
def evaluate_captions(model: Model, rows: Sequence[Row], batch_size: int, seed: int) -> TaskResult:
    """Exact match, attributes right and CIDEr-D; rows with `heldout_pairs` are a set of their own.

    A row with `objects` is matched when the caption says the same scene; another row when the normalized texts are
    equal. `attribute_accuracy` is all right attributes over all attributes of the rows that have `objects` (see
    `mmllm.evaluation.captions.count_attributes`), `heldout_pairs_accuracy` the share of the held-out rows that
    name the held-out object's shape and colour both right. `shuffled_` scores are other pictures' captions.
    """
    images = cast("list[Any]", [media_source(cast("Media", row.image)) for row in rows])
    max_new_tokens = _max_new_tokens(model, [row.text for row in rows])
    settings: dict[str, Any] = {"max_new_tokens": max_new_tokens, "batch_size": batch_size, "temperature": 0.0}
    said = model.caption(images, **settings)
    blind = model.caption(images, blind=True, **settings)
    predictions = [_caption_prediction(row, *texts) for row, *texts in zip(rows, said, blind, strict=True)]
    test = [place for place, row in enumerate(rows) if _group(row) != "heldout_pairs"]
    scores: dict[str, Any] = {}
    if test:
        scores |= _caption_scores([rows[i] for i in test], [said[i] for i in test], seed, "")
        scores["n"] = len(test)
        scores |= _caption_scores([rows[i] for i in test], [blind[i] for i in test], seed, "blind_")
        if len(test) > 1:
            others = [said[test[i]] for i in derangement(len(test), seed)]
            scores |= _caption_scores([rows[i] for i in test], others, seed, "shuffled_")
    heldout = [place for place in range(len(rows)) if place not in set(test)]
    if heldout:
        for prefix, texts in (("", said), ("blind_", blind)):
            right = [names_heldout_pairs(texts[i], rows[i].metadata["heldout_pairs"]) for i in heldout]
            scores |= _mean_scores(f"{prefix}heldout_pairs_accuracy", right, seed)
        scores["heldout_pairs_n"] = len(heldout)
        matched = [predictions[i].correct for i in heldout]
        scores |= _mean_scores("heldout_pairs_exact_match", matched, seed)
    return TaskResult("caption", scores, predictions)


def _caption_scores(rows: Sequence[Row], texts: Sequence[str], seed: int, prefix: str) -> dict[str, Any]:
    scenes = [reference_scene(row.metadata) for row in rows]
    matched = [caption_matches(text, row.text, scene) for text, row, scene in zip(texts, rows, scenes, strict=True)]
    scores = _mean_scores(f"{prefix}exact_match", matched, seed)
    counts = [count_attributes(text, scene) for text, scene in zip(texts, scenes, strict=True) if scene is not None]
    if counts:
        right, total = (np.array(column, dtype=float) for column in zip(*counts, strict=True))
        scores[f"{prefix}attribute_accuracy"] = float(right.sum() / total.sum())
        scores[f"{prefix}attribute_accuracy_ci"] = bootstrap_interval(right, total, seed=seed)
    scores |= _mean_scores(f"{prefix}cider", cider_d(texts, [[row.text] for row in rows]), seed)
    return scores


def _caption_prediction(row: Row, said: str, blind: str) -> Prediction:
    scene = reference_scene(row.metadata)
    correct = caption_matches(said, row.text, scene)
    if scene is None:
        score = float(correct)
    else:
        right, total = count_attributes(said, scene)
        score = right / max(total, 1)
    return Prediction(row.id, row.text, said, score, correct, _group(row), blind, image=str(row.image))


# ------------------------------------------------------------------------------------------------------ transcripts
def evaluate_transcripts(model: Model, rows: Sequence[Row], batch_size: int, seed: int) -> TaskResult:
    """WER and CER over all words and characters, and rows without an error; `heldout_voice` rows apart.

    `shuffled_wer` is that of other sounds' transcripts.
    """
    sounds = cast("list[Any]", [media_source(cast("Media", row.audio)) for row in rows])
    settings = _transcription_settings(model, rows, batch_size)
    said = model.transcribe(sounds, **settings)
    blind = model.transcribe(sounds, blind=True, **settings)
    scores: dict[str, Any] = {}
    predictions = []
    for group in ("test", "heldout_voices"):
        places = [place for place, row in enumerate(rows) if (_group(row) == "heldout_voices") == (group != "test")]
        if not places:
            continue
        references = [rows[i].text for i in places]
        edits = _edits([said[i] for i in places], references)
        blind_edits = _edits([blind[i] for i in places], references)
        if group == "test":
            letters = [character_edits(said[i], rows[i].text) for i in places]
            blind_letters = [character_edits(blind[i], rows[i].text) for i in places]
            scores |= _rate_scores("wer", edits, seed) | _rate_scores("cer", letters, seed)
            scores |= _mean_scores("exact_match", [e.errors == 0 for e in edits], seed)
            scores["n"] = len(places)
            scores |= _rate_scores("blind_wer", blind_edits, seed)
            if len(places) > 1:
                others = [said[places[i]] for i in derangement(len(places), seed)]
                scores |= _rate_scores("shuffled_wer", _edits(others, references), seed)
            scores["blind_cer"] = error_rate(blind_letters)
            scores["blind_exact_match"] = float(np.mean([e.errors == 0 for e in blind_edits]))
        else:
            scores |= _rate_scores("heldout_voices_wer", edits, seed)
            scores["heldout_voices_n"] = len(places)
            scores["blind_heldout_voices_wer"] = error_rate(blind_edits)
        predictions += [
            Prediction(
                rows[i].id, rows[i].text, said[i], 1.0 - edit.rate, edit.errors == 0, group, blind[i],
                audio=str(rows[i].audio),
            )
            for i, edit in zip(places, edits, strict=True)
        ]  # fmt: skip
    return TaskResult("transcribe", scores, predictions)


def _transcription_settings(model: Model, rows: Sequence[Row], batch_size: int) -> dict[str, Any]:
    max_new_tokens = _max_new_tokens(model, [row.text for row in rows])
    return {"max_new_tokens": max_new_tokens, "batch_size": batch_size, "temperature": 0.0}


def _edits(texts: Sequence[str], references: Sequence[str]) -> list[Edits]:
    return [word_edits(text, reference) for text, reference in zip(texts, references, strict=True)]


# ----------------------------------------------------------------------------------------------------------- speech
def evaluate_speech(
    model: Model, rows: Sequence[Row], batch_size: int, seed: int, media_dir: Path | None
) -> TaskResult:
    """Speaks each row's text in its speaker's voice, where training heard it, and transcribes that back.

    Controls: `shuffled_wer` scores the same transcripts against other rows' texts; `resynthesis_wer` transcribes the
    real speech after it went through the codec and back. Rows of held-out voices are left out where there are
    others, since their voices can't be asked for.
    """
    rows = [row for row in rows if _group(row) != "heldout_voices"] or list(rows)
    texts = [row.text for row in rows]
    known = model.generation.voices
    named = [row.metadata.get("speaker") for row in rows]
    speakers = [None if speaker is None else str(speaker) for speaker in named]
    voices = [speaker if not known or speaker in known else None for speaker in speakers]
    sounds = [as_audio(cast("Any", media_source(cast("Media", row.audio)))) for row in rows]
    longest = max(sound.seconds for sound in sounds)
    generation = model.generation
    bound = min(generation.max_seconds, generation.max_heard_seconds or generation.max_seconds)
    max_seconds = min(bound, max(SPEECH_MARGIN * longest, MIN_SPEECH_SECONDS))
    spoken = model.speak(texts, voice=voices, max_seconds=max_seconds, seed=seed, batch_size=batch_size)
    written: list[str | None] = [None] * len(rows)
    if media_dir is not None:
        for number, waveform in enumerate(spoken):
            path = media_dir / f"{number:05d}.wav"
            waveform.save(path)
            written[number] = str(path)
    heard_inputs = cast("list[Any]", [
        path or (waveform.samples, waveform.sample_rate) for path, waveform in zip(written, spoken, strict=True)
    ])  # fmt: skip
    settings = _transcription_settings(model, rows, batch_size)
    heard = model.transcribe(heard_inputs, **settings)
    resynthesized = model.transcribe([_resynthesize(model, sound) for sound in sounds], **settings)
    edits = _edits(heard, texts)
    scores = _rate_scores("round_trip_wer", edits, seed)
    if len(rows) > 1:
        others = [texts[i] for i in derangement(len(rows), seed)]
        scores |= _rate_scores("shuffled_wer", _edits(heard, others), seed)
    scores |= _rate_scores("resynthesis_wer", _edits(resynthesized, texts), seed)
    scores["n"] = len(rows)
    predictions = [
        Prediction(
            row.id, row.text, text, 1.0 - edit.rate, edit.errors == 0, audio=str(row.audio), written=path
        )
        for row, text, edit, path in zip(rows, heard, edits, written, strict=True)
    ]  # fmt: skip
    return TaskResult("speak", scores, predictions)


def _resynthesize(model: Model, sound: AudioPart) -> Any:
    """A real sound after the codec: (samples, rate), with the codebooks that the model uses."""
    audio = model.tokenizer.require_audio()
    codes_KF = audio.encode(sound.wave_CT, sound.sample_rate)[: model.tokenizer.num_codebooks]
    return audio.decode(codes_KF), audio.sample_rate


def derangement(num_rows: int, seed: int) -> list[int]:
    """A random permutation without fixed points: each row gets another's place in a random cycle.

    Raises:
        ValueError: there are fewer than two rows.
    """
    if num_rows < 2:
        raise ValueError(f"got {num_rows} rows; shuffling them needs at least two")
    order = list(range(num_rows))
    random.Random(f"derangement {seed}").shuffle(order)
    given = [0] * num_rows
    for place, row in enumerate(order):
        given[row] = order[(place + 1) % num_rows]
    return given


# ------------------------------------------------------------------------------------------------------ interleaved
def evaluate_answers(model: Model, rows: Sequence[Row], batch_size: int, seed: int) -> TaskResult:
    """Answers right, beside those given when pictures and sounds change places between rows, and blind."""
    questions = [str(row.metadata["question"]) for row in rows]
    references = [str(row.metadata["answer"]) for row in rows]
    settings: dict[str, Any] = {
        "max_new_tokens": _max_new_tokens(model, references), "batch_size": batch_size, "temperature": 0.0,
    }  # fmt: skip
    parts = [_segments(row) for row in rows]
    answers = cast("list[str]", model.answer(parts, questions, **settings))
    blind = cast("list[str]", model.answer(parts, questions, blind=True, **settings))
    shuffled = cast("list[str]", model.answer(shuffled_segments(rows, seed), questions, **settings))
    right = _matches(answers, references)
    scores = _mean_scores("answer_accuracy", right, seed)
    scores |= _mean_scores("shuffled_accuracy", _matches(shuffled, references), seed)
    scores |= _mean_scores("blind_accuracy", _matches(blind, references), seed)
    scores["n"] = len(rows)
    predictions = [
        Prediction(
            row.id, reference, answer, float(correct), correct, "test", without, question=question,
            segments=[
                {kind: str(segment[kind]) for kind in ("text", "image", "audio") if kind in segment}
                for segment in row.segments
            ],
        )
        for row, reference, answer, correct, without, question in zip(
            rows, references, answers, right, blind, questions, strict=True
        )
    ]  # fmt: skip
    return TaskResult("interleaved", scores, predictions)


def _matches(texts: Sequence[str], references: Sequence[str]) -> list[bool]:
    return [exact_match(text, reference) for text, reference in zip(texts, references, strict=True)]


def _segments(row: Row) -> list[Segment]:
    return [
        Segment(
            segment.get("text"),
            media_source(segment["image"]) if "image" in segment else None,
            media_source(segment["audio"]) if "audio" in segment else None,
        )
        for segment in row.segments
    ]


def shuffled_segments(rows: Sequence[Row], seed: int) -> list[list[Segment]]:
    """Each row's prompt with pictures and sounds of other rows in the places of its own, kind for kind.

    A picture comes back to its own row only where one row holds more than half of all pictures.
    """
    shuffled = [_segments(row) for row in rows]
    order = list(range(len(rows)))
    random.Random(f"shuffle {seed}").shuffle(order)
    for kind in ("image", "audio"):
        places = [
            (row, number) for row in order for number, segment in enumerate(rows[row].segments) if kind in segment
        ]
        if not places:
            continue
        most_of_one_row = max(np.bincount([row for row, _ in places]))
        given = [shuffled[row][number] for row, number in places]
        for place, (row, number) in enumerate(places):
            shuffled[row][number] = given[(place + int(most_of_one_row)) % len(places)]
    return shuffled


# ------------------------------------------------------------------------------------------------------------- text
def evaluate_text(model: Model, rows: Sequence[Row], batch_size: int, seed: int, sequence_length: int) -> TaskResult:
    """Bits a byte: the tokens' negative log2 likelihood, the document's end included, over the text's UTF-8 bytes.

    There is no blind baseline: nothing but text is given.
    """
    texts = [row.text for row in rows]
    bits_N = bits_of_documents(model, texts, sequence_length, batch_size)
    bytes_N = np.array([len(text.encode("utf-8")) for text in texts], dtype=float)
    scores: dict[str, Any] = {
        "bits_per_byte": float(bits_N.sum() / bytes_N.sum()),
        "bits_per_byte_ci": bootstrap_interval(bits_N, bytes_N, seed=seed),
        "n": len(rows),
        "num_bytes": int(bytes_N.sum()),
    }
    samples = dict(_continuations(model, texts, seed))
    predictions = [
        Prediction(
            row.id, *samples.get(i, ("", ""))[1:], score=-bits / size, correct=False,
            question=samples[i][0] if i in samples else None,
        )
        if i in samples
        else Prediction(row.id, "", "", -bits / size, False)
        for i, (row, bits, size) in enumerate(zip(rows, bits_N.tolist(), bytes_N.tolist(), strict=True))
    ]  # fmt: skip
    return TaskResult("text", scores, predictions)


def _continuations(model: Model, texts: Sequence[str], seed: int) -> list[tuple[int, tuple[str, str, str]]]:
    """(row, (beginning, how it goes on, how the model goes on)) of a few rows, drawn at random."""
    chosen = random.Random(f"text {seed}").sample(range(len(texts)), min(NUM_CONTINUATIONS, len(texts)))
    cut = [_cut(texts[i]) for i in chosen]
    prompts = [Segment(text=start) for start, _ in cut]
    said = model.generate_batch(prompts, max_new_tokens=CONTINUATION_TOKENS, temperature=0.8, top_p=0.95, seed=seed)
    return [(i, (start, end, text)) for i, (start, end), text in zip(chosen, cut, said, strict=True)]


def _cut(text: str, num_given: int = 160, num_shown: int = 320) -> tuple[str, str]:
    """The beginning of a text, up to a space near its first third or `num_given` letters, and what follows."""
    place = min(num_given, max(len(text) // 3, 1))
    place = text.find(" ", place) if " " in text[place:] else place
    return text[:place], text[place : place + num_shown]
