"""Stage `incremental`: tasks learnt one after the other; Reptile before few rows; and what to pick for 20 or 300 rows.

Tasks are types of questions (`question_types`). Three tables come of it, each of plain commands:

- `matrix`: three tasks by `mmllm incremental`, and what captions and transcripts lose;
- `reptile`: a new task from 1, 5 and 20 rows by as many steps, from weights that Reptile made of other tasks, from
  weights trained on the same tasks mixed, and from the model itself; beside it the rows as examples in the prompt;
- `pick`: all weights, LoRA, prompt and prefix tuning on 20 and on 300 rows, beside 8, 1 and 0 examples in the prompt.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmllm.checkpoints.files import ADAPTERS
from mmllm.checkpoints.weights import Checkpoint
from mmllm.quickstart.plan import write_yaml
from mmllm.quickstart.tour.question_types import make_questions
from mmllm.quickstart.tour.stage import Tour

MODULE = "mmllm.training.decoder_module.DecoderModule"
REPTILE_MODULE = "mmllm.training.posttraining.reptile_module.ReptileModule"
DATA = "mmllm.data.loading.datamodules.PackedDataModule"
BATCH_SIZE, FEW_BATCH_SIZE, SHORT_LENGTH = 4, 2, 128
"""Sequences a step; where questions alone are trained on they are short, with some two questions each."""
FULL: dict[str, Any] = {"lr": 1e-3, "weight_decay": 0.05, "warmup": 0.05, "muon": True}
"""How all weights are trained where there are rows enough."""
NUM_TEST = 150
NUM_KEPT = 150
"""Rows of each evaluation of a task, and of captions and transcripts."""

# --- one after the other ----------------------------------------------------------------------------------------------
TASKS = ("count", "shape", "end")
NUM_ROWS = 600
REPLAY_SHARE = 0.4
TASK_MINUTES = 1.0

# --- meta-learning ----------------------------------------------------------------------------------------------------
META_TASKS = ("count", "there", "colour", "size", "shape")
NEW_TASK = "end"
FEW_ROWS = (1, 5, 20)
META_MINUTES = 1.5
INNER_STEPS = 5
META: dict[str, Any] = {"lr": 1e-3, "weight_decay": 0.0, "warmup": 0.05, "min_lr_ratio": 1.0}
"""Adam, of Reptile's inner steps and of the tasks mixed alike."""
ADAPT_STEPS = 20
ADAPT: dict[str, Any] = {"lr": 1e-3, "weight_decay": 0.0, "warmup": 0.0}

# --- what to pick -----------------------------------------------------------------------------------------------------
PICK_TASK = "beside"
PICK_ROWS = (20, 300)
PICK_MINUTES = 0.7
SHOTS = (8, 1, 0)
METHODS: dict[str, tuple[dict[str, Any] | None, dict[str, Any]]] = {
    "full": (None, FULL),
    "lora": (
        {"parts": ["attention", "experts"], "r": 4, "lora_alpha": 16},
        {"lr": 5e-3, "weight_decay": 0.0, "warmup": 0.05},
    ),
    "prompt_tuning": (
        {"kind": "prompt_tuning", "num_virtual_tokens": 8},
        {"lr": 2e-2, "weight_decay": 0.0, "warmup": 0.05},
    ),
    "prefix_tuning": (
        {"kind": "prefix_tuning", "num_virtual_tokens": 8},
        {"lr": 1e-2, "weight_decay": 0.0, "warmup": 0.05},
    ),
}
"""Of each the adapter (None: all weights) and its rates."""


@dataclass(frozen=True)
class IncrementalStage:
    """The three tables."""

    name: str = "incremental"

    def run(self, tour: Tour) -> dict[str, Any]:
        """Makes them one after the other."""
        learnt = learn_in_turn(tour)
        few = learn_from_few(tour)
        return {
            "matrix": learnt["matrix"],
            "average": learnt["average"],
            **{key: learnt[key] for key in ("backward_transfer", "forward_transfer", "forgetting")},
            "forgetting_points": max(learnt["points_lost"].values()),
            "lost": learnt["points_lost"],
            "reptile": few,
            "pick": pick(tour),
            "plots": [{"title": f"right answers to a new type of question, by rows ({NEW_TASK})",
                       "curves": {name: [[float(rows), few[rows][name]] for rows in few] for name in few["1"]}}],
        }  # fmt: skip


