"""What a training costs: held-out tasks scored before, during and after it, how far it moved, and whether it is honest.

`TaskScores` looks; `RewardHackingStop` reads what it found.
"""

from __future__ import annotations

import csv
import json
import logging
import random
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

from mmllm.data.rows.bad_rows import BadRows, is_of_machine
from mmllm.data.rows.forms import read_rows
from mmllm.data.rows.rows import Row
from mmllm.data.samples.document import Document
from mmllm.evaluation.preferences.prompts import document_of
from mmllm.evaluation.speech_task import Judge
from mmllm.evaluation.tasks import evaluate, scored_rows
from mmllm.inference.api import Model
from mmllm.training.decoder_module import DecoderModule
from mmllm.training.posttraining.drift import drift
from mmllm.training.posttraining.hacking import HackingTest
from mmllm.training.posttraining.hacking import Look as TruthLook
from mmllm.training.posttraining.held_out import PROMPT_OF, HeldOutTask, Look
from mmllm.training.posttraining.plots import costs_page

log = logging.getLogger(__name__)

_MAX_BAD = 0.05
"""Share of a manifest's rows that may be unusable, as of `mmllm eval`; each is named."""


@dataclass
class _State:
    looks: list[Look] = field(default_factory=list)
    rewards: list[float] = field(default_factory=list)
    """Of each step of the run that had one."""


