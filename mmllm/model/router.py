"""Which experts a token goes to, and with what weight.

Shapes: N tokens of the whole batch (padding removed), D width, E experts, K experts a token, G groups of experts,
M modalities.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mmllm_kernels
from mmllm.batch import Modality
from mmllm.model.roles import mark
from mmllm_kernels import Backend

_SMALLEST_SUM = 1e-20
"""Added to the sum of gates before dividing by it, as DeepSeek-V3 does."""


@dataclass(frozen=True)
class MoEConfig:
    """A mixture of experts, dropless. Keys that transformers' configs have are called as there.

    Attributes:
        num_experts: experts a layer.
        num_experts_per_tok: experts a token.
        moe_intermediate_size: inner width of each expert.
        router_aux_loss_coef: weight of the balance loss in the training loss: E · Σᵢ fᵢ Pᵢ, with fᵢ an expert's share
            of the choices and Pᵢ its mean probability (Switch, arXiv 2101.03961). 1 at perfect balance, where every
            token may choose every expert.
        router_z_loss_coef: weight of the router's z-loss (ST-MoE, arXiv 2202.08906).
        norm_topk_prob: divide a token's chosen gates by their sum.
        backend: of `mmllm_kernels.experts`.
        aux_loss_scope: over what the balance loss takes f and P. "layer": each layer's own, over the tokens of the
            global batch; the loss is the mean over layers. "global": the mean over layers too, so that layers may
            differ if their sum is balanced (as transformers' `load_balancing_loss_func`, which is K times as large).
            "sequence": each layer's own over each packed sequence (a row of the batch), as in DeepSeek-V3 (arXiv
            2412.19437); the loss is the mean over layers and over sequences that hold tokens.
        scoring_func: of the logits: "softmax" over the experts, or each expert's own "sigmoid" (DeepSeek-V3). What the
            balance loss calls a probability is then a sigmoid divided by the token's sum of them.
        routed_scaling_factor: the chosen gates are multiplied by it, last.
        n_group: experts lie in so many groups, in the order of their indices.
        topk_group: a token may choose from so many groups only: those with the largest sum of their two best scores
            (the bias included; DeepSeek-V3).
        n_shared_experts: experts of width `moe_intermediate_size` that every token passes with gate 1 (DeepSeekMoE,
            arXiv 2401.06066). A wide shared expert is exactly several of this width.
        use_expert_bias: add a bias to the scores where experts are chosen, not in the gates; no gradient moves it
            (arXiv 2408.15664).
        bias_update_speed: γ. After each optimizer step an expert's bias rises by γ if its load was below the mean, and
            falls by γ if above.
        router_jitter_noise: in training, what the router reads is multiplied by a uniform number between 1 - this and
            1 + this (Switch). What the experts read is not.
        expert_dropout: in training, each of a token's choices is dropped with this probability, but for one if all
            were to go. The gates of those that stay are scaled so that their sum is unchanged.
        modality_experts: which experts tokens of a modality ("text", "image", "audio", "units") may choose (MoMa, arXiv
            2407.21770). A modality that is left out may choose among all. Scores are taken over these experts alone.
        local_entropy_loss_coef: weight of LIMoE's local loss (arXiv 2206.02770): mean entropy of the router for a token
            of a modality. Summed over `local_entropy_modalities`, mean over layers.
        local_entropy_modalities: whose tokens the local loss counts; LIMoE's: text.
        global_entropy_loss_coef: weight of LIMoE's global loss: minus the entropy of the router's mean over a
            modality's tokens. Summed over modalities, mean over layers.
        global_entropy_min_experts: S: the global loss is max(0, log S - entropy) instead, so that about S experts a
            modality are enough; 0: as it is.
    """

    num_experts: int = 8
    num_experts_per_tok: int = 2
    moe_intermediate_size: int = 256
    router_aux_loss_coef: float = 0.01
    router_z_loss_coef: float = 0.001
    norm_topk_prob: bool = True
    backend: Backend = "auto"
    aux_loss_scope: Literal["global", "layer", "sequence"] = "layer"
    scoring_func: Literal["softmax", "sigmoid"] = "softmax"
    routed_scaling_factor: float = 1.0
    n_group: int = 1
    topk_group: int = 1
    n_shared_experts: int = 0
    use_expert_bias: bool = False
    bias_update_speed: float = 1e-3
    router_jitter_noise: float = 0.0
    expert_dropout: float = 0.0
    modality_experts: dict[str, tuple[int, ...]] | None = None
    local_entropy_loss_coef: float = 0.0
    local_entropy_modalities: tuple[str, ...] = ("text",)
    global_entropy_loss_coef: float = 0.0
    global_entropy_min_experts: float = 0.0

    def __post_init__(self) -> None:
        if isinstance(self.modality_experts, Mapping):  # YAML and JSON give lists
            plain = {str(name): tuple(experts) for name, experts in self.modality_experts.items()}
            object.__setattr__(self, "modality_experts", plain)
        object.__setattr__(self, "local_entropy_modalities", tuple(self.local_entropy_modalities))
        if not 1 <= self.num_experts_per_tok <= self.num_experts:
            raise ValueError(
                f"moe.num_experts_per_tok is {self.num_experts_per_tok}; it must be between 1 and num_experts, "
                f"{self.num_experts}"
            )
        if self.moe_intermediate_size < 1:
            raise ValueError(f"moe.moe_intermediate_size is {self.moe_intermediate_size}; it must be positive")
        _check_numbers(self)
        _check_groups(self)
        if self.modality_experts is not None:
            _check_modality_experts(self, self.modality_experts)
        for name in self.local_entropy_modalities:
            _check_modality("local_entropy_modalities", name)

    @property
    def counts_by_sequence(self) -> bool:
        """Whether the balance loss needs each sequence's own counts."""
        return self.aux_loss_scope == "sequence" and self.router_aux_loss_coef > 0

    @property
    def has_entropy_loss(self) -> bool:
        """Whether one of LIMoE's losses is used."""
        return self.local_entropy_loss_coef > 0 or self.global_entropy_loss_coef > 0

    def expert_pools(self) -> list[tuple[int, ...]]:
        """Sets of experts among which a token chooses, each once."""
        everyone = tuple(range(self.num_experts))
        by_modality = self.modality_experts or {}
        pools = [tuple(sorted(by_modality.get(modality.name.lower(), everyone))) for modality in Modality]
        return list(dict.fromkeys(pools))


