"""Keys of rows in shards: safe and unlike, numbered without a table of all of them.

A key that is taken already gets `-1`, `-2`, … behind it. Whether it is taken is told by hashes of 64 bits: unlike
hashes are unlike keys, so keys are always unlike; that a key is numbered without need has a chance of some 3e-8 in a
million rows.
"""

from __future__ import annotations

import hashlib
import re
from array import array
from collections.abc import Iterable, Sequence

import numpy as np

_MAX_KEY = 80
_SAFE = re.compile(rf"(?!_)[A-Za-z0-9_-]{{1,{_MAX_KEY}}}(?<!_)")
_MAX_DIGITS = 9
_MASK, _FACTOR = 2**64 - 1, 0xD1342543DE82EF95


def copy_name(name: str, copy: int) -> str:
    """What the altered copies of a row are called; the first is the row itself."""
    return f"{name}#{copy}" if copy else name


def safe_key(name: str) -> str:
    """An id as a tar key: ASCII letters, digits, `_` and `-` alone, at most 80 of them."""
    if _SAFE.fullmatch(name):
        return name
    key = re.sub(r"[^A-Za-z0-9_-]+", "_", name).strip("_") or "row"
    if len(key) > _MAX_KEY or key != name:
        key = f"{key[: _MAX_KEY - 9]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"
    return key


def numbered_key(key: str, number: int) -> str:
    """A key with its number; 0 is none."""
    return f"{key}-{number}" if number else key


def id_hash(name: str) -> int:
    """64 bits of an id's key. That of `numbered_key(key, n)` comes of that of `key`, by `_numbered_hash`."""
    is_safe = name.isalnum() and name.isascii() and len(name) <= _MAX_KEY  # most are, and it takes little to see
    return _hash(name) if is_safe else _key_hash(safe_key(name))


def _key_hash(key: str) -> int:
    if "-" in key:
        base, _, digits = key.rpartition("-")
        if digits.isdecimal() and digits[0] != "0" and len(digits) <= _MAX_DIGITS:
            return _numbered_hash(_key_hash(base), int(digits))
    return _hash(key)


def _hash(key: str) -> int:
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "little")


def _numbered_hash(hashed: int, number: int) -> int:
    return (hashed * _FACTOR + number) & _MASK


def _numbered_hashes(hashes_N: np.ndarray, numbers_N: np.ndarray) -> np.ndarray:
    return hashes_N * np.uint64(_FACTOR) + numbers_N.astype(np.uint64)  # arrays of integers overflow as they should


def key_numbers(hashes: Sequence[int] | array[int]) -> np.ndarray | None:
    """uint32 `[K]`: the number that each of K keys gets, in their order; None if all are 0, since all are unlike.

    Args:
        hashes: `id_hash` of each id.
    """
    hashes_K = np.frombuffer(hashes, dtype=np.uint64) if isinstance(hashes, array) else np.array(hashes, np.uint64)
    order_K = np.argsort(hashes_K, kind="stable")
    sorted_K = hashes_K[order_K]
    repeats_K = np.zeros(len(sorted_K), dtype=bool)
    np.equal(sorted_K[1:], sorted_K[:-1], out=repeats_K[1:])
    if not repeats_K.any():
        return None
    places_K = np.arange(len(sorted_K))
    counted_K = places_K - np.maximum.accumulate(np.where(repeats_K, 0, places_K))
    numbers_K = np.zeros(len(sorted_K), dtype=np.uint32)
    numbers_K[order_K] = counted_K
    given_N = _numbered_hashes(sorted_K[repeats_K], counted_K[repeats_K])
    clashes_N = _are_in(given_N, sorted_K)
    if clashes_N.any():
        involved = {*sorted_K[repeats_K][clashes_N].tolist(), *given_N[clashes_N].tolist()}
        _number_in_turn(hashes_K, sorted_K, involved, numbers_K)
    return numbers_K


def _are_in(values_N: np.ndarray, sorted_K: np.ndarray) -> np.ndarray:
    found_N = np.minimum(np.searchsorted(sorted_K, values_N), len(sorted_K) - 1)
    return sorted_K[found_N] == values_N


def _number_in_turn(hashes_K: np.ndarray, sorted_K: np.ndarray, involved: set[int], numbers_K: np.ndarray) -> None:
    """Numbers keys one after another where a numbered key may be another row's: `a`, `a`, `a-1`.

    Whether it is, isn't known before: so keys that turn out to be involved are numbered from the start as well.
    """
    while True:
        places = np.flatnonzero(np.isin(hashes_K, np.fromiter(involved, dtype=np.uint64, count=len(involved))))
        taken: set[int] = set()
        counts: dict[int, int] = {}  # of rows with one key, so that many of them don't try each other's keys
        given: set[int] = set()
        for place, base in zip(places.tolist(), hashes_K[places].tolist(), strict=True):
            key, number = base, 0
            while key in taken:
                number = counts[base] = counts.get(base, 0) + 1
                key = _numbered_hash(base, number)
                given.add(key)
            taken.add(key)
            numbers_K[place] = number
        missed = _in_common(given - involved, sorted_K)
        if not missed:
            return
        involved |= missed


def _in_common(values: Iterable[int], sorted_K: np.ndarray) -> set[int]:
    values_N = np.fromiter(values, dtype=np.uint64)
    return set(values_N[_are_in(values_N, sorted_K)].tolist())
