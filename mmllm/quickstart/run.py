"""`mmllm quickstart`: from manifests, or from nothing, to a trained model and a report. Every stage is a command.

A stage that is done is noted in `DIR/quickstart.json`; run again, quickstart goes on with the first that is not.
"""

from __future__ import annotations

import shlex
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from mmllm.checkout import commit
from mmllm.evaluation.results import load_result
from mmllm.quickstart import machine, stages
from mmllm.quickstart.budget import Budget, scored_rows, task_seconds
from mmllm.quickstart.monitor import MemoryMonitor
from mmllm.quickstart.plan import (
    OUTPUT_OF_STAGE,
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
from mmllm.quickstart.presets import DEMO, check_gpu, preset_of
from mmllm.quickstart.processes import Processes, terminated_as_interrupt
from mmllm.quickstart.stages import StageList, Step
from mmllm.quickstart.state import RunState
from mmllm.ticker import clock

RunCommand = Callable[[Sequence[str]], int]
LEAST_DECODER_SHARE = 0.25
"""Of `--minutes`: a decoder that gets less is warned of."""


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
    preset: str = DEMO.name,
    data_only: bool = False,
) -> dict[str, Any]:
    """The whole way on one machine.

    Args:
        run_command: runs a command line (`["data", "build", …]`) in this process and gives its exit code; used with
            `max_steps`, where processes of their own would take longer than their work.
        out: the run's folder.
        train: manifests, or data of other forms; none: the demo's own data.
        test: manifests of held-out rows.
        holdout: `KEY=VALUE` or a fraction, where there are no test manifests.
        minutes: wall time to aim at, for everything from making data to the report; None: the preset's. A run that is
            continued may be given more, until its decoder is trained.
        seed: of data, order and weights.
        max_steps: of each training at most (with a small demo data set): for trying the whole way out.
        max_bad_fraction: more unusable rows of a manifest than this are an error; None: the commands' own bound.
        form: of `train` and `test`; "auto": told from each.
        media: what their paths are relative to; by default each input's folder.
        columns: what their columns are called here, as `--columns` says it.
        preset: sizes and minutes, by name; see `mmllm.quickstart.presets`.
        data_only: ends before the decoder is trained; its recipe and config are written. The same run without it goes
            on there.

    Returns:
        What report.json holds; nothing with `data_only`.

    Raises:
        ValueError: the arguments contradict each other, what `out` already holds, or what the machine has.
        StageFailed: a stage failed.
    """
    if (test or holdout) and not train:
        raise ValueError("--test and --holdout need --train; without it quickstart makes its own data")
    if minutes is not None and minutes <= 0:
        raise ValueError(f"--minutes is {minutes}; give a positive number")
    if max_steps is not None and max_steps < 1:
        raise ValueError(f"--max_steps is {max_steps}; give at least 1")
    chosen = preset_of(preset)
    if chosen.needs_rows and not train:
        raise ValueError(f"--preset {preset} is for rows of your own; give --train, or another preset")
    if chosen.on_gpu and max_steps is None and not machine.NVIDIA_GPU.exists():
        raise ValueError(
            f"--preset {preset} trains on a GPU, and {machine.NVIDIA_GPU} is not there; give --preset demo, or "
            f"--max_steps to try the way out on the CPU"
        )
    if chosen.on_gpu and max_steps is None:
        check_gpu(chosen)
    minutes = chosen.minutes if minutes is None and max_steps is None else minutes
    settings = {"train": list(train), "test": list(test), "holdout": holdout, "minutes": minutes, "seed": seed,
                "max_steps": max_steps, "max_bad_fraction": max_bad_fraction}  # fmt: skip
    given = {"format": form if form != "auto" else None, "media": media, "columns": list(columns) or None,
             "preset": preset if preset != DEMO.name else None}  # fmt: skip
    settings |= {key: value for key, value in given.items() if value is not None}
    run = _Run(Path(out), settings, run_command)
    with MemoryMonitor(run.state.save_now_and_then) as memory, terminated_as_interrupt():
        run.state.memory = memory
        try:
            return run.all_stages(data_only)
        finally:
            run.processes.end_all()


