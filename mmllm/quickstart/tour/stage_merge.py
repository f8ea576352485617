"""Stage `merge`: two specialists of the tour's model, each an adapter that learnt one thing, become one model.

Every method merges them with a few settings, of which rows to choose by take the best; the best of all is where a
search goes on (`evolve`). All are judged by rows that nothing was chosen by: what counts is the least share that is
kept of the two gains.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from mmllm.quickstart.tour.merge_rows import PARTS, Skill, make_skills
from mmllm.quickstart.tour.stage import FULL_MINUTES, Tour

MODULE = "mmllm.training.decoder_module.DecoderModule"
DATA = "mmllm.data.loading.datamodules.PackedDataModule"
ADAPTER: dict[str, Any] = {"parts": ["attention", "experts"], "r": 8, "lora_alpha": 16}
OPTIMIZER: dict[str, Any] = {"lr": 1.5e-3, "weight_decay": 0.0, "warmup": 0.05}
"""At twice the rate specialists learnt 2 to 3 points more, and kept less in every merge but one: docs/RESULTS.md."""
BATCH_SIZE = 4
MINUTES = 5.0
REPLAY_SHARE = 0.4
"""Of a specialist's tokens those of questions that the model was trained on: without other questions beside its own, an
adapter learns to answer every question with its own words, and two such adapters contradict each other."""
EVOLVE_MINUTES = 4.0
VAL_ROWS = 120
SHOWN = ("task_arithmetic", "linear", "slerp", "ties", "dare_linear", "dare_ties", "della", "model_stock", "svd", "cat")
"""Methods, in the order of the table."""

Scores = dict[str, float]
"""By the skill's name."""


@dataclass(frozen=True)
class MergeStage:
    """Trains two specialists, merges them by every method, and searches for the best weights."""

    name: str = "merge"

    def run(self, tour: Tour) -> dict[str, Any]:
        """Does the stage."""
        skills = make_skills(tour)
        manifests = {skill: {part: tour.write_rows(f"merge_{skill.name}_{part}", rows[part]) for part in PARTS}
                     for skill, rows in skills.items()}  # fmt: skip
        judge = Judge(tour, manifests)
        parents = {skill: train(tour, skill, manifests[skill]["train"]) for skill in skills}
        start = {part: judge.scores("merge_base", tour.model, part) for part in ("val", "test")}
        goal = {
            part: {s.name: judge.score(f"merge_{s.name}", parents[s], s, part, adapter=s.name) for s in skills}
            for part in ("val", "test")
        }
        settings = dict(recipes(tour, parents))
        chosen: dict[str, tuple[str, float]] = {}
        for name, values in settings.items():
            model, adapter = merged(tour, name, values, list(parents.values()))
            least = min(shares(judge.scores(name, model, "val", adapter), start["val"], goal["val"]).values())
            method = name.removeprefix("merge_").rpartition("_")[0]
            if method not in chosen or least > chosen[method][1]:
                chosen[method] = (name, least)
        best = max(chosen, key=lambda method: chosen[method][1])
        table = {}
        for method in (method for method in SHOWN if method in chosen):
            name = chosen[method][0]
            model, adapter = merged(tour, name, settings[name], list(parents.values()))
            table[method] = judged(judge.scores(name, model, "test", adapter), start["test"], goal["test"])
        found = max((m for m in chosen if m not in ("svd", "cat")), key=lambda method: chosen[method][1])
        evolved_from = settings[chosen[found][0]]
        model = evolve(tour, evolved_from, manifests, start["val"], goal["val"])
        table["evolved"] = judged(judge.scores("merge_evolved", model, "test"), start["test"], goal["test"])
        points = 100 * (table["evolved"]["mean"] - table[best]["mean"])
        return {
            "best_method": best,
            "best_share_of_gain": table[best]["least_share"],
            "evolved_points": points,
            "evolved_share_of_gain": table["evolved"]["least_share"],
            "methods": table,
            "base": start["test"],
            "specialists": goal["test"],
            "settings": {method: name for method, (name, _) in chosen.items()},
            "notes": [
                f"{best} keeps {100 * table[best]['least_share']:.0f}% of the smaller gain of the two specialists; "
                f"evolved weights {points:+.1f} points."
            ],
        }


