"""How an answer came about: log-probabilities of its tokens, where they looked, and which experts took what.

One pass over prompt and answer together, as in training; what was drawn is not drawn again.

Shapes: L layers with experts, N tokens of prompt and answer, M of the answer, K experts a token, E experts, V ids,
D width; of pictures and attention see `mmllm.evaluation.attention_maps`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from mmllm.batch import Modality
from mmllm.data.samples.document import Document, DocumentWriter
from mmllm.evaluation.attention_maps import Attention, SeenPicture, seen_pictures, watch
from mmllm.evaluation.routing import chosen_experts
from mmllm.inference.engine.sampling import TextRules
from mmllm.inference.generate import evaluating
from mmllm.inference.prompts import join, pad_left
from mmllm.model.multimodal import MultimodalModel
from mmllm_tokenizers.folder import TokenizerFolder
from mmllm_tokenizers.text import TextTokenizer

NUM_ALTERNATIVES = 3
END_PIECE = "end"


@dataclass(frozen=True)
class TracedToken:
    """A token of an answer."""

    piece: str
    """What it adds to the text; empty: its character isn't whole yet. Of the answer's end: "end"."""
    logprob: float
    """In nats, at temperature 1, among the ids that a text may have, as `Completion.logprobs`."""
    alternatives: tuple[tuple[str, float], ...]
    """The most probable tokens in its place, and their log-probabilities."""
    is_end: bool = False


@dataclass(frozen=True)
class TracedWord:
    """Tokens `[start, stop)` of an answer, which a space or a line break sets apart from those before."""

    text: str
    start: int
    stop: int


@dataclass(frozen=True, eq=False)
class RoutingTrace:
    """Which experts the tokens of one document passed."""

    modality_N: np.ndarray
    """int64, a `Modality`."""
    layers: tuple[int, ...]
    """Which decoder layers the L are; none in a model without experts."""
    num_experts: int
    experts_LNK: np.ndarray
    """int64; -1: none."""

    @staticmethod
    def of(model: MultimodalModel, document: Document) -> RoutingTrace:
        """Of a document, by a pass of its own; learned tokens before it aren't counted."""
        batch = pad_left([document]).to(model.decoder.head_weight_VD.device)
        moe = model.config.decoder.moe
        experts_LNK = chosen_experts(model, batch).cpu().numpy()[:, -document.num_tokens :]
        layers = tuple(model.decoder.expert_layers())
        return RoutingTrace(document.modality_T, layers, moe.num_experts if moe is not None else 0, experts_LNK)

    @property
    def counts_LME(self) -> np.ndarray:
        """How many (token, choice) pairs of each modality each layer sent to each expert."""
        counts_LME = np.zeros((len(self.layers), len(Modality), self.num_experts), dtype=np.int64)
        for layer, experts_NK in enumerate(self.experts_LNK):
            modality_NK = np.broadcast_to(self.modality_N[:, None], experts_NK.shape)
            is_chosen = experts_NK >= 0
            np.add.at(counts_LME[layer], (modality_NK[is_chosen], experts_NK[is_chosen]), 1)
        return counts_LME


@dataclass(frozen=True, eq=False)
class AnswerTrace:
    """How one answer came about."""

    tokens: tuple[TracedToken, ...]
    words: tuple[TracedWord, ...]
    attention: Attention
    """Of the positions that predicted each of the tokens."""
    pictures: tuple[SeenPicture, ...]
    routing: RoutingTrace

    def looks(self, word: TracedWord, layer: int | None = None) -> np.ndarray:
        """Where a word looked, float64 [N]: mean over its tokens, and over the layers where none is given."""
        rows_LMN = self.attention.weights_LMN[:, word.start : word.stop].astype(np.float64)
        if layer is not None:
            rows_LMN = rows_LMN[[self.attention.layers.index(layer)]]
        return rows_LMN.mean(axis=(0, 1))


