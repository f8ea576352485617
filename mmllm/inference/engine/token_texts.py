"""What each token adds to a text: what streaming and constraints on texts are built on.

A text is `decode` of all its ids. Here it is put together id by id: a byte-level token adds bytes, which may be part of
a character; a token of SentencePiece's kind adds text, or one byte of a run of bytes, and at the very beginning its
space is dropped. All rules that are relied on are those of the `tokenizers` library's decoders.
"""

from __future__ import annotations

import codecs
import functools
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from tokenizers.decoders import Decoder

from mmllm_tokenizers.text import TextTokenizer

_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")
_SHIELD = "a"
"""A token before another one, which then isn't the first."""
_BY_PLACE = frozenset({"Metaspace", "WordPiece"})
"""Decoders that treat the first token in another way."""
_BEFORE_FUSE = _BY_PLACE | {"Replace", "ByteFallback"}


class TokenTexts:
    """What each id of a text tokenizer adds to a text. Use `token_texts`, which makes it once.

    Raises:
        ValueError: the tokenizer's decoder is of a kind in which later tokens change what earlier ones have given.
    """

    def __init__(self, text: TextTokenizer) -> None:
        self.num_tokens = text.num_tokens
        self._text = text
        self._hidden_ids = text.hidden_ids
        steps = list(_flat(text.decoder_settings))
        kinds = [step["type"] for step in steps]
        self.is_byte_level = kinds == ["ByteLevel"]
        self.stripped = ""
        """Spaces that are dropped, at most so many, where a text begins with them."""
        self._has_bytes = "ByteFallback" in kinds
        self._is_by_place = not kinds or not _BY_PLACE.isdisjoint(kinds)
        self._decoder: Decoder | None = None if self.is_byte_level else text.decoder
        if not self.is_byte_level:
            self._check(steps, kinds)
        self._middles: list[bytes | None] = [None] * text.num_tokens

    def _check(self, steps: list[dict[str, Any]], kinds: list[str]) -> None:
        fused = kinds.index("Fuse") if "Fuse" in kinds else len(kinds)
        before, behind = steps[:fused], steps[fused + 1 :]
        is_known = all(kind in _BEFORE_FUSE for kind in kinds[:fused])
        if self._has_bytes:  # nothing may change what bytes have given
            is_known = is_known and before[-1]["type"] == "ByteFallback"
        if len(behind) == 1 and behind[0]["type"] == "Strip" and behind[0]["stop"] == 0 and not self._is_by_place:
            self.stripped = behind.pop()["content"] * steps[-1]["start"]
        if not is_known or behind or self._joined([_SHIELD]) != _SHIELD:
            raise ValueError(
                f"this tokenizer puts its text together by {' and '.join(kinds) or 'nothing known'}, which can't be "
                f"told piece by piece; ask for whole texts, without streaming, stop strings and constraints"
            )

    def _joined(self, tokens: list[str]) -> str:
        return " ".join(tokens) if self._decoder is None else self._decoder.decode(tokens)

    def is_dropped(self, token_id: int) -> bool:
        """Whether `decode` leaves the id out: a special token, or none."""
        return not 0 <= token_id < self.num_tokens or token_id in self._hidden_ids

    def is_byte(self, token_id: int) -> bool:
        """Whether the id is a byte for which its tokenizer has no text: with those beside it, it gives characters."""
        return self._has_bytes and not self.is_dropped(token_id) and bool(_BYTE.fullmatch(self._token(token_id)))

    def middle(self, token_id: int) -> bytes:
        """What an id adds to a text that has begun."""
        if self.is_dropped(token_id):
            return b""
        known = self._middles[token_id]
        if known is None:
            known = self._middles[token_id] = self._middle(token_id)
        return known

    def _middle(self, token_id: int) -> bytes:
        token = self._token(token_id)
        if self.is_byte_level:
            values = [_BYTES_OF_CHARACTERS.get(character) for character in token]
            return token.encode() if None in values else bytes(value for value in values if value is not None)
        if self._has_bytes and _BYTE.fullmatch(token):
            return bytes([int(token[3:5], 16)])
        return self._joined([_SHIELD, token])[len(_SHIELD) :].encode()

    def first(self, token_id: int) -> bytes:
        """What an id adds to a text if it is the first."""
        if (
            self._is_by_place
            and not self.is_byte_level
            and not self.is_dropped(token_id)
            and not self.is_byte(token_id)
        ):
            return self._joined([self._token(token_id)]).encode()
        added = self.middle(token_id)
        return added[len(_spaces(added.decode(errors="replace"), self.stripped)) :] if self.stripped else added

    @functools.cached_property
    def silent_first_ids(self) -> list[int]:
        """Ids that add nothing if they are first, after which a text goes on as in its middle: a space that is dropped.

        Encoders of SentencePiece's kind write it before what has no token with a space.
        """
        if len(self.stripped) > 1:  # the next id's space would be dropped too
            return []
        return [i for i in range(self.num_tokens) if not self.first(i) and self.middle(i)]

    def _token(self, token_id: int) -> str:
        return self._text.token(token_id)


