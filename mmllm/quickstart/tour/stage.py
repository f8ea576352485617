"""What the stages of `mmllm posttrain-tour` share: the tour's folder, and how a command is run, skipped and noted.

A stage writes data, runs plain commands and reads their JSON; nothing that it does needs the tour. What a stage gives
back goes into `OUT/report.json` under its name, and these keys of it into the page alone:

- `examples`: a list of `{"group", "image", "audio", "segments", "prompt", "wanted", "answers": {model: text}}`, where
  all but `prompt` and `answers` may be missing;
- `plots`: a list of `{"title", "curves": {name: [[x, y], …]}}`;
- `notes`: sentences.
"""

from __future__ import annotations

import json
import os
import shlex
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import yaml
from rich.console import Console
from rich.markup import escape

from mmllm.quickstart import machine
from mmllm.quickstart.plan import write_yaml
from mmllm.quickstart.processes import Processes

RunCommand = Callable[[Sequence[str]], int]
PAGE_KEYS = ("examples", "plots", "notes")
"""Of what a stage gives back: shown on the page, and not in report.json."""
FULL_MINUTES = 5.0
NOTES = "tour.json"
"""In the tour's folder: its settings, the commands that have made something, the seconds of stages."""
LOG_STEPS = 20
TRIM_STEPS = 25


class CommandFailed(ValueError):
    """A command of the tour ended with an error, which it has printed itself."""


