"""Experts of two models in one order, before they are merged.

The order of a layer's experts means nothing: a model whose experts, and whose router's rows with them, are permuted
computes the same. Averaging two models' third experts therefore makes sense only once the experts correspond: each is
given the place of the one that it is most like, all together as well as they can be (an assignment, as for neurons in
"Git Re-Basin", arXiv 2209.04836). Experts of one group, or of one modality's pool, stay in it.

Shapes: E experts, I inner width, D width, N tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from mmllm.interop.merging.parents import Parent
from mmllm.model.router import MoEConfig

AlignExperts = Callable[[Parent, Parent], None]
"""Sets the second parent's `order` so that its experts correspond to the first's."""


def align_by_weight(one: Parent, other: Parent) -> None:
    """By the distance of all weights of an expert, its router's row included."""
    decoder = one.parts.config.decoder
    assert decoder.moe is not None
    for layer in filter(decoder.has_experts, range(decoder.num_hidden_layers)):
        distance_EE = torch.zeros(decoder.moe.num_experts, decoder.moe.num_experts)
        for leaf in ("experts.gate_up_proj", "experts.down_proj", "gate.weight"):
            name = f"decoder.layers.{layer}.mlp.{leaf}"
            distance_EE += squared_distances(one.read(name), other.read(name))
        other.order[layer] = _composed(other.order.get(layer), assignment(distance_EE, decoder.moe))


def align_by_activation(inputs: Mapping[int, Tensor]) -> AlignExperts:
    """By the distance of what experts answer to the same inputs, and of how much their routers want them there.

    Args:
        inputs: of each layer with experts, what its tokens are as they arrive there, [N, D].
    """

    def align(one: Parent, other: Parent) -> None:
        moe = one.parts.config.decoder.moe
        assert moe is not None
        for layer, x_ND in inputs.items():
            answers, wants = zip(*(_answers(parent, layer, x_ND) for parent in (one, other)), strict=True)
            distance_EE = sum(squared_distances(a, b) / a.square().sum().clamp(min=1e-12) for a, b in (answers, wants))
            assert isinstance(distance_EE, Tensor)
            other.order[layer] = _composed(other.order.get(layer), assignment(distance_EE, moe))

    return align


def _answers(parent: Parent, layer: int, x_ND: Tensor) -> tuple[Tensor, Tensor]:
    """What each expert makes of each token, [E, N, D], and its score for it, [E, N]."""
    path = f"decoder.layers.{layer}.mlp"
    gate_up, down, router_ED = (
        parent.read(f"{path}.{leaf}").float() for leaf in ("experts.gate_up_proj", "experts.down_proj", "gate.weight")
    )
    made = []
    for gate_up_JD, down_DI in zip(gate_up, down, strict=True):
        gate_NI, up_NI = (x_ND.float() @ gate_up_JD.T).chunk(2, dim=-1)
        made.append((F.silu(gate_NI) * up_NI) @ down_DI.T)
    return torch.stack(made), (x_ND.float() @ router_ED.T).softmax(dim=-1).T.contiguous()


def squared_distances(a: Tensor, b: Tensor) -> Tensor:
    """Of each of the first's experts and each of the second's, [E, E]."""
    a, b = a.flatten(1).float(), b.flatten(1).float()
    return a.square().sum(dim=1)[:, None] + b.square().sum(dim=1)[None] - 2 * (a @ b.T)


def assignment(distance_EE: Tensor, moe: MoEConfig) -> list[int]:
    """For each of the first's experts the second's that takes its place, so that the sum of distances is least.

    Raises:
        ModuleNotFoundError: without SciPy.
    """
    try:
        from scipy.optimize import linear_sum_assignment
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "align_experts needs SciPy, which is not installed; pip install 'mmllm[merge]'"
        ) from error
    kinds = [_kind(expert, moe) for expert in range(moe.num_experts)]
    apart_EE = torch.tensor([[a != b for b in kinds] for a in kinds])
    too_far = float(distance_EE.abs().max()) * (moe.num_experts + 1) + 1.0
    _, chosen = linear_sum_assignment(distance_EE.double().masked_fill(apart_EE, too_far).numpy())
    return [int(expert) for expert in chosen]


def _kind(expert: int, moe: MoEConfig) -> tuple[object, ...]:
    """What must stay the same where an expert moves: its group, and the modalities that may choose it."""
    pools = tuple(sorted(name for name, pool in (moe.modality_experts or {}).items() if expert in pool))
    return expert // (moe.num_experts // moe.n_group), pools


def _composed(before: list[int] | None, order: list[int]) -> list[int]:
    """Places in the file, where experts that were already read in another order are ordered again."""
    return order if before is None else [before[expert] for expert in order]