@dataclass(frozen=True)
class Judge:
    """Scores models in both skills."""

    tour: Tour
    manifests: Mapping[Skill, Mapping[str, Path]]

    def scores(self, name: str, model: Path, part: str, adapter: str | None = None) -> Scores:
        """A model's score in each skill, on the rows of a part."""
        return {skill.name: self.score(name, model, skill, part, adapter) for skill in self.manifests}

    def score(self, name: str, model: Path, skill: Skill, part: str, adapter: str | None = None) -> float:
        """A model's score in one skill."""
        limit = {} if part == "test" else {"limit": min(VAL_ROWS, self.tour.limit or VAL_ROWS)}
        found = self.tour.eval_json(
            f"{name}_{skill.name}_{part}", model, skill.task, self.manifests[skill][part], adapter=adapter, **limit
        )
        return float(found[skill.task][skill.measure])


def train(tour: Tour, skill: Skill, manifest: Path) -> Path:
    """A specialist: an adapter of the tour's model, trained on a skill's rows and on questions the model knows."""
    name, shards = f"merge_{skill.name}", tour.out / "shards" / f"merge_{skill.name}"
    tokenizer = ("--tokenizer", str(tour.model))
    built = tour.make(
        f"build {name}", shards / "shards.json", "data", "build", str(manifest), "--out", str(shards), *tokenizer,
        "--workers", "0", inputs=[manifest, tour.model],
    )  # fmt: skip
    tour.make(f"index {name}", shards, "data", "index", str(shards), *tokenizer, inputs=[built])
    known = tour.replay_sources(REPLAY_SHARE, "interleaved")
    share = 1 - REPLAY_SHARE if known else 1.0
    source = {"name": skill.name, "kind": skill.kind, "shards": f"{shards}/*.tar", "weight": share}
    recipe = tour.recipe_of([source, *known], name)
    arguments = {"optimizer": OPTIMIZER, "adapter": ADAPTER, "adapter_name": skill.name}
    data = {"recipe": str(recipe), "batch_size": BATCH_SIZE, "cache_mb": 128, "min_scale": 0.85}
    return tour.fit(name, tour.training(name, MODULE, arguments, DATA, data, minutes=MINUTES), inputs=[manifest])


def recipes(tour: Tour, parents: Mapping[Skill, Path]) -> Iterator[tuple[str, dict[str, Any]]]:
    """What is tried of each method: its name with a number, and the YAML of `mmllm merge`."""
    paths = [f"{folder}+{skill.name}" for skill, folder in parents.items()]
    tried: dict[str, list[dict[str, Any]]] = {
        "linear": [{"weight": 1.0}],
        "task_arithmetic": [{"weight": weight} for weight in (0.6, 0.8, 1.0)],
        "ties": [{"weight": 1.0, "density": density, "lambda": scale} for density, scale in ((0.3, 1.0), (0.6, 1.0))],
        "dare_linear": [{"weight": weight, "density": 0.7} for weight in (0.8, 1.0)],
        "dare_ties": [{"weight": weight, "density": 0.7} for weight in (0.8, 1.0)],
        "della": [{"weight": 1.0, "density": 0.6, "lambda": scale} for scale in (0.8, 1.0)],
        "model_stock": [{}],
        "svd": [{"weight": weight} for weight in (0.8, 1.0)],
        "cat": [{"weight": weight} for weight in (0.8, 1.0)],
    }
    for method, settings in tried.items():
        for number, parameters in enumerate(settings, 1):
            values: dict[str, Any] = {"merge_method": method}
            if method != "linear":
                values["base_model"] = str(tour.model)
            values |= {"models": [{"model": path} for path in paths], "parameters": parameters, "seed": tour.seed}
            if method in ("svd", "cat"):
                values |= {"adapter": "merged"}
            if not parameters:
                del values["parameters"]
            yield f"merge_{method}_{number}", values
    first, second = paths
    yield "merge_slerp_1", {
        "merge_method": "slerp", "base_model": first, "models": [{"model": second}], "parameters": {"t": 0.5},
    }  # fmt: skip


