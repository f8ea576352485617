"""`mmllm scaling sweep`: says what the trainings cost, runs those that are not done, and writes their points.

A run is a folder. `result.json` in it says that it is done; a run that was ended begins anew, so a kill loses one.
"""

from __future__ import annotations

import copy
import json
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from mmllm.checkout import commit
from mmllm.model.multimodal import MultimodalModel
from mmllm.quickstart.plan import write_yaml
from mmllm.quickstart.processes import Processes
from mmllm.studies.at_once import run_at_once
from mmllm.studies.commands import call, measured
from mmllm.studies.lengths import GUESSED_STEPS, Length, read_training, until, write_files
from mmllm.studies.measures import Measure
from mmllm.studies.run import alone, check_manifests, make_data, run_once
from mmllm.studies.scaling import check_points
from mmllm.studies.scaling_grid import Run, Sweep, load_sweep
from mmllm.studies.scaling_heldout import heldout_data, heldout_loss
from mmllm.studies.scaling_points import ONE_EPOCH
from mmllm.studies.settings import Settings, filled, for_one_process, put, put_all, read_values
from mmllm.training.estimate import model_config
from mmllm.training.parts import flops_of

RESULT, SWEEP, POINTS, MODEL, HELDOUT = "result.json", "sweep.json", "points.jsonl", "model", "heldout.yaml"
_TRAINING_FLOPS = 6
_NAME = "train"


@dataclass(frozen=True)
class Counted:
    """What a run will be, before it is trained.

    Attributes:
        parameters: that a token passes.
        total_parameters: all.
        embedding_parameters: of them those of embedding and head.
        length: steps, documents, tokens and operations.
        unique_tokens: of the documents, each counted once.
        config: the file.
        lr: learning rates by their keys.
    """

    parameters: int
    total_parameters: int
    embedding_parameters: int
    length: Length
    unique_tokens: int
    config: Path
    lr: dict[str, float]

    @property
    def epochs(self) -> float:
        """How often the documents are gone through."""
        return self.length.tokens / self.unique_tokens


