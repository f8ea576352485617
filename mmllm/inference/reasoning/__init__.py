"""Reasoning on top of `Model`: more tokens for better answers, and what they cost."""

from mmllm.inference.reasoning.effort import (
    Effort,
    SureConfig,
    ThresholdPoint,
    Trial,
    by_difficulty,
    choose_threshold,
    effort_trials,
    threshold_curve,
)
from mmllm.inference.reasoning.shots import Shown, few_shot
from mmllm.inference.reasoning.thoughts import ThinkConfig, Thought, think
from mmllm.inference.reasoning.tree import TreeAnswer, TreeConfig, tree_search
from mmllm.inference.reasoning.votes import self_consistency
from mmllm.inference.voting import Vote, VotingConfig

__all__ = [
    "Effort",
    "Shown",
    "SureConfig",
    "ThinkConfig",
    "Thought",
    "ThresholdPoint",
    "TreeAnswer",
    "TreeConfig",
    "Trial",
    "Vote",
    "VotingConfig",
    "by_difficulty",
    "choose_threshold",
    "effort_trials",
    "few_shot",
    "self_consistency",
    "think",
    "threshold_curve",
    "tree_search",
]
