"""Reptile: weights from which a new task is learnt in a few steps (Nichol et al. 2018, https://arxiv.org/abs/1803.02999).

`class_path: mmllm.training.posttraining.reptile_module.ReptileModule`, with `data.init_args.tasks`. From the weights θ
each task is trained on by itself for k steps of an ordinary optimizer, which gives φ; then

    θ ← θ + ε · mean over the tasks of a round (φ − θ)

and the next tasks begin at the new θ (the paper's Algorithm 2; ε falls to 0 along a line, as in its experiments). What
is exported is θ.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mmllm.training.averaging import AverageLast
from mmllm.training.decoder_module import DecoderModule
from mmllm.training.ema import EMA
from mmllm.training.optimizers import parameter_groups

KEY = "mmllm_reptile"
"""Of a checkpoint: the outer weights, and how far the round is."""


@dataclass(frozen=True)
class ReptileConfig:
    """How weights move between tasks.

    Attributes:
        inner_steps: k, optimizer steps on a task; `data.init_args.tasks.steps` is as many batches (times
            `accumulate_grad_batches`).
        outer_lr: ε at the start.
        anneal: ε falls along a line to 0 at the end of the training.
        meta_batch_size: tasks of a round, whose moves are averaged.
        inner_optimizer: "adam": the one of `optimizer`; "sgd": its rates, without momentum, moments or decay.
        reset_optimizer: each task begins without moments. False: they go on from task to task, as in the paper's code
            (whose Adam has betas 0 and 0.999).
    """

    inner_steps: int = 5
    outer_lr: float = 1.0
    anneal: bool = True
    meta_batch_size: int = 1
    inner_optimizer: Literal["adam", "sgd"] = "adam"
    reset_optimizer: bool = True

    def __post_init__(self) -> None:
        if self.inner_steps < 1 or self.meta_batch_size < 1:
            raise ValueError(
                f"reptile.inner_steps is {self.inner_steps} and meta_batch_size {self.meta_batch_size}; both are at "
                f"least 1"
            )
        if not 0 < self.outer_lr <= 1:
            raise ValueError(f"reptile.outer_lr is {self.outer_lr}; it is a share of the way, above 0 and up to 1")
        if self.inner_optimizer not in ("adam", "sgd"):
            raise ValueError(f"reptile.inner_optimizer is {self.inner_optimizer!r}; choose adam or sgd")

    @property
    def round_steps(self) -> int:
        """Optimizer steps between two moves of the outer weights."""
        return self.inner_steps * self.meta_batch_size


class OuterWeights:
    """θ beside the weights that train, and the sum of a round's moves.

    Args:
        parameters: those that train.
        config: how they move.
    """

    def __init__(self, parameters: list[nn.Parameter], config: ReptileConfig) -> None:
        self.config = config
        self._parameters = parameters
        self._start = [parameter.detach().clone() for parameter in parameters]
        self._moves = [torch.zeros_like(start) for start in self._start] if config.meta_batch_size > 1 else []
        self.num_steps = 0
        """Optimizer steps of the round that are done."""
        self._outer_lr = config.outer_lr

    def begin_step(self, progress: float) -> None:
        """Before an optimizer step: a round's first fixes its ε.

        Args:
            progress: share of the training that is done.
        """
        if not self.num_steps:
            self._outer_lr = self.config.outer_lr * (1.0 - progress if self.config.anneal else 1.0)

    @torch.no_grad()
    def end_step(self) -> bool:
        """After an optimizer step: at a task's end φ is noted and θ comes back, which a round's end has moved.

        Returns:
            Whether a task has ended.
        """
        self.num_steps += 1
        if self.num_steps % self.config.inner_steps:
            return False
        moves = list(torch._foreach_sub(self._weights, self._start))
        if self._moves:
            torch._foreach_add_(self._moves, moves)
            moves = self._moves
        if self.num_steps == self.config.round_steps:
            torch._foreach_add_(self._start, moves, alpha=self._outer_lr / self.config.meta_batch_size)
            if self._moves:
                torch._foreach_zero_(self._moves)
            self.num_steps = 0
        torch._foreach_copy_(self._weights, self._start)
        return True

    @torch.no_grad()
    def put_back(self) -> None:
        """Takes θ for the weights; a round that is not over is lost."""
        torch._foreach_copy_(self._weights, self._start)
        self.num_steps = 0

    @property
    def _weights(self) -> list[Tensor]:
        return [parameter.detach() for parameter in self._parameters]

    def state_dict(self) -> dict[str, Any]:
        """θ; of the round so far the moves, how many steps are done, and ε."""
        return {
            "start": self._start, "moves": self._moves, "num_steps": self.num_steps, "outer_lr": self._outer_lr
        }  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from a state.

        Raises:
            ValueError: other parameters were trained.
        """
        for name, own in (("start", self._start), ("moves", self._moves)):
            if [one.shape for one in state[name]] != [one.shape for one in own]:
                raise ValueError(
                    "the checkpoint's Reptile trained other weights, or rounds of another size; go on with the same "
                    "optimizer.parts, adapter and reptile.meta_batch_size"
                )
            for mine, saved in zip(own, state[name], strict=True):
                mine.copy_(saved)
        self.num_steps, self._outer_lr = int(state["num_steps"]), float(state["outer_lr"])