@dataclass(frozen=True)
class Tour:
    """Where a tour's things are, and how its commands are run."""

    model: Path
    """The folder of the model that it begins with."""
    data: Path
    """The folder of the run that trained it: `recipe.yaml`, `manifests/`, `data/`, `shards/`, `aligned/aligner`."""
    out: Path
    seed: int = 0
    minutes: float = FULL_MINUTES
    """Of each training that says nothing else, to which others are in proportion; less only to try the way out."""
    media: Path | None = None
    """Folder of data sets (`MMLLM_DATA`); None: scenes alone."""
    run_command: RunCommand | None = None
    """Runs a command line in this process, for tests; None: each is a process."""
    limit: int | None = None
    """Rows of each evaluation at most; None: all."""
    processes: Processes = field(default_factory=Processes, repr=False, compare=False)
    console: Console = field(
        default_factory=lambda: Console(highlight=False, soft_wrap=True), repr=False, compare=False
    )

    # ----------------------------------------------------------------------------------------------------- the run
    @property
    def recipe(self) -> Path:
        """The recipe that the model was trained on."""
        return self.data / "recipe.yaml"

    @property
    def test_manifest(self) -> Path:
        """The held-out rows of the run: captions, sounds, questions, texts."""
        return self.data / "manifests" / "test.jsonl"

    @property
    def judge(self) -> Path:
        """The aligner, which transcribes and shares nothing with the model."""
        return self.data / "aligned" / "aligner"

    @property
    def num_ranks(self) -> int:
        """Processes of a training."""
        return 1 if self.run_command is not None else machine.num_ranks(None, None)

    def replay_sources(self, share: float, kind: str | None = None) -> list[dict[str, Any]]:
        """The sources that the model was trained on, at their last weights.

        Args:
            share: what their weights sum to.
            kind: of the sources that are taken; None: all.
        """
        sources = yaml.safe_load(self.recipe.read_text(encoding="utf-8"))["sources"]
        sources = [source for source in sources if kind in (None, source["kind"])]
        weights = [source["weight_schedule"][-1][1] if "weight_schedule" in source else source["weight"]
                   for source in sources]  # fmt: skip
        kept = [{key: value for key, value in source.items() if key != "weight_schedule"} for source in sources]
        total = sum(weights)
        return [{**source, "weight": round(share * weight / total, 6)}
                for source, weight in zip(kept, weights, strict=True) if weight > 0]  # fmt: skip

    def replay_recipe(self) -> Path:
        """Writes `OUT/recipes/replay.yaml`: what the model was trained on at last, without its schedules."""
        return self.recipe_of(self.replay_sources(1.0), "replay")

    def recipe_of(self, sources: Sequence[Mapping[str, Any]], name: str) -> Path:
        """Writes `OUT/recipes/NAME.yaml`: these sources, and all else as the model was trained, but for its curriculum.

        Args:
            sources: as a recipe has them.
            name: of the recipe.
        """
        before = yaml.safe_load(self.recipe.read_text(encoding="utf-8"))
        kept = {key: value for key, value in before.items() if key not in ("curriculum", "sources")}
        return self.write_recipe(name, {**kept, "seed": self.seed, "sources": [dict(source) for source in sources]})

    # ------------------------------------------------------------------------------------------------------- files
    def write_rows(self, name: str, rows: Iterable[Mapping[str, Any]]) -> Path:
        """Writes `OUT/data/NAME.jsonl`, a row a line, anew."""
        return self.write_jsonl(self.out / "data" / f"{name}.jsonl", rows)

    def write_jsonl(self, path: Path, rows: Iterable[Mapping[str, Any]]) -> Path:
        """Writes rows to a file, a row a line, unless it holds them."""
        path.parent.mkdir(parents=True, exist_ok=True)
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        if not path.is_file() or path.read_text(encoding="utf-8") != text:  # else what was made of it stays newer
            path.write_text(text, encoding="utf-8")
        return path

    def write_recipe(self, name: str, recipe: Mapping[str, Any]) -> Path:
        """Writes `OUT/recipes/NAME.yaml`."""
        path = self.out / "recipes" / f"{name}.yaml"
        _write_changed(
            path, recipe, f"Written by `mmllm posttrain-tour`. See what it holds: mmllm data show --recipe {path}"
        )
        return path

    def training(
        self,
        name: str,
        module: str,
        module_args: Mapping[str, Any],
        data: str,
        data_args: Mapping[str, Any],
        minutes: float | None = None,
        max_steps: int | None = None,
        callbacks: Sequence[Mapping[str, Any]] = (),
        num_ranks: int | None = None,
    ) -> dict[str, Any]:
        """The config of a training on this machine, for `fit`.

        Args:
            name: of the training; its model goes to `OUT/models/NAME`.
            module: class path of the module.
            module_args: its arguments; `init_from` (the tour's model), `out` and `max_seconds` are set unless given.
            data: class path of the data module.
            data_args: its arguments.
            minutes: that it takes in a tour of the usual minutes, in others in proportion; None: the tour's.
            max_steps: that it takes at most; None: the clock alone ends it.
            callbacks: beside the progress bar and the one that gives free memory back.
            num_ranks: of DDP; None: the machine's.
        """
        ranks = self.num_ranks if num_ranks is None else num_ranks
        logger = {"class_path": "lightning.pytorch.loggers.CSVLogger",
                  "init_args": {"save_dir": str(self.out / "logs"), "name": name, "version": "",
                                "flush_logs_every_n_steps": 1}}  # fmt: skip
        trainer: dict[str, Any] = {
            "accelerator": "cpu",
            "precision": "32-true",
            "devices": ranks,
            **({"strategy": "ddp"} if ranks > 1 else {}),
            "max_steps": -1 if max_steps is None else max_steps,
            "gradient_clip_val": 1.0,
            "log_every_n_steps": LOG_STEPS,
            "enable_checkpointing": False,
            "logger": [logger],
            "callbacks": [
                {"class_path": "mmllm.training.progress.Progress"},
                {"class_path": "mmllm.training.heap.TrimHeap", "init_args": {"every_steps": TRIM_STEPS}},
                *(dict(callback) for callback in callbacks),
            ],
        }
        seconds = 60.0 * self.minutes * (1.0 if minutes is None else minutes / FULL_MINUTES)
        defaults = {"init_from": str(self.model), "out": str(self.out / "models" / name), "max_seconds": seconds}
        return {
            "seed_everything": self.seed,
            "trainer": trainer,
            "model": {"class_path": module, "init_args": {**defaults, **module_args}},
            "data": {"class_path": data, "init_args": dict(data_args)},
        }

    # ---------------------------------------------------------------------------------------------------- commands
    def run(self, *command: str) -> None:
        """Prints `$ mmllm COMMAND` and runs it, in the process that short commands share.

        Raises:
            CommandFailed: it ended with an error.
        """
        self._run(command, num_threads=0)

    def make(self, name: str, makes: Path, *command: str, inputs: Sequence[Path] = ()) -> Path:
        """Runs a command unless what it makes is there, by the same command and newer than what it was made of.

        Args:
            name: of the command, in `OUT/tour.json`.
            makes: the file or folder that it writes.
            command: the command line.
            inputs: files or folders that it reads.

        Returns:
            `makes`.

        Raises:
            CommandFailed: it ended with an error, or without making it.
        """
        return self._make(name, makes, command, inputs, num_threads=0)

    def fit(self, name: str, config: Mapping[str, Any], inputs: Sequence[Path] = ()) -> Path:
        """Writes `OUT/configs/NAME.yaml` and runs `mmllm fit` on it, unless its model is there.

        Args:
            name: of the training; its module's `out` is `OUT/models/NAME`, as `training` says it.
            config: see `training`.
            inputs: what it is trained on, when that may change while the config doesn't.

        Returns:
            The model's folder.

        Raises:
            CommandFailed: the training ended with an error, or without its model.
        """
        path, model = self.out / "configs" / f"{name}.yaml", self.out / "models" / name
        _write_changed(path, config, f"Written by `mmllm posttrain-tour`. Run again: mmllm fit -c {path} --overwrite")
        num_threads = 1 if config["trainer"].get("devices", 1) > 1 else 0
        command = ("fit", "-c", str(path), "--overwrite")
        return self._make(f"fit {name}", model, command, [path, self.model, *inputs], num_threads)

    def eval_json(self, name: str, model: Path, task: str, manifest: Path, **options: Any) -> dict[str, Any]:
        """Runs `mmllm eval`, unless its JSON is there and newer than the model and the rows.

        Args:
            name: of the evaluation; it goes to `OUT/eval/NAME.json`.
            model: a model folder.
            task: as `mmllm eval --task` has it.
            manifest: the rows.
            options: further ones of `mmllm eval`, such as `adapter="lora"` or `limit=100`.

        Returns:
            What `--json` wrote: `{"task", TASK: scores, "predictions"}`.
        """
        path = self.out / "eval" / f"{name}.json"
        given = {"limit": self.limit, "seed": self.seed, **options}
        flags = [text for key, value in given.items() if value is not None for text in (f"--{key}", str(value))]
        command = ("eval", "--model", str(model), "--task", task, "--manifest", str(manifest), "--json", str(path))
        self.make(f"eval {name}", path, *command, *flags, inputs=[model, manifest])
        return json.loads(path.read_text(encoding="utf-8"))

    def title(self, name: str) -> None:
        """Prints a stage's name above its commands."""
        self.console.print(f"\n[bold]{escape(name)}[/bold]")

    def say(self, text: str) -> None:
        """Prints a line."""
        self.console.print(escape(text))

    def _make(self, name: str, makes: Path, command: Sequence[str], inputs: Sequence[Path], num_threads: int) -> Path:
        line, done = shlex.join(["mmllm", *command]), self.commands.get(name, {})
        changed_at = max(map(_changed_at, inputs), default=0.0)
        if done.get("command") == line and makes.exists() and done["begun_at"] >= changed_at:
            self.console.print(f"[dim]done before: {escape(line)}[/dim]")
            return makes
        begun_at, begun = time.time(), time.monotonic()
        makes.parent.mkdir(parents=True, exist_ok=True)
        self._run(command, num_threads)
        if not makes.exists():
            raise CommandFailed(f"`{line}` ended without writing {makes}; read what it says above")
        seconds = round(time.monotonic() - begun, 2)
        self._note("commands", name, {"command": line, "begun_at": begun_at, "seconds": seconds})
        return makes

    # ------------------------------------------------------------------------------------------------------- notes
    @property
    def commands(self) -> dict[str, dict[str, Any]]:
        """Of each command that has made something: `command`, when it began, and its seconds."""
        return self._notes().get("commands", {})

    def seconds_of(self, stage: str) -> float:
        """Wall time that a stage has taken, before it was stopped too."""
        return self._notes().get("seconds", {}).get(stage, 0.0)

    def note_seconds(self, stage: str, seconds: float) -> float:
        """Keeps a stage's wall time and gives it."""
        self._note("seconds", stage, round(seconds, 2))
        return round(seconds, 2)

    def noted_settings(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """The settings that the tour was begun with: these, where it begins now."""
        if "settings" not in self._notes():
            for key, value in settings.items():
                self._note("settings", key, value)
        return self._notes()["settings"]

    def _notes(self) -> dict[str, Any]:
        path = self.out / NOTES
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}

    def _note(self, group: str, key: str, value: Any) -> None:
        notes = self._notes()
        notes.setdefault(group, {})[key] = value
        self.out.mkdir(parents=True, exist_ok=True)
        new = self.out / f"{NOTES}.new"
        new.write_text(json.dumps(notes, indent=1) + "\n", encoding="utf-8")
        os.replace(new, self.out / NOTES)

    def _run(self, command: Sequence[str], num_threads: int) -> None:
        line = shlex.join(["mmllm", *command])
        self.console.print(f"[green]$ {escape(line)}[/green]")
        if self.run_command is not None:
            code = self.run_command(command)
        elif num_threads:
            code = self.processes.run(command, num_threads)
        else:
            code = self.processes.run_shared(command)
        if code in (130, -2):
            raise KeyboardInterrupt
        if code:
            raise CommandFailed(
                f"`{line}` failed; mend what it says above and run the tour again, or that command alone"
            )


class Stage(Protocol):
    """One stage: what `mmllm/quickstart/tour/stage_NAME.py` gives as `STAGE`."""

    @property
    def name(self) -> str:
        """As `--stages` and report.json call it."""
        ...

    def run(self, tour: Tour) -> dict[str, Any]:
        """Does the stage and gives its keys of report.json, with what the page shows beside them."""
        ...


def _write_changed(path: Path, values: Mapping[str, Any], header: str) -> None:
    """Writes a YAML file unless it says the same already: then what was made of it stays newer."""
    new = path.with_name(f"{path.name}.new")
    write_yaml(new, values, header)
    if path.is_file() and path.read_text(encoding="utf-8") == new.read_text(encoding="utf-8"):
        new.unlink()
    else:
        os.replace(new, path)


def _changed_at(path: Path) -> float:
    """When a file, or a file of a model folder, was changed last; 0 where it isn't there."""
    if path.is_dir():
        weights = path / "model.safetensors"
        return weights.stat().st_mtime if weights.is_file() else path.stat().st_mtime
    return path.stat().st_mtime if path.exists() else 0.0
