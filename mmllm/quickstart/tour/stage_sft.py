"""Stage `sft`: the model is instructed by 300 and by 3,000 questions of types that it was never asked before.

Each training mixes the questions with what the model was trained on, so that it keeps its captions and transcripts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmllm.data.rows.forms import read_rows
from mmllm.data.rows.rows import Row
from mmllm.evaluation.chat_task import ChatRow
from mmllm.quickstart.tour.questions import KINDS, NUM_TEST, NUM_TRAIN, make_questions
from mmllm.quickstart.tour.stage import Tour

MODULE = "mmllm.training.decoder_module.DecoderModule"
DATA = "mmllm.data.loading.datamodules.PackedDataModule"
FEW = 300
QUESTION_SHARE = {FEW: 0.3, NUM_TRAIN: 0.6}
"""Of the tokens, of questions; the others are of what the model was trained on."""
MINUTES = {FEW: 3.5, NUM_TRAIN: 5.5}
REPLAYED = {"transcribe": 2.0, "speak": 0.5}
"""Factors of what was trained on before, by its task: transcripts are lost first, and speech takes many tokens."""
BATCH_SIZE = 4
OPTIMIZER: dict[str, Any] = {
    "lr": 2e-3, "weight_decay": 0.05, "warmup": 0.05, "muon": True,
    "parts": {"image_tower": 0.0, "audio_front_end": 0.0, "image_projector": 5e-4, "experts": 3e-4, "attention": 4e-3},
}  # fmt: skip
"""Mostly attention is trained: experts learn few rows by heart."""
UNITS_WEIGHT = 0.25
"""Of the loss of speech's units, of which a document has many more than a question has words."""
EMA = {"class_path": "mmllm.training.ema.EMA", "init_args": {"decay": 0.99, "every_steps": 2}}
NUM_EXAMPLES = 8


@dataclass(frozen=True)
class SftStage:
    """Instructs the model, and measures what it has learnt and lost."""

    name: str = "sft"

    def run(self, tour: Tour) -> dict[str, Any]:
        """Trains on 300 and on 3,000 questions."""
        test = write_test(tour)
        rows = {row.id: row for row in read_rows(test)}
        start = measure(tour, "start", tour.model, test)
        found: dict[str, Any] = {"start_accuracy": start["accuracy"]}
        lost, answers = [], {}
        for num_rows in (FEW, NUM_TRAIN):
            model = train(tour, f"sft_{num_rows}", num_rows, OPTIMIZER, MINUTES[num_rows])
            after = measure(tour, f"sft_{num_rows}", model, test)
            found |= {f"accuracy_{num_rows}": after["accuracy"], f"blind_{num_rows}": after["blind"],
                      f"kinds_{num_rows}": by_kind(after["predictions"], rows)}  # fmt: skip
            lost += [points_lost(start, after)]
            found[f"lost_{num_rows}"] = lost[-1]
            answers[f"{num_rows:,} questions"] = after["predictions"]
        found["chance"] = sum(float(row.metadata["chance"]) for row in rows.values()) / len(rows)
        found["forgetting_points"] = max(max(each.values()) for each in lost)
        return {**found, "examples": examples(rows, answers)}


def write_test(tour: Tour) -> Path:
    """Writes the held-out questions, `OUT/test.jsonl`."""
    rows = make_questions(tour.data / "data", "test", NUM_TEST, tour.seed, tour.out)
    return tour.write_jsonl(tour.out / "test.jsonl", rows)


def question_shards(tour: Tour, num_rows: int) -> str:
    """Writes the first so many questions of training and builds their shards; gives the pattern of these."""
    name = f"questions_{num_rows}"
    rows = make_questions(tour.data / "data", "train", num_rows, tour.seed, tour.out / "data")
    manifest, shards = tour.write_rows(name, rows), tour.out / "shards" / name
    tokenizer = ("--tokenizer", str(tour.model))
    built = tour.make(
        f"build {name}", shards / "shards.json", "data", "build", str(manifest), "--out", str(shards), *tokenizer,
        "--workers", "0", inputs=[manifest, tour.model],
    )  # fmt: skip
    tour.make(f"index {name}", shards, "data", "index", str(shards), *tokenizer, inputs=[built])
    return f"{shards}/*.tar"


