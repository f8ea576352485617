"""The optimizer of every stage: AdamW with parameter groups, Muon for hidden matrices, or SGD with momentum.

Shapes: a matrix is [out, in]; a stack of experts is [E, out, in]; a convolution's filters are [out, in, height, width].
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim.adamw import adamw

from mmllm.model.roles import parameter_roles
from mmllm.training.matrix_exchange import MatrixExchange, local, local_matrices, matrix_shape, ranks_of

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
"""Quintic coefficients of Jordan et al. 2024 (https://kellerjordan.github.io/posts/muon/)."""
MUON_MOVES = (("hidden", 2), ("hidden", 3), ("filters", 4))
"""Roles and dimensions of what Muon moves. AdamW moves the filters of one-dimensional convolutions: most of ours are
depthwise, one row each."""

_SCHEDULES = ("cosine", "wsd", "linear", "constant")

_OLDER = {"image_tower": "tower_lr", "image_projector": "projector_lr", "audio_front_end": "projector_lr"}
"""Keys that gave rates before `parts` did."""


@dataclass(frozen=True)
class OptimizerConfig:
    """How weights move.

    Attributes:
        lr: peak learning rate of everything that has none of its own.
        tower_lr: peak learning rate of the image tower; None: `lr`; 0: the tower is frozen.
        projector_lr: peak learning rate of the image and audio projectors; None: `lr`; 0: they are frozen.
        parts: peak learning rates of parts of a decoder's model (`mmllm.training.parts`) by their names, which then
            don't follow `lr`, `tower_lr` and `projector_lr`. 0: frozen, without gradient or optimizer state.
        weight_decay: decoupled; never on norms, biases and embeddings.
        betas: AdamW's.
        eps: AdamW's.
        schedule: of the rate behind the warm-up: "cosine" or "linear": it falls to its floor all the way; "wsd": it
            stays at the peak and falls at the end (warm-up, stable, decay: arXiv 2404.06395); "constant": it stays.
        warmup: share of the run over which the rate rises linearly, from one part of it at the first step.
        warmup_steps: in the place of `warmup`, a number of steps, which is the same however long the run is.
        decay: of "wsd", share of the run over which the rate falls.
        decay_steps: in the place of `decay`, a number of steps. With both numbers of steps a checkpoint of the stable
            phase is that of a run of any other `trainer.max_steps`: one run, several decays.
        decay_shape: of "wsd": "sqrt", 1 - √t (arXiv 2405.18392), or "linear".
        min_lr_ratio: the floor as a share of the peak.
        muon: move hidden matrices with Muon, the rest with AdamW.
        muon_momentum: Muon's momentum (Nesterov's form).
        muon_steps: Newton-Schulz iterations.
        sgd: move everything by SGD with momentum, in the place of AdamW. Its steps are as long as the gradients are, so
            that rates (and with them decay) are of another order than AdamW's.
        sgd_momentum: SGD's momentum (the heavy ball's), 0: none.
    """

    lr: float = 1e-3
    tower_lr: float | None = None
    projector_lr: float | None = None
    parts: dict[str, float] | None = None
    weight_decay: float = 0.05
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    schedule: Literal["cosine", "wsd", "linear", "constant"] = "cosine"
    warmup: float = 0.03
    warmup_steps: int | None = None
    decay: float = 0.1
    decay_steps: int | None = None
    decay_shape: Literal["sqrt", "linear"] = "sqrt"
    min_lr_ratio: float = 0.05
    muon: bool = False
    muon_momentum: float = 0.95
    muon_steps: int = 5
    sgd: bool = False
    sgd_momentum: float = 0.9

    def __post_init__(self) -> None:
        if not self.lr > 0:
            raise ValueError(f"optimizer.lr is {self.lr}; it must be positive")
        for name in ("tower_lr", "projector_lr"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise ValueError(f"optimizer.{name} is {value}; give a rate of 0 or more, or leave it out for lr")
        for name, value in (self.parts or {}).items():
            if not 0 <= value < math.inf:
                raise ValueError(f"optimizer.parts.{name} is {value}; give a rate of 0 or more, or leave it out for lr")
            older = _OLDER.get(name)
            if older is not None and getattr(self, older) is not None:
                raise ValueError(f"optimizer.{older} and parts.{name} both give a rate; leave one of them out")
        if not 0 <= self.warmup < 1:
            raise ValueError(f"optimizer.warmup is {self.warmup}; it is a share of the run, from 0 up to below 1")
        self._check_schedule()
        if not 0 <= self.min_lr_ratio <= 1:
            raise ValueError(f"optimizer.min_lr_ratio is {self.min_lr_ratio}; it is a share of lr, from 0 to 1")
        if not all(0 <= beta < 1 for beta in (*self.betas, self.muon_momentum)):
            raise ValueError(f"optimizer.betas {self.betas} and muon_momentum {self.muon_momentum} must be in [0, 1)")
        if not 0 <= self.sgd_momentum < 1:
            raise ValueError(f"optimizer.sgd_momentum is {self.sgd_momentum}; it must be in [0, 1)")
        if self.sgd and self.muon:
            raise ValueError(
                "optimizer.sgd and optimizer.muon are both true; SGD moves everything: leave one of them out"
            )

    def _check_schedule(self) -> None:
        if self.schedule not in _SCHEDULES:
            raise ValueError(f"optimizer.schedule is {self.schedule!r}; choose {', '.join(_SCHEDULES)}")
        if self.decay_shape not in ("sqrt", "linear"):
            raise ValueError(f"optimizer.decay_shape is {self.decay_shape!r}; choose sqrt or linear")
        is_whole = self.schedule == "wsd" and not self.counts_steps and self.decay + self.warmup > 1
        if not 0 < self.decay <= 1 or is_whole:
            raise ValueError(
                f"optimizer.decay is {self.decay} and warmup {self.warmup}; decay is a share of the run above 0, and "
                f"the two are at most the whole of it"
            )
        for name, least in (("warmup_steps", 0), ("decay_steps", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"optimizer.{name} is {value}; give {least} or more, or leave it out for a share")
        if self.decay_steps is not None and self.schedule != "wsd":
            raise ValueError(
                f"optimizer.decay_steps is {self.decay_steps} and schedule is {self.schedule}, which has no decay of "
                f"its own; set schedule to wsd, or leave decay_steps out"
            )

    @property
    def counts_steps(self) -> bool:
        """Whether the schedule is told in steps, so that how many there are must be known."""
        return self.warmup_steps is not None or self.decay_steps is not None

    def fits(self, num_steps: int) -> bool:
        """Whether a run of so many steps has room for the warm-up, and with "wsd" for the decay behind it."""
        warmup = self.warmup * num_steps if self.warmup_steps is None else self.warmup_steps
        decay = self.decay * num_steps if self.decay_steps is None else self.decay_steps
        return warmup + (decay if self.schedule == "wsd" else 0) <= num_steps * (1 + 1e-9)

    def rate_of(self, group: str) -> float:
        """The peak rate of a part that `parts` names, or of "tower", "projector" or "decoder"."""
        if group in (self.parts or {}):
            return (self.parts or {})[group]
        own = {"tower": self.tower_lr, "image_tower": self.tower_lr, "projector": self.projector_lr}.get(group)
        return self.lr if own is None else own


def learning_rate_factor(
    progress: float, config: OptimizerConfig, step: int | None = None, num_steps: int | None = None
) -> float:
    """The rate as a share of its peak: linear warm-up, then what `config.schedule` says, down to `min_lr_ratio`.

    Args:
        progress: share of the run that is done when the step ends, 0 to 1.
        config: gives the schedule.
        step: number of the step, from 1; for `warmup_steps` and `decay_steps`.
        num_steps: of the whole run; likewise.
    """
    progress = min(max(progress, 0.0), 1.0)
    warmed, warmup = (progress / config.warmup if config.warmup else 1.0), config.warmup
    decayed = (progress - (1 - config.decay)) / config.decay
    if config.counts_steps:
        assert step is not None and num_steps is not None, "the module asks for trainer.max_steps"
        # Whole numbers, so that the stable phase is bit for bit that of a run of any other length.
        if config.warmup_steps is not None:
            warmed, warmup = step / max(config.warmup_steps, 1), config.warmup_steps / num_steps
        if config.decay_steps is not None:
            decayed = (step - (num_steps - config.decay_steps)) / config.decay_steps
    if warmed < 1:
        return warmed
    floor = config.min_lr_ratio
    match config.schedule:
        case "constant":
            return 1.0
        case "wsd":
            fallen = min(max(decayed, 0.0), 1.0)
            return 1.0 - (1 - floor) * (math.sqrt(fallen) if config.decay_shape == "sqrt" else fallen)
        case "linear":
            return 1.0 - (1 - floor) * _share_behind(progress, warmup)
        case _:
            return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * _share_behind(progress, warmup)))


def _share_behind(progress: float, warmup: float) -> float:
    """How much of the run behind the warm-up is done."""
    return (progress - warmup) / (1 - warmup) if warmup < 1 else 1.0


def parameter_groups(
    module: nn.Module, config: OptimizerConfig, tower_of: Callable[[str], str] = lambda name: "decoder"
) -> list[dict[str, Any]]:
    """Groups by tower, by decay or none, and by AdamW, Muon (with `config.muon`) or SGD (`config.sgd`).

    Args:
        module: whose trainable parameters are grouped; frozen ones are left out.
        config: the rates.
        tower_of: a parameter's name to what has a rate: see `OptimizerConfig.rate_of`.

    What a parameter is, its module's type or mark says (`mmllm.model.roles`): embeddings and vectors don't decay, and
    Muon moves hidden matrices, stacks of them and the filters of two-dimensional convolutions.

    Returns:
        Groups for `MuonAdamW`, `SGDW` or `torch.optim.AdamW`. Each also has its `name` and its `peak_lr`, from which
        the schedule computes `lr`. The order depends on names alone, so checkpoints resume.
    """
    roles = parameter_roles(module)
    groups: dict[str, dict[str, Any]] = {}
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        tower, role = tower_of(name), roles[name]
        decays = role in ("head", "hidden", "filters")
        use_muon = config.muon and (role, parameter.ndim) in MUON_MOVES
        moved_by = "muon" if use_muon else "sgd" if config.sgd else "adamw"
        key = f"{tower}/{moved_by}/{'decay' if decays else 'no_decay'}"
        group = groups.setdefault(
            key,
            {
                "params": [],
                "name": key,
                "lr": config.rate_of(tower),
                "peak_lr": config.rate_of(tower),
                "weight_decay": config.weight_decay if decays else 0.0,
                "use_muon": use_muon,
            },
        )
        group["params"].append(parameter)
    return [groups[key] for key in sorted(groups)]


def build_optimizer(
    groups: list[dict[str, Any]], config: OptimizerConfig, num_replicas: int = 1
) -> torch.optim.Optimizer:
    """`torch.optim.AdamW` (fused), `MuonAdamW` when `config.muon`, `SGDW` when `config.sgd`.

    Args:
        groups: as `parameter_groups` gives them.
        config: the rates.
        num_replicas: ranks that hold the same weights and gradients (DDP's), among which Muon's work is shared.
    """
    if not groups:
        raise ValueError(
            "no parameter is trainable: each part's rate is 0; give one of optimizer.parts (or tower_lr, projector_lr) "
            "a learning rate above 0"
        )
    optimizer: torch.optim.Optimizer
    if config.muon:
        optimizer = MuonAdamW(groups, config, num_replicas)
    elif config.sgd:
        optimizer = SGDW(groups, config)
    else:
        optimizer = torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)
    optimizer.register_step_post_hook(_count_versions)
    return optimizer


