"""What `benchmarks/train.py` compares with: transformers' Mixtral on the same documents, and all logits at once.

Shapes: B sequences, T positions, R rows (a document each), M targets, D width, V vocabulary.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from allocations import AllocationPeak
from torch import Tensor
from train_documents import IGNORE, Packed, Shape
from train_requests import synchronize
from train_side import NEW_TOKENS, PROMPT, decoding_ids

EXPERTS = ("eager", "grouped_mm")
"""transformers' ways to compute the experts; the faster one is the peer."""
LEAK = 1e-4
"""Largest difference of a logit between a packed document and the same document alone."""


def save_weights(shape: Shape, folder: Path) -> None:
    """A Mixtral of random weights, as a checkpoint that both sides read."""
    from transformers import MixtralConfig, MixtralForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=shape.vocab_size, hidden_size=shape.hidden_size, intermediate_size=shape.moe_intermediate_size,
        num_hidden_layers=shape.num_hidden_layers, num_attention_heads=shape.num_attention_heads,
        num_key_value_heads=shape.num_key_value_heads, head_dim=shape.head_dim, num_local_experts=shape.num_experts,
        num_experts_per_tok=shape.num_experts_per_tok, max_position_embeddings=max(4096, shape.sequence_length),
        rms_norm_eps=1e-5, rope_parameters={"rope_type": "default", "rope_theta": 10000.0}, sliding_window=None,
        tie_word_embeddings=False, pad_token_id=0, bos_token_id=None, eos_token_id=1,
    )  # fmt: skip
    MixtralForCausalLM(config).save_pretrained(str(folder))


def load(folder: Path, experts: str, device: str, dtype: torch.dtype = torch.float32) -> Any:
    """The checkpoint's model, with attention by `F.scaled_dot_product_attention`."""
    from transformers import MixtralForCausalLM

    model = MixtralForCausalLM.from_pretrained(
        str(folder), attn_implementation="sdpa", experts_implementation=experts, dtype=dtype, local_files_only=True
    )
    return model.to(device)  # pyright: ignore[reportArgumentType]


def padded_inputs(documents: Packed, device: str) -> dict[str, Tensor]:
    """A document a row, padded on the right to the longest, with a mask."""
    longest = max(max(row) for row in documents.lengths)
    ids, labels, mask = [], [], []
    for row, lengths in enumerate(documents.lengths):
        start = 0
        for length in lengths:
            found = documents.ids_BT[row, start : start + length]
            ids.append(np.pad(found, (0, longest - length)))
            labels.append(np.pad(found, (0, longest - length), constant_values=IGNORE))
            mask.append(np.pad(np.ones(length, np.int64), (0, longest - length)))
            start += length
    arrays = {"input_ids": ids, "labels": labels, "attention_mask": mask}
    return {name: torch.from_numpy(np.stack(rows)).to(device) for name, rows in arrays.items()}


def packed_inputs(documents: Packed, device: str) -> dict[str, Tensor]:
    """Documents end to end with positions that restart, and no mask.

    From these transformers makes a mask of each sequence's documents for `sdpa`
    (`masking_utils.find_packed_sequence_indices`), if there is no cache: `use_cache=False` matters. Padding becomes a
    document at the end without targets.
    """
    ids_BT, positions_BT = documents.ids_BT.copy(), documents.positions_BT.copy()
    labels_BT = ids_BT.copy()
    labels_BT[(positions_BT == 0) | (documents.document_ids_BT < 0)] = IGNORE  # it shifts by itself
    for row, lengths in enumerate(documents.lengths):
        used = sum(lengths)
        positions_BT[row, used:] = np.arange(ids_BT.shape[1] - used)
    arrays = {"input_ids": ids_BT, "labels": labels_BT, "position_ids": positions_BT}
    return {name: torch.from_numpy(array).to(device) for name, array in arrays.items()}


