"""What an adapter is to be: `adapter` of a training's config."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from mmllm.model.decoder_config import DecoderConfig
from mmllm.model.virtual_tokens import VirtualKind

_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
_DENSE = ("gate_proj", "up_proj", "down_proj")
_STACKS = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")
_OF_LORA = (
    "parts", "target_modules", "target_parameters", "r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora",
    "quantization",
)  # fmt: skip


@dataclass(frozen=True)
class AdapterConfig:
    """An adapter to train on a decoder that is frozen. Keys are PEFT's where it has the same thing.

    Attributes:
        kind: "lora" (arXiv 2106.09685); "prompt_tuning" (arXiv 2104.08691): learned embeddings before each document;
            "prefix_tuning" (arXiv 2101.00190): learned keys and values of each layer before each document. The last two
            have `num_virtual_tokens` alone.
        parts: what LoRA adapts: "attention" (its four projections), "experts" (the projections of dense layers, and
            the stacks of routed experts). None: attention, unless targets are named.
        target_modules: in the place of `parts`, names of linear layers: q_proj, k_proj, v_proj, o_proj, gate_proj,
            up_proj, down_proj.
        target_parameters: likewise of the experts' stacks: mlp.experts.gate_up_proj, mlp.experts.down_proj.
        r: rank; of a stack, each expert's.
        lora_alpha: an adapter's output is multiplied by lora_alpha / r.
        lora_dropout: on an adapter's input, in training. Not for stacks of experts.
        use_rslora: multiply by lora_alpha / sqrt(r) instead (arXiv 2312.03732).
        use_dora: learn the norm of each row apart from its direction (DoRA, arXiv 2402.09353). Not for stacks.
        quantization: "nf4" or "fp4": the linear layers of the frozen base are kept in four bits while the adapter is
            trained (QLoRA, arXiv 2305.14314; bitsandbytes). None: as they are.
        num_virtual_tokens: of prompt and prefix tuning.
    """

    kind: Literal["lora", "prompt_tuning", "prefix_tuning"] = "lora"
    parts: tuple[str, ...] | None = None
    target_modules: tuple[str, ...] | None = None
    target_parameters: tuple[str, ...] | None = None
    r: int = 16
    lora_alpha: int = 32
    lora_dropout: float = 0.0
    use_rslora: bool = False
    use_dora: bool = False
    quantization: Literal["nf4", "fp4"] | None = None
    num_virtual_tokens: int = 20

    def __post_init__(self) -> None:
        for key in ("parts", "target_modules", "target_parameters"):  # lists, as YAML gives them
            if isinstance(getattr(self, key), list):
                object.__setattr__(self, key, tuple(getattr(self, key)))
        if self.kind not in ("lora", *get_args(VirtualKind)):
            raise ValueError(f"adapter.kind is {self.kind!r}; choose lora, {', '.join(get_args(VirtualKind))}")
        if self.num_virtual_tokens < 1:
            raise ValueError(f"adapter.num_virtual_tokens is {self.num_virtual_tokens}; give 1 or more")
        unused = [key for key in _OF_LORA if self.kind != "lora" and getattr(self, key) != getattr(AdapterConfig, key)]
        if unused:
            raise ValueError(f"adapter.{unused[0]} is given, but kind is {self.kind}, which has no {unused[0]}")
        if self.quantization not in (None, "nf4", "fp4"):
            raise ValueError(f"adapter.quantization is {self.quantization!r}; choose nf4, fp4, or null")
        if self.quantization is not None and self.use_dora:
            raise ValueError(
                "adapter.use_dora and quantization are given; DoRA's norms are of whole weights: choose one"
            )
        if self.r < 1:
            raise ValueError(f"adapter.r is {self.r}; a rank is at least 1")
        if not (math.isfinite(self.lora_alpha) and self.lora_alpha > 0):
            raise ValueError(f"adapter.lora_alpha is {self.lora_alpha}; give a positive number")
        if not 0 <= self.lora_dropout < 1:
            raise ValueError(f"adapter.lora_dropout is {self.lora_dropout}; it must be at least 0 and below 1")
        named = self.target_modules is not None or self.target_parameters is not None
        if self.parts is not None and named:
            raise ValueError("adapter.parts and adapter.target_modules or target_parameters are given; leave one out")
        _check_known("parts", self.parts, ("attention", "experts"))
        _check_known("target_modules", self.target_modules, (*_ATTENTION, *_DENSE))
        _check_known("target_parameters", self.target_parameters, _STACKS)

    def targets(self, decoder: DecoderConfig) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Linear layers and parameters of a decoder that LoRA adapts; none of other kinds.

        Raises:
            ValueError: it has none of that name, or one that can't be adapted so; the message names the key.
        """
        if self.kind != "lora":
            return (), ()
        layers = range(decoder.num_hidden_layers)
        has_dense = any(not decoder.has_experts(layer) for layer in layers)
        has_stacks = any(decoder.has_experts(layer) for layer in layers)
        modules, parameters = self.target_modules or (), self.target_parameters or ()
        if not modules and not parameters:
            parts = self.parts if self.parts is not None else ("attention",)
            modules = _ATTENTION if "attention" in parts else ()
            if "experts" in parts:
                modules += _DENSE if has_dense else ()
                parameters = _STACKS if has_stacks else ()
        if not modules and not parameters:
            raise ValueError("adapter.parts is empty; name attention, experts, or both")
        for key, names, wanted, is_there in (
            ("target_modules", modules, _DENSE, has_dense), ("target_parameters", parameters, _STACKS, has_stacks)
        ):  # fmt: skip
            missing = [name for name in names if name in wanted and not is_there]
            if missing:
                what = "dense layer" if key == "target_modules" else "layer with experts"
                raise ValueError(f"adapter.{key} names {missing[0]}, but the decoder has no {what}; leave it out")
        for key in ("lora_dropout", "use_dora"):
            if parameters and getattr(self, key):
                raise ValueError(
                    f"adapter.{key} is {getattr(self, key)} and stacks of experts are adapted ({parameters[0]}), which "
                    f"PEFT can't do; leave {key} out, or name target_modules without them"
                )
        return modules, parameters


def _check_known(key: str, names: tuple[str, ...] | None, known: tuple[str, ...]) -> None:
    unknown = [name for name in names or () if name not in known]
    if unknown:
        raise ValueError(f"adapter.{key} names {unknown[0]!r}; choose among {', '.join(known)}")
