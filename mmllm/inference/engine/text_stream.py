"""A text told while it is written: in whole characters, and never a part of a string that it stops before."""

from __future__ import annotations

import functools
from collections.abc import Iterable

from mmllm.inference.engine.token_texts import TextPieces, token_texts
from mmllm_tokenizers.folder import TokenizerFolder

MAX_STOP_CHARACTERS = 65_536
"""Of all stop strings of a request together."""
_NUM_CHARACTERS = 0x110000


class TextStream:
    """The text of ids that come one after another.

    What `push` and `finish` give is together the text of all ids, cut before the first stop string: the one that is
    whole first, and of several that are whole with the same character the longest.

    Args:
        tokenizer: of the model.
        stop: strings before which the text ends.

    Raises:
        ValueError: a stop string is empty, or they are too long together; or the tokenizer's texts can't be told piece
            by piece.
    """

    def __init__(self, tokenizer: TokenizerFolder, stop: tuple[str, ...] = ()) -> None:
        self._pieces = TextPieces(token_texts(tokenizer.text))
        self._automaton = _automaton(stop) if stop else None
        self._node = 0
        self._held = ""
        """The text's end, which may be a stop string's beginning."""
        self._told: list[str] = []
        self.stopped: str | None = None
        """The stop string that was met; what is pushed then is no longer looked at."""

    @property
    def text(self) -> str:
        """All that was given so far."""
        return "".join(self._told)

    def push(self, ids: Iterable[int]) -> str:
        """More ids; the text that is certain now and wasn't before."""
        return "" if self.stopped is not None else self._tell(self._pieces.push(ids))

    def finish(self) -> str:
        """The text ends here: what was held back of it."""
        if self.stopped is not None:
            return ""
        text = self._tell(self._pieces.finish())
        if self.stopped is None and self._held:
            self._told.append(self._held)
            text, self._held = text + self._held, ""
        return text

    def _tell(self, text: str) -> str:
        if self._automaton is not None:
            text = self._before_stop(text, self._automaton)
        if text:
            self._told.append(text)
        return text

    def _before_stop(self, text: str, automaton: _Automaton) -> str:
        start = len(self._held)
        whole = self._held + text
        for place in range(start, len(whole)):
            self._node = automaton.step(self._node, whole[place])
            stop = automaton.stops[self._node]
            if stop is not None:
                self.stopped, self._held = stop, ""
                return whole[: place + 1 - len(stop)]
        certain = len(whole) - automaton.depths[self._node]
        self._held = whole[certain:]
        return whole[:certain]


class _Automaton:
    """Finds many strings at once: Aho and Corasick 1975, "Efficient String Matching: An Aid to Bibliographic Search".

    A node stands for the longest end of the text that some string begins with.
    """

    def __init__(self, strings: Iterable[str]) -> None:
        self._edges: dict[int, int] = {}
        self.depths = [0]
        self.stops: list[str | None] = [None]
        """The longest string that ends at each node."""
        parents, characters = [0], [""]
        for string in strings:
            node = 0
            for character in string:
                edge = node * _NUM_CHARACTERS + ord(character)
                following = self._edges.get(edge)
                if following is None:
                    following = self._edges[edge] = len(self.depths)
                    self.depths.append(self.depths[node] + 1)
                    self.stops.append(None)
                    parents.append(node)
                    characters.append(character)
                node = following
            self.stops[node] = string
        self._shorter = [0] * len(self.depths)
        """Of each node the one that stands for the next shorter such end."""
        for node in sorted(range(1, len(self.depths)), key=self.depths.__getitem__):
            if parents[node]:
                self._shorter[node] = self.step(self._shorter[parents[node]], characters[node])
            if self.stops[node] is None:
                self.stops[node] = self.stops[self._shorter[node]]

    def step(self, node: int, character: str) -> int:
        """The node after one more character."""
        code = ord(character)
        while True:
            following = self._edges.get(node * _NUM_CHARACTERS + code)
            if following is not None:
                return following
            if node == 0:
                return 0
            node = self._shorter[node]


@functools.lru_cache(maxsize=16)
def _automaton(stop: tuple[str, ...]) -> _Automaton:
    if not all(stop):
        raise ValueError("a stop string is empty; give text, or leave it out")
    length = sum(map(len, stop))
    if length > MAX_STOP_CHARACTERS:
        raise ValueError(
            f"the {len(stop)} stop strings have {length} characters together; give at most {MAX_STOP_CHARACTERS}"
        )
    return _Automaton(stop)