def _check_numbers(config: MoEConfig) -> None:
    choices = {"scoring_func": ("softmax", "sigmoid"), "aux_loss_scope": ("global", "layer", "sequence")}
    for key, names in choices.items():
        if getattr(config, key) not in names:
            raise ValueError(f"moe.{key} is {getattr(config, key)!r}; choose {', '.join(names)}")
    for key in (
        "router_aux_loss_coef", "router_z_loss_coef", "n_shared_experts", "bias_update_speed",
        "local_entropy_loss_coef", "global_entropy_loss_coef",
    ):  # fmt: skip
        if not 0 <= getattr(config, key) < math.inf:
            raise ValueError(f"moe.{key} is {getattr(config, key)}; it must be a finite number, 0 or more")
    for key in ("router_jitter_noise", "expert_dropout"):
        if not 0 <= getattr(config, key) < 1:
            raise ValueError(f"moe.{key} is {getattr(config, key)}; it must be at least 0 and below 1")
    if not 0 < config.routed_scaling_factor < math.inf:
        raise ValueError(f"moe.routed_scaling_factor is {config.routed_scaling_factor}; it must be positive")
    if config.scoring_func == "sigmoid" and config.router_z_loss_coef:
        raise ValueError(
            f"moe.router_z_loss_coef is {config.router_z_loss_coef} with scoring_func sigmoid; the z-loss is of a "
            f"softmax's normalizer, which sigmoids lack: set router_z_loss_coef: 0"
        )
    if config.global_entropy_min_experts and not 1 < config.global_entropy_min_experts <= config.num_experts:
        raise ValueError(
            f"moe.global_entropy_min_experts is {config.global_entropy_min_experts}; it must be 0 or between 1 and "
            f"num_experts, {config.num_experts}"
        )


def _check_groups(config: MoEConfig) -> None:
    num_groups, num_chosen = config.n_group, config.topk_group
    if num_groups < 1 or config.num_experts % num_groups:
        raise ValueError(
            f"moe.n_group is {num_groups}, which does not divide num_experts, {config.num_experts}; choose a divisor"
        )
    if not 1 <= num_chosen <= num_groups:
        raise ValueError(f"moe.topk_group is {num_chosen}; it must be between 1 and n_group, {num_groups}")
    size = config.num_experts // num_groups
    if num_chosen * size < config.num_experts_per_tok:
        raise ValueError(
            f"moe.topk_group is {num_chosen}, and so many groups hold {num_chosen * size} experts, fewer than "
            f"num_experts_per_tok, {config.num_experts_per_tok}; raise topk_group or lower n_group"
        )
    if num_groups > 1 and size < 2:
        raise ValueError(
            f"moe.n_group is {num_groups}, as many as num_experts; a group's score is that of its two best experts: "
            f"choose n_group of at most {config.num_experts // 2}"
        )


