"""The documents and sizes of `benchmarks/train.py`, equal for ours and its peers.

Shapes: B sequences, T positions.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

IGNORE = -100


@dataclass(frozen=True)
class Shape:
    """A decoder as Mixtral's, and the sequences of a step."""

    name: str
    hidden_size: int = 256
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    head_dim: int = 64
    moe_intermediate_size: int = 512
    num_experts: int = 8
    num_experts_per_tok: int = 2
    vocab_size: int = 4096
    num_sequences: int = 2
    sequence_length: int = 1024
    median_length: int = 150

    def case(self, device: str, dtype: str) -> str:
        """Device, dtype and shape, as the JSON names them."""
        sizes = f"d {self.hidden_size} L {self.num_hidden_layers} n {self.moe_intermediate_size} E {self.num_experts}"
        return f"{device} {dtype} {self.name} ({sizes} K {self.num_experts_per_tok} V {self.vocab_size})"

    def to_dict(self) -> dict[str, Any]:
        """As JSON takes it."""
        return asdict(self)


TRAINING = {
    "cpu": (Shape("coarse"), Shape("fine-grained", moe_intermediate_size=128, num_experts=32, num_experts_per_tok=4)),
    "cuda": (
        Shape(
            "coarse", 1024, 16, 16, 4, 64, 1024, 16, 2, vocab_size=32768, num_sequences=8, sequence_length=4096,
            median_length=400,
        ),
        Shape(
            "fine-grained", 1024, 16, 16, 4, 64, 512, 32, 4, vocab_size=32768, num_sequences=8, sequence_length=4096,
            median_length=400,
        ),
    ),
}  # fmt: skip
TINY = Shape("coarse", 64, 2, 2, 1, 32, 64, 4, 2, vocab_size=256, num_sequences=2, sequence_length=96, median_length=20)
DECODING = Shape("decoder", 512, 4, 8, 2, 64, 1024, 8, 2, vocab_size=8192)
TINY_DECODING = Shape("decoder", 64, 2, 2, 1, 32, 64, 4, 2, vocab_size=256)

LENGTH_SIGMA = 0.9
"""Of the logarithm of a document's length: the mean is 1.5 times the median, and one document in 140 is longer than
nine times the median."""
SHORTEST = 8


@dataclass(frozen=True)
class Packed:
    """Documents laid end to end in B sequences; what is left of each is padding.

    `labels_BT` is shifted: the target of a position is the next token of its document, or `IGNORE`.
    """

    ids_BT: np.ndarray
    labels_BT: np.ndarray
    positions_BT: np.ndarray
    document_ids_BT: np.ndarray
    lengths: tuple[tuple[int, ...], ...]
    """Of the documents of each sequence."""

    @property
    def num_tokens(self) -> int:
        """Without padding."""
        return sum(map(sum, self.lengths))


def ragged(shape: Shape, seed: int = 0) -> Packed:
    """Documents whose lengths are log-normal, drawn until a sequence has no room for the next; ids are uniform."""
    rng = np.random.default_rng(seed)
    lengths = []
    for _ in range(shape.num_sequences):
        row: list[int] = []
        while True:
            length = int(np.exp(rng.normal(np.log(shape.median_length), LENGTH_SIGMA)))
            length = min(max(length, SHORTEST), shape.sequence_length)
            if sum(row) + length > shape.sequence_length:
                break
            row.append(length)
        lengths.append(tuple(row))
    return packed(lengths, shape.sequence_length, shape.vocab_size, rng)


def packed(lengths: list[tuple[int, ...]], sequence_length: int, vocab_size: int, rng: np.random.Generator) -> Packed:
    """Documents of these lengths."""
    size = (len(lengths), sequence_length)
    ids, labels = np.zeros(size, np.int64), np.full(size, IGNORE, np.int64)
    positions, documents = np.zeros(size, np.int64), np.full(size, -1, np.int64)
    for row, of_row in enumerate(lengths):
        start = 0
        for number, length in enumerate(of_row):
            stop = start + length
            ids[row, start:stop] = rng.integers(0, vocab_size, length)
            labels[row, start : stop - 1] = ids[row, start + 1 : stop]
            positions[row, start:stop] = np.arange(length)
            documents[row, start:stop] = number
            start = stop
    return Packed(ids, labels, positions, documents, tuple(lengths))
