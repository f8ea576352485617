"""Ids that are guessed by what followed the last few ones where a model wrote them before: no model's step at all.

A row's own text is looked up beside a table that `mmllm draft --kind ngram` counted; the surer of the two guesses.

Shapes: M contexts, N ids of each.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

from mmllm.inference.engine.drafting import Agreement, LookedUp, StepTimes, best_length
from mmllm.inference.engine.rows import Row

NGRAMS = "ngrams.safetensors"
ORDERS = (4, 3, 2, 1)
"""How many last ids are looked up in the table, the longest first."""
_LEVELS = 16
_LEAST_CHANCE = 0.05
_LOOKED_UP_CHANCES = {4: 0.9, 3: 0.8, 2: 0.6}
"""That what followed so many ids before follows them again, until it is known better."""


@dataclass(frozen=True)
class NGrams:
    """What mostly follows each few ids.

    Attributes:
        num_text: ids of text.
        tokenizer_hash: of the tokenizer folder whose ids they are.
        following: by a few ids, the one that mostly follows them, and how often of so many times.
    """

    num_text: int
    tokenizer_hash: str
    following: dict[tuple[int, ...], tuple[int, int, int]]

    def guess(self, ids: Sequence[int]) -> tuple[int, float] | None:
        """The likeliest next id and its share, of the longest few last ids that are known; None: none are."""
        for order in ORDERS:
            found = self.following.get(tuple(ids[-order:])) if len(ids) >= order else None
            if found is not None:
                token_id, count, total = found
                return token_id, count / (total + 0.5)  # what was seen once isn't certain
        return None

    def save(self, path: Path) -> None:
        """Writes the table."""
        arrays = {}
        for order in ORDERS:
            rows = [(*key, *value) for key, value in self.following.items() if len(key) == order]
            arrays[f"order_{order}"] = np.array(rows, dtype=np.int32).reshape(-1, order + 3)
        said = {"num_text": self.num_text, "tokenizer_hash": self.tokenizer_hash}
        save_file(arrays, path, {"mmllm": json.dumps(said)})

    @classmethod
    def load(cls, path: Path) -> NGrams:
        """The inverse of `save`.

        Raises:
            ValueError: it is no such table, or a damaged one.
        """
        following: dict[tuple[int, ...], tuple[int, int, int]] = {}
        try:
            with safe_open(path, framework="numpy") as tables:
                said = json.loads(tables.metadata()["mmllm"])
                for order in ORDERS:
                    for row in tables.get_tensor(f"order_{order}").tolist():
                        token_id, count, total = row[order:]
                        following[tuple(row[:order])] = (token_id, count, total)
            made = cls(int(said["num_text"]), str(said["tokenizer_hash"]), following)
        except Exception as error:
            raise ValueError(f"{path} is no table of `mmllm draft --kind ngram`: {error}; make it anew") from None
        if any(not 0 <= token_id < made.num_text for token_id, _, _ in following.values()):
            raise ValueError(f"{path} has ids beyond its {made.num_text}; make it anew")
        return made


class NGramCounts:
    """Counts what follows what.

    Args:
        num_text: as of `NGrams`.
        tokenizer_hash: likewise.
    """

    def __init__(self, num_text: int, tokenizer_hash: str) -> None:
        self._num_text, self._tokenizer_hash = num_text, tokenizer_hash
        self._counts: dict[tuple[int, ...], dict[int, int]] = {}

    def add(self, before: Sequence[int], ids: Iterable[int]) -> None:
        """Counts ids, and what each follows.

        Args:
            before: ids that are not counted themselves.
            ids: that were written behind them.
        """
        seen = list(before)[-max(ORDERS) :]
        for token_id in ids:
            for order in ORDERS:
                if len(seen) >= order:
                    counts = self._counts.setdefault(tuple(seen[-order:]), {})
                    counts[token_id] = counts.get(token_id, 0) + 1
            seen.append(token_id)

    def table(self) -> NGrams:
        """What mostly follows; of equals what came first."""
        following = {}
        for key, counts in self._counts.items():
            token_id = max(counts, key=counts.__getitem__)
            following[key] = (token_id, counts[token_id], sum(counts.values()))
        return NGrams(self._num_text, self._tokenizer_hash, following)


class LookUp:
    """Guesses by the row's own text, and a table if there is one, and learns how far either may be trusted.

    Args:
        ngrams: the table.
    """

    def __init__(self, ngrams: NGrams | None = None) -> None:
        self._ngrams = ngrams
        self.times = StepTimes()
        self._texts: dict[Row, LookedUp] = {}
        looked_up = list(_LOOKED_UP_CHANCES.values())
        self._agreement = Agreement([*((level + 0.5) / _LEVELS for level in range(_LEVELS)), *looked_up])
        self._levels: dict[Row, list[int]] = {}

    def draft(self, rows: Sequence[Row], most: Sequence[int]) -> list[list[int]]:
        """See `Drafter`."""
        drafts = []
        for row, count in zip(rows, most, strict=True):
            if row not in self._texts:
                self._texts[row] = LookedUp(row)
            text = self._texts[row]
            text.extend(row.written.sampler.ids)  # pyright: ignore[reportOptionalMemberAccess]
            drafts.append(self._guesses(row, text, count))
        return drafts

    def _guesses(self, row: Row, text: LookedUp, most: int) -> list[int]:
        ids: list[int] = []
        levels: list[int] = []
        chances: list[float] = []
        chance = 1.0
        while len(ids) < most:
            found = self._guess(text, ids)
            if found is None:
                break
            token_id, level = found
            chance *= self._agreement.of(level)
            if chance < _LEAST_CHANCE:
                break
            ids.append(token_id)
            levels.append(level)
            chances.append(chance)
        num_kept = best_length(chances, self.times)
        self._levels[row] = levels[:num_kept]
        return ids[:num_kept]

    def _guess(self, text: LookedUp, guessed: list[int]) -> tuple[int, int] | None:
        """The next id and the level of trust that it has."""
        options = []
        known = None if self._ngrams is None else self._ngrams.guess(text.last(max(ORDERS), guessed))
        if known is not None:
            options.append((known[0], int(known[1] * _LEVELS)))
        before = text.next(guessed)
        if before is not None:
            options.append((before[0], _LEVELS + list(_LOOKED_UP_CHANCES).index(before[1])))
        return max(options, key=lambda each: self._agreement.of(each[1]), default=None)

    def verified(self, rows: Sequence[Row], num_accepted: Sequence[int]) -> None:
        """See `Drafter`."""
        for row, count in zip(rows, num_accepted, strict=True):
            for place, level in enumerate(self._levels.pop(row, [])[: count + 1]):
                self._agreement.note(level, place < count)

    def leave(self, row: Row) -> None:
        """See `Drafter`."""
        self._texts.pop(row, None)
        self._levels.pop(row, None)