class Sweeper:
    """Runs the trainings of one sweep.

    Args:
        sweep: what is swept.
        out: its folder.
        num_threads: of each training.
        keeps_models: models stay; else they are removed when they are scored.
    """

    def __init__(self, sweep: Sweep, out: Path, num_threads: int = 1, keeps_models: bool = False) -> None:
        # Absolute: a thread that reads a config changes the working directory of all, and their processes begin in it.
        self.sweep, self.out = sweep, out.absolute()
        self._num_threads, self._keeps_models = num_threads, keeps_models
        self._data = Path(sweep.data.folder).absolute()
        self._config = read_values(sweep.config, self._data, "config")
        self._recipe = read_values(sweep.recipe, self._data, "recipe")
        self.heldout = (
            Path(filled(sweep.heldout, self.places)) if isinstance(sweep.heldout, str) else self.out / HELDOUT
        )
        self._processes, self._is_stopped = Processes(), False

    def stop(self) -> None:
        """Ends what runs, from another thread; nothing begins then."""
        self._is_stopped = True
        self._processes.end_all()

    @property
    def places(self) -> dict[str, str]:
        """What stands for `{data}` and `{prepared}`."""
        return {"data": str(self._data), "prepared": str(self.out / "prepared")}

    def check(self) -> None:
        """Refuses files that aren't there.

        Raises:
            FileNotFoundError: there is no recipe of what is held out, or no manifest of a measure.
        """
        check_manifests(self.sweep.measures, self._data, self.sweep.seeds)
        is_given = isinstance(self.sweep.heldout, str) and "{prepared}" not in self.sweep.heldout
        if is_given and not self.heldout.is_file():
            raise FileNotFoundError(
                f"heldout is {self.heldout}, and no recipe is there; give one of held-out documents"
            )

    def prepare(self) -> Iterator[str]:
        """Makes what is held out, if that isn't done by the same commands; gives lines to print.

        Raises:
            ValueError: a command failed, or nothing is held out.
        """
        if self.sweep.prepare:
            told, commands = self.out / "prepared.json", filled(list(self.sweep.prepare), self.places)
            if not told.is_file() or json.loads(told.read_text(encoding="utf-8")) != commands:
                shutil.rmtree(self.places["prepared"], ignore_errors=True)
                told.write_text(json.dumps(commands) + "\n", encoding="utf-8")
            yield from run_once(Path(self.places["prepared"]), self.sweep.prepare, self.places, "sweep")
        if not isinstance(self.sweep.heldout, str):
            write_yaml(self.heldout, filled(self.sweep.heldout, self.places), "Written by `mmllm scaling sweep`.")
        try:
            heldout_data(self.heldout, self.sweep.num_heldout_sequences)
        except (FileNotFoundError, ValueError) as error:
            raise ValueError(f"heldout: {error}") from error

    def folder(self, run: Run) -> Path:
        """Where a run lies."""
        return self.out / "runs" / run.name

    def done(self) -> list[dict[str, Any]]:
        """The points of all runs that are done."""
        paths = [self.folder(run) / RESULT for run in self.sweep.runs()]
        return [json.loads(path.read_text(encoding="utf-8")) for path in paths if path.is_file()]

    # ---- before anything runs

    def count(self, run: Run, folder: Path) -> Counted:
        """Writes a run's config and recipe into a folder, and counts what it will be.

        Raises:
            ValueError: a key is unknown or has a wrong value, or the documents end before.
        """
        settings = self.settings(run, self.folder(run))
        module, data, accumulated = read_training(write_files(settings.with_steps(GUESSED_STEPS), folder, _NAME))
        config = model_config(module)
        with torch.device("meta"):
            model = MultimodalModel(config)
        active, total = model.num_active_parameters(), model.num_parameters()
        lr = self._scale_rates(settings.config, self.sweep.rate.factor(active) * run.rate)
        amount = run.amount / (_TRAINING_FLOPS * active) if run.is_flops else run.amount
        flops = flops_of(config, module.optimizer, module.adapter)
        length = until(flops, data.plan, accumulated, "tokens", amount)
        if settings.with_steps(length.steps).recipe != settings.with_steps(GUESSED_STEPS).recipe:
            # the plan depends on the horizon, which now is nearly right
            _, data, _ = read_training(write_files(settings.with_steps(length.steps), folder, _NAME))
            length = until(flops, data.plan, accumulated, "tokens", amount)
        path = write_files(settings.with_steps(length.steps), folder, _NAME)
        unique = sum(source.num_epoch_tokens for source in data.plan.sources)
        parts = (model.decoder.embed_tokens, model.decoder.lm_head)
        embedding = {parameter for part in parts for parameter in part.parameters()}
        return Counted(active, total, sum(each.numel() for each in embedding), length, unique, path, lr)

    def settings(self, run: Run, folder: Path) -> Settings:
        """A run's config and recipe, without a horizon."""
        sweep, variant = self.sweep, self.sweep.variants[run.variant]
        config, recipe = copy.deepcopy(self._config), copy.deepcopy(self._recipe)
        put_all(config, sweep.set, "set")
        put_all(config, variant.config, f"variants.{run.variant}.config")
        put_all(config, sweep.size(run), f"sizes.{run.size}")
        removed = {key: None for key, value in variant.config.items() if value is None}
        put_all(config, removed, f"variants.{run.variant}.config")  # dense ones have no experts, of whatever size
        put_all(recipe, sweep.set_recipe, "set_recipe")
        put_all(recipe, variant.recipe, f"variants.{run.variant}.recipe")
        recipe["seed"] = run.seed
        for source in recipe["sources"]:
            if run.share < 1:
                source["share"] = run.share * (source.get("share") or 1.0)
        put(config, "seed_everything", run.seed)
        put(config, "model.init_args.out", str(folder / MODEL))
        if run.batch_size is not None:
            put(config, "data.init_args.batch_size", run.batch_size)
        for_one_process(config, folder, _NAME)
        return Settings(filled(config, self.places), filled(recipe, self.places))

    def _scale_rates(self, config: dict[str, Any], factor: float) -> dict[str, float]:
        """Sets the learning rates of a size; gives them."""
        rates = {}
        for key in self.sweep.rate.keys:
            value: Any = config
            for part in key.split("."):
                value = value.get(part) if isinstance(value, dict) else None
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise ValueError(
                    f"rate.keys names {key}, and the config has {value!r} there; name a learning rate of it"
                )
            rates[key] = float(f"{value * factor:.6g}")
            put(config, key, rates[key])
        return rates

    # ---- a run

    def run(self, run: Run) -> dict[str, Any]:
        """Trains and scores; gives the run's point.

        Raises:
            ValueError: a command of it failed.
        """
        folder = self.folder(run)
        if folder.exists():
            shutil.rmtree(folder)
        folder.mkdir(parents=True)
        counted, begun = self.count(run, folder), time.monotonic()
        try:
            self._call(["fit", "-c", str(counted.config)], folder, run)
            minutes = (time.monotonic() - begun) / 60
            scores = {measure.name: self._score(measure, folder, run) for measure in self.sweep.measures}
        finally:
            self._processes.end_all()
        heldout = heldout_loss(folder / MODEL, self.heldout, self.sweep.num_heldout_sequences)
        point = self._point(run, counted) | {
            "loss": heldout.loss,
            **{f"loss_{name}": value for name, value in heldout.by_task.items()},
            "loss_by_source": heldout.by_source,
            "scores": scores,
            "minutes": minutes,
            "commit": commit(),
        }
        unfinished = folder / f".{RESULT}"
        unfinished.write_text(json.dumps(point, indent=1) + "\n", encoding="utf-8")
        unfinished.replace(folder / RESULT)
        if not self._keeps_models:
            shutil.rmtree(folder / MODEL)
        return point

    def _point(self, run: Run, counted: Counted) -> dict[str, Any]:
        return {
            "parameters": counted.parameters,
            "tokens": counted.length.tokens,
            "total_parameters": counted.total_parameters,
            "embedding_parameters": counted.embedding_parameters,
            "flops": counted.length.flops,
            "steps": counted.length.steps,
            "unique_tokens": counted.unique_tokens,
            "epochs": counted.epochs,
            "lr": next(iter(counted.lr.values())),
            **{key: value for key, value in asdict(run).items() if key not in ("amount", "is_flops", "is_check")},
            "check": run.is_check,
        }

    def _score(self, measure: Measure, folder: Path, run: Run) -> float:
        path = folder / f"{measure.name}.json"
        self._call(filled(measure.command(str(folder / MODEL), str(path)), self.places), folder, run)
        return measured(measure, path)[0]

    def _call(self, command: Sequence[str], folder: Path, run: Run) -> None:
        if self._is_stopped:
            raise KeyboardInterrupt
        call(self._processes, command, folder, run.name, self._num_threads)