class TextPieces:
    """A text while its ids come: together its pieces are `decode` of all of them."""

    def __init__(self, texts: TokenTexts) -> None:
        self._texts = texts
        self._characters = codecs.getincrementaldecoder("utf-8")("replace")
        self._run = bytearray()
        self._stripped = texts.stripped
        self._has_begun = False

    def push(self, ids: Iterable[int]) -> str:
        """What is certain of the text with these ids, beyond what was given before."""
        texts = self._texts
        if texts.is_byte_level:
            return self._characters.decode(b"".join([texts.middle(token_id) for token_id in ids]))
        parts = []
        for token_id in ids:
            if texts.is_dropped(token_id):
                continue
            if texts.is_byte(token_id):
                self._run += texts.middle(token_id)
            else:
                parts.append(self._flush())
                added = texts.middle(token_id) if self._has_begun or texts.stripped else texts.first(token_id)
                parts.append(added.decode())
            self._has_begun = True
        return self._strip("".join(parts))

    def finish(self) -> str:
        """What is left, with U+FFFD where bytes are no characters."""
        return self._characters.decode(b"", final=True) if self._texts.is_byte_level else self._strip(self._flush())

    def _flush(self) -> str:
        """The text of a run of bytes that has ended; one that isn't UTF-8 as a whole gives no character at all."""
        run, self._run = self._run, bytearray()
        try:
            return run.decode()
        except UnicodeDecodeError:
            return "\ufffd" * len(run)

    def _strip(self, text: str) -> str:
        if not self._stripped or not text:
            return text
        dropped = _spaces(text, self._stripped)
        self._stripped = self._stripped[len(dropped) :] if len(dropped) == len(text) else ""
        return text[len(dropped) :]


@functools.lru_cache(maxsize=8)
def token_texts(text: TextTokenizer) -> TokenTexts:
    """`TokenTexts` of a tokenizer, made once for the tokenizers that were used last."""
    return TokenTexts(text)


def _spaces(text: str, stripped: str) -> str:
    """As many of the characters `stripped`, all of which are alike, as the text begins with."""
    return text[: next((n for n, each in enumerate(stripped) if text[n : n + 1] != each), len(stripped))]


def _flat(decoder: Mapping[str, Any] | None) -> Iterator[dict[str, Any]]:
    match decoder:
        case None:
            return
        case {"type": "Sequence", "decoders": steps}:
            for step in steps:
                yield from _flat(step)
        case _:
            yield dict(decoder)


@functools.cache
def _bytes_of_characters() -> dict[str, int]:
    """Byte-level BPE's letters for bytes (GPT-2's): printable ones stand for themselves, others for U+0100 and on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + n): byte for n, byte in enumerate(others)}


_BYTES_OF_CHARACTERS = _bytes_of_characters()
