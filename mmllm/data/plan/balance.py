"""How often each of a source's documents is drawn where the values of a column are to have other shares.

Value v of n_v documents gets the share n_v^alpha / sum of these (Conneau and Lample 2019,
https://arxiv.org/abs/1901.07291, of languages): with alpha 1 as many as there are, with 0 as many of each. In each
epoch a document is drawn once or not at all, by the chance n_v^(alpha - 1) against that of the rarest value, and each
epoch draws anew: nothing is repeated before all was there to be drawn.

Shapes: M items of the source (a long text is several, one of several tasks too), V values.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

NO_VALUE = ""
"""Of documents that have none."""


@dataclass(frozen=True)
class Balance:
    """A source's documents by the values of a column."""

    names: tuple[str, ...]
    """Of the values, sorted."""
    counts_V: np.ndarray
    """Documents that there are."""
    alpha: float

    @property
    def shares_V(self) -> np.ndarray:
        """Shares of what is drawn, as wanted."""
        powers_V = self.counts_V.astype(np.float64) ** self.alpha
        return powers_V / powers_V.sum()

    @property
    def chances_V(self) -> np.ndarray:
        """With which a document is drawn in an epoch; 1 of the rarest value."""
        return (self.counts_V / self.counts_V.min()) ** (self.alpha - 1)


def balance_of(
    codes_M: np.ndarray, names: dict[str, int], alpha: float, counts: np.ndarray
) -> tuple[Balance, np.ndarray]:
    """The balance of documents, and the chance [M] of each item.

    Args:
        codes_M: Number of each item's value.
        names: The values and their numbers; those that no document has are left out.
        alpha: From 0 to 1.
        counts: Documents of each of these values, each once.
    """
    there = sorted(name for name, code in names.items() if counts[code])
    balance = Balance(tuple(there), counts[[names[name] for name in there]], alpha)
    chances = np.zeros(len(names))
    chances[[names[name] for name in there]] = balance.chances_V
    return balance, chances[codes_M]