def _count_versions(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    """Fused kernels move weights without counting their versions, by which an engine sees that they have moved."""
    moved = [p for group in optimizer.param_groups for p in group["params"] if not isinstance(p, DTensor)]
    torch.autograd.graph.increment_version(moved)


class _ByGroup(torch.optim.Optimizer):
    """Steps group by group, of each those parameters that have gradients."""

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One step of all groups; `closure`, where given, computes the gradients first."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            if parameters:
                self._step_group(group, parameters)
        return loss

    def _step_group(self, group: dict[str, Any], parameters: list[Tensor]) -> None:
        raise NotImplementedError


class SGDW(_ByGroup):
    """SGD with momentum and decoupled decay (arXiv 1711.05101): v ← μ·v + g; θ ← (1 − lr·decay)·θ − lr·v.

    `torch.optim.SGD` would add the decay to the gradient, so that momentum multiplies it. Weights may be sharded; the
    state is sharded as they are.
    """

    def __init__(self, groups: Iterable[dict[str, Any]], config: OptimizerConfig) -> None:
        defaults = {"lr": config.lr, "momentum": config.sgd_momentum, "weight_decay": config.weight_decay}
        super().__init__(groups, defaults)

    def _step_group(self, group: dict[str, Any], parameters: list[Tensor]) -> None:
        for parameter in parameters:
            if not self.state[parameter]:
                self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        weights = [local(p) for p in parameters]
        buffers = [local(self.state[p]["momentum_buffer"]) for p in parameters]
        torch._foreach_mul_(buffers, group["momentum"])
        torch._foreach_add_(buffers, [_local_gradient(p) for p in parameters])
        torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_add_(weights, buffers, alpha=-group["lr"])


class MuonAdamW(_ByGroup):
    """Muon for the groups with `use_muon`, AdamW for the others, in one optimizer with one state.

    Muon follows Jordan et al. 2024 with the update scaled by 0.2·sqrt(max(out, in)) (Liu et al. 2025,
    https://arxiv.org/abs/2502.16982), so that AdamW's rate and decay fit both. Unlike `torch.optim.Muon` it
    takes stacks [E, out, in] and filters [out, in, height, width] (each output's as one row, as in Jordan's CIFAR-10
    speed record), orthogonalizes matrices of one shape in one batched product, and iterates in fp32 on every device,
    or in float64 where the weights are (theirs iterates in bf16).

    Replicas share the work, and so do ranks that hold parts of a matrix: see `MatrixExchange`. Weights may be sharded
    along any dimensions of any mesh (FSDP2, tensor and expert parallelism); the state is sharded as they are.
    """

    def __init__(self, groups: Iterable[dict[str, Any]], config: OptimizerConfig, num_replicas: int = 1) -> None:
        self.num_replicas = num_replicas
        self._exchanges: dict[tuple[int, ...], MatrixExchange] = {}
        defaults = {
            "lr": config.lr,
            "betas": config.betas,
            "eps": config.eps,
            "weight_decay": config.weight_decay,
            "momentum": config.muon_momentum,
            "num_steps": config.muon_steps,
            "use_muon": False,
        }
        super().__init__(groups, defaults)
        for group in self.param_groups:
            for parameter in group["params"]:
                if group["use_muon"] and parameter.ndim not in (2, 3, 4):
                    raise ValueError(
                        f"Muon moves matrices and stacks of them; group {group.get('name')!r} holds a parameter "
                        f"of shape {tuple(parameter.shape)}"
                    )

    def _step_group(self, group: dict[str, Any], parameters: list[Tensor]) -> None:
        if group["use_muon"]:
            self._step_muon(group, parameters)
        else:
            self._step_adamw(group, parameters)

    def _step_adamw(self, group: dict[str, Any], parameters: list[Tensor]) -> None:
        for parameter in parameters:
            state = self.state[parameter]
            if not state:
                state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
                state["exp_avg"] = torch.zeros_like(parameter)
                state["exp_avg_sq"] = torch.zeros_like(parameter)
        beta1, beta2 = group["betas"]
        adamw(
            [local(p) for p in parameters],
            [_local_gradient(p) for p in parameters],
            [local(self.state[p]["exp_avg"]) for p in parameters],
            [local(self.state[p]["exp_avg_sq"]) for p in parameters],
            [],
            [self.state[p]["step"] for p in parameters],
            fused=True,
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )

    def _step_muon(self, group: dict[str, Any], parameters: list[Tensor]) -> None:
        for parameter in parameters:
            state = self.state[parameter]
            if not state:
                state["momentum_buffer"] = torch.zeros_like(parameter)
        momentum, gradients = group["momentum"], [_local_gradient(p) for p in parameters]
        buffers = [local(self.state[p]["momentum_buffer"]) for p in parameters]
        torch._foreach_mul_(buffers, momentum)
        torch._foreach_add_(buffers, gradients)
        directions = torch._foreach_add(gradients, buffers, alpha=momentum)
        updates = self._orthogonalized(parameters, list(directions), group["num_steps"])
        weights = [local(p) for p in parameters]
        torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])
        by_width: dict[int, list[int]] = {}
        for number, parameter in enumerate(parameters):
            by_width.setdefault(max(matrix_shape(parameter)[1:]), []).append(number)
        for width, numbers in by_width.items():
            scale = group["lr"] * 0.2 * math.sqrt(width)
            torch._foreach_add_([weights[n] for n in numbers], [updates[n] for n in numbers], alpha=-scale)

    def _orthogonalized(self, parameters: list[Tensor], directions: list[Tensor], num_steps: int) -> list[Tensor]:
        """This rank's parts of the orthogonalized whole matrices, in the shapes of `directions`."""
        together: dict[Any, list[int]] = {}
        for number, parameter in enumerate(parameters):
            mesh = parameter.device_mesh if isinstance(parameter, DTensor) else None
            together.setdefault((mesh, parameter.dtype), []).append(number)
        updates = list(directions)
        for numbers in together.values():
            alike = [parameters[number] for number in numbers]
            key = tuple(id(parameter) for parameter in alike)
            if key not in self._exchanges:
                self._exchanges[key] = MatrixExchange(alike, *ranks_of(alike[0], self.num_replicas))
            parts = [local_matrices(parameters[number], directions[number]) for number in numbers]
            results = self._exchanges[key].apply(parts, lambda stack_NOI: orthogonalize(stack_NOI, num_steps))
            for number, result in zip(numbers, results, strict=True):
                updates[number] = result.reshape(directions[number].shape)
        return updates


def _local_gradient(parameter: Tensor) -> Tensor:
    """This rank's part of the gradient, split as the parameter is."""
    gradient = parameter.grad
    assert gradient is not None
    if isinstance(gradient, DTensor) and isinstance(parameter, DTensor) and gradient.placements != parameter.placements:
        gradient = gradient.redistribute(placements=parameter.placements)
    return local(gradient)


def orthogonalize(matrices_NOI: Tensor, num_steps: int = 5) -> Tensor:
    """Approximately U·Vᵀ of each matrix's singular value decomposition, by Newton-Schulz.

    Args:
        matrices_NOI: [N, out, in], any float type; an all-zero matrix stays zero.
        num_steps: iterations; after five, singular values lie between about 0.7 and 1.2.

    Returns:
        [N, out, in], fp32 or wider.
    """
    a, b, c = NEWTON_SCHULZ
    x = matrices_NOI.to(torch.promote_types(matrices_NOI.dtype, torch.float32))
    is_tall = x.shape[-2] > x.shape[-1]
    if is_tall:
        x = x.mT
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    for _ in range(num_steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if is_tall else x