def run_sweep(
    plan: str | Path,
    out: str | Path,
    num_threads: int = 1,
    keeps_models: bool = False,
    is_dry: bool = False,
    num_at_once: int = 1,
    data: str | None = None,
) -> Iterator[str]:
    """Runs what of a sweep is not done; gives lines to print while it goes on.

    Args:
        plan: the sweep's YAML, or the name of a shipped one.
        out: its folder.
        num_threads: of each training.
        keeps_models: models stay.
        is_dry: costs are told; nothing runs, and nothing is left.
        num_at_once: runs at once.
        data: a folder that is there, such as a quickstart's, in the place of the sweep's own.

    Raises:
        FileNotFoundError: it is dry, and the data isn't there.
        ValueError: the plan, or a run of it, can't be, or another process is at its folder: said before anything is
            trained; or a command failed.
    """
    sweep, values = load_sweep(plan, data)
    out = Path(out)
    _check_folder(out, sweep, values)
    if is_dry:
        if not Path(sweep.data.folder).exists():
            raise FileNotFoundError(
                f"{sweep.data.folder}: the sweep's data isn't there; a run makes it, or give --data"
            )
        sweeper = Sweeper(sweep, out, num_threads, keeps_models)
        sweeper.check()
        yield from _costs(sweeper, num_at_once)
        return
    out.mkdir(parents=True, exist_ok=True)
    with alone(out, "scaling sweep"):
        (out / SWEEP).write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
        yield from make_data(sweep.data, "sweep")
        sweeper = Sweeper(sweep, out, num_threads, keeps_models)
        sweeper.check()
        yield from sweeper.prepare()
        yield from _costs(sweeper, num_at_once)
        waiting = [run for run in sweep.runs() if not (sweeper.folder(run) / RESULT).is_file()]
        for run, point in run_at_once(waiting, lambda: Sweeper(sweep, out, num_threads, keeps_models), num_at_once):
            assert point is not None
            _write_points(sweeper)
            yield f"  {run.name}: loss {point['loss']:.4f} ({point['steps']:,} steps, {point['minutes']:.1f} min)"
        _write_points(sweeper)
        yield f"{out / POINTS}: {len(sweeper.done())} points"


