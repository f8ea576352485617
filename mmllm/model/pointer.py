"""Speech has a pointer: what is being said, as an input at each frame that is predicted, and how far it advances.

Alignment is what costs a codec language model its samples (VALL-E and its kin need hundreds of hours to learn it); here
it is given in training and predicted frame by frame in generation, as by the state machine of delayed streams modeling
(https://arxiv.org/abs/2509.08753), but over letters and with the letters' neighbours in sight.

Shapes: W positions with a pointer, N letters of a window, L letters, D width, A advances, M ages.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmllm.batch import LETTER_GAP
from mmllm.model.roles import mark, mark_all
from mmllm_tokenizers.pointer import NUM_LETTERS

EMBEDDING_STD = 0.2
"""Of what is being said, all letters in sight together: about that of a frame's own embedding, to which it is added."""


@dataclass(frozen=True)
class PointerConfig:
    """What the model knows of the text that it speaks.

    Attributes:
        before: letters in sight before the one that is said.
        after: letters in sight behind it.
        max_age: frames that a letter has lasted are told apart up to this number.
        max_advance: letters passed between two frames, at most; 0: the tokenizer folder's.
    """

    before: int = 2
    after: int = 3
    max_age: int = 24
    max_advance: int = 0

    def __post_init__(self) -> None:
        for name in ("before", "after"):
            if not 0 <= getattr(self, name) <= LETTER_GAP:
                raise ValueError(f"audio.pointer.{name} is {getattr(self, name)}; give 0 to {LETTER_GAP} letters")
        if self.max_age < 1:
            raise ValueError(f"audio.pointer.max_age is {self.max_age}; it must be at least 1")
        if self.max_advance < 0:
            raise ValueError(f"audio.pointer.max_advance is {self.max_advance}; give 0 for the tokenizer folder's")


class SpeechPointer(nn.Module):
    """Embeds the letters around a pointer, and predicts how far it moves."""

    offsets_N: Tensor
    up_to_MM: Tensor

    def __init__(self, config: PointerConfig, width: int):
        super().__init__()
        self.config = config
        offsets_N = torch.arange(-config.before, config.after + 1)
        self.register_buffer("offsets_N", offsets_N, persistent=False)
        # A table an offset, one behind the other; a row more in each, for no letter.
        self.letters = nn.Embedding(len(offsets_N) * (NUM_LETTERS + 1), width)
        self.age_embedding = nn.Parameter(torch.zeros(config.max_age, width))
        # Not `cumsum`: its gradient rounds, and Adam makes steps of what should be zero.
        self.register_buffer("up_to_MM", torch.ones(config.max_age, config.max_age).tril(), persistent=False)
        self.advance_head = nn.Linear(width, config.max_advance + 1)
        std = len(offsets_N) ** -0.5
        nn.init.normal_(self.letters.weight, std=EMBEDDING_STD * std)
        nn.init.normal_(self.age_embedding[0], std=EMBEDDING_STD * std)
        mark(self.letters, weight="embedding")
        mark(self, age_embedding="embedding")
        mark_all(self.advance_head, "head")

    def forward(self, letters_L: Tensor, pointer_W: Tensor, age_W: Tensor) -> Tensor:
        """What is being said, [W, D].

        Args:
            letters_L: bytes; -1: none.
            pointer_W: indices into them.
            age_W: frames before that said the same letter.
        """
        places_WN = pointer_W[:, None] + self.offsets_N
        is_inside_WN = (places_WN >= 0) & (places_WN < len(letters_L))
        letters_WN = letters_L[places_WN.clamp(0, len(letters_L) - 1)]
        letters_WN = torch.where(is_inside_WN & (letters_WN >= 0), letters_WN, NUM_LETTERS)
        rows_WN = letters_WN + torch.arange(letters_WN.shape[1], device=letters_WN.device) * (NUM_LETTERS + 1)
        # An age is a sum of steps from 0: one that training never held is as the oldest that it did, so that a letter
        # which lasts too long is not said on and on.
        # Buffers keep their dtype where weights are loaded, or gathered by FSDP2, in another.
        ages_MD = self.up_to_MM.to(self.age_embedding.dtype) @ self.age_embedding
        return self.letters(rows_WN).sum(dim=1) + F.embedding(age_W.clamp(max=self.config.max_age - 1), ages_MD)