class TaskScores(pl.Callback):
    """Scores held-out tasks before, during and after a training, and tells what was lost; not of a sharded model.

    In `directory` it writes `scores.csv` (a row for each number), `forgetting.json` (scores and points lost of all
    looks) and `costs.html` (all of it as plots). To the loggers go `costs/NAME`, `costs/NAME_points_lost`, `costs/kl`,
    `costs/entropy`, `costs/length` and `costs/reward`. The last look is at the weights that are exported; a callback
    that changes them, such as `EMA`, must stand before this one. The time of looks is none of the training's, so they
    don't change it.
    """

    def __init__(
        self,
        tasks: list[HeldOutTask],
        directory: str,
        every_steps: int | None = None,
        every_seconds: float | None = None,
        num_answers: int = 32,
        max_new_tokens: int = 64,
        batch_size: int = 64,
        seed: int = 0,
    ) -> None:
        """Keeps the settings; the rows are read when training starts.

        Args:
            tasks: that are scored.
            directory: where the files go.
            every_steps: steps between looks; None: only `every_seconds` counts.
            every_seconds: of training between looks; None: only `every_steps` counts. Neither: before and after alone.
            num_answers: drawn of the tasks' prompts at each look, for KL, entropy and length; 0: none.
            max_new_tokens: of each of them at most.
            batch_size: prompts at once.
            seed: of which rows are taken, and of the answers.

        Raises:
            ValueError: there is no task, two have one name, or a number is out of range.
        """
        labels = [task.label for task in tasks]
        if not tasks or len(set(labels)) < len(labels):
            raise ValueError(f"TaskScores has the tasks {labels}; give one or more, each with a name of its own")
        if (every_steps is not None and every_steps < 1) or (every_seconds is not None and not every_seconds > 0):
            raise ValueError(f"TaskScores has every_steps {every_steps}, every_seconds {every_seconds}; give above 0")
        if num_answers < 0 or max_new_tokens < 1:
            raise ValueError(f"TaskScores has num_answers {num_answers} and max_new_tokens {max_new_tokens}")
        self.tasks, self.directory = tasks, Path(directory)
        self.every_steps, self.every_seconds = every_steps, every_seconds
        self.num_answers, self.max_new_tokens = num_answers, max_new_tokens
        self.batch_size, self.seed = batch_size, seed
        self._state = _State()
        self._since_rewards = 0
        self._last_step = 0
        self._rows: dict[str, list[Row]] = {}
        self._judges: dict[str, Judge] = {}
        self._prompts: list[Document] | None = None

    @property
    def state_key(self) -> str:
        """One of its own for each directory."""
        return self._generate_state_key(directory=str(self.directory))

    @property
    def files(self) -> list[Path]:
        """What it writes."""
        return [self.directory / name for name in ("scores.csv", "forgetting.json", "costs.html")]

    @property
    def looks(self) -> list[Look]:
        """So far, from the start on."""
        return self._state.looks

    @property
    def rewards(self) -> list[float]:
        """Of each step so far that had one."""
        return self._state.rewards

    # --- when ---------------------------------------------------------------------------------------------------

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Reads the rows, and has the start kept.

        Raises:
            ValueError: a manifest can't be used, or has no rows of its task.
        """
        if stage != "fit" or not isinstance(pl_module, DecoderModule):
            return
        if self.num_answers and pl_module.init_from is not None and pl_module.device_mesh is None:
            pl_module.keeps_start = True
        if not trainer.is_global_zero:
            return
        for task in self.tasks:
            self._rows[task.label] = scored_rows(
                list(read_rows(task.manifest, BadRows(_MAX_BAD))), task.task, task.manifest
            )
            if task.judge is not None:
                self._judges[task.label] = Judge.load(task.judge)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Looks at the start, unless a checkpoint brought that look."""
        self._last_step = trainer.global_step
        if pl_module.device_mesh is not None:
            if trainer.is_global_zero:
                log.warning("TaskScores are not taken: no rank has the whole of a sharded model")
            return
        if not isinstance(pl_module, DecoderModule):
            if trainer.is_global_zero:
                log.warning("TaskScores scores models with a decoder; %s is none", type(pl_module).__name__)
            return
        if self.looks or not trainer.is_global_zero:
            return
        if not trainer.global_step:
            self._look(trainer, pl_module, 0)
        elif pl_module.start is not None:
            with pl_module.start.in_place():
                self._look(trainer, pl_module, 0, is_start=True)
        else:
            log.warning(
                "the checkpoint has no scores of the start: points lost count from step %d", trainer.global_step
            )
            self._look(trainer, pl_module, trainer.global_step)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Notes the step's reward, and looks when it is time."""
        step = trainer.global_step
        if step == self._last_step or not trainer.is_global_zero:
            return
        self._last_step = step
        if not isinstance(pl_module, DecoderModule) or pl_module.device_mesh is not None:
            return
        ask = getattr(pl_module, "rollout_stats", None)
        reward = None if ask is None else ask().get("reward")
        if reward is not None:
            self.rewards.append(float(reward))
        since = pl_module.elapsed_seconds - self.looks[-1].seconds if self.looks else 0.0
        is_due = self.every_steps is not None and step % self.every_steps == 0
        is_due |= self.every_seconds is not None and since >= self.every_seconds
        if is_due and step != trainer.max_steps:  # the end has a look of its own
            self._look(trainer, pl_module, step)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Looks a last time, at what is exported."""
        if trainer.is_global_zero and isinstance(pl_module, DecoderModule) and pl_module.device_mesh is None:
            with pl_module.exported_weights():
                self._look(trainer, pl_module, trainer.global_step)

    # --- a look -------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _look(self, trainer: pl.Trainer, pl_module: DecoderModule, step: int, is_start: bool = False) -> None:
        if pl_module.model is None or pl_module.folder is None:
            log.warning("TaskScores are not taken: the model has no tokenizer folder")
            return
        pl_module.watch.settle()  # broken weights would fail here for another reason
        begun = time.monotonic()
        with torch.random.fork_rng(devices=[]):  # what training draws next doesn't depend on looks
            look = self._found(pl_module, step, is_start)
        replaced = next((one for one in self.looks if one.step == step), None)
        if replaced is not None and look.reward is None:  # the end's look at a step that had one: no reward since
            look.reward = replaced.reward
        self._state.looks = [one for one in self.looks if one.step != step] + [look]
        self._write(trainer)
        metrics = {f"costs/{name}": score for name, score in look.scores.items()}
        metrics |= {f"costs/{name}_points_lost": lost for name, lost in look.points_lost(self.looks[0]).items()}
        metrics |= {f"costs/{name}": value for name in _NUMBERS if (value := getattr(look, name)) is not None}
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step)
        pl_module.leave_out_seconds(time.monotonic() - begun)

    def _found(self, pl_module: DecoderModule, step: int, is_start: bool) -> Look:
        assert pl_module.model is not None and pl_module.folder is not None
        served = Model(pl_module.model, pl_module.folder, pl_module.image_transform, pl_module.generation)
        look = Look(step, pl_module.elapsed_seconds, {}, {})
        for task in self.tasks:
            result = evaluate(
                served,
                task.task,
                self._rows[task.label],
                self.batch_size,
                task.limit,
                self.seed,
                judge=self._judges.get(task.label),
                controls=False,
            )
            look.scores[task.label] = task.score(result.scores)
            look.values[task.label] = list(task.values(result))
        recent = self.rewards[self._since_rewards :]
        look.reward = sum(recent) / len(recent) if recent else None
        look.num_rewards = self._since_rewards = len(self.rewards)
        if self.num_answers and pl_module.start is not None and not is_start:
            prompts = self._fixed_prompts(served)
            if prompts:
                moved = drift(served, pl_module.start, prompts, self.max_new_tokens, self.seed)
                look.kl, look.entropy, look.length = moved.kl, moved.entropy, moved.length
        return look

    def _fixed_prompts(self, served: Model) -> list[Document]:
        """Of the tasks that are answered in text, taken in turn."""
        if self._prompts is None:
            kinds = [task for task in self.tasks if task.task in PROMPT_OF and self._rows[task.label]]
            if not kinds:
                log.warning("TaskScores tells no KL: none of its tasks is answered in text")
            self._prompts = []
            for place, task in enumerate(kinds):
                count = len(range(place, self.num_answers, len(kinds)))
                rows = random.Random(f"drift {self.seed} {task.label}").sample(
                    self._rows[task.label], min(count, len(self._rows[task.label]))
                )
                for row in rows:
                    try:
                        self._prompts.append(document_of(row, PROMPT_OF[task.task], served))
                    except (OSError, ValueError) as error:  # which its evaluation counts, and bounds
                        if is_of_machine(error):
                            raise
                        log.warning("TaskScores draws no answer to %s: %s", row.where, error)
        return self._prompts

    # --- files and state ----------------------------------------------------------------------------------------

    def _write(self, trainer: pl.Trainer) -> None:
        start = self.looks[0]
        self.directory.mkdir(parents=True, exist_ok=True)
        with self.files[0].open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["step", "seconds", "name", "value", "points_lost"])
            for look in self.looks:
                lost = look.points_lost(start)
                for name, score in look.scores.items():
                    writer.writerow([look.step, round(look.seconds, 2), name, score, round(lost[name], 4)])
                for name in _NUMBERS:
                    if getattr(look, name) is not None:
                        writer.writerow([look.step, round(look.seconds, 2), name, getattr(look, name), ""])
        told = [
            {key: value for key, value in asdict(look).items() if key not in ("values", "num_rewards")}
            | {"points_lost": look.points_lost(start)}
            for look in self.looks
        ]
        names = [task.label for task in self.tasks]
        matrix = [[look.scores[name] for name in names] for look in self.looks]
        values = {"tasks": names, "steps": [look.step for look in self.looks], "scores": matrix, "looks": told}
        self.files[1].write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
        self.files[2].write_text(costs_page(self.looks, trainer.global_step), encoding="utf-8")

    def state_dict(self) -> dict[str, Any]:
        """All looks and rewards."""
        return asdict(self._state)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores them."""
        looks = [Look(**look) for look in state_dict["looks"]]
        self._state = _State(looks, list(state_dict["rewards"]))
        self._since_rewards = looks[-1].num_rewards if looks else 0