class ReptileModule(DecoderModule):
    """A decoder that learns to learn tasks: its inner steps are `DecoderModule`'s, of an adapter too.

    Training ends with a round: by steps, which must be whole rounds, or by seconds, with the first round that ends
    after them. Replicas (DDP) move alike; sharded weights are refused.
    """

    def __init__(self, reptile: ReptileConfig | None = None, **settings: Any) -> None:
        """Keeps the settings.

        Args:
            reptile: how weights move between tasks; None: the defaults.
            **settings: of `DecoderModule`.
        """
        super().__init__(**settings)
        self.reptile = reptile or ReptileConfig()
        self.outer: OuterWeights | None = None
        self._saved: dict[str, Any] | None = None

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """The inner optimizer."""
        if self.reptile.inner_optimizer == "adam":
            return super().configure_optimizers()
        groups = parameter_groups(self, self.optimizer, self.tower_of)
        self._peak_lrs = [group.pop("peak_lr") for group in groups]
        plain = [{key: group[key] for key in ("params", "name", "lr")} for group in groups]
        return torch.optim.SGD(plain, lr=self.optimizer.lr)

    def on_fit_start(self) -> None:
        """Looks whether the data comes task by task, in whole rounds.

        Raises:
            ValueError: it doesn't; or weights are sharded, or averaged.
        """
        super().on_fit_start()
        self._check()
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        self.outer = OuterWeights(trained, self.reptile)
        if self._saved is not None:
            self.outer.load_state_dict(self._saved)
            self._saved = None

    def _check(self) -> None:
        config, trainer = self.reptile, self.trainer
        if self.mesh is not None:
            raise ValueError("ReptileModule knows no sharded weights; set trainer.strategy to auto or ddp")
        callbacks: list[Any] = trainer.callbacks  # pyright: ignore[reportAttributeAccessIssue]
        averaging = next((callback for callback in callbacks if isinstance(callback, (EMA, AverageLast))), None)
        if averaging is not None:
            raise ValueError(
                f"trainer.callbacks has {type(averaging).__name__}, which would average weights within inner loops; "
                f"leave it out: Reptile's outer weights are an average themselves"
            )
        if trainer.max_steps > 0 and trainer.max_steps % config.round_steps:
            raise ValueError(
                f"trainer.max_steps is {trainer.max_steps}, and a round has {config.round_steps} steps "
                f"(reptile.inner_steps times meta_batch_size); give a multiple of it"
            )
        tasks = getattr(self._data, "tasks", None)
        wanted = config.inner_steps * trainer.accumulate_grad_batches
        if tasks is None or tasks.steps != wanted:
            raise ValueError(
                f"reptile.inner_steps is {config.inner_steps}, but the data has "
                f"{'all tasks mixed' if tasks is None else f'{tasks.steps} batches of a task at a time'}; set "
                f"data.init_args.tasks.steps to {wanted}"
            )

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """An inner step, and at a task's or round's end the outer one: before any checkpoint of this step is saved."""
        assert self.outer is not None, "on_fit_start makes it"
        self.outer.begin_step(self.progress if self.max_seconds is None else self._shared(self.progress))
        super().optimizer_step(*args, **kwargs)
        if self.outer.end_step() and self.reptile.reset_optimizer:
            self.trainer.optimizers[0].state.clear()

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """As `DecoderModule`'s, but where the time is over the round is gone on with to its end."""
        before = self.trainer.should_stop
        super().on_train_batch_end(outputs, batch, batch_idx)
        if self.outer is not None and self.outer.num_steps and not before:
            self.trainer.should_stop = False

    def on_train_end(self) -> None:
        """Exports the outer weights; a round that was stopped in its middle is lost."""
        if self.outer is not None and self.outer.num_steps:
            self.outer.put_back()
        super().on_train_end()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keeps the outer weights beside the inner ones."""
        super().on_save_checkpoint(checkpoint)
        if self.outer is not None:
            checkpoint[KEY] = self.outer.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restores them."""
        super().on_load_checkpoint(checkpoint)
        self._saved = checkpoint.get(KEY)
