"""What the three stages (codec, CLIP tower, decoder) share: their clock, schedule, optimizer and metrics."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import psutil
import torch
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from mmllm.model.earlier_names import is_earlier
from mmllm.parallel.norms import scale_to_norm_, total_norm
from mmllm.training.ema import without_averages
from mmllm.training.optimizers import OptimizerConfig, build_optimizer, learning_rate_factor, parameter_groups
from mmllm.training.parts import check_parts
from mmllm.training.step_start import StepStart
from mmllm.training.watch import Watch

log = logging.getLogger(__name__)

FIRST_SECONDS = 0.01
"""Share of the warm-up that counts as done at the first step of a training without a number of steps."""


class StagedModule(pl.LightningModule):
    """A Lightning module with a schedule by steps or by seconds, and metrics averaged between log lines.

    Progress is max(step / trainer.max_steps, seconds / max_seconds): whichever ends first shapes the whole
    schedule (see `schedule_progress`). Seconds count training alone (validation included) and go on counting after a
    resume.
    """

    parts: tuple[str, ...] = ()
    """Names that `optimizer.parts` may have."""

    def __init__(self, optimizer: OptimizerConfig | None = None, max_seconds: float | None = None) -> None:
        """Keeps the settings.

        Args:
            optimizer: rates and decay; None: the defaults.
            max_seconds: training ends after this long, resumes included; None: `trainer.max_steps` alone ends it.

        Raises:
            ValueError: `max_seconds` is not positive, or `optimizer.parts` names what is no part of it.
        """
        super().__init__()
        if max_seconds is not None and not max_seconds > 0:
            raise ValueError(f"max_seconds is {max_seconds}; give a positive number of seconds or null")
        self.optimizer = optimizer or OptimizerConfig()
        check_parts(self.optimizer, self.parts, type(self).__name__)
        self.max_seconds = max_seconds
        self.elapsed_seconds = 0.0
        self.window = MetricWindow()
        self.watch = Watch()
        self._last_tick: float | None = None
        self._logged_step = 0
        self._step_start: StepStart | None = None
        self._resumed: dict[str, Any] | None = None
        self._peak_lrs: list[float] = []
        self._last_factor: float | None = None
        self._seed = torch.initial_seed()

    @property
    def batch_rank(self) -> int:
        """Which of the ranks with data of their own this one is."""
        return self.trainer.global_rank

    def tower_of(self, name: str) -> str:
        """What decides a parameter's learning rate: see `OptimizerConfig.rate_of`."""
        return "decoder"

    def export(self, directory: Path) -> None:
        """Writes the trained part where the next stage, or inference, reads it."""
        raise NotImplementedError

    @property
    def export_dir(self) -> str | None:
        """Where `export` writes when training ends; None: nowhere."""
        return None

    def check_export(self, directory: Path) -> None:
        """Raises ValueError before training where `export` would refuse the folder after it."""

    def on_fit_start(self) -> None:
        """Looks at the folder of the export."""
        if self.export_dir:
            self.check_export(Path(self.export_dir))

    # --- schedule ---------------------------------------------------------------------------------------------

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Groups by tower; the rate is set before each batch by `on_train_batch_start`."""
        groups = parameter_groups(self, self.optimizer, self.tower_of)
        self._peak_lrs = [group.pop("peak_lr") for group in groups]
        is_replicated = self._trainer is not None and isinstance(self.trainer.strategy, DDPStrategy)
        return build_optimizer(groups, self.optimizer, self.trainer.world_size if is_replicated else 1)

    @property
    def progress(self) -> float:
        """Share of the run that is done, 0 to 1."""
        num_steps = self._num_steps()
        by_steps = self.trainer.global_step / num_steps if num_steps else 0.0
        by_seconds = self.elapsed_seconds / self.max_seconds if self.max_seconds else 0.0
        return min(max(by_steps, by_seconds), 1.0)

    @property
    def schedule_progress(self) -> float:
        """The progress that the step under way ends at: what its learning rate is computed from.

        The first of S warm-up steps has 1/S of the peak, and the last step of all the floor. How long a step takes
        isn't known before it: where seconds alone end the training, the rate counts those of the steps that are done,
        but at least `FIRST_SECONDS` of the warm-up.
        """
        num_steps = self._num_steps()
        by_seconds = self.elapsed_seconds / self.max_seconds if self.max_seconds else 0.0
        by_steps = (self.trainer.global_step + 1) / num_steps if num_steps else FIRST_SECONDS * self.optimizer.warmup
        return min(max(by_steps, by_seconds), 1.0)

    def _num_steps(self) -> int | None:
        trainer = self.trainer
        if trainer.max_steps != -1:
            return trainer.max_steps
        if trainer.max_epochs in (None, -1) or math.isinf(trainer.num_training_batches):
            return None
        return trainer.max_epochs * math.ceil(trainer.num_training_batches / trainer.accumulate_grad_batches)

    def on_train_start(self) -> None:
        """Starts the clock; says if what an earlier training wrote is in the way."""
        if self._num_steps() is None and self.max_seconds is None:
            raise ValueError("training has no end; set trainer.max_steps or model.init_args.max_seconds")
        self._check_schedule()
        directory = Path(self.export_dir) if self.export_dir and self.trainer.is_global_zero else None
        if directory is not None and directory.is_dir() and any(directory.iterdir()):
            log.warning("%s is not empty: this training writes over it when it ends", directory)
        self._last_tick = time.monotonic()
        self.window.reset()
        self._logged_step = self.trainer.global_step
        self.watch = self._new_watch()
        self._step_start, self._resumed = StepStart(self, self._resumed), None

    def _check_schedule(self) -> None:
        """Refuses a schedule told in steps without a number of steps; says if a resumed run's rate jumps.

        Raises:
            ValueError: see above.
        """
        num_steps, config = self._num_steps(), self.optimizer
        if config.counts_steps and (num_steps is None or self.max_seconds is not None or not config.fits(num_steps)):
            raise ValueError(
                f"optimizer.warmup_steps is {config.warmup_steps} (warmup {config.warmup}) and decay_steps "
                f"{config.decay_steps} (decay {config.decay}), with trainer.max_steps {self.trainer.max_steps} and "
                f"max_seconds {self.max_seconds}; set max_steps to at least their sum and leave max_seconds out, or "
                f"give warmup and decay as shares"
            )
        before, self._last_factor = self._last_factor, None
        if before is None or config.schedule != "wsd":
            return
        step = self.trainer.global_step
        now = learning_rate_factor(self.progress, config, step, num_steps)
        if abs(before - now) > 1e-6:
            log.warning(
                "the learning rate jumps at step %d from %.3g to %.3g of its peak: the checkpoint isn't of this "
                "schedule's stable phase; take an earlier one for what an uninterrupted run would give",
                step, before, now,
            )  # fmt: skip

    def _new_watch(self) -> Watch:
        folder = self.trainer.log_dir or self.trainer.default_root_dir  # of rank 0, on every rank
        return Watch(
            Path(folder) / "non_finite",
            self.source_names,
            self.trainer.train_dataloader,
            self.trainer.global_rank,
            self.trainer.world_size,
        )

    @property
    def source_names(self) -> list[str]:
        """Of the data's sources, by which losses are told apart; none where they are not."""
        return []

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Sets each group's learning rate, and the random numbers of this batch: a resumed run draws the same."""
        self.watch.begin_batch(batch)
        batch_number = self.trainer.fit_loop.epoch_loop.batch_progress.total.ready
        torch.manual_seed(_mixed(self._seed, batch_number, self.batch_rank))
        step = self.trainer.global_step + 1
        factor = learning_rate_factor(self._shared_progress(), self.optimizer, step, self._num_steps())
        self._last_factor = factor
        for group, peak in zip(self._optimizer().param_groups, self._peak_lrs, strict=True):
            group["lr"] = peak * factor

    def on_before_backward(self, loss: Tensor) -> None:
        """Notes the batch's loss."""
        self.watch.note_loss(loss)

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: int | float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Measures the gradient's norm, which is logged and watched, and clips by it.

        (Lightning's own refuses AdamW in one kernel with bf16-mixed, where there is no scaled loss to be afraid of.)

        Raises:
            NonFiniteError: the step before was not finite.
        """
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        has_scaler = getattr(self.trainer.precision_plugin, "scaler", None) is not None
        norm = total_norm(gradients)
        self.window.note("grad_norm", norm)
        self.watch.end_step(self.trainer.global_step + 1, norm, checks_norm=not has_scaler)
        if has_scaler or gradient_clip_algorithm not in (None, "norm"):
            super().configure_gradient_clipping(optimizer, gradient_clip_val, gradient_clip_algorithm)
        elif gradient_clip_val and gradients:
            scale_to_norm_(gradients, norm, gradient_clip_val)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Advances the clock, writes the metrics, stops when the time is over."""
        now = time.monotonic()
        self.elapsed_seconds += now - (self._last_tick or now)
        self._last_tick = now
        if self.max_seconds is not None and self._shared(self.elapsed_seconds) >= self.max_seconds:
            self.trainer.should_stop = True
        trainer: Any = self.trainer  # `log_every_n_steps` is declared nowhere
        step = trainer.global_step
        # Of accumulated batches only the last one ends a step.
        if step != self._logged_step and step % trainer.log_every_n_steps == 0 and self.window.num_batches:
            self._logged_step = step
            self._write_metrics(step)
        assert self._step_start is not None, "on_train_start makes it"
        if self._step_start.is_over:
            self._step_start.note()

    def leave_out_seconds(self, seconds: float) -> None:
        """Time since the last batch that is none of the training's, such as that of an evaluation."""
        if self._last_tick is not None:
            self._last_tick += seconds

    def _shared_progress(self) -> float:
        progress = self.schedule_progress
        return self._shared(progress) if self.max_seconds is not None else progress

    def _shared(self, seconds: float) -> float:
        """Rank 0's clock on every rank, so that all stop together and keep one rate."""
        return float(self.trainer.strategy.broadcast(seconds)) if self.trainer.world_size > 1 else seconds

    def _optimizer(self) -> torch.optim.Optimizer:
        optimizer = self.optimizers()
        assert not isinstance(optimizer, list)
        return optimizer  # type: ignore[return-value]

    # --- metrics ----------------------------------------------------------------------------------------------

    def window_metrics(self) -> dict[str, float]:
        """The window's metrics as the stage wants them logged: means, and whatever it derives from them."""
        return self.window.means()

    def _write_metrics(self, step: int) -> None:
        metrics = {f"train/{name}": value for name, value in self.window_metrics().items()}
        metrics["train/lr"] = self._optimizer().param_groups[0]["lr"]
        metrics["train/seconds"] = self.elapsed_seconds
        metrics["train/steps_per_second"] = self.window.num_batches / max(self.window.seconds, 1e-9)
        metrics |= {f"train/{name}": value for name, value in memory_gb(self.device).items()}
        for logger in self.trainer.loggers:
            logger.log_metrics(metrics, step)
        self.window.reset()

    # --- state and export -------------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keeps the clock, and the place in the run: where the last optimizer step ended.

        Raises:
            NonFiniteError: the last step was not finite: its weights are not saved over good ones.
        """
        self.watch.settle()
        checkpoint["mmllm_elapsed_seconds"] = float(self.elapsed_seconds)
        if self._last_factor is not None:
            checkpoint["mmllm_lr_factor"] = self._last_factor
        if "optimizer_states" in checkpoint:
            states = zip(checkpoint["optimizer_states"], self.trainer.optimizers, strict=True)
            checkpoint["optimizer_states"] = [self._numbered(state, optimizer) for state, optimizer in states]
        if self._step_start is not None:
            self._step_start.rewind(checkpoint)

    def _numbered(self, state: dict[str, Any], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """An optimizer's state with parameters numbered as the module has them, not as the optimizer's groups do.

        Sharded strategies read whole checkpoints so (lightning 2.6); `load_state_dict` takes any numbers.
        """
        saved = [number for group in state.get("param_groups", ()) for number in group["params"]]
        if not saved or saved != list(range(len(saved))):  # another rank's, names (in shards), or numbered so already
            return state
        places = {id(parameter): place for place, parameter in enumerate(self.parameters())}
        new = [places[id(parameter)] for group in optimizer.param_groups for parameter in group["params"]]
        groups = [{**group, "params": [new[number] for number in group["params"]]} for group in state["param_groups"]]
        return {**state, "state": {new[n]: value for n, value in state["state"].items()}, "param_groups": groups}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restores the clock.

        Raises:
            ValueError: the checkpoint is at the end of the training that it should go on with; Lightning would do
                nothing, export included, and say so nowhere.
        """
        weights = checkpoint.get("state_dict", {})  # a sharded strategy has loaded them already
        earlier = next((name for name in weights if is_earlier(name)), None)
        if earlier is not None:
            raise ValueError(
                f"the checkpoint has {earlier}, a name that an earlier mmllm gave that weight, and the optimizer's "
                f"state in its order; go on with the mmllm that wrote it (the model folders it writes are read here)"
            )
        without_averages(weights)
        if self._trainer is not None and self.trainer.state.fn == TrainerFn.FITTING:
            self._check_goes_on(checkpoint)
        self.elapsed_seconds = float(checkpoint.get("mmllm_elapsed_seconds", 0.0))
        self._last_factor = checkpoint.get("mmllm_lr_factor")
        self._resumed = checkpoint.get("loops", {}).get("fit_loop")

    def _check_goes_on(self, checkpoint: Mapping[str, Any]) -> None:
        epochs = checkpoint["loops"]["fit_loop"]["epoch_progress"]["current"]["processed"]
        steps = checkpoint["global_step"]
        for name, done, last in (("step", steps, self.trainer.max_steps), ("epoch", epochs, self.trainer.max_epochs)):
            if last not in (None, -1) and done >= last:
                raise ValueError(
                    f"nothing is left to train: the checkpoint is at {name} {done} and trainer.max_{name}s is {last}; "
                    f"raise it, or begin anew without --ckpt_path"
                )

    def on_train_end(self) -> None:
        """Writes the last metrics, and exports, after callbacks such as `EMA` have put the final weights in place.

        Raises:
            NonFiniteError: the last step was not finite.
        """
        self.watch.settle()
        if self.window.num_batches:
            self._write_metrics(self.trainer.global_step)
        if self.export_dir and self.trainer.is_global_zero:
            self.export(Path(self.export_dir))
            log.info("wrote %s", self.export_dir)


class MetricWindow:
    """Sums and counts since the last log line; on the device until they are read."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forgets everything and restarts the clock."""
        self.sums: dict[str, Tensor | float] = {}
        self.counts: dict[str, Tensor | float] = {}
        self.num_batches = 0
        self.flops = 0
        """Of this rank's batches, where they are counted."""
        self._start = time.monotonic()

    @property
    def seconds(self) -> float:
        """Since the last reset."""
        return time.monotonic() - self._start

    def add(self, sums: Mapping[str, Tensor | float], counts: Mapping[str, Tensor | float] | None = None) -> None:
        """Adds one batch: a metric's mean is the sum of `sums[name]` over that of `counts[name]` (1 by default)."""
        self.num_batches += 1
        for name, value in sums.items():
            count = 1.0 if counts is None else counts[name]
            value = value.detach() if isinstance(value, Tensor) else value
            self.sums[name] = self.sums.get(name, 0.0) + value
            self.counts[name] = self.counts.get(name, 0.0) + count

    def note(self, name: str, value: Tensor | float) -> None:
        """Adds one value of a metric that isn't a batch's."""
        value = value.detach() if isinstance(value, Tensor) else value
        self.sums[name] = self.sums.get(name, 0.0) + value
        self.counts[name] = self.counts.get(name, 0.0) + 1.0

    def means(self) -> dict[str, float]:
        """Each metric's mean; those without a count are left out."""
        counts = {name: float(count) for name, count in self.counts.items()}
        return {name: float(total) / counts[name] for name, total in self.sums.items() if counts[name] > 0}


def memory_gb(device: torch.device) -> dict[str, float]:
    """What the process holds of the device's memory, in 10⁹ bytes.

    Of a GPU the most that was allocated, and the most that PyTorch's allocator reserved, since the process began; of a
    CPU what the process has in memory now.
    """
    if device.type == "cuda":
        return {
            "memory_allocated_gb": torch.cuda.max_memory_allocated(device) / 1e9,
            "memory_reserved_gb": torch.cuda.max_memory_reserved(device) / 1e9,
        }
    return {"memory_resident_gb": psutil.Process().memory_info().rss / 1e9}


def _mixed(seed: int, batch_number: int, rank: int) -> int:
    """A seed for one batch on one rank."""
    return hash((seed, batch_number, rank)) % 2**63
