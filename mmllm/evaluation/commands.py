"""What `mmllm eval` does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from mmllm.data.rows.column_names import ColumnNames
from mmllm.evaluation.results import TaskResult, save_result
from mmllm.evaluation.shots import ShotsConfig
from mmllm.evaluation.speech_task import Judge
from mmllm.evaluation.tasks import check_prompt, evaluate
from mmllm.inference.api import load
from mmllm.inference.voting import VotingConfig


def run_eval(
    model_dir: str,
    task: str,
    manifest: str,
    json_out: str | None = None,
    limit: int | None = None,
    batch_size: int = 64,
    seed: int = 0,
    media_dir: str | None = None,
    sequence_length: int = 512,
    device: str = "auto",
    max_bad_fraction: float = 0.05,
    progress: Callable[[int, int], None] | None = None,
    form: str = "auto",
    columns: ColumnNames | None = None,
    adapter: str | None = None,
    judge: str | None = None,
    voting: VotingConfig | None = None,
    shots: ShotsConfig | None = None,
    anchor: str | None = None,
) -> TaskResult:
    """Scores a model on held-out rows, with intervals and the blind baseline.

    Args:
        model_dir: The model folder.
        task: caption, transcribe, speak, interleaved, chat or text.
        manifest: Input of held-out rows, of any form; those of other kinds are left out.
        json_out: Where scores and predictions go: `{"task", TASK: scores, "predictions"}`, and `prompt` where there
            are shots or an anchor.
        limit: At most so many rows of each set, drawn at random.
        batch_size: Prompts at once.
        seed: Of the draw, the shuffled controls, sampling and the bootstrap.
        media_dir: Folder for the WAVs of `speak`; by default `spoken/` beside `json_out`.
        sequence_length: For `text`, the length of training's sequences.
        device: "cpu", "cuda", or "auto".
        max_bad_fraction: More unusable rows than this are an error.
        progress: See `evaluate`.
        form: Of `manifest`; "auto": told from it.
        columns: What its columns are called here, and their types.
        adapter: Of the model's, by name; None: the model alone.
        judge: For `speak`, an aligner's folder (`mmllm data align` writes one): it writes down what is spoken as well.
        voting: See `evaluate`.
        shots: Likewise.
        anchor: Likewise.

    Returns:
        What `json_out` holds.

    Raises:
        ValueError: An unknown task, rows that can't be used, or a model that lacks the sense.
        FileNotFoundError: No such model or manifest.
    """
    if json_out is not None and Path(json_out).is_dir():
        raise ValueError(f"json_out is {json_out}, a folder; name a file in it, such as {Path(json_out) / 'eval.json'}")
    if media_dir is None and json_out is not None and task == "speak":
        media_dir = str(Path(json_out).parent / "spoken")
    check_prompt(task, shots, anchor)
    model = load(model_dir, device, adapter=adapter)
    result = evaluate(
        model,
        task,
        manifest,
        batch_size,
        limit,
        seed,
        media_dir,
        sequence_length,
        max_bad_fraction,
        progress,
        form,
        columns,
        None if judge is None else Judge.load(judge),
        voting,
        shots=shots,
        anchor=anchor,
    )
    if json_out is not None:
        save_result(result, json_out)
    return result


def score_lines(result: TaskResult) -> list[str]:
    """The scores as lines to print: "exact_match      0.853  [0.821, 0.884]"."""
    scores: dict[str, Any] = result.scores
    lines = []
    for key, value in scores.items():
        if key.endswith("_ci"):
            continue
        number = f"{value:.4f}" if isinstance(value, float) else f"{value:,}"
        interval = scores.get(f"{key}_ci")
        between = f"  [{interval[0]:.4f}, {interval[1]:.4f}]" if interval else ""
        lines.append(f"{key:<28}{number:>10}{between}")
    return lines