def merged(tour: Tour, name: str, values: Mapping[str, Any], inputs: list[Path]) -> tuple[Path, str | None]:
    """Runs `mmllm merge` unless its model is there; gives the folder, and its adapter where adapters were merged."""
    config, out = tour.out / "configs" / f"{name}.yaml", tour.out / "models" / name
    _write(config, values)
    if not _is_done(out, [config, *inputs]):
        shutil.rmtree(out, ignore_errors=True)
    tour.make(name, out, "merge", str(config), "--out", str(out), inputs=[config, *inputs])
    return out, values.get("adapter")


def evolve(
    tour: Tour,
    values: Mapping[str, Any],
    manifests: Mapping[Skill, Mapping[str, Path]],
    start: Scores,
    goal: Scores,
) -> Path:
    """Searches the weights of a merge, beginning at what was best so far; the share of the gains is what counts."""
    method = values["merge_method"]
    if method in ("linear", "model_stock", "slerp"):  # of whole models and without numbers: their changes are added
        parameters, method = {"weight": 0.7}, "task_arithmetic"
    else:
        parameters = dict(values["parameters"])
    tasks = [
        {"task": skill.task, "manifest": str(parts["val"]), "measure": skill.measure,
         **({"start": start[skill.name], "goal": goal[skill.name]} if goal[skill.name] != start[skill.name] else {})}
        for skill, parts in manifests.items()
    ]  # fmt: skip
    search = {
        "tasks": tasks, "objective": "least", "limit": min(VAL_ROWS, tour.limit or VAL_ROWS), "seed": tour.seed,
        "minutes": EVOLVE_MINUTES * tour.minutes / FULL_MINUTES, "layer_groups": 2, "max_weight": 1.5,
    }  # fmt: skip
    config, out = tour.out / "configs" / "merge_evolved.yaml", tour.out / "models" / "merge_evolved"
    models = [{"model": each["model"]} for each in values["models"]]
    if len(models) == 1:  # slerp, whose base is the other specialist
        models.insert(0, {"model": values["base_model"]})
    parents = [Path(each["model"].rpartition("+")[0]) for each in models]
    _write(config, {"merge_method": method, "base_model": str(tour.model), "models": models, "parameters": parameters,
                    "seed": tour.seed, "evolve": search})  # fmt: skip
    if not _is_done(out, [config, *parents]):
        shutil.rmtree(out, ignore_errors=True)
        if _is_newer([config, *parents], trace := out.with_name("merge_evolved.evolve.jsonl")):
            trace.unlink(missing_ok=True)
    return tour.make("merge_evolved", out, "merge", str(config), "--out", str(out), inputs=[config, *parents])


def _write(path: Path, values: Mapping[str, Any]) -> None:
    """Writes a merge's YAML unless it says the same already: then what was made of it stays newer."""
    text = yaml.safe_dump(dict(values), sort_keys=False)
    if not path.is_file() or path.read_text(encoding="utf-8") != text:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")


def _is_done(out: Path, inputs: list[Path]) -> bool:
    return (out / "config.json").is_file() and not _is_newer(inputs, out / "config.json")


def _is_newer(inputs: list[Path], made: Path) -> bool:
    """Whether what something was made of has changed since; a folder by its weights."""
    files = [path / "model.safetensors" if path.is_dir() else path for path in inputs]
    return not made.exists() or any(file.stat().st_mtime > made.stat().st_mtime for file in files)


def shares(scores: Scores, start: Scores, goal: Scores) -> Scores:
    """Of each skill how much of its specialist's gain a model has: 1 is all of it."""
    return {
        name: (score - start[name]) / (goal[name] - start[name]) if goal[name] > start[name] else 0.0
        for name, score in scores.items()
    }


def judged(scores: Scores, start: Scores, goal: Scores) -> dict[str, Any]:
    """A row of the table."""
    kept = shares(scores, start, goal)
    return {
        "scores": scores,
        "shares": kept,
        "least_share": min(kept.values()),
        "mean": sum(scores.values()) / len(scores),
    }


STAGE = MergeStage()