# ------------------------------------------------------------------------------------------------- one after the other
def learn_in_turn(tour: Tour) -> dict[str, Any]:
    """Three tasks by `mmllm incremental`; gives what its matrix.json holds."""
    kept = {"manifest": str(tour.test_manifest), "limit": _limit(tour, NUM_KEPT)}
    tasks = [
        {"name": asks, "rows": str(_rows(tour, asks, NUM_ROWS)),
         "eval": {"task": "interleaved", "manifest": str(_test(tour, asks)), "score": "answer_accuracy",
                  "limit": _limit(tour, NUM_TEST)}}
        for asks in TASKS
    ]  # fmt: skip
    base = tour.training("incremental", MODULE, {"optimizer": FULL}, DATA, _data(""), minutes=TASK_MINUTES)
    del base["data"]["init_args"]["recipe"]  # it is each task's own
    plan = {
        "start": str(tour.model),
        "base": base,
        "tasks": tasks,
        "also": {
            "captions": {"task": "caption", "score": "exact_match", **kept},
            "transcripts": {"task": "transcribe", "score": "wer", "lower_is_better": True, **kept},
        },
        "replay": {"recipe": str(tour.replay_recipe()), "share": REPLAY_SHARE},
    }
    path, out = tour.out / "configs" / "incremental_plan.yaml", tour.out / "incremental"
    write_yaml(path, plan, f"Written by `mmllm posttrain-tour`. Run again: mmllm incremental {path} --out DIR")
    return json.loads(tour.make("incremental", out / "matrix.json", "incremental", str(path), "--out", str(out),
                                inputs=[tour.model]).read_text(encoding="utf-8"))  # fmt: skip


# ------------------------------------------------------------------------------------------------------- meta-learning
def learn_from_few(tour: Tour) -> dict[str, dict[str, float]]:
    """Right answers to a new type of question, by rows and by what they were learnt from."""
    sources = [_source(tour, asks, NUM_ROWS) for asks in META_TASKS]
    recipe = _short_recipe(tour, "meta_tasks", sources)
    starts = {"plain": tour.model}
    settings = {"optimizer": META, "reptile": {"inner_steps": INNER_STEPS}}
    for name, module, arguments, more in (
        ("reptile", REPTILE_MODULE, settings, {"tasks": {"steps": INNER_STEPS}}),
        ("joint", MODULE, {"optimizer": META}, {}),
    ):
        data = {**_data(recipe), **more}
        starts[name] = tour.fit(name, tour.training(name, module, arguments, DATA, data, minutes=META_MINUTES))
    test = _test(tour, NEW_TASK)
    table: dict[str, dict[str, float]] = {}
    for num_rows in FEW_ROWS:
        row = table[str(num_rows)] = {}
        few = _few_recipe(tour, NEW_TASK, num_rows)
        for start, folder in starts.items():
            name = f"{start}_{num_rows}_rows"
            arguments = {"init_from": str(folder), "optimizer": ADAPT}
            config = tour.training(name, MODULE, arguments, DATA, _data(few, FEW_BATCH_SIZE), max_steps=ADAPT_STEPS,
                                       num_ranks=1)  # fmt: skip
            row[start] = _accuracy(tour, name, tour.fit(name, config, inputs=[folder]), test)
        row["in_context"] = _in_context(tour, NEW_TASK, num_rows)
    return table


# -------------------------------------------------------------------------------------------------------- what to pick
def pick(tour: Tour) -> list[dict[str, Any]]:
    """Ways to teach a type of question by few rows: right answers, minutes, parameters, and points of captions lost."""
    test, limit = _test(tour, PICK_TASK), _limit(tour, NUM_KEPT)
    before = tour.eval_json("pick_start_caption", tour.model, "caption", tour.test_manifest, limit=limit)
    table = []
    for num_rows in PICK_ROWS:
        recipe = _few_recipe(tour, PICK_TASK, num_rows)
        for method, (adapter, optimizer) in METHODS.items():
            name = f"pick_{method}_{num_rows}"
            arguments: dict[str, Any] = {"optimizer": optimizer}
            if adapter is not None:
                arguments |= {"adapter": adapter, "adapter_name": method}
            data = _data(recipe, FEW_BATCH_SIZE)
            config = tour.training(name, MODULE, arguments, DATA, data, minutes=PICK_MINUTES, num_ranks=1)
            model, chosen = tour.fit(name, config), None if adapter is None else method
            after = tour.eval_json(
                f"{name}_caption", model, "caption", tour.test_manifest, limit=limit, adapter=chosen
            )  # fmt: skip
            lost = before["caption"]["exact_match"] - after["caption"]["exact_match"]
            table.append(
                {"method": method, "rows": num_rows, "score": _accuracy(tour, name, model, test, chosen),
                 "minutes": round(config["model"]["init_args"]["max_seconds"] / 60, 2),
                 "trained_parameters": num_trained(model, chosen), "forgetting_points": 100 * lost}
            )  # fmt: skip
    for num_shots in SHOTS:
        table.append(
            {"method": "in_context", "rows": num_shots, "score": _in_context(tour, PICK_TASK, num_shots),
             "minutes": 0.0, "trained_parameters": 0, "forgetting_points": 0.0}
        )  # fmt: skip
    return table