class _Run:
    """One run's folder and stages."""

    def __init__(self, out: Path, settings: dict[str, Any], run_command: RunCommand) -> None:
        self.out, self.settings, self.run_command = out, settings, run_command
        self.console = Console(highlight=False, soft_wrap=True)
        self.state = RunState(out, settings)
        self.preset = preset_of(settings.get("preset", DEMO.name))
        ranks = machine.num_ranks(settings["minutes"], settings["max_steps"])
        self.num_processes = 1 if self.preset.is_one_process else ranks
        self.num_workers = min(machine.num_cores(), self.preset.max_workers)
        self.processes = Processes()
        self.tasks: dict[str, list[int]] = {}

    @property
    def is_demo(self) -> bool:
        """Whether the rows are quickstart's own."""
        return not self.settings["train"]

    @property
    def budget(self) -> Budget:
        return Budget(self.settings["minutes"], self.settings["max_steps"], self.is_demo, self.num_processes)

    def _warn(self, message: str) -> None:
        self.console.print(f"[yellow]{escape(message)}[/yellow]")

    # ------------------------------------------------------------------------------------------------------ stages
    def stage(
        self, name: str, *command: str, makes: Path | None = None, num_threads: int = 0, is_beside: bool = False
    ) -> None:
        """Runs a command unless it is done.

        Args:
            name: of the stage.
            command: the command line.
            makes: what must be there when it is done.
            num_threads: run it as a process of its own with so many threads; 0: in the one that short commands share.
                Under DDP it must be one of its own, since it runs its own command line again for the other ranks.
            is_beside: others run beside it, so what it prints is shown, below its command, when it has ended.

        Raises:
            StageFailed: it ended with an error.
        """
        line = shlex.join(["mmllm", *command])
        if self.state.is_done(name):
            self.console.print(f"[dim]done before: {escape(line)}[/dim]")
            return
        left = self.state.seconds_left
        times = f"{clock(self.state.seconds)} gone" + (f", {clock(left)} left" if left is not None else "")
        title = f"\n[bold]{name}[/bold] [dim]({times})[/dim]\n[green]$ {escape(line)}[/green]"
        self.state.go_on()
        begun, code_used = time.monotonic(), commit()
        if is_beside:
            self.console.print(f"[dim]{name} begins ({times})[/dim]")
            code, printed = self.processes.run_beside(command, num_threads, lambda said: self._beside(name, said))
            self.console.print(f"{title}\n{escape(printed.rstrip())}")
        else:
            self.console.print(title)
            code = self._run(command, num_threads)
        self._check(name, command, code)
        if makes is not None and not makes.exists():
            raise StageFailed(
                f"the stage {name!r} ended without writing {makes}; remove {self.out / 'checkpoints'} and run "
                f"quickstart again"
            )
        self.state.add(
            {"name": name, "seconds": time.monotonic() - begun, "command": line, "commit": code_used}
        )  # fmt: skip

    def _beside(self, name: str, said: str) -> None:
        """Shows a line of a command beside which others run."""
        self.console.print(f"[dim]{name}:[/dim] {escape(said)}")

    def _run(self, command: Sequence[str], num_threads: int = 0) -> int:
        """Runs a stage's command and gives its exit code; see `stage`."""
        if num_threads:
            return self.processes.run(command, num_threads)
        if self.settings["max_steps"] is not None:
            return self.run_command(command)
        return self.processes.run_shared(command)

    def _check(self, name: str, command: Sequence[str], code: int) -> None:
        """Ends the run where a stage's command did not end well."""
        if code in (130, -signal.SIGINT):
            raise KeyboardInterrupt
        if code:
            raise StageFailed(f"the stage {name!r} failed; mend what it says above and run quickstart again, or run "
                              f"`{shlex.join(['mmllm', *command])}` alone")  # fmt: skip

    def all_stages(self, data_only: bool = False) -> dict[str, Any]:
        """Everything, in order, or all before the decoder."""
        if machine.NVIDIA_GPU.exists() and not self.preset.on_gpu:
            self._warn("trainings run on the CPU, which this preset's configs are made for; --preset one_gpu trains "
                       "on your rows with the GPU, and `mmllm configs ls` lists more")  # fmt: skip
        try:
            self._data()
            contents = read_contents(self.out / "manifests", self.is_demo)
            choices = choose(contents, self.is_demo, self.preset)
            self.tasks, left_out = evaluation_tasks(self.out / "manifests" / "test.jsonl", contents)
            for message in left_out:
                self._warn(message)
            stage_list = StageList(
                self.out, contents, choices, self.preset, self.settings["seed"], self.num_workers,
                stages.bad_rows(self.settings),
            )  # fmt: skip
            for step in stage_list.steps():
                if data_only and step.training == "decoder":
                    self._write_recipe(contents, choices)
                    self._write_config("decoder", {**self._length("decoder"), **step.overrides})
                    return {}
                self._step(step, contents, choices)
            self._forget_scores_of_another_model()
            self._evaluate(stage_list)
            return self._report()
        except KeyboardInterrupt:
            self._warn("stopped; run the same command again to go on")
            raise
        finally:
            self.state.save()

    def _data(self) -> None:
        """The rows, parted into manifests."""
        train, test = self.settings["train"], self.settings["test"]
        if self.is_demo:
            is_tryout = self.settings["max_steps"] is not None
            share = 0.01 if is_tryout else self.preset.data_share
            step = stages.demo_data(self.out, share, self.settings["seed"], self.num_workers)
            # In a process of its own, since it spawns others, which would run a caller's unguarded script again.
            self.stage(step.name, *step.command, num_threads=0 if is_tryout else 1)
            made = read_json(self.out / "data" / "manifests.json")
            for message in made["left_out"]:
                self._warn(message)
            train, test = made["train"], made["test"]
        step = stages.split(self.out, self.settings, train, test)
        self.stage(step.name, *step.command)

    def _step(self, step: Step, contents: Contents, choices: Choices) -> None:
        """A stage between the manifests and the trained model."""
        if step.training is None:
            bound = []
            if step.share is not None and not self.state.is_done(step.name):
                bound = self.budget.command_length(self.tasks, self.state.seconds_left, step.share)
            is_tryout = self.settings["max_steps"] is not None
            self.stage(step.name, *step.command, *bound, num_threads=0 if is_tryout else step.num_threads)
            return
        if step.training == "decoder" and not self.state.is_done(step.name):
            self._write_recipe(contents, choices)
        self._fit(step.training, step.overrides, step.share)

    # ---------------------------------------------------------------------------------------------------- training
    def _fit(self, stage: str, overrides: Mapping[str, Any], share: float | None = None) -> None:
        """Writes a stage's config and fits it; a second call resumes from the stage's last checkpoint.

        Args:
            stage: its name.
            overrides: see `stage_config`.
            share: of the time that is left, with `--minutes`; None: all.
        """
        path = self.out / "configs" / f"{stage}.yaml"
        begun: list[str] = []
        if not self.state.is_done(f"fit {stage}"):
            length = self._length(stage, share)
            begun = self._begun(stage, length)
            self._write_config(stage, {**length, **overrides})
        if self.preset.on_gpu:
            self.stage(f"estimate {stage}", "fit", "--print_estimate", "-c", str(path))
        num_threads = 1 if self.num_processes > 1 else 0
        self.stage(f"fit {stage}", "fit", "-c", str(path), *begun, makes=self.out / OUTPUT_OF_STAGE[stage],
                   num_threads=num_threads)  # fmt: skip

    def _write_config(self, stage: str, overrides: Mapping[str, Any]) -> None:
        """Writes a stage's config; see `stage_config`."""
        path = self.out / "configs" / f"{stage}.yaml"
        config = stage_config(self.preset.decoder if stage == "decoder" else stage, self.out, overrides)
        self._for_this_machine(config)
        write_yaml(path, config, f"Written by `mmllm quickstart`. Run again: mmllm fit -c {path} --overwrite")

    def _for_this_machine(self, config: dict[str, Any]) -> None:
        """Sets a config's seed and ranks, and leaves out samples where there are no rows for them."""
        config["seed_everything"] = self.settings["seed"]
        trainer = config["trainer"]
        trainer["devices"] = min(self.num_processes, config["data"]["init_args"]["batch_size"])
        if trainer["devices"] > 1:
            trainer["strategy"] = "ddp"
        if not machine.NVIDIA_GPU.exists():  # a try-out of the preset for a GPU
            trainer |= {"accelerator": "cpu", "precision": "32-true"}
        if not (self.out / "manifests" / "val.jsonl").stat().st_size:
            trainer["callbacks"] = [c for c in trainer["callbacks"] if not c["class_path"].endswith(".Samples")]

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
        return self.budget.training_length(stage, self.tasks, self.state.seconds_left, share)

    def _write_recipe(self, contents: Contents, choices: Choices) -> None:
        """Writes the decoder's recipe, and warns where building has left it little time."""
        length = self._length("decoder")
        steps = length["trainer.max_steps"] if length["trainer.max_steps"] > 0 else None
        recipe = recipe_dict(self.out, contents, choices, self.settings["seed"], steps)
        path = self.out / "recipe.yaml"
        show = f"mmllm data show --recipe {path} --batch_size {choices.batch_size} --step 0"
        write_yaml(path, recipe, f"Written by `mmllm quickstart`. See what it holds: {show}")
        seconds, minutes = length["model.init_args.max_seconds"], self.settings["minutes"]
        if seconds is not None and minutes is not None and seconds < LEAST_DECODER_SHARE * 60 * minutes:
            self._warn(f"data, building and the stages before took {clock(self.state.seconds)} of --minutes {minutes:g}"
                       f": the decoder trains for {clock(seconds)}; give more minutes for better scores")  # fmt: skip

    # -------------------------------------------------------------------------------------------------- evaluation
    def _forget_scores_of_another_model(self) -> None:
        """Scores are of the model that is there: one that was trained again, by hand, is evaluated again."""
        found = (self.out / "model" / "model.safetensors").stat()
        model = [found.st_mtime_ns, found.st_size]
        scored = [stage for stage in self.state.stages if stage["name"].startswith("eval ")]
        if scored and self.state.model not in (None, model):
            self._warn(f"{self.out / 'model'} has changed since it was evaluated: it is evaluated again")
            self.state.stages = [stage for stage in self.state.stages if stage not in scored]
            self.state.is_rescored = True
        self.state.model = model

    def _evaluate(self, stage_list: StageList) -> None:
        """Evaluates the tasks, the longest first, as many at once as there are ranks in training.

        Where the run's minutes don't suffice for all rows, fewer are scored, and that is told.
        """
        tasks = self.tasks
        if not tasks:
            self._warn("no test row can be scored")
            return
        num_lanes = self.budget.num_lanes(tasks)
        limits = {} if self.state.is_rescored else self.budget.limits(tasks, self.state.seconds_left)
        for task, limit in limits.items():
            num_scored, num_rows = scored_rows(limit, tasks[task]), sum(tasks[task])
            if num_scored < num_rows and not self.state.is_done(f"eval {task}"):
                self._warn(f"time is short: {task} is scored on {num_scored:,} of {num_rows:,} rows")

        def evaluate(task: str) -> None:
            step = stage_list.evaluation(task, limits.get(task))
            self.stage(step.name, *step.command, num_threads=1 if num_lanes > 1 else 0, is_beside=num_lanes > 1)

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
        """Writes the report and shows the scores."""
        self.state.finish()
        command = ["report", "--out", str(self.out)]
        self.console.print(f"\n[bold]report[/bold]\n[green]$ {escape(shlex.join(['mmllm', *command]))}[/green]")
        self._check("report", command, self._run(command))
        self.console.print(f"\n[bold]Scores[/bold] on held-out rows ({clock(self.state.seconds)}, "
                           f"{self.state.peak_rss_bytes / 1e9:.1f} GB at the most)")  # fmt: skip
        for result in (load_result(self.out / "eval" / f"{task}.json") for task in self.tasks):
            for key, value in result.scores.items():
                if isinstance(value, (int, float)):
                    shown = f"{value:.4f}" if isinstance(value, float) else f"{value:,}"
                    self.console.print(f"  {result.task + '.' + key:<44}{shown:>10}")
        minutes = self.settings["minutes"]
        over = 0.0 if minutes is None else self.state.seconds - 60 * minutes
        if over >= 1:
            self._warn(f"the run took {clock(over)} longer than the {minutes:g} minutes that it aimed at")
        self.console.print(f"\nReport: [bold]{escape(str(self.out / 'report.html'))}[/bold]")
        model = escape(str(self.out / "model"))
        self.console.print(f"Model:  [bold]{model}[/bold]")
        self.console.print(f"Try it: mmllm ui --model {model}", soft_wrap=True)
        self.console.print(f"        mmllm serve --model {model}", soft_wrap=True)
        return read_json(self.out / "report.json")


def _trained(checkpoint: Path) -> tuple[int, float]:
    """How many steps and how long a stage had trained when it was saved."""
    import torch  # only where a training that was stopped goes on: see NVIDIA_GPU

    saved = torch.load(checkpoint, map_location="cpu", mmap=True, weights_only=True)
    return int(saved.get("global_step", 0)), float(saved.get("mmllm_elapsed_seconds", 0.0))