def trace_answer(
    model: MultimodalModel, tokenizer: TokenizerFolder, prompt: Document, ids: Sequence[int], has_ended: bool
) -> AnswerTrace:
    """Runs prompt and answer through the model once more, and looks on.

    Args:
        model: in any mode; it is run in eval mode and left as it was.
        tokenizer: of the model.
        prompt: what was answered.
        ids: the answer, without its end.
        has_ended: it ended by itself: the end is a token of the answer too.

    Raises:
        ValueError: there is nothing to trace.
    """
    decoder, text = model.decoder, tokenizer.text
    device = decoder.head_weight_VD.device
    said = [*ids, tokenizer.text.end_ids[0]] if has_ended else list(ids)
    if not said:
        raise ValueError("the answer has no token; there is nothing to look into")
    writer = DocumentWriter(tokenizer)
    writer.ids(said, is_target=True)
    document = join([prompt, writer.finish()])
    batch = pad_left([document]).to(device)
    positions = range(prompt.num_tokens - 1, document.num_tokens - 1)
    with evaluating(model):
        output, attention = watch(model, batch, positions)
        hidden_MD = output.hidden_QD[positions.start : positions.stop]
        head_VD = decoder.head_weight_VD[: model.config.num_text]
        rules = TextRules.of(tokenizer, device)
        logprobs_MV = rules.masked(F.linear(hidden_MD, head_VD).float()).log_softmax(dim=-1).cpu()
    if has_ended:  # a foreign tokenizer has several ends; which was drawn isn't told
        said[-1] = max(text.end_ids, key=lambda each: float(logprobs_MV[-1, each]))
    pieces = _pieces(text, ids)
    tokens = _tokens(text, said, pieces, logprobs_MV, has_ended)
    return AnswerTrace(
        tokens=tokens,
        words=_words(pieces),
        attention=attention,
        pictures=tuple(seen_pictures(model, prompt)),
        routing=RoutingTrace.of(model, document),
    )


def _tokens(
    text: TextTokenizer, said: Sequence[int], pieces: Sequence[str], logprobs_MV: torch.Tensor, has_ended: bool
) -> tuple[TracedToken, ...]:
    best = logprobs_MV.topk(min(NUM_ALTERNATIVES, logprobs_MV.shape[-1]), dim=-1)
    tokens = []
    for number, token_id in enumerate(said):
        others = zip(best.indices[number].tolist(), best.values[number].tolist(), strict=True)
        alternatives = tuple((_alone(text, each), logprob) for each, logprob in others)
        is_end = has_ended and number + 1 == len(said)
        piece = END_PIECE if is_end else pieces[number]
        tokens.append(TracedToken(piece, float(logprobs_MV[number, token_id]), alternatives, is_end))
    return tuple(tokens)


def _alone(text: TextTokenizer, token_id: int) -> str:
    """How a token is written by itself."""
    if token_id in text.end_ids:
        return END_PIECE
    return text.decode([token_id]) or text.token(token_id)


def _pieces(text: TextTokenizer, ids: Sequence[int]) -> list[str]:
    """What each token adds to the text; a character that takes several tokens is its last one's."""
    pieces, before = [], ""
    for stop in range(1, len(ids) + 1):
        now = text.decode(ids[:stop])
        whole = now.rstrip("�") if stop < len(ids) else now
        pieces.append(whole[len(before) :])
        before = whole if len(whole) > len(before) else before
    return pieces


def _words(pieces: Sequence[str]) -> tuple[TracedWord, ...]:
    starts = [0] if pieces else []
    starts += [place for place, piece in enumerate(pieces) if place and piece[:1].isspace()]
    stops = [*starts[1:], len(pieces)]
    return tuple(
        TracedWord("".join(pieces[start:stop]).strip(), start, stop)
        for start, stop in zip(starts, stops, strict=True)
        if "".join(pieces[start:stop]).strip()
    )
