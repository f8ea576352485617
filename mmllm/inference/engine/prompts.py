"""Prompts on their way into the cache: what is found there already, and the embeddings of what isn't.

Shapes: B prompts, T positions, D width, V virtual tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mmllm.batch import Modality
from mmllm.data.samples.document import Document
from mmllm.inference.prompts import pad_left
from mmllm.model.multimodal import MultimodalModel


@dataclass(frozen=True)
class PromptInputs:
    """What a prompt's positions hold, as far as they are to be computed."""

    x_TD: Tensor
    modality_T: Tensor
    spans_T: Tensor | None
    """Bidirectional spans; None: there are none."""

    def part(self, start: int, stop: int | None) -> PromptInputs:
        """Some of them."""
        here = slice(start, stop)
        spans_T = None if self.spans_T is None else self.spans_T[here]
        return PromptInputs(self.x_TD[here], self.modality_T[here], spans_T)

    def followed_by(self, positions: Sequence[Tensor], modality: Modality) -> PromptInputs:
        """With positions behind them, [D] each, that were computed once and are to be computed again."""
        x_TD = torch.stack(list(positions))
        modality_T = torch.cat([self.modality_T, self.modality_T.new_full((len(x_TD),), int(modality))])
        spans_T = self.spans_T
        if spans_T is not None:
            spans_T = torch.cat([spans_T, spans_T.new_full((len(x_TD),), -1)])
        return PromptInputs(torch.cat([self.x_TD, x_TD]), modality_T, spans_T)


def embed_prompts(model: MultimodalModel, prompts: Sequence[Document], num_cached: Sequence[int]) -> list[PromptInputs]:
    """The embeddings of each prompt behind what is cached of it.

    Pictures and sounds that are cached whole with all of a prompt's others are not looked at again.

    Args:
        model: whose.
        prompts: at least one.
        num_cached: of each how many positions are cached.
    """
    device = model.decoder.head_weight_VD.device
    seen = [_without_seen_media(prompt, count) for prompt, count in zip(prompts, num_cached, strict=True)]
    batch = pad_left(seen).to(device)
    x_BTD, spans_BT = model.splice(batch), model.spans(batch)
    inputs = []
    for row, (prompt, count) in enumerate(zip(prompts, num_cached, strict=True)):
        here = slice(x_BTD.shape[1] - prompt.num_tokens + count, None)
        spans_T = None if spans_BT is None else spans_BT[row, here]
        inputs.append(PromptInputs(x_BTD[row, here], batch.modality_BT[row, here], spans_T))
    return inputs


def _without_seen_media(prompt: Document, num_cached: int) -> Document:
    """The prompt without the pictures, or sounds, of which none reaches beyond what is cached."""
    if all(picture.start + picture.num_slots <= num_cached for picture in prompt.images):
        prompt = dataclasses.replace(prompt, images=())
    if all(clip.start + clip.num_slots <= num_cached for clip in prompt.clips):
        prompt = dataclasses.replace(prompt, clips=())
    return prompt


def with_prompt_embeddings(model: MultimodalModel, inputs: PromptInputs) -> PromptInputs:
    """With the learned tokens of prompt tuning before them; those of prefix tuning are no inputs."""
    decoder = model.decoder
    if decoder.active_virtual is None:
        return inputs
    virtual = decoder.virtual_tokens[decoder.active_virtual]
    if virtual.kind != "prompt_tuning":
        return inputs
    embeddings_VD: Tensor = virtual.prompt_embeddings.to(inputs.x_TD.dtype)  # pyright: ignore
    text_V = inputs.modality_T.new_full((len(embeddings_VD),), int(Modality.TEXT))
    modality_T = torch.cat([text_V, inputs.modality_T])
    return PromptInputs(torch.cat([embeddings_VD, inputs.x_TD]), modality_T, inputs.spans_T)
