"""How speech came about: log-probabilities of the units that were drawn, word by word, and which experts took what.

Shapes: K codebooks, F frames, P positions of units under the codebook pattern, R rows of codes at one of them
(1 when flat, else K), V units of a row and its filler.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch

from mmllm.batch import IGNORE, Modality
from mmllm.data.samples.document import Document, pattern_codes
from mmllm.data.samples.pointers import Pointer, spoken_pointer
from mmllm.evaluation.answer_traces import RoutingTrace
from mmllm.inference.engine.requests import SpokenUnits
from mmllm.inference.generate import evaluating
from mmllm.inference.pacing import Said
from mmllm.inference.prompts import pad_left
from mmllm.model.multimodal import MultimodalModel
from mmllm_tokenizers.folder import TokenizerFolder


@dataclass(frozen=True, eq=False)
class SpeechTrace:
    """How one text was spoken."""

    words: tuple[tuple[str, np.ndarray], ...]
    """Each word that was said, and the mean log-probability of its units in each codebook, [K], in nats at temperature
    1; all of the text as one word where the model has no pointer."""
    logprobs_KF: np.ndarray
    """Of each unit."""
    routing: RoutingTrace


def trace_speech(
    model: MultimodalModel, tokenizer: TokenizerFolder, prompt: Document, text: str, spoken: SpokenUnits
) -> SpeechTrace:
    """Runs prompt and units through the model once more, and looks on.

    Of speech that was cut off, the units of the frame that was not finished are left out, which its last frames had
    before them when they were drawn.

    Args:
        model: in any mode; it is run in eval mode and left as it was.
        tokenizer: of the model.
        prompt: what was spoken from: a text with or without a voice's name, no recording.
        text: of the prompt.
        spoken: what was drawn.

    Raises:
        ValueError: nothing was said.
    """
    num_frames = spoken.codes_KF.shape[1]
    if not num_frames:
        raise ValueError("nothing was said; there is nothing to look into")
    document = _spoken(prompt, spoken, tokenizer)
    start = prompt.num_tokens
    with evaluating(model):
        batch = pad_left([document]).to(model.decoder.head_weight_VD.device)
        hidden_PD = model(batch).hidden_QD[start - 1 : document.num_tokens - 1]
        logits_PRV = model.unit_logits(hidden_PD).float().cpu()
    logprobs_KF = _by_frame(logits_PRV, spoken.codes_KF, tokenizer.config.pattern)
    return SpeechTrace(_words(logprobs_KF, text, spoken, tokenizer), logprobs_KF, RoutingTrace.of(model, document))


def _spoken(prompt: Document, spoken: SpokenUnits, tokenizer: TokenizerFolder) -> Document:
    """The prompt with the units behind it, as they were drawn."""
    codes_PK = pattern_codes(spoken.codes_KF.numpy(), tokenizer).T
    num_positions, first_id = len(codes_PK), tokenizer.vocabulary.codebook_start(0)
    pointer = prompt.pointer
    if pointer is not None and spoken.pointer_F is not None:
        said = spoken_pointer(pointer.letters_L, spoken.pointer_F.numpy(), num_positions)
        pointer = Pointer(
            pointer.letters_L,
            np.concatenate([pointer.places_T[:-1], said.places_T, [-1]]),
            np.concatenate([pointer.ages_T[:-1], said.ages_T, [0]]),
            np.full(prompt.num_tokens + num_positions, IGNORE, dtype=np.int64),
        )
    return replace(
        prompt,
        token_ids_T=np.concatenate([prompt.token_ids_T, codes_PK[:, 0] + first_id]),
        targets_T=np.concatenate([prompt.targets_T, np.ones(num_positions, dtype=bool)]),
        modality_T=np.concatenate([prompt.modality_T, np.full(num_positions, int(Modality.UNITS), dtype=np.int64)]),
        codes_TK=np.concatenate(
            [prompt.codes_TK, np.broadcast_to(codes_PK, (num_positions, prompt.codes_TK.shape[1]))]
        ),
        has_units=True,
        pointer=pointer,
    )


def _by_frame(logits_PRV: torch.Tensor, codes_KF: torch.Tensor, pattern: str) -> np.ndarray:
    """The log-probability of each unit at the position that predicted it, among its codebook's units alone, [K, F]."""
    (num_codebooks, num_frames), size = codes_KF.shape, logits_PRV.shape[-1] - 1
    frames_F, rows = torch.arange(num_frames), []
    for codebook, codes_F in enumerate(codes_KF):
        match pattern:
            case "flatten":  # one row, in which the codebooks' units follow each other
                positions_F, units = frames_F * num_codebooks + codebook, size // num_codebooks
                logits_FV = logits_PRV[positions_F, 0, codebook * units : (codebook + 1) * units]
            case "delay":
                logits_FV = logits_PRV[frames_F + codebook, codebook, :size]
            case _:
                logits_FV = logits_PRV[frames_F, codebook, :size]
        rows.append(logits_FV.log_softmax(dim=-1)[frames_F, codes_F])
    return torch.stack(rows).numpy()


def _words(
    logprobs_KF: np.ndarray, text: str, spoken: SpokenUnits, tokenizer: TokenizerFolder
) -> tuple[tuple[str, np.ndarray], ...]:
    if spoken.pointer_F is None:
        return ((text, logprobs_KF.mean(axis=1)),)
    said = Said.of(spoken.pointer_F.numpy(), text, 0, tokenizer.frame_rate, spoken.is_whole)
    words = []
    for number, word in enumerate(text.split()):
        is_its_F = (said.words_F == number) & said.is_letter_F
        if is_its_F.any():
            words.append((word, logprobs_KF[:, is_its_F].mean(axis=1)))
    return tuple(words)