def _check_folder(out: Path, sweep: Sweep, values: dict[str, Any]) -> None:
    """Refuses a folder of another sweep, or of one that has more runs; more sizes, lengths or seeds only add runs."""
    kept = out / SWEEP
    adding = ("title", "sizes", "tokens", "flops", "shares", "rates", "batch_sizes", "seeds", "check", "variants")
    if kept.is_file() and any(out.glob(f"runs/*/{RESULT}")):
        before = json.loads(kept.read_text(encoding="utf-8"))
        changed = [key for key in {*before, *values} if key not in adding and before.get(key) != values.get(key)]
        for group in ("sizes", "variants"):
            changed += _changed(before.get(group), values.get(group), group)
        checks = [(each.get("check") or {}).get("sizes") for each in (before, values)]
        changed += _changed(checks[0], checks[1], "check.sizes")
        if changed:
            raise ValueError(
                f"{out} holds runs of this sweep with another {', '.join(sorted(changed))}; they can't be put on one "
                f"curve: give another folder, or remove it"
            )
    names = {run.name for run in sweep.runs()}
    gone = sorted(path.parent.name for path in out.glob(f"runs/*/{RESULT}") if path.parent.name not in names)
    if gone:
        raise ValueError(
            f"{out} holds {len(gone)} runs that this sweep doesn't have ({gone[0]}), which {POINTS} would lose: give "
            f"another folder"
        )


def _changed(before: dict[str, Any] | None, after: dict[str, Any] | None, where: str) -> list[str]:
    """Names that have other keys than they had."""
    before, after = before or {}, after or {}
    return [f"{where}.{name}" for name, keys in before.items() if name in after and after[name] != keys]


def _costs(sweeper: Sweeper, num_at_once: int) -> Iterator[str]:
    """What each run will be; whether they can tell a law; how long they take, by those that are done."""
    runs = sweeper.sweep.runs()
    counted: dict[str, Counted] = {}
    with TemporaryDirectory() as trial:
        for run in runs:
            one = replace(run, seed=sweeper.sweep.seeds[0])
            if one.name not in counted:
                counted[one.name] = found = sweeper.count(one, Path(trial) / one.name)
                rate = next(iter(found.lr.values()))
                yield (
                    f"  {one.name}: {found.parameters:,} of {found.total_parameters:,} parameters, "
                    f"{found.length.tokens:,} tokens ({found.epochs:.2g} epochs), {found.length.steps:,} steps, "
                    f"{found.length.flops:.3g} FLOPs, rate {rate:.3g}{', check' if one.is_check else ''}"
                )
    if sweeper.sweep.is_law:
        _check_grid(sweeper.sweep, counted)
    flops = {run.name: counted[replace(run, seed=sweeper.sweep.seeds[0]).name].length.flops for run in runs}
    done = sweeper.done()
    left = sum(flops[run.name] for run in runs if not (sweeper.folder(run) / RESULT).is_file())
    line = f"{len(runs)} runs, {len(done)} done; the rest need {left:.3g} FLOPs"
    if done:
        speed = sum(point["flops"] for point in done) / sum(point["minutes"] for point in done)
        line += f", about {left / speed / num_at_once:,.0f} minutes at the speed so far"
    elif left:
        line += "; how long that takes is told after the first: start again to see it"
    yield line


def _check_grid(sweep: Sweep, counted: dict[str, Counted]) -> None:
    """Refuses a grid that no law can be told from.

    Raises:
        ValueError: it is so.
    """
    for variant in sweep.variants:
        runs = [run for run in sweep.runs() if run.variant == variant and not run.is_check]
        planned = [counted[replace(run, seed=sweep.seeds[0]).name] for run in runs]
        fitted = [one for one in planned if one.epochs <= ONE_EPOCH]
        repeated = len(planned) - len(fitted)
        if not fitted:
            raise ValueError(
                f"variant {variant}: all {repeated} runs go through the documents up to "
                f"{max(one.epochs for one in planned):.2g} times, and fits leave out what repeats them; lower tokens, "
                f"give more documents, or set is_law: false, where no law is to be fitted"
            )
        try:
            check_points([one.parameters for one in fitted], [one.length.tokens for one in fitted])
        except ValueError as error:
            told = f" ({repeated} of {len(planned)} runs repeat documents: fits leave them out)" if repeated else ""
            raise ValueError(
                f"variant {variant}: {error}{told}; or set is_law: false, where no law is to be fitted"
            ) from None


def _write_points(sweeper: Sweeper) -> None:
    lines = "".join(json.dumps(point) + "\n" for point in sweeper.done())
    unfinished = sweeper.out / f".{POINTS}"
    unfinished.write_text(lines, encoding="utf-8")
    unfinished.replace(sweeper.out / POINTS)
