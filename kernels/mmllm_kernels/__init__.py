"""Mixture-of-experts layer and nearest code: each function picks a backend; `reference` defines what is correct."""

from mmllm_kernels.api import moe, nearest_code
from mmllm_kernels.backends import Backend
from mmllm_kernels.reference import MoEOutput

__all__ = ["Backend", "MoEOutput", "moe", "nearest_code"]