def check_no_leak(model: Any, documents: Packed, device: str) -> None:
    """Refuses a peer whose packed documents see each other: it would do another, and a cheaper, work.

    Raises:
        ValueError: logits of the second document are not those of the document alone.
    """
    inputs = packed_inputs(documents, device)
    first, second = documents.lengths[0][:2]
    part = slice(first, first + second)
    with torch.no_grad():
        ids_BT, positions_BT = inputs["input_ids"], inputs["position_ids"]
        together = model(input_ids=ids_BT, position_ids=positions_BT, use_cache=False).logits[0, part]
        alone = model(input_ids=ids_BT[:1, part], use_cache=False).logits[0]
    difference = float((together - alone).abs().max())
    if not difference < LEAK:
        raise ValueError(
            f"transformers' packed documents see each other: logits differ by {difference:.1e} from the document alone"
        )


class Training:
    """Forward, loss, backward, clipping and a step of fused AdamW, as ours: float32, or bfloat16 autocast on a GPU."""

    def __init__(self, model: Any, inputs: dict[str, Tensor], device: str) -> None:
        self.model, self.inputs, self.device = model.train(), inputs, device
        self.optimizer = torch.optim.AdamW(
            model.parameters(), lr=1e-5, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0, fused=True
        )

    def step(self) -> float:
        """The loss before the step."""
        with torch.autocast(self.device, torch.bfloat16, enabled=self.device == "cuda"):
            loss = self.model(**self.inputs, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        synchronize()
        return float(loss.detach())


def fastest_training(folder: Path, documents: Packed, inputs: dict[str, Tensor], device: str) -> tuple[Training, str]:
    """A peer with the faster of transformers' ways to compute experts, by the best of three steps, and its name."""
    found = {}
    for experts in EXPERTS:
        training, times = Training(load(folder, experts, device), inputs, device), []
        if "position_ids" in inputs:
            check_no_leak(training.model, documents, device)
        for _ in range(3):
            began = time.perf_counter()
            training.step()
            times.append(time.perf_counter() - began)
        found[experts] = min(times)
    best = min(found, key=lambda name: found[name])
    return Training(load(folder, best, device), inputs, device), best


def decoding(folder: Path, shape: Shape, device: str, dtype: torch.dtype, experts: str) -> Callable[[], Tensor]:
    """Decodes the same tokens after the same prompt, with `DynamicCache`; gives the last logits."""
    model = load(folder, experts, device, dtype).eval()
    ids_BT = decoding_ids(shape, device)
    with torch.no_grad():
        prompt = model(input_ids=ids_BT[:, :PROMPT], use_cache=True).past_key_values

    @torch.no_grad()
    def run() -> Tensor:
        cache, logits = copy.deepcopy(prompt), None
        for place in range(PROMPT, PROMPT + NEW_TOKENS):
            logits = model(input_ids=ids_BT[:, place : place + 1], past_key_values=cache, use_cache=True).logits
        synchronize()
        assert logits is not None
        return logits

    return run


def kernel_decoding(folder: Path, shape: Shape, device: str, dtype: torch.dtype, experts: str) -> Callable[[], Any]:
    """One layer's experts alone, from router logits, a token at a time."""
    model = load(folder, experts, device, dtype).eval()
    layer = model.model.layers[0].mlp.experts
    generator = torch.Generator(device).manual_seed(0)
    x_TD = torch.randn(NEW_TOKENS, shape.hidden_size, generator=generator, device=device).to(dtype)
    logits_TE = torch.randn(NEW_TOKENS, shape.num_experts, generator=generator, device=device)

    @torch.no_grad()
    def run() -> Tensor:
        for x_1D, logits_1E in zip(x_TD.split(1), logits_TE.split(1), strict=True):
            gates, chosen = logits_1E.softmax(dim=-1).topk(shape.num_experts_per_tok, dim=-1)
            out = layer(x_1D, chosen, (gates / gates.sum(dim=-1, keepdim=True)).to(dtype))
        synchronize()
        return out

    return run


def all_logits_memory(shape: Shape, num_targets: int, device: str) -> int:
    """Peak bytes of head, cross-entropy and their gradients where all logits are held at once, in float32."""
    hidden_MD = torch.randn(num_targets, shape.hidden_size, device=device, requires_grad=True)
    weight_VD = torch.randn(shape.vocab_size, shape.hidden_size, device=device, requires_grad=True)
    labels_M = torch.randint(0, shape.vocab_size, (num_targets,), device=device)
    with AllocationPeak(device) as memory:
        F.cross_entropy(F.linear(hidden_MD, weight_VD), labels_M).backward()
    return memory.peak