def _check_modality(key: str, name: str) -> None:
    names = [modality.name.lower() for modality in Modality]
    if name not in names:
        raise ValueError(f"moe.{key} names the modality {name!r}; choose {', '.join(names)}")


def _check_modality_experts(config: MoEConfig, by_modality: Mapping[str, tuple[int, ...]]) -> None:
    for name, experts in by_modality.items():
        _check_modality("modality_experts", name)
        wrong = [expert for expert in experts if not 0 <= expert < config.num_experts]
        if wrong or len(set(experts)) < len(experts):
            raise ValueError(
                f"moe.modality_experts has {list(experts)} for {name}; experts are 0 to {config.num_experts - 1}, each "
                f"named once"
            )
        if len(experts) < config.num_experts_per_tok:
            raise ValueError(
                f"moe.modality_experts gives {name} {len(experts)} experts, fewer than num_experts_per_tok, "
                f"{config.num_experts_per_tok}; give it more, or lower num_experts_per_tok"
            )
    pools = config.expert_pools()
    unused = sorted(set(range(config.num_experts)).difference(*pools))
    if unused:
        raise ValueError(f"moe.modality_experts lets no modality choose expert {unused[0]}; give it to one")
    if config.n_group > 1:
        raise ValueError(
            f"moe.n_group is {config.n_group} and modality_experts is given; both limit a token's choice, and together "
            f"they may leave it nothing: set n_group: 1"
        )
    if config.use_expert_bias and sum(map(len, pools)) > config.num_experts:
        raise ValueError(
            "moe.use_expert_bias compares an expert's load with the mean of those that the same tokens choose from, "
            "but pools of modality_experts overlap; name every modality and share no expert, or set use_expert_bias: "
            "false"
        )


@dataclass(frozen=True)
class TokenInfo:
    """What routing may depend on beside the hidden states, and what of it is to be counted."""

    modality_N: Tensor | None = None
    """int64, a `Modality`; None: counted by no modality."""
    sequence_N: Tensor | None = None
    """int64, the row of the batch; needed where `counts_by_sequence`."""
    num_sequences: int = 0
    is_real_N: Tensor | None = None
    """bool; False: a place filler, in no count. None: all are real."""
    positions_N: Tensor | None = None
    """int64, of each in its document; needed where tokens skip blocks at random (`mod_router`)."""
    is_counted: bool = True
    """False: nobody reads the sums (as while generating), and none are made."""


class Routing(NamedTuple):
    """The experts of each token."""

    gates_NK: Tensor
    """Float32 or wider, differentiable; 0 at a dropped choice."""
    experts_NK: Tensor
    """int64, the best first; -1: dropped."""
    logits_NE: Tensor
    """Float32 or wider, differentiable; -inf at experts that the token's modality may not choose."""


