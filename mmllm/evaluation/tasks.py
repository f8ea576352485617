"""Runs a model over held-out rows and scores what it says: captions, transcripts, speech, answers, conversations, text.

Every score comes with its number of rows `n`, a 95% bootstrap interval `…_ci`, and the control beside which it is to
be read: the same model blind (its image or sound hidden), or shuffled inputs.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import cast

from mmllm.data.rows.bad_rows import BadRows, ManifestError
from mmllm.data.rows.column_names import ColumnNames
from mmllm.data.rows.forms import read_rows
from mmllm.data.rows.media import sound_seconds
from mmllm.data.rows.readable import readable_rows
from mmllm.data.rows.rows import Row, row_media
from mmllm.evaluation.answer_task import evaluate_answers
from mmllm.evaluation.asking import AskedModel
from mmllm.evaluation.caption_task import evaluate_captions
from mmllm.evaluation.chat_task import chat_rows, evaluate_chat, is_conversation
from mmllm.evaluation.results import ANCHORED_TASKS, KIND_OF_TASK, SHOT_TASKS, TASKS, TaskResult
from mmllm.evaluation.scoring import scored_set
from mmllm.evaluation.shots import RowShots, ShotsConfig
from mmllm.evaluation.speech_task import Judge, evaluate_speech
from mmllm.evaluation.text_task import evaluate_text
from mmllm.evaluation.transcript_task import evaluate_transcripts
from mmllm.inference.api import Model
from mmllm.inference.prompting import check_anchor
from mmllm.inference.voting import VotingConfig

PROMPTS_A_ROW = {"caption": 1, "transcribe": 1, "speak": 3, "interleaved": 3, "chat": 3, "text": 1}
"""Of a row and its controls; no blind captions and transcripts: their prompts are nearly all alike, so asked once."""
VOTED_TASKS = ("caption", "interleaved")
"""Whose answers several samples can agree on."""
_WANTED = {
    "interleaved": "rows with segments, a question and an answer",
    "chat": "conversations (segments with roles, or messages)",
}
"""What a manifest lacks, where the kind of its rows doesn't say it."""


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
    judge: Judge | None = None,
    voting: VotingConfig | None = None,
    controls: bool = True,
    shots: ShotsConfig | None = None,
    anchor: str | None = None,
) -> TaskResult:
    """Scores a model on one task.

    Args:
        model: as `mmllm.load` gives it.
        task: "caption", "transcribe", "speak", "interleaved", "chat" or "text".
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
        judge: of `speak`; None: nobody but the model writes down what is spoken.
        voting: of `caption` and `interleaved`: how several answers a row are drawn, whose majority is scored beside
            the greedy answer; None: none are.
        controls: of `interleaved` and `chat`: also ask blind and with shuffled pictures and sounds; False, where a
            score is followed through a training, takes a third of the time.
        shots: of `caption`, `transcribe` and `interleaved`: what is shown with its answer in front of each row, drawn
            by `seed`; its form and columns are those of the rows. None: nothing.
        anchor: of these and `chat`: a text in front of each prompt, as a recipe's `anchor_prompt` is in front of the
            documents that a model is tuned on.

    Returns:
        Scores under the keys of report.json, and one record a row.

    Raises:
        ValueError: an unknown task, votes, shots or an anchor of one that has none, no rows, too many that can't be
            read, too few to show, or a model that lacks the sense.
        FileNotFoundError: no such manifest.
    """
    if task not in TASKS:
        raise ValueError(f"task is {task!r}; choose one of {', '.join(TASKS)}")
    if voting is not None and task not in VOTED_TASKS:
        raise ValueError(
            f"task is {task!r}, which has no votes; those of {' and '.join(VOTED_TASKS)} have: leave votes out"
        )
    check_prompt(task, shots, anchor)
    if limit is not None and limit < 1:
        raise ValueError(f"limit is {limit}; it must be at least 1, or None for all rows")
    bad = BadRows(max_bad_fraction)
    is_manifest = isinstance(rows_or_manifest, str | Path)
    name = str(rows_or_manifest) if is_manifest else "the rows"
    if is_manifest:
        rows = read_rows(cast("str | Path", rows_or_manifest), bad, form, columns=columns)
    else:
        rows = list(rows_or_manifest)
    rows = scored_rows(rows, task, name)
    unreadable = BadRows(max_bad_fraction)
    rows = readable_rows(_limited(rows, limit, seed), unreadable, name)
    is_joined = KIND_OF_TASK[task] == "interleaved"
    longest = model.generation.max_heard_seconds if is_joined else AskedModel(model).longest_seconds
    rows = short_enough(rows, longest, unreadable, name)
    num_votes = 0 if voting is None else voting.num_votes
    num_asked = PROMPTS_A_ROW[task] if controls or task not in ("interleaved", "chat") else 1
    if shots is not None and task in ("caption", "transcribe"):
        num_asked += 1  # blind prompts differ by their shots, so each is asked
    num_prompts = (num_asked + num_votes) * len(rows)
    asked = AskedModel(model, None if progress is None else _summed(progress, num_prompts))
    shown: RowShots | None = None
    if shots is not None:
        prompter, most = model.prompter.anchored(anchor), model.engine.config.max_length
        shown = RowShots.read(shots, task, seed, prompter, longest, most, max_bad_fraction, form, columns)
    if shown is not None or anchor is not None:
        asked = replace(asked, anchor=anchor, shots=shown)
    match task:
        case "caption":
            result = evaluate_captions(asked, rows, batch_size, seed, voting)
        case "transcribe":
            result = evaluate_transcripts(asked, rows, batch_size, seed)
        case "speak":
            result = evaluate_speech(asked, rows, batch_size, seed, Path(media_dir) if media_dir else None, judge)
        case "interleaved":
            result = evaluate_answers(asked, rows, batch_size, seed, voting, controls)
        case "chat":
            result = evaluate_chat(asked, chat_rows(rows, unreadable, name), batch_size, seed, controls)
        case _:
            result = evaluate_text(asked, rows, batch_size, seed, sequence_length)
    if bad.reasons or unreadable.reasons:
        result.scores["num_skipped_rows"] = len(bad.reasons) + len(unreadable.reasons)
    if anchor is not None:
        result.prompt["anchor"] = anchor
    if shown is not None:
        result.prompt["shots"] = shown.told()
        result.scores.update(shown.scores())
    return result


