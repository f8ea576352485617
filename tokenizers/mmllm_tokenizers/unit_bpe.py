"""Byte-pair encoding of discrete units: the pairs that come most often become tokens of their own.

Source: Sennrich et al. (https://arxiv.org/abs/1508.07909), over the units of speech as in
https://arxiv.org/abs/2309.15800. Differs from BPE of text in that there are no words: a sound is one.

Shapes: U units, P tokens, M merges, V tokens of the vocabulary.
"""

from __future__ import annotations

import json
from collections.abc import Iterable

import torch
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from torch import Tensor

MAX_VOCAB_SIZE = 65_536
"""Codes are stored in 16 bits."""
_FIRST = 0xF0000
"""Of a plane for private use, whose characters no normalization changes; a unit is such a character."""
_MAX_UNITS = 0xFFFD
"""As many as the plane has."""


class UnitBPE:
    """Units to tokens and back. The first tokens are the units themselves.

    Args:
        num_units: different units that there are.
        merges_M2: int64, which two tokens become one, the first merges first. A merge whose units are those of an
            earlier token gives that token.

    Raises:
        ValueError: there are too many units or tokens, or a merge names a token that no earlier one makes.
    """

    def __init__(self, num_units: int, merges_M2: Tensor) -> None:
        self.num_units = num_units
        self.merges_M2 = merges_M2
        tokens: list[tuple[int, ...]] = [(unit,) for unit in range(num_units)]
        known = set(tokens)
        for number, (left, right) in enumerate(merges_M2.tolist()):
            if not (0 <= left < len(tokens) and 0 <= right < len(tokens)):
                raise ValueError(f"merge {number} is of tokens {left} and {right}; there are {len(tokens)} before it")
            merged = tokens[left] + tokens[right]
            if merged not in known:
                known.add(merged)
                tokens.append(merged)
        self.tokens = tuple(tokens)
        """The units of each token."""
        check_sizes(num_units, len(tokens))
        spelled = [_spelled(units) for units in tokens]
        merges = [(spelled[left], spelled[right]) for left, right in merges_M2.tolist()]
        self._tokenizer = Tokenizer(BPE({text: number for number, text in enumerate(spelled)}, merges))

    @classmethod
    def train(cls, sequences: Iterable[Tensor], num_units: int, vocab_size: int) -> UnitBPE:
        """Merges pairs, the most frequent first, until there are `vocab_size` tokens; depends on the units alone.

        Args:
            sequences: int64 [U] of each sound.
            num_units: different units that there are.
            vocab_size: of the tokens, the units included.

        Raises:
            ValueError: the size can't be, or too few pairs come twice to reach it.
        """
        check_sizes(num_units, vocab_size)
        trainer = BpeTrainer(
            vocab_size=vocab_size,
            min_frequency=2,
            initial_alphabet=[chr(_FIRST + unit) for unit in range(num_units)],
            show_progress=False,
        )
        tokenizer = Tokenizer(BPE())
        tokenizer.train_from_iterator((_spelled(units_U.tolist()) for units_U in sequences), trainer)
        merges = json.loads(tokenizer.to_str())["model"]["merges"]  # the library tells them nowhere else
        pairs = [[tokenizer.token_to_id(left), tokenizer.token_to_id(right)] for left, right in merges]
        made = cls(num_units, torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2))
        if made.vocab_size < vocab_size:
            raise ValueError(
                f"BPE is to have {vocab_size} tokens, but there is only sound for {made.vocab_size}: no other pair of "
                f"units comes twice; give more sound, or fewer tokens"
            )
        return made

    @property
    def vocab_size(self) -> int:
        """V."""
        return len(self.tokens)

    @property
    def lengths_V(self) -> Tensor:
        """int64: of how many units each token is."""
        return torch.tensor([len(units) for units in self.tokens], dtype=torch.int64)

    def encode(self, units_U: Tensor) -> Tensor:
        """int64 tokens [P] of units."""
        encoding = self._tokenizer.encode(_spelled(units_U.tolist()), add_special_tokens=False)
        return torch.tensor(encoding.ids, dtype=torch.int64)

    def decode(self, tokens_P: Tensor) -> Tensor:
        """int64 units [U] of tokens."""
        return torch.tensor([unit for token in tokens_P.tolist() for unit in self.tokens[token]], dtype=torch.int64)


def _spelled(units: Iterable[int]) -> str:
    return "".join(chr(_FIRST + unit) for unit in units)


def check_sizes(num_units: int, vocab_size: int) -> None:
    """Refuses a vocabulary that can't be.

    Args:
        num_units: different units that there are.
        vocab_size: of the tokens, the units included.

    Raises:
        ValueError: there are too many units or tokens, or no room for a merge.
    """
    if not 1 <= num_units <= _MAX_UNITS:
        raise ValueError(f"BPE is over {num_units} units; it can be over 1 to {_MAX_UNITS}")
    if not num_units < vocab_size <= MAX_VOCAB_SIZE:
        raise ValueError(
            f"BPE is to have {vocab_size} tokens; it must have more than the {num_units} units, which are among them, "
            f"and {MAX_VOCAB_SIZE} at most"
        )
