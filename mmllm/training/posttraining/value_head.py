"""What PPO needs beside a policy: how much reward is still to come, token by token.

Shapes: M tokens, D width.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from mmllm.model.roles import mark_all


@dataclass(frozen=True)
class PPOConfig:
    """What of PPO (arXiv 1707.06347) the other algorithms don't have; names and defaults are TRL's where TRL has them.

    Attributes:
        gamma: what a reward is worth a token later.
        lam: of generalized advantage estimation: 0 trusts the values alone, 1 the rewards alone.
        vf_coef: weight of the values' loss.
        cliprange_value: how far a value may move from what it was before only its being worse counts.
        whiten_rewards: rewards of tokens get spread 1.
        whiten_advantages: advantages get mean 0 and spread 1.
        kl_target: nats an answer that the adaptive controller aims at (arXiv 1909.08593); None: `beta` stays.
        kl_horizon: answers over which it adapts.
    """

    gamma: float = 1.0
    lam: float = 0.95
    vf_coef: float = 0.1
    cliprange_value: float = 0.2
    whiten_rewards: bool = False
    whiten_advantages: bool = True
    kl_target: float | None = None
    kl_horizon: int = 10_000

    def __post_init__(self) -> None:
        for name in ("gamma", "lam"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"ppo.{name} is {getattr(self, name)}; it must be from 0 to 1")
        for name in ("cliprange_value", "kl_target", "kl_horizon"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"ppo.{name} is {value}; it must be positive")
        if self.vf_coef < 0:
            raise ValueError(f"ppo.vf_coef is {self.vf_coef}; it must be 0 or more")


class ValueHead(nn.Module):
    """The reward that is still to come, from the hidden state that a token is drawn from; at first 0 everywhere.

    Args:
        width: D.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, 1)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)
        mark_all(self, "head")

    def forward(self, hidden_MD: Tensor) -> Tensor:
        """Values [M], in float32."""
        return self.linear(hidden_MD.to(self.linear.weight.dtype)).squeeze(-1).float()
