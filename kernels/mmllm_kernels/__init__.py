"""Mixture-of-experts layer and nearest code: each function picks a backend; `reference` defines what is correct."""

from mmllm_kernels.api import experts, moe, nearest_code, route
from mmllm_kernels.backends import Backend
from mmllm_kernels.reference import ExpertsOutput, MoEOutput

__all__ = ["Backend", "ExpertsOutput", "MoEOutput", "experts", "moe", "nearest_code", "route"]