class Router(nn.Module):
    """A score of each expert for each token, and the choice that follows from them."""

    e_score_correction_bias: Tensor | None
    allowed_ME: Tensor | None

    def __init__(self, width: int, config: MoEConfig):
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.num_experts, width))
        mark(self, weight="head")
        bias_E = torch.zeros(config.num_experts) if config.use_expert_bias else None
        self.register_buffer("e_score_correction_bias", bias_E)
        allowed_ME = None
        if config.modality_experts is not None:
            allowed_ME = torch.zeros(len(Modality), config.num_experts, dtype=torch.bool)
        self.register_buffer("allowed_ME", allowed_ME, persistent=False)
        self.reset_buffers()

    @torch.no_grad()
    def reset_buffers(self) -> None:
        """No bias, and the experts that each modality may choose: also after a start on the meta device."""
        if self.e_score_correction_bias is not None:
            self.e_score_correction_bias.zero_()
        if self.allowed_ME is not None and self.config.modality_experts is not None:
            self.allowed_ME.fill_(True)
            for name, experts in self.config.modality_experts.items():
                row_E = self.allowed_ME[Modality[name.upper()]]
                row_E.fill_(False)
                for expert in experts:
                    row_E[expert] = True

    def _apply(self, fn, recurse=True):
        """Keeps the bias in float32 where a model is cast: a step of it is below what bfloat16 can tell apart."""
        before = self.e_score_correction_bias
        super()._apply(fn, recurse)
        after = self.e_score_correction_bias
        if before is not None and after is not None and after.dtype.itemsize < before.dtype.itemsize:
            self.e_score_correction_bias = before.to(after.device)
        return self

    def logits(self, x_ND: Tensor, modality_N: Tensor | None = None) -> Tensor:
        """[N, E], float32 or wider, also under autocast; -inf at experts that a modality may not choose."""
        dtype = torch.promote_types(torch.promote_types(x_ND.dtype, self.weight.dtype), torch.float32)
        x_ND, noise = x_ND.to(dtype), self.config.router_jitter_noise
        if noise and self.training:
            x_ND = x_ND * torch.empty_like(x_ND).uniform_(1 - noise, 1 + noise)
        with torch.autocast(x_ND.device.type, enabled=False):
            logits_NE = F.linear(x_ND, self.weight.to(dtype))
        if self.allowed_ME is None:
            return logits_NE
        if modality_N is None:
            raise ValueError("moe.modality_experts is set, but the tokens' modalities were not given; pass modality_BT")
        return logits_NE.masked_fill(~self.allowed_ME[modality_N], -torch.inf)

    def forward(self, x_ND: Tensor, modality_N: Tensor | None = None) -> Routing:
        """Each token's experts and gates.

        Raises:
            ValueError: `modality_experts` is set, but no modalities are given.
        """
        config, top_k = self.config, self.config.num_experts_per_tok
        logits_NE = self.logits(x_ND, modality_N)
        if config.scoring_func == "softmax" and self.e_score_correction_bias is None and config.n_group == 1:
            gates_NK, experts_NK = mmllm_kernels.route(logits_NE, top_k, config.norm_topk_prob, config.backend)
        else:
            scores_NE = logits_NE.sigmoid() if config.scoring_func == "sigmoid" else logits_NE.softmax(dim=-1)
            experts_NK = self._choice(scores_NE.detach(), logits_NE.detach())
            gates_NK = scores_NE.gather(1, experts_NK)
            if config.norm_topk_prob:
                gates_NK = gates_NK / (gates_NK.sum(dim=-1, keepdim=True) + _SMALLEST_SUM)
        if config.routed_scaling_factor != 1:
            gates_NK = gates_NK * config.routed_scaling_factor
        if config.expert_dropout and self.training:
            gates_NK, experts_NK = _dropped(gates_NK, experts_NK, config.expert_dropout)
        return Routing(gates_NK, experts_NK, logits_NE)

    def _choice(self, scores_NE: Tensor, logits_NE: Tensor) -> Tensor:
        """The K experts of the largest score and bias, of the best groups, of equal ones the lowest index first."""
        config = self.config
        choice_NE = scores_NE
        if self.e_score_correction_bias is not None:
            choice_NE = choice_NE + self.e_score_correction_bias.to(choice_NE.dtype)
        if self.allowed_ME is not None:
            choice_NE = choice_NE.masked_fill(logits_NE == -torch.inf, -torch.inf)
        if config.topk_group < config.n_group:
            choice_NGE = choice_NE.unflatten(1, (config.n_group, -1))
            best_NG = choice_NGE.topk(2, dim=-1).values.sum(dim=-1)
            _, groups_NC = mmllm_kernels.route(best_NG, config.topk_group, True, config.backend)
            is_open_NG = torch.zeros_like(best_NG, dtype=torch.bool).scatter(1, groups_NC, True)
            choice_NE = choice_NGE.masked_fill(~is_open_NG[..., None], -torch.inf).flatten(1)
        # The kernel takes logits, but which are the largest is the same question.
        return mmllm_kernels.route(choice_NE, config.num_experts_per_tok, True, config.backend)[1]


def _dropped(gates_NK: Tensor, experts_NK: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """Drops choices at random; the one with the largest draw stays. The sum of a token's gates stays what it was."""
    draws_NK = torch.rand(gates_NK.shape, device=gates_NK.device)
    stays_NK = (draws_NK >= share) | (draws_NK == draws_NK.amax(dim=-1, keepdim=True))
    kept_NK = gates_NK * stays_NK
    sums_N1, kept_N1 = gates_NK.sum(dim=-1, keepdim=True), kept_NK.sum(dim=-1, keepdim=True)
    return kept_NK * (sums_N1 / (kept_N1 + _SMALLEST_SUM)), experts_NK.masked_fill(~stays_NK, -1)
