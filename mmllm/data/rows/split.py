"""One manifest a kind for training, one for looking, one for testing: how other people's manifests enter a run."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from mmllm.data.rows.bad_rows import BadRows, ManifestError
from mmllm.data.rows.column_names import ColumnNames
from mmllm.data.rows.forms import read_rows
from mmllm.data.rows.holdout import showing_nothing_of, split_rows, split_tasks, without_shown
from mmllm.data.rows.media import Digests, Media
from mmllm.data.rows.readable import readable_rows
from mmllm.data.rows.rows import KINDS, Row
from mmllm.data.rows.validation import draw_validation

DEFAULT_HOLDOUT = "0.1"
"""Share of the rows that is held out where neither test manifests nor `holdout` are given."""


MIN_ROWS_FOR_VAL = 4


def split(
    train: Sequence[str | Path],
    out: str | Path,
    test: Sequence[str | Path] = (),
    holdout: str | None = None,
    num_val: int = 16,
    max_bad_fraction: float = 0.05,
    seed: int = 0,
    form: str = "auto",
    media: str | Path | None = None,
    columns: ColumnNames | None = None,
    hold_tasks: Sequence[str] = (),
    task_column: str = "task",
) -> dict[str, Any]:
    """Writes `train-KIND.jsonl`, `val.jsonl` (rows taken from training, to look at meanwhile) and `test.jsonl`.

    Args:
        train: Inputs of any form that `forms.FORMS` reads; kinds may be mixed.
        out: Folder of the new manifests, whose paths are relative to it. Pictures and sounds stay where they are, also
            those that are embedded: the manifests hold references (`media.py`).
        test: Inputs of held-out rows; without them, `holdout` decides.
        holdout: `KEY=VALUE` or a fraction of the training rows to hold out; with `test`, `KEY=VALUE` rows are
            left out of training as well.
        num_val: Rows of each kind for `val.jsonl`; at most a fiftieth of the kind, or one. Nothing that they show is
            trained on; see `draw_validation`.
        max_bad_fraction: More unusable rows than this are an error.
        seed: Of the draws by fraction.
        form: Of the inputs; `auto`: told from each.
        media: What their paths are relative to; by default each input's folder.
        columns: What their columns are called here, and their types.
        hold_tasks: Task types that are never trained on. All their rows are tested, and other rows that show some of
            the same are left out of training; with `holdout` by fraction, pictures are split first, and only those of
            their rows are tested that show nothing of what is trained on.
        task_column: The key that says a row's task type.

    Returns:
        `train`, `val`, `test`: rows by kind; `repeated`: training rows left out since rows of `test` or `val` show some
        of the same; `skipped`: unusable rows; `left_out`: what else isn't used, counted.

    Raises:
        FileNotFoundError, ManifestError: A manifest can't be used, or a part would be empty.
    """
    bad, digests = BadRows(max_bad_fraction), Digests()
    train_rows = [row for path in train for row in read_rows(path, bad, form, media, columns)]
    test_rows = [row for path in test for row in read_rows(path, bad, form, media, columns)]
    if test_rows and holdout is not None and "=" not in holdout:
        raise ManifestError(f"holdout is {holdout}, a fraction, beside test manifests; give one of the two")
    _, of_tasks = split_tasks(train_rows, hold_tasks, task_column)
    if holdout is not None or not (test_rows or of_tasks):
        train_rows, heldout = split_rows(train_rows, holdout or DEFAULT_HOLDOUT, seed, digests)
        test_rows = test_rows or heldout
    train_rows, of_tasks = split_tasks(train_rows, hold_tasks, task_column, is_known=True)
    if holdout is not None:
        # What is trained on stays, and of the held task types what shows nothing of it is tested.
        num_before = len(of_tasks)
        of_tasks = showing_nothing_of(of_tasks, train_rows, digests)
        bad.left_out["rows of held task types that show what is trained on"] += num_before - len(of_tasks)
    test_rows = test_rows + of_tasks
    test_rows = readable_rows(test_rows, bad, "the test rows")  # now, not when all is trained
    num_before = len(train_rows)
    train_rows = without_shown(train_rows, test_rows, digests)
    counts = {
        kind: min(num_val, max(count // 50, int(count >= MIN_ROWS_FOR_VAL)))
        for kind, count in _count(train_rows).items()
    }
    train_rows, val_rows = draw_validation(train_rows, counts, seed, digests)
    num_repeated = num_before - len(train_rows) - len(val_rows)
    by_kind = {kind: [row for row in train_rows if row.kind == kind] for kind in KINDS}
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    for kind, rows in by_kind.items():
        (out / f"train-{kind}.jsonl").unlink(missing_ok=True)
        if rows:
            write_manifest(rows, out / f"train-{kind}.jsonl")
    write_manifest(val_rows, out / "val.jsonl")
    write_manifest(test_rows, out / "test.jsonl")
    return {
        "train": {kind: len(rows) for kind, rows in by_kind.items() if rows},
        "val": _count(val_rows),
        "test": _count(test_rows),
        "repeated": num_repeated,
        "skipped": bad.reasons,
        **({"held_tasks": _held(test_rows, hold_tasks, task_column)} if hold_tasks else {}),
        **({"left_out": dict(left_out)} if (left_out := +bad.left_out) else {}),
    }


def write_manifest(rows: Sequence[Row], path: Path) -> None:
    """Writes rows as JSONL with paths relative to the new file."""

    def relative(media: Media) -> str:
        if isinstance(media, Path):
            return os.path.relpath(media, path.parent)
        return str(replace(media, file=Path(os.path.relpath(media.file, path.parent))))

    lines = []
    for row in rows:
        values: dict[str, Any] = {"id": row.id}
        if row.segments:
            values["segments"] = [
                {key: relative(value) if key in ("image", "audio") else value for key, value in segment.items()}
                for segment in row.segments
            ]
        else:
            values["text"] = row.text
        if row.image is not None:
            values["image"] = relative(row.image)
        if row.audio is not None:
            values["audio"] = relative(row.audio)
        lines.append(json.dumps({**values, **row.metadata}, ensure_ascii=False) + "\n")
    path.write_text("".join(lines), encoding="utf-8")


def _held(rows: Sequence[Row], tasks: Sequence[str], column: str) -> dict[str, int]:
    """Test rows of each held task type."""
    counts = Counter(str(row.metadata.get(column)) for row in rows)
    return {task: counts[task] for task in tasks}


def _count(rows: Sequence[Row]) -> dict[str, int]:
    counts = {kind: sum(row.kind == kind for row in rows) for kind in KINDS}
    return {kind: count for kind, count in counts.items() if count}
