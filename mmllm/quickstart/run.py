"""`mmllm quickstart`: from manifests, or from nothing, to a trained model and a report. Every stage is a command.

A stage that is done is noted in `DIR/quickstart.json`; run again, quickstart goes on with the first that is not.
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.markup import escape

from mmllm.checkout import commit
from mmllm.evaluation.results import load_result
from mmllm.quickstart.budget import CLIP_SHARE, CODEC_SHARE, Budget, task_seconds
from mmllm.quickstart.monitor import MemoryMonitor
from mmllm.quickstart.plan import (
    OUTPUT_OF_STAGE,
    STATE_FILE,
    Choices,
    Contents,
    choose,
    evaluation_tasks,
    read_contents,
    read_json,
    recipe_dict,
    stage_config,
    write_yaml,
)
from mmllm.quickstart.processes import Processes, terminated_as_interrupt
from mmllm.ticker import clock

RunCommand = Callable[[Sequence[str]], int]
FORMAT_VERSION = 1
CODEC_COPIES = 3
"""Altered copies of each sound, at most, from which the codec learns voices other than the few that there are."""
MAX_WORKERS = 4
MAX_RANKS = 4
RANK_BYTES = 2 * 2**30
"""Free memory that a training of more than two ranks needs for each."""
NVIDIA_GPU = Path("/dev/nvidia0")
"""Asked for in place of torch, which this process does not import: that would take memory beside the trainings."""
SAVE_SECONDS = 5.0
"""How often the clock is saved while a stage runs: so much of it is lost at most when the process is killed."""


class StageFailed(ValueError):
    """A stage's command ended with an error, which it has printed itself."""


def quickstart(
    run_command: RunCommand,
    out: str,
    train: Sequence[str] = (),
    test: Sequence[str] = (),
    holdout: str | None = None,
    minutes: float | None = None,
    seed: int = 0,
    max_steps: int | None = None,
    max_bad_fraction: float | None = None,
    form: str = "auto",
    media: str | None = None,
    columns: Sequence[str] = (),
) -> dict[str, Any]:
    """The whole way on one machine.

    Args:
        run_command: runs a command line (`["data", "build", …]`) in this process and gives its exit code; used with
            `max_steps`, where processes of their own would take longer than their work.
        out: the run's folder.
        train: manifests, or data of other forms; none: the demo's own data.
        test: manifests of held-out rows.
        holdout: `KEY=VALUE` or a fraction, where there are no test manifests.
        minutes: wall time at most, evaluation included; None: the demo's fixed steps. A run that is continued may be
            given more, until its decoder is trained.
        seed: of data, order and weights.
        max_steps: of each training at most (with a small demo data set): for trying the whole way out.
        max_bad_fraction: more unusable rows of a manifest than this are an error; None: the commands' own bound.
        form: of `train` and `test`; "auto": told from each.
        media: what their paths are relative to; by default each input's folder.
        columns: what their columns are called here, as `--columns` says it.

    Returns:
        What report.json holds.

    Raises:
        ValueError: the arguments contradict each other or what `out` already holds.
        StageFailed: a stage failed.
    """
    if (test or holdout) and not train:
        raise ValueError("--test and --holdout need --train; without it quickstart makes its own data")
    if minutes is not None and minutes <= 0:
        raise ValueError(f"--minutes is {minutes}; give a positive number")
    if max_steps is not None and max_steps < 1:
        raise ValueError(f"--max_steps is {max_steps}; give at least 1")
    settings = {"train": list(train), "test": list(test), "holdout": holdout, "minutes": minutes, "seed": seed,
                "max_steps": max_steps, "max_bad_fraction": max_bad_fraction}  # fmt: skip
    given = {"format": form if form != "auto" else None, "media": media, "columns": list(columns) or None}
    settings |= {key: value for key, value in given.items() if value is not None}
    run = _Run(Path(out), settings, run_command)
    with MemoryMonitor(run.save_now_and_then) as memory, terminated_as_interrupt():
        run.memory = memory
        try:
            return run.all_stages()
        finally:
            run.processes.end_all()