def check_prompt(task: str, shots: ShotsConfig | None, anchor: str | None) -> None:
    """Refuses shots, or an anchor, of a task whose prompts have none.

    Raises:
        ValueError: the task has none, or the anchor is empty.
    """
    for name, given, having in (("shots", shots, SHOT_TASKS), ("anchor", anchor, ANCHORED_TASKS)):
        if given is not None and task not in having:
            raise ValueError(f"task is {task!r}, which has no {name}; {', '.join(having)} have: leave {name} out")
    if anchor is not None:
        check_anchor(anchor)


def scored_rows(rows: Sequence[Row], task: str, name: str) -> list[Row]:
    """The rows that a task is scored on.

    Args:
        rows: of any kinds.
        task: one of `TASKS`.
        name: what they are called in messages.

    Raises:
        ManifestError: there are none.
    """
    kept = [row for row in rows if row.kind == KIND_OF_TASK[task]]
    if task == "interleaved":
        kept = [row for row in kept if "question" in row.metadata]
    if task == "chat":
        kept = [row for row in kept if is_conversation(row)]
    if not kept:
        wanted = _WANTED.get(task, f"{KIND_OF_TASK[task]} rows")
        raise ManifestError(f"{name} has no {wanted}, which the task {task!r} needs; give another manifest or task")
    return kept


def _summed(progress: Callable[[int, int], None], num_all: int) -> Callable[[int], None]:
    """Takes what was done since the last call, and gives what was done so far."""
    num_done = 0

    def add(count: int) -> None:
        nonlocal num_done
        num_done += count
        progress(min(num_done, num_all), num_all)

    return add


def _limited(rows: list[Row], limit: int | None, seed: int) -> list[Row]:
    """At most `limit` rows of each set, drawn at random, in their order."""
    if limit is None:
        return rows
    kept: set[int] = set()
    for group in ("test", "heldout_pairs", "heldout_voices"):
        places = [place for place, row in enumerate(rows) if scored_set(row) == group]
        kept.update(random.Random(f"limit {seed} {group}").sample(places, min(limit, len(places))))
    return [rows[place] for place in sorted(kept)]


def short_enough(rows: list[Row], max_seconds: float | None, bad: BadRows, name: str) -> list[Row]:
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
