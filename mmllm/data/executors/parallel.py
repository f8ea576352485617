"""Work on rows by the chunk, in this process or shared by several; the results come in the rows' order."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from torch.utils.data import DataLoader, Dataset

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


def in_chunks(
    function: Callable[[Sequence[_Item]], _Result], items: Sequence[_Item], size: int, workers: int = 0
) -> Iterator[tuple[Sequence[_Item], _Result]]:
    """Each chunk of `size` items, and what the function makes of it; else as `in_order`."""
    return in_order(function, [items[start : start + size] for start in range(0, len(items), size)], workers)


def in_order(
    function: Callable[[_Item], _Result], items: Sequence[_Item], workers: int = 0
) -> Iterator[tuple[_Item, _Result]]:
    """Each item, and what the function makes of it.

    Args:
        function: Picklable, since processes may be spawned.
        items: Best large ones, since each is sent to a process.
        workers: Processes that run the function; 0: this one does.
    """
    results = DataLoader(
        _Mapped(function, items), batch_size=None, num_workers=min(workers, len(items)), collate_fn=_as_it_is
    )
    yield from zip(items, results, strict=True)


class _Mapped(Dataset[Any]):
    """As a `Dataset`, so that a loader's workers may do it."""

    def __init__(self, function: Callable[[Any], Any], items: Sequence[Any]) -> None:
        self._function, self._items = function, items

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, number: int) -> Any:
        return self._function(self._items[number])


def _as_it_is(result: Any) -> Any:
    return result
