"""The optimizer of every stage: AdamW with parameter groups, and Muon for hidden matrices.

Shapes: a matrix is [out, in]; a stack of experts is [E, out, in]; a convolution's filters are [out, in, height, width].
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.adamw import adamw

from mmllm.model.roles import parameter_roles

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
"""Quintic coefficients of Jordan et al. 2024 (https://kellerjordan.github.io/posts/muon/)."""
MUON_MOVES = (("hidden", 2), ("hidden", 3), ("filters", 4))
"""Roles and dimensions of what Muon moves. AdamW moves the filters of one-dimensional convolutions: most of ours are
depthwise, one row each."""


@dataclass(frozen=True)
class OptimizerConfig:
    """How weights move.

    Attributes:
        lr: peak learning rate of everything that has none of its own.
        tower_lr: peak learning rate of the image tower; None: `lr`; 0: the tower is frozen.
        projector_lr: peak learning rate of the image and audio projectors; None: `lr`.
        weight_decay: decoupled; never on norms, biases and embeddings.
        betas: AdamW's.
        eps: AdamW's.
        warmup: share of the run over which the rate rises linearly, from one part of it at the first step.
        min_lr_ratio: the cosine's floor as a share of the peak.
        muon: move hidden matrices with Muon, the rest with AdamW.
        muon_momentum: Muon's momentum (Nesterov's form).
        muon_steps: Newton-Schulz iterations.
    """

    lr: float = 1e-3
    tower_lr: float | None = None
    projector_lr: float | None = None
    weight_decay: float = 0.05
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    warmup: float = 0.03
    min_lr_ratio: float = 0.05
    muon: bool = False
    muon_momentum: float = 0.95
    muon_steps: int = 5

    def __post_init__(self) -> None:
        if not self.lr > 0:
            raise ValueError(f"optimizer.lr is {self.lr}; it must be positive")
        for name in ("tower_lr", "projector_lr"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise ValueError(f"optimizer.{name} is {value}; give a rate of 0 or more, or leave it out for lr")
        if not 0 <= self.warmup < 1:
            raise ValueError(f"optimizer.warmup is {self.warmup}; it is a share of the run, from 0 up to below 1")
        if not 0 <= self.min_lr_ratio <= 1:
            raise ValueError(f"optimizer.min_lr_ratio is {self.min_lr_ratio}; it is a share of lr, from 0 to 1")
        if not all(0 <= beta < 1 for beta in (*self.betas, self.muon_momentum)):
            raise ValueError(f"optimizer.betas {self.betas} and muon_momentum {self.muon_momentum} must be in [0, 1)")


def learning_rate_factor(progress: float, config: OptimizerConfig) -> float:
    """The rate as a share of its peak: linear warm-up, then a cosine to `min_lr_ratio`.

    Args:
        progress: share of the run that is done when the step ends, 0 to 1.
        config: gives `warmup` and `min_lr_ratio`.
    """
    progress = min(max(progress, 0.0), 1.0)
    if progress < config.warmup:
        return progress / config.warmup
    decayed = (progress - config.warmup) / (1 - config.warmup)
    return config.min_lr_ratio + (1 - config.min_lr_ratio) * 0.5 * (1 + math.cos(math.pi * decayed))


def parameter_groups(
    module: nn.Module, config: OptimizerConfig, tower_of: Callable[[str], str] = lambda name: "decoder"
) -> list[dict[str, Any]]:
    """Groups by tower, by decay or none, and (with `config.muon`) by AdamW or Muon.

    Args:
        module: whose trainable parameters are grouped; frozen ones are left out.
        config: the rates.
        tower_of: a parameter's name to "decoder", "tower" or "projector".

    What a parameter is, its module's type or mark says (`mmllm.model.roles`): embeddings and vectors don't decay, and
    Muon moves hidden matrices, stacks of them and the filters of two-dimensional convolutions.

    Returns:
        Groups for `MuonAdamW` or `torch.optim.AdamW`. Each also has its `name` and its `peak_lr`, from which
        the schedule computes `lr`. The order depends on names alone, so checkpoints resume.
    """
    rates = {
        "decoder": config.lr,
        "tower": config.lr if config.tower_lr is None else config.tower_lr,
        "projector": config.lr if config.projector_lr is None else config.projector_lr,
    }
    roles = parameter_roles(module)
    groups: dict[str, dict[str, Any]] = {}
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        tower, role = tower_of(name), roles[name]
        decays = role in ("head", "hidden", "filters")
        use_muon = config.muon and (role, parameter.ndim) in MUON_MOVES
        key = f"{tower}/{'muon' if use_muon else 'adamw'}/{'decay' if decays else 'no_decay'}"
        group = groups.setdefault(
            key,
            {
                "params": [],
                "name": key,
                "lr": rates[tower],
                "peak_lr": rates[tower],
                "weight_decay": config.weight_decay if decays else 0.0,
                "use_muon": use_muon,
            },
        )
        group["params"].append(parameter)
    return [groups[key] for key in sorted(groups)]


def build_optimizer(
    groups: list[dict[str, Any]], config: OptimizerConfig, num_replicas: int = 1
) -> torch.optim.Optimizer:
    """`torch.optim.AdamW` (fused), or `MuonAdamW` when `config.muon`.

    Args:
        groups: as `parameter_groups` gives them.
        config: the rates.
        num_replicas: ranks that hold the same weights and gradients (DDP's), among which Muon's work is shared.
    """
    if not groups:
        raise ValueError("no parameter is trainable; set a tower's `trainable: true` or a learning rate above 0")
    if config.muon:
        return MuonAdamW(groups, config, num_replicas)
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)


class MuonAdamW(torch.optim.Optimizer):
    """Muon for the groups with `use_muon`, AdamW for the others, in one optimizer with one state.

    Muon follows Jordan et al. 2024 with the update scaled by 0.2·sqrt(max(out, in)) (Liu et al. 2025,
    https://arxiv.org/abs/2502.16982), so that AdamW's rate and decay fit both. Unlike `torch.optim.Muon` it
    takes stacks [E, out, in] and filters [out, in, height, width] (each output's as one row, as in Jordan's CIFAR-10
    speed record), orthogonalizes matrices of one shape in one batched product, and iterates in fp32 on the CPU,
    where bf16 products are slow.
    """

    def __init__(self, groups: Iterable[dict[str, Any]], config: OptimizerConfig, num_replicas: int = 1) -> None:
        self.num_replicas = num_replicas
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

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One step of all groups; `closure`, where given, computes the gradients first."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            if not parameters:
                continue
            if group["use_muon"]:
                self._step_muon(group, parameters)
            else:
                self._step_adamw(group, parameters)
        return loss

    def _step_adamw(self, group: dict[str, Any], parameters: list[Tensor]) -> None:
        for parameter in parameters:
            state = self.state[parameter]
            if not state:
                state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
                state["exp_avg"] = torch.zeros_like(parameter)
                state["exp_avg_sq"] = torch.zeros_like(parameter)
        beta1, beta2 = group["betas"]
        adamw(
            parameters,
            [p.grad for p in parameters if p.grad is not None],
            [self.state[p]["exp_avg"] for p in parameters],
            [self.state[p]["exp_avg_sq"] for p in parameters],
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
        by_shape: dict[tuple[int, int], list[Tensor]] = {}
        for parameter in parameters:
            state = self.state[parameter]
            if not state:
                state["momentum_buffer"] = torch.zeros_like(parameter)
            by_shape.setdefault(_matrix_shape(parameter), []).append(parameter)
        momentum, stacks = group["momentum"], []
        for shape, same_shape in by_shape.items():
            directions = []
            for parameter in same_shape:
                grad, buffer = parameter.grad, self.state[parameter]["momentum_buffer"]
                assert grad is not None
                buffer.mul_(momentum).add_(grad)
                directions.append(grad.add(buffer, alpha=momentum).reshape(-1, *shape))
            stacks.append(torch.cat(directions))
        updates = self._orthogonalized(stacks, group["num_steps"])
        for (shape, same_shape), update_NOI in zip(by_shape.items(), updates, strict=True):
            scale = group["lr"] * 0.2 * math.sqrt(max(shape))
            sizes = [parameter.numel() // math.prod(shape) for parameter in same_shape]
            for parameter, update in zip(same_shape, update_NOI.split(sizes), strict=True):
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.add_(update.reshape(parameter.shape).to(parameter.dtype), alpha=-scale)

    def _orthogonalized(self, stacks: list[Tensor], num_steps: int) -> list[Tensor]:
        """`orthogonalize` of each stack [N, out, in]; each replica does its share of every stack."""
        num_ranks = self.num_replicas
        if num_ranks == 1:
            return [orthogonalize(stack, num_steps) for stack in stacks]
        rank, own = dist.get_rank(), []
        for turn, stack in enumerate(stacks):  # stacks of one matrix fall to each rank in turn
            size = math.ceil(len(stack) / num_ranks)
            padded = F.pad(stack, (0, 0, 0, 0, 0, size * num_ranks - len(stack)))
            place = (rank + turn) % num_ranks
            own.append(orthogonalize(padded[place * size : (place + 1) * size], num_steps))
        flat = torch.cat([share.flatten() for share in own])
        of_ranks = [torch.empty_like(flat) for _ in range(num_ranks)]
        dist.all_gather(of_ranks, flat)
        whole, start = [], 0
        for turn, (stack, share) in enumerate(zip(stacks, own, strict=True)):
            stop = start + share.numel()
            shares = [of_ranks[(place - turn) % num_ranks][start:stop] for place in range(num_ranks)]
            whole.append(torch.cat(shares).view(-1, *stack.shape[1:])[: len(stack)])
            start = stop
        return whole


def _matrix_shape(parameter: Tensor) -> tuple[int, int]:
    """[out, in] of a matrix or of those in a stack; filters count as one row an output."""
    if parameter.ndim == 4:
        return parameter.shape[0], parameter[0].numel()
    return parameter.shape[-2], parameter.shape[-1]


def orthogonalize(matrices_NOI: Tensor, num_steps: int = 5) -> Tensor:
    """Approximately U·Vᵀ of each matrix's singular value decomposition, by Newton-Schulz.

    Args:
        matrices_NOI: [N, out, in], any float type; an all-zero matrix stays zero.
        num_steps: iterations; after five, singular values lie between about 0.7 and 1.2.

    Returns:
        fp32 [N, out, in].
    """
    a, b, c = NEWTON_SCHULZ
    x = matrices_NOI.float()
    is_tall = x.shape[-2] > x.shape[-1]
    if is_tall:
        x = x.mT
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    for _ in range(num_steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if is_tall else x
