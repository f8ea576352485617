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
    """Each chunk, and what the function makes of it.

    Args:
        function: Picklable, since processes may be spawned.
        items: What is cut into chunks.
        size: Items of a chunk.
        workers: Processes that run the function; 0: this one does.
    """
    chunks = [items[start : start + size] for start in range(0, len(items), size)]
    results = DataLoader(
        _Mapped(function, chunks), batch_size=None, num_workers=min(workers, len(chunks)), collate_fn=_as_it_is
    )
    yield from zip(chunks, results, strict=True)


class _Mapped(Dataset[Any]):
    """As a `Dataset`, so that a loader's workers may do it."""

    def __init__(self, function: Callable[[Any], Any], chunks: Sequence[Any]) -> None:
        self._function, self._chunks = function, chunks

    def __len__(self) -> int:
        return len(self._chunks)

    def __getitem__(self, number: int) -> Any:
        return self._function(self._chunks[number])


def _as_it_is(result: Any) -> Any:
    return result