_NUMBERS = ("kl", "entropy", "length", "reward")


class RewardHackingStop(pl.Callback):
    """Tells, and ends a training, where its reward rises while what the reward stands for falls.

    It reads the looks of the run's `TaskScores`, and the rewards of its steps; the two tests are those of
    `mmllm.training.posttraining.hacking`. `hacking.json` then has `noticed_at_step` (null: it wasn't) and the numbers.
    """

    def __init__(
        self,
        directory: str,
        truth: str | None = None,
        alpha: float = 0.002,
        patience: int = 2,
        stops: bool = True,
    ) -> None:
        """Keeps the settings.

        Args:
            directory: where `hacking.json` goes.
            truth: name of the held-out task that is the true score; None: the first of `TaskScores`.
            alpha: level of each of the two tests.
            patience: looks one after the other at which both must hold.
            stops: training ends there; False: it is said, and goes on.

        Raises:
            ValueError: a number is out of range.
        """
        self.directory, self.truth, self.stops = Path(directory), truth, stops
        self.test = HackingTest(alpha, patience)
        self.noticed: dict[str, Any] | None = None
        self._num_seen = 0

    @property
    def files(self) -> list[Path]:
        """What it writes."""
        return [self.directory / "hacking.json"]

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Finds the run's `TaskScores`.

        Raises:
            ValueError: there is none, or it has no task of the name.
        """
        scores = self._scores(trainer)
        names = [task.label for task in scores.tasks]
        if self.truth is not None and self.truth not in names:
            raise ValueError(f"RewardHackingStop's truth is {self.truth!r}; TaskScores has {', '.join(names)}")
        if not hasattr(pl_module, "rollout_stats") and trainer.is_global_zero:
            log.warning("RewardHackingStop sees no reward: %s has none to tell", type(pl_module).__name__)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Judges a new look."""
        is_noticed = trainer.is_global_zero and self._judge(trainer)
        if self.stops and trainer.world_size > 1:
            is_noticed = bool(trainer.strategy.broadcast(is_noticed))
        if is_noticed and self.stops:
            trainer.should_stop = True

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Judges the last look, and writes that nothing was noticed where nothing was."""
        if trainer.is_global_zero:
            self._judge(trainer)
            self._write()

    def state_dict(self) -> dict[str, Any]:
        """What was noticed."""
        return {"noticed": self.noticed, "num_seen": self._num_seen}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores it."""
        self.noticed, self._num_seen = state_dict["noticed"], state_dict["num_seen"]

    def _judge(self, trainer: pl.Trainer) -> bool:
        """Whether reward hacking is noticed for the first time."""
        scores = self._scores(trainer)
        looks, name = scores.looks, self.truth or scores.tasks[0].label
        if len(looks) == self._num_seen or self.noticed is not None:
            return False
        self._num_seen = len(looks)
        truths = [TruthLook(look.step, tuple(look.values[name])) for look in looks]
        found = self.test.noticed(truths, [scores.rewards[: look.num_rewards] for look in looks])
        if found is None:
            return False
        self.noticed = {**asdict(found), "truth": name}
        log.warning("reward hacking at step %d: %s%s", found.step, found, "; training ends" if self.stops else "")
        self._write()
        return True

    def _write(self) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        step = None if self.noticed is None else self.noticed["step"]
        test = {"alpha": self.test.alpha, "patience": self.test.patience, "num_looks": self._num_seen}
        values = {"noticed_at_step": step, "stops": self.stops, **test, "evidence": self.noticed}
        self.files[0].write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")

    @staticmethod
    def _scores(trainer: pl.Trainer) -> TaskScores:
        callbacks: Sequence[pl.Callback] = trainer.callbacks  # pyright: ignore[reportAttributeAccessIssue]
        found = [callback for callback in callbacks if isinstance(callback, TaskScores)]
        if len(found) != 1:
            raise ValueError(
                f"RewardHackingStop reads the looks of TaskScores, of which the trainer has {len(found)}; give one "
                f"with the task that is the true score"
            )
        return found[0]