def train(
    tour: Tour,
    name: str,
    num_rows: int,
    optimizer: Mapping[str, Any],
    minutes: float,
    adapter: Mapping[str, Any] | None = None,
) -> Path:
    """Trains the tour's model on questions and on what it was trained on before.

    Args:
        tour: the tour.
        name: of the model.
        num_rows: how many questions.
        optimizer: rates.
        minutes: that the training takes.
        adapter: what is trained in the place of the model's weights.

    Returns:
        The model's folder.
    """
    shards, share = question_shards(tour, num_rows), QUESTION_SHARE[num_rows]
    questions = {"name": "questions", "kind": "interleaved", "shards": shards, "weight": share, "tasks": ["chat"]}
    recipe = tour.recipe_of([questions, *_replayed(tour, 1 - share)], name)
    arguments: dict[str, Any] = {"optimizer": dict(optimizer), "loss": {"units": UNITS_WEIGHT}}
    if adapter is not None:
        arguments |= {"adapter": dict(adapter), "adapter_name": name}
    data = {"recipe": str(recipe), "batch_size": BATCH_SIZE, "cache_mb": 128, "min_scale": 0.85}
    config = tour.training(name, MODULE, arguments, DATA, data, minutes=minutes, callbacks=[EMA])
    return tour.fit(name, config, inputs=[tour.out / "data" / f"questions_{num_rows}.jsonl"])


def _replayed(tour: Tour, share: float) -> list[dict[str, Any]]:
    """What the model was trained on before, with a share of the tokens."""
    sources = tour.replay_sources(1.0)
    weights = [source["weight"] * REPLAYED.get("".join(source.get("tasks", ())), 1.0) for source in sources]
    return [{**source, "weight": round(share * weight / sum(weights), 6)}
            for source, weight in zip(sources, weights, strict=True)]  # fmt: skip


def measure(tour: Tour, name: str, model: Path, test: Path, adapter: str | None = None) -> dict[str, Any]:
    """Answers, captions and transcripts of a model."""
    chat = tour.eval_json(f"{name}_chat", model, "chat", test, adapter=adapter)
    caption = tour.eval_json(f"{name}_caption", model, "caption", tour.test_manifest, adapter=adapter)
    heard = tour.eval_json(f"{name}_transcribe", model, "transcribe", tour.test_manifest, adapter=adapter)
    return {
        "accuracy": chat["chat"]["answer_accuracy"],
        "blind": chat["chat"]["blind_accuracy"],
        "predictions": chat["predictions"],
        "caption": 100 * caption["caption"]["exact_match"],
        "transcribe": 100 * (1 - heard["transcribe"]["wer"]),
    }


def points_lost(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, float]:
    """Points of captions (exact) and transcripts (100 - WER) that a training has cost; below 0: gained."""
    return {task: before[task] - after[task] for task in ("caption", "transcribe")}


def by_kind(predictions: Sequence[Mapping[str, Any]], rows: Mapping[str, Row]) -> dict[str, dict[str, float]]:
    """Of each kind of question the share that is right, that is right blind, and that a guess gets right."""
    found: dict[str, dict[str, float]] = {}
    for kind in KINDS:
        chosen = [one for one in predictions if rows[one["id"]].metadata["kind"] == kind]
        if not chosen:
            continue
        blind = [ChatRow.of(rows[one["id"]]).is_right(one["blind"]) for one in chosen]
        chances = [float(rows[one["id"]].metadata["chance"]) for one in chosen]
        right = [bool(one["correct"]) for one in chosen]
        shares = {"accuracy": right, "blind": blind, "chance": chances}
        found[kind] = {key: round(sum(values) / len(chosen), 4) for key, values in shares.items()}
    return found


def examples(rows: Mapping[str, Row], answers: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """The first questions of the test set, as the page shows them, with what each model answers."""
    said = {name: {one["id"]: one for one in predictions} for name, predictions in answers.items()}
    chosen = [name for name in rows if all(name in one for one in said.values())][:NUM_EXAMPLES]
    first = next(iter(said.values()))
    return [
        {
            "segments": _shown(first[name]["segments"], rows[name]),
            "wanted": first[name]["reference"],
            "answers": {model: one[name]["prediction"] for model, one in said.items()},
        }
        for name in chosen
    ]


def _shown(segments: Sequence[Mapping[str, str]], row: Row) -> list[dict[str, str]]:
    """What was asked, with an arrow before what the assistant has said in earlier turns."""
    roles = [segment.get("role") for segment in row.segments]
    return [{kind: f"→ {value}" if kind == "text" and role == "assistant" else value for kind, value in one.items()}
            for one, role in zip(segments, roles, strict=False)]  # fmt: skip


STAGE = SftStage()