class _Run:
    """One run's folder, clock and stages."""

    def __init__(self, out: Path, settings: dict[str, Any], run_command: RunCommand) -> None:
        self.out, self.settings, self.run_command = out, settings, run_command
        self.console = Console(highlight=False, soft_wrap=True)
        self.memory: MemoryMonitor | None = None
        out.mkdir(parents=True, exist_ok=True)
        saved = read_json(out / STATE_FILE)
        self.stages: list[dict[str, Any]] = saved.get("stages", [])
        if self.stages:
            self._check_settings(saved["settings"])
        self.seconds_before = float(saved.get("seconds", 0.0))
        self.peak_before = int(saved.get("peak_rss_bytes", 0))
        self.model: list[int] | None = saved.get("model")
        """Time and size of the weights that were evaluated."""
        self.is_finished = bool(saved.get("finished", False))
        """All is done but the report, which may be written again: time and memory are no longer counted."""
        self.num_processes = num_ranks(settings["minutes"], settings["max_steps"])
        self.started = self.saved_at = time.monotonic()
        self.processes = Processes()
        self.tasks: dict[str, list[int]] = {}
        self.lock = threading.Lock()

    def _check_settings(self, before: dict[str, Any]) -> None:
        """Refuses to go on with a run of other settings; only `minutes` may grow, until the decoder is trained."""
        changed = [key for key in {**before, **self.settings} if before.get(key) != self.settings.get(key)]
        old, new = before.get("minutes"), self.settings["minutes"]
        has_more_time = old is not None and new is not None and new > old and not self.is_done("fit decoder")
        if changed and not (changed == ["minutes"] and has_more_time):
            only = "; minutes may only grow, and only until the decoder is trained" if changed == ["minutes"] else ""
            raise ValueError(
                f"{self.out} holds a run with other settings ({', '.join(changed)} differ{only}); give another --out, "
                f"or remove it"
            )

    # ------------------------------------------------------------------------------------------------------- clock
    @property
    def is_demo(self) -> bool:
        return not self.settings["train"]

    @property
    def bad_rows(self) -> list[str]:
        """The option that bounds unusable rows, where it was given."""
        bound = self.settings["max_bad_fraction"]
        return [] if bound is None else ["--max_bad_fraction", str(bound)]

    @property
    def budget(self) -> Budget:
        return Budget(self.settings["minutes"], self.settings["max_steps"], self.is_demo, self.num_processes)

    @property
    def seconds(self) -> float:
        """Wall time so far, earlier parts of this run included."""
        return self.seconds_before + (0.0 if self.is_finished else time.monotonic() - self.started)

    @property
    def peak_rss_bytes(self) -> int:
        """Memory at the most, in earlier parts of this run as well."""
        now = 0 if self.is_finished or self.memory is None else self.memory.peak_rss_bytes
        return max(now, self.peak_before)

    @property
    def seconds_left(self) -> float | None:
        minutes = self.settings["minutes"]
        return None if minutes is None else max(0.0, 60 * minutes - self.seconds)

    def save(self) -> None:
        new = self.out / f"{STATE_FILE}.new"
        with self.lock:
            state = {
                "format_version": FORMAT_VERSION,
                "settings": self.settings,
                "seconds": self.seconds,
                "peak_rss_bytes": self.peak_rss_bytes,
                "finished": self.is_finished,
                "model": self.model,
                "stages": self.stages,
            }
            new.write_text(json.dumps(state, indent=1) + "\n", encoding="utf-8")
            os.replace(new, self.out / STATE_FILE)
            self.saved_at = time.monotonic()

    def save_now_and_then(self) -> None:
        """Saves the clock, from another thread; what can't be written now is said when the stage ends."""
        if time.monotonic() - self.saved_at >= SAVE_SECONDS:
            with suppress(OSError):
                self.save()

    def _finish(self) -> None:
        """Stops counting time and memory."""
        with self.lock:
            self.seconds_before, self.peak_before = self.seconds, self.peak_rss_bytes
            self.is_finished = True
        self.save()

    def _warn(self, message: str) -> None:
        self.console.print(f"[yellow]{escape(message)}[/yellow]")

    # ------------------------------------------------------------------------------------------------------ stages
    def is_done(self, name: str) -> bool:
        return any(stage["name"] == name for stage in self.stages)

    def stage(self, name: str, *command: str, makes: Path | None = None, num_threads: int = 0) -> None:
        """Runs a command unless it is done.

        Args:
            name: of the stage.
            command: the command line.
            makes: what must be there when it is done.
            num_threads: run it as a process of its own with so many threads; 0: in the one that short commands share.
                Under DDP it must be one of its own, since it runs its own command line again for the other ranks.

        Raises:
            StageFailed: it ended with an error.
        """
        line = shlex.join(["mmllm", *command])
        if self.is_done(name):
            self.console.print(f"[dim]done before: {escape(line)}[/dim]")
            return
        left = self.seconds_left
        times = f"{clock(self.seconds)} gone" + (f", {clock(left)} left" if left is not None else "")
        self.console.print(f"\n[bold]{name}[/bold] [dim]({times})[/dim]\n[green]$ {escape(line)}[/green]")
        if self.is_finished:  # somebody struck this stage from those that are done
            self.is_finished, self.started = False, time.monotonic()
        begun, code_used = time.monotonic(), commit()
        self._run(name, command, num_threads)
        if makes is not None and not makes.exists():
            raise StageFailed(
                f"the stage {name!r} ended without writing {makes}; remove {self.out / 'checkpoints'} and run "
                f"quickstart again"
            )
        seconds = time.monotonic() - begun
        self.stages.append({"name": name, "seconds": seconds, "command": line, "commit": code_used})
        self.save()

    def _run(self, name: str, command: Sequence[str], num_threads: int = 0) -> None:
        """Runs a stage's command; see `stage`."""
        if num_threads:
            code = self.processes.run(command, num_threads)
        elif self.settings["max_steps"] is not None:
            code = self.run_command(command)
        else:
            code = self.processes.run_shared(command)
        if code in (130, -signal.SIGINT):
            raise KeyboardInterrupt
        if code:
            raise StageFailed(f"the stage {name!r} failed; mend what it says above and run quickstart again, or run "
                              f"`{shlex.join(['mmllm', *command])}` alone")  # fmt: skip

    def all_stages(self) -> dict[str, Any]:
        """Everything, in order."""
        if NVIDIA_GPU.exists():
            self._warn("trainings run on the CPU, which quickstart's configs are made for; `mmllm configs ls` lists "
                       "those for GPUs")  # fmt: skip
        try:
            self._data()
            contents = read_contents(self.out / "manifests")
            choices = choose(contents, self.is_demo)
            self.tasks, left_out = evaluation_tasks(self.out / "manifests" / "test.jsonl", contents)
            for message in left_out:
                self._warn(message)
            self._tokenizers(contents, choices)
            self._shards(contents, choices)
            if "caption" in contents.kinds:
                self._fit_clip(contents, choices)
            self._fit_decoder(contents, choices)
            self._forget_scores_of_another_model()
            self._evaluate(choices)
            return self._report()
        except KeyboardInterrupt:
            self._warn("stopped; run the same command again to go on")
            raise
        finally:
            self.save()

    def _data(self) -> None:
        train, test = self.settings["train"], self.settings["test"]
        seed = str(self.settings["seed"])
        if self.is_demo:
            share = ["--share", "0.01"] if self.settings["max_steps"] else []
            # In a process of its own, since it spawns others, which would run a caller's unguarded script again.
            self.stage("demo data", "demo-data", "--out", str(self.out / "data"), "--seed", seed, *share,
                       "--workers", str(num_workers()), num_threads=0 if share else 1)  # fmt: skip
            made = read_json(self.out / "data" / "manifests.json")
            for message in made["left_out"]:
                self._warn(message)
            train, test = made["train"], made["test"]
        command = ["data", "split", *train]
        for manifest in test:
            command += ["--test", manifest]
        if self.settings["holdout"] is not None:
            command += ["--holdout", self.settings["holdout"]]
        for key in ("format", "media"):
            if key in self.settings:
                command += [f"--{key}", self.settings[key]]
        for item in self.settings.get("columns", ()):
            command += ["--columns", item]
        self.stage("split", *command, "--out", str(self.out / "manifests"), "--seed", seed, *self.bad_rows)

    def _tokenizers(self, contents: Contents, choices: Choices) -> None:
        manifests = [str(self.out / "manifests" / f"train-{kind}.jsonl") for kind in contents.kinds]
        shape = ["--image_tokens", str(choices.image_tokens), "--image_size", str(choices.image_size),
                 "--audio_pool", str(choices.audio_pool)]  # fmt: skip
        self.stage("text tokenizer", "tokenizer", "train-text", *manifests, "--vocab_size", str(choices.vocab_size),
                   "--out", str(self.out / "text_tokenizer"), *shape)  # fmt: skip
        codec = []
        if contents.has_sounds:
            manifest = str(self.out / "manifests" / "train-audio.jsonl")
            copies = min(choices.perturb, CODEC_COPIES)
            perturb = ["--perturb", str(copies), "--seed", str(self.settings["seed"])] if copies else []
            self.stage("sound shards", "data", "build", manifest, "--out", str(self.out / "shards" / "sound"), *perturb,
                       "--workers", str(num_workers()), *self.bad_rows)  # fmt: skip
            self._fit_codec()
            codec = ["--codec", str(self.out / "codec")]
        self.stage("tokenizer", "tokenizer", "assemble", "--text", str(self.out / "text_tokenizer"), *codec,
                   "--out", str(self.out / "tokenizer"), *shape)  # fmt: skip

    def _shards(self, contents: Contents, choices: Choices) -> None:
        manifests = [str(self.out / "manifests" / f"train-{kind}.jsonl") for kind in contents.kinds]
        seed, shards = str(self.settings["seed"]), str(self.out / "shards" / "train")
        perturb = ["--perturb", str(choices.perturb)] if choices.perturb else []
        self.stage("shards", "data", "build", *manifests, "--out", shards, "--tokenizer", str(self.out / "tokenizer"),
                   *perturb, "--seed", seed, "--workers", str(num_workers()), *self.bad_rows)  # fmt: skip
        self.stage("index", "data", "index", shards, "--tokenizer", str(self.out / "tokenizer"))

    # ---------------------------------------------------------------------------------------------------- training
    def _fit(self, stage: str, overrides: dict[str, Any], share: float | None = None) -> None:
        """Writes a stage's config and fits it; a second call resumes from the stage's last checkpoint.

        Args:
            stage: its name.
            overrides: see `stage_config`.
            share: of the time that is left, with `--minutes`; None: all.
        """
        path = self.out / "configs" / f"{stage}.yaml"
        begun: list[str] = []
        if not self.is_done(f"fit {stage}"):
            length = self._length(stage, share)
            begun = self._begun(stage, length)
            config = stage_config(stage, self.out, {**length, **overrides})
            config["seed_everything"] = self.settings["seed"]
            config["trainer"]["devices"] = min(self.num_processes, config["data"]["init_args"]["batch_size"])
            if config["trainer"]["devices"] > 1:
                config["trainer"]["strategy"] = "ddp"
            if not (self.out / "manifests" / "val.jsonl").stat().st_size:
                callbacks = config["trainer"]["callbacks"]
                config["trainer"]["callbacks"] = [c for c in callbacks if not c["class_path"].endswith(".Samples")]
            write_yaml(path, config, f"Written by `mmllm quickstart`. Run again: mmllm fit -c {path} --overwrite")
        num_threads = 1 if self.num_processes > 1 else 0
        self.stage(f"fit {stage}", "fit", "-c", str(path), *begun, makes=self.out / OUTPUT_OF_STAGE[stage],
                   num_threads=num_threads)  # fmt: skip

    def _begun(self, stage: str, length: dict[str, Any]) -> list[str]:
        """The option for what a stage that was stopped left; what it has trained is added to its seconds."""
        checkpoint, logs = self.out / "checkpoints" / stage / "last.ckpt", self.out / "logs" / stage
        if checkpoint.is_file():
            num_steps, seconds = _trained(checkpoint)
            if not 0 < length["trainer.max_steps"] <= num_steps:  # else it was stopped while it wrote its model
                if length["model.init_args.max_seconds"] is not None:
                    length["model.init_args.max_seconds"] += seconds
                return ["--ckpt_path", str(checkpoint)]
        is_there = any(left.exists() for left in (checkpoint, logs, self.out / OUTPUT_OF_STAGE[stage]))
        return ["--overwrite"] if is_there else []

    def _length(self, stage: str, share: float | None = None) -> dict[str, Any]:
        return self.budget.training_length(stage, self.tasks, self.seconds_left, share)

    def _fit_codec(self) -> None:
        self._fit("codec", {"data.init_args.seed": self.settings["seed"]}, CODEC_SHARE)

    def _fit_clip(self, contents: Contents, choices: Choices) -> None:
        is_few = contents.num_captions < 10_000
        overrides = {
            "data.init_args.image_size": choices.image_size,
            "data.init_args.seed": self.settings["seed"],
            "data.init_args.min_scale": 0.6 if is_few else 0.85,
            "data.init_args.flip": not contents.names_sides,
        }
        self._fit("clip", overrides, CLIP_SHARE)

    def _fit_decoder(self, contents: Contents, choices: Choices) -> None:
        is_few = contents.num_captions < 10_000
        length = self._length("decoder")
        steps = max(1, length["trainer.max_steps"] // 2) if length["trainer.max_steps"] > 0 else None
        if not self.is_done("fit decoder"):
            recipe = recipe_dict(self.out, contents, choices, self.settings["seed"], steps)
            path = self.out / "recipe.yaml"
            show = f"mmllm data show --recipe {path} --batch_size {choices.batch_size} --step 0"
            write_yaml(path, recipe, f"Written by `mmllm quickstart`. See what it holds: {show}")
        overrides: dict[str, Any] = {
            **{f"model.init_args.decoder.{key}": value for key, value in choices.decoder.items()},
            "data.init_args.batch_size": choices.batch_size,
            "data.init_args.min_scale": 0.6 if is_few else 0.85,
            "data.init_args.flip": not contents.names_sides,
        }
        if "caption" not in contents.kinds:
            overrides["model.init_args.clip"] = None
            clip = stage_config("clip", self.out, {})["model"]["init_args"]["clip"]["open_clip"]
            overrides["model.init_args.vision.open_clip"] = clip
        if not contents.has_images:
            overrides = {key: value for key, value in overrides.items() if ".vision" not in key}
            overrides["model.init_args.vision"] = overrides["model.init_args.image_projector"] = None
        if not contents.has_sounds:
            overrides["model.init_args.audio"] = None
        self._fit("decoder", overrides)

    # -------------------------------------------------------------------------------------------------- evaluation
    def _forget_scores_of_another_model(self) -> None:
        """Scores are of the model that is there: one that was trained again, by hand, is evaluated again."""
        found = (self.out / "model" / "model.safetensors").stat()
        model = [found.st_mtime_ns, found.st_size]
        scored = [stage for stage in self.stages if stage["name"].startswith("eval ")]
        if scored and self.model not in (None, model):
            self._warn(f"{self.out / 'model'} has changed since it was evaluated: it is evaluated again")
            self.stages = [stage for stage in self.stages if stage not in scored]
        self.model = model

    def _evaluate(self, choices: Choices) -> None:
        """Evaluates the tasks, the longest first, as many at once as there are ranks in training."""
        tasks = self.tasks
        if not tasks:
            self._warn("no test row can be scored")
            return
        num_lanes, limits = self.budget.num_lanes(tasks), self.budget.limits(tasks, self.seconds_left)

        def evaluate(task: str) -> None:
            options = ["--sequence_length", str(choices.sequence_length)] if task == "text" else []
            if task in limits:
                options += ["--limit", str(limits[task])]
            self.stage(
                f"eval {task}", "eval", "--model", str(self.out / "model"), "--task", task,
                "--manifest", str(self.out / "manifests" / "test.jsonl"),
                "--json", str(self.out / "eval" / f"{task}.json"), *options, *self.bad_rows,
                num_threads=1 if num_lanes > 1 else 0,
            )  # fmt: skip

        with ThreadPoolExecutor(num_lanes) as lanes:
            try:
                longest_first = sorted(tasks, key=lambda task: -task_seconds(task, tasks[task]))
                for done in [lanes.submit(evaluate, task) for task in longest_first]:
                    done.result()
            except BaseException:
                lanes.shutdown(wait=False, cancel_futures=True)
                self.processes.end_all()
                raise

    def _report(self) -> dict[str, Any]:
        if not self.is_finished:
            self._finish()
        command = ["report", "--out", str(self.out)]
        self.console.print(f"\n[bold]report[/bold]\n[green]$ {escape(shlex.join(['mmllm', *command]))}[/green]")
        self._run("report", command)
        self.console.print(f"\n[bold]Scores[/bold] on held-out rows ({clock(self.seconds)}, "
                           f"{self.peak_rss_bytes / 2**30:.1f} GiB at the most)")  # fmt: skip
        for result in (load_result(self.out / "eval" / f"{task}.json") for task in self.tasks):
            for key, value in result.scores.items():
                if isinstance(value, (int, float)):
                    shown = f"{value:.4f}" if isinstance(value, float) else f"{value:,}"
                    self.console.print(f"  {result.task + '.' + key:<44}{shown:>10}")
        self.console.print(f"\nReport: [bold]{escape(str(self.out / 'report.html'))}[/bold]")
        self.console.print(f"Model:  [bold]{escape(str(self.out / 'model'))}[/bold]")
        return read_json(self.out / "report.json")


def num_workers() -> int:
    """Processes that make and build data: as many as this process may use cores, four at most."""
    return min(num_cores(), MAX_WORKERS)


def num_cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def num_ranks(minutes: float | None, max_steps: int | None) -> int:
    """Ranks of each training: two of one thread each do almost twice as much on two cores as one of two threads.

    Without `minutes` always two where there are two cores, so that everybody's demo is the same run; with them as
    many as there are cores and memory for. A power of two, which every stage's batch can be shared by.
    """
    if max_steps is not None:
        return 1
    if minutes is None:
        return min(os.cpu_count() or 1, 2)
    has_memory = psutil.virtual_memory().available >= MAX_RANKS * RANK_BYTES
    return MAX_RANKS if num_cores() >= MAX_RANKS and has_memory else min(num_cores(), 2)


def _trained(checkpoint: Path) -> tuple[int, float]:
    """How many steps and how long a stage had trained when it was saved."""
    import torch  # only where a training that was stopped goes on: see NVIDIA_GPU

    saved = torch.load(checkpoint, map_location="cpu", mmap=True, weights_only=True)
    return int(saved.get("global_step", 0)), float(saved.get("mmllm_elapsed_seconds", 0.0))
