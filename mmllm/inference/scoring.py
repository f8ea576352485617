"""How probable a continuation is to a model.

Shapes: B rows, T positions, M tokens of continuations, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from mmllm.data.samples.document import Document, DocumentWriter
from mmllm.inference.generate import batches, evaluating
from mmllm.inference.prompts import join, pad_left
from mmllm.losses.cross_entropy import log_probabilities
from mmllm.model.multimodal import MultimodalModel
from mmllm_tokenizers.folder import TokenizerFolder


def score_continuations(
    model: MultimodalModel,
    tokenizer: TokenizerFolder,
    prompts: Sequence[str | Document],
    continuations: Sequence[str],
    batch_size: int = 64,
) -> list[float]:
    """The sum of log-probabilities of each continuation's tokens behind its prompt, in nats.

    Prompt and continuation are encoded each by itself; nothing is added to either, neither special nor task tokens.
    Probabilities are over the ids of text: of an imported checkpoint its own, as the checkpoint itself has them.

    Args:
        model: in any mode; it is run in eval mode and left as it was.
        tokenizer: of the model.
        prompts: what goes before: text, or documents with pictures and sounds.
        continuations: one for each prompt.
        batch_size: rows at once; those of like length go together.

    Raises:
        ValueError: a prompt is empty, so that the first token follows nothing; or the numbers differ.
    """
    if len(prompts) != len(continuations):
        raise ValueError(f"there are {len(prompts)} prompts but {len(continuations)} continuations; give one for each")
    documents, lengths = [], []
    for number, (prompt, continuation) in enumerate(zip(prompts, continuations, strict=True)):
        given = _written(prompt, tokenizer, is_target=False) if isinstance(prompt, str) else prompt
        scored = _written(continuation, tokenizer, is_target=True)
        if scored.num_tokens and not given.num_tokens:
            raise ValueError(
                f"prompt {number} is {prompt!r}, which has no token; what a text begins with is scored behind "
                f"something, such as a line break"
            )
        documents.append(join([given, scored]))
        lengths.append(scored.num_tokens)
    scores = [0.0] * len(documents)
    with evaluating(model):
        for rows in batches(documents, batch_size):
            rows = [row for row in rows if lengths[row]]
            if rows:
                found = _scores(model, [documents[row] for row in rows], [lengths[row] for row in rows])
                for row, score in zip(rows, found, strict=True):
                    scores[row] = score
    return scores


def _written(text: str, tokenizer: TokenizerFolder, is_target: bool) -> Document:
    writer = DocumentWriter(tokenizer)
    writer.ids(tokenizer.text.encode(text), is_target=is_target)
    return writer.finish()


def _scores(model: MultimodalModel, documents: list[Document], lengths: list[int]) -> list[float]:
    """Of the last tokens of each document, so many."""
    decoder, config = model.decoder, model.config
    head_VD = decoder.head_weight_VD[: config.decoder.num_base_ids or config.num_text]
    batch = pad_left(documents).to(head_VD.device)
    num_positions = batch.token_ids_BT.shape[1]
    is_scored_BT = torch.zeros(batch.token_ids_BT.shape, dtype=torch.bool)
    for row, length in enumerate(lengths):
        is_scored_BT[row, num_positions - length :] = True
    rows_M, places_M = (each.to(head_VD.device) for each in is_scored_BT.nonzero(as_tuple=True))
    hidden_MD = model.hidden(batch)[rows_M, places_M - 1]
    nats_M = log_probabilities(hidden_MD, head_VD, batch.token_ids_BT[rows_M, places_M]).double()
    return nats_M.new_zeros(len(documents)).index_add(0, rows_M, nats_M).tolist()