def num_trained(folder: Path, adapter: str | None) -> int:
    """Parameters of an adapter, or of the whole model."""
    if adapter is None:
        weights = Checkpoint.open(folder)
    else:
        weights = Checkpoint.open_file(folder / ADAPTERS / adapter / "adapter_model.safetensors")
    return sum(spec.num_elements for spec in weights.specs.values())


# --------------------------------------------------------------------------------------------------- rows and answers
def _rows(tour: Tour, asks: str, num_rows: int) -> Path:
    """The first so many training questions of a type, in a manifest."""
    folder = tour.out / "data"
    questions = make_questions(tour.data / "data", asks, "train", num_rows, tour.seed, folder)
    return tour.write_rows(f"{asks}_{num_rows}", questions)


def _test(tour: Tour, asks: str) -> Path:
    """Held-out questions of a type."""
    questions = make_questions(tour.data / "data", asks, "test", NUM_TEST, tour.seed, tour.out / "data")
    return tour.write_rows(f"{asks}_test", questions)


def _source(tour: Tour, asks: str, num_rows: int) -> dict[str, Any]:
    """Builds a type's training questions; gives the recipe's source of them."""
    manifest = _rows(tour, asks, num_rows)
    name, tokenizer = manifest.stem, ("--tokenizer", str(tour.model))
    shards = tour.out / "shards" / name
    command = ("data", "build", str(manifest), "--out", str(shards), *tokenizer, "--workers", "0")
    built = tour.make(f"build {name}", shards / "shards.json", *command, inputs=[manifest, tour.model])
    tour.make(f"index {name}", shards, "data", "index", str(shards), *tokenizer, inputs=[built])
    return {"name": asks, "kind": "interleaved", "shards": f"{shards}/interleaved-*.tar", "weight": 1.0}


def _short_recipe(tour: Tour, name: str, sources: Sequence[Mapping[str, Any]]) -> str:
    """A recipe of questions alone, over and over, a few at a step."""
    recipe = {"seed": tour.seed, "tokenizer": str(tour.model), "sequence_length": SHORT_LENGTH,
              "mixture": {"unit": "tokens", "on_exhausted": "repeat"}, "sources": list(sources),
              "packing": {"window": 256}}  # fmt: skip
    return str(tour.write_recipe(name, recipe))


def _few_recipe(tour: Tour, asks: str, num_rows: int) -> str:
    """A recipe of so many questions of one type."""
    return _short_recipe(tour, f"{asks}_{num_rows}", [_source(tour, asks, num_rows)])


def _data(recipe: str, batch_size: int = BATCH_SIZE) -> dict[str, Any]:
    return {"recipe": recipe, "batch_size": batch_size, "cache_mb": 128, "min_scale": 0.85}


def _limit(tour: Tour, num_rows: int) -> int:
    return num_rows if tour.limit is None else min(tour.limit, num_rows)


def _accuracy(tour: Tour, name: str, model: Path, test: Path, adapter: str | None = None) -> float:
    """Share of a type's held-out questions that are answered right."""
    found = tour.eval_json(name, model, "interleaved", test, limit=_limit(tour, NUM_TEST), adapter=adapter)
    return found["interleaved"]["answer_accuracy"]


def _in_context(tour: Tour, asks: str, num_shots: int) -> float:
    """The same of the model itself, so many training questions standing answered before each."""
    name, test = f"{asks}_{num_shots}_shots", _test(tour, asks)
    path = tour.out / "eval" / f"{name}.json"
    method = ["--method", "direct"]
    if num_shots:
        shots = _rows(tour, asks, num_shots)
        method = ["--method", "few_shot", "--shots", str(shots), "--num_shots", str(num_shots)]
    command = ["reason", "--model", str(tour.model), "--manifest", str(test), "--json", str(path), *method]
    limit = ["--limit", str(_limit(tour, NUM_TEST)), "--seed", str(tour.seed)]
    tour.make(f"reason {name}", path, *command, *limit, inputs=[tour.model, test])
    scores: Sequence[Mapping[str, Any]] = json.loads(path.read_text(encoding="utf-8"))["scores"]
    return float(scores[0]["accuracy"])


STAGE = IncrementalStage()
