"""Marks in texts that stand for pictures and sounds: `<image>`, `<image1>`, `<|image_1|>`, `<img>a.png</img>`."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

from mmllm.data.rows.bad_rows import ManifestError

KINDS = ("image", "audio")
_MARK = re.compile(
    r"<img>(?P<image_path>[^<>]+)</img>|<audio>(?P<audio_path>[^<>\n]+)</audio>"
    r"|<\|?(?P<kind>image|audio)(?:[ _-]?(?P<number>\d+))?\|?>"
)
_VIDEO = re.compile(r"<video>|<\|?video[ _-]?\d*\|?>")

Find = Callable[[str, str], Any]
"""Takes a kind and a path that a text names, and gives the file."""


class Marked:
    """The pictures and sounds of texts that follow each other, by the marks in them.

    A mark without a number is the next file; `<image1>` is picture 1, each time it stands; a path between marks is that
    file. A text's marks are one of the three.

    Args:
        texts: All of them, in order.
        files: Of each kind, those that the record names.
        find: Finds a path that stands between marks.

    Raises:
        ManifestError: Marks and files don't go together.
    """

    def __init__(self, texts: Sequence[str], files: dict[str, list[Any]], find: Find) -> None:
        self._files, self._find = files, find
        self._next: dict[str, int] = dict.fromkeys(KINDS, 0)
        marks = [match for text in texts for match in _MARK.finditer(text)]
        if any(_VIDEO.search(text) for text in texts):
            raise ManifestError("a text has the mark <video>; videos aren't read: give pictures of them, as <image>")
        self.unmarked: dict[str, list[Any]] = {}
        """Of each kind the files that no mark stands for: they come first."""
        for kind in KINDS:
            plain = sum(match["kind"] == kind and match["number"] is None for match in marks)
            numbers = {int(match["number"]) for match in marks if match["kind"] == kind and match["number"]}
            num_paths = sum(match[f"{kind}_path"] is not None for match in marks)
            self.unmarked[kind] = self._check(kind, plain, numbers, num_paths)
            self._next[kind] = len(self.unmarked[kind])

    def _check(self, kind: str, num_plain: int, numbers: set[int], num_paths: int) -> list[Any]:
        files = self._files.get(kind, [])
        if num_paths and files:
            raise ManifestError(f"{num_paths} texts' marks and '{kind}s' name files; name each in one of the two")
        if numbers and num_plain:
            raise ManifestError(f"has marks with and without numbers (<{kind}>, <{kind}{min(numbers)}>); use one kind")
        if numbers and numbers != set(range(1, len(files) + 1)):
            shown = ", ".join(f"<{kind}{number}>" for number in sorted(numbers))
            raise ManifestError(
                f"the marks {shown} stand for files 1 to {len(files)} of '{kind}s'; give each file one, from 1"
            )
        if num_plain > len(files):
            raise ManifestError(f"{num_plain} marks for {kind} but {len(files)} files; give one for each")
        return [] if numbers else files[: len(files) - num_plain]

    def pieces(self, text: str) -> list[dict[str, Any]]:
        """A text cut at its marks, each replaced by its file; a line break beside a mark belongs to the mark."""
        pieces: list[dict[str, Any]] = []
        start = 0
        for match in _MARK.finditer(text):
            pieces += _text(text[start : match.start()])
            pieces.append(self._file(match))
            start = match.end()
        return pieces + _text(text[start:])

    def _file(self, match: re.Match[str]) -> dict[str, Any]:
        for kind in KINDS:
            if match[f"{kind}_path"] is not None:
                return {kind: self._find(kind, match[f"{kind}_path"].strip())}
        kind = match["kind"]
        if match["number"] is not None:
            return {kind: self._files[kind][int(match["number"]) - 1]}
        self._next[kind] += 1
        return {kind: self._files[kind][self._next[kind] - 1]}


def has_marks(text: str) -> bool:
    """Whether anything in a text stands for a picture or a sound."""
    return _MARK.search(text) is not None


def _text(text: str) -> list[dict[str, Any]]:
    text = text.strip("\n")
    return [{"text": text}] if text.strip() else []
