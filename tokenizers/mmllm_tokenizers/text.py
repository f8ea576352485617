"""Byte-level BPE text tokens: lossless for any Unicode text, with special tokens that no user text can forge."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer

from mmllm_tokenizers.vocab import SPECIAL_TOKENS

PIECE_TOKENS = 512
_MAX_FAILED_CUTS = 8
MIN_VOCAB_SIZE = len(SPECIAL_TOKENS) + 256
"""The special tokens and one token for each byte."""


def train_text_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Trains byte-level BPE; the result depends on the texts alone.

    Args:
        texts: training text, one document an item.
        vocab_size: upper bound of the number of tokens, special tokens included; a small text may
            have fewer pairs worth merging.

    Raises:
        ValueError: `vocab_size` leaves no room for the special tokens and the 256 bytes.
    """
    if vocab_size < MIN_VOCAB_SIZE:
        raise ValueError(
            f"vocab_size is {vocab_size}; it must be at least {MIN_VOCAB_SIZE} "
            f"({len(SPECIAL_TOKENS)} special tokens and 256 bytes)"
        )
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False, use_regex=True)  # type: ignore[assignment]
    tokenizer.decoder = ByteLevelDecoder()  # type: ignore[assignment]
    trainer = BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator((_valid_unicode(text) for text in texts), trainer)
    return tokenizer


class TextTokenizer:
    """A text tokenizer whose first ids are `SPECIAL_TOKENS`.

    Args:
        tokenizer: a Hugging Face tokenizer, of `train_text_tokenizer` or of a `tokenizer.json`.

    Raises:
        ValueError: the tokenizer's first ids are not `SPECIAL_TOKENS`.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        for token_id, token in enumerate(SPECIAL_TOKENS):
            if tokenizer.token_to_id(token) != token_id:
                raise ValueError(
                    f"special token {token} has id {tokenizer.token_to_id(token)} in this tokenizer and must have "
                    f"{token_id}; train it with `mmllm tokenizer train-text`"
                )
        # Two objects of one model: whether special tokens are looked for is a switch of the object.
        serialized = tokenizer.to_str()
        self._template = Tokenizer.from_str(serialized)
        self._plain = Tokenizer.from_str(serialized)
        self._plain.encode_special_tokens = True  # i.e. encode their characters, as of any other text

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickled as its JSON: the library's own pickle forgets the switch, and users could write special tokens."""
        return type(self)._from_json, (self._template.to_str(),)

    @classmethod
    def _from_json(cls, serialized: str) -> TextTokenizer:
        return cls(Tokenizer.from_str(serialized))

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> TextTokenizer:
        """A tokenizer trained on `texts`; see `train_text_tokenizer`."""
        return cls(train_text_tokenizer(texts, vocab_size))

    @classmethod
    def load(cls, path: str | Path) -> TextTokenizer:
        """Reads a `tokenizer.json`.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is no Hugging Face tokenizer, or one with other special tokens.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"{path} does not exist; `mmllm tokenizer train-text` writes it")
        try:
            tokenizer = Tokenizer.from_str(path.read_text(encoding="utf-8"))
        except Exception as error:  # the library raises bare Exception on bad JSON
            raise ValueError(f"{path} is not a Hugging Face tokenizer: {error}") from error
        try:
            return cls(tokenizer)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error

    def save(self, path: str | Path) -> None:
        """Writes a `tokenizer.json`."""
        Path(path).write_text(self._template.to_str(pretty=True), encoding="utf-8")

    @property
    def vocab_size(self) -> int:
        """Number of ids, special tokens included."""
        return self._template.get_vocab_size()

    @property
    def hash(self) -> str:
        """SHA-256 of what decides the ids: vocabulary, merges, special tokens and splitting."""
        content = json.loads(self._template.to_str())
        parts = {
            "vocab": content["model"]["vocab"],
            "merges": content["model"]["merges"],
            "added": [[token["id"], token["content"]] for token in content["added_tokens"]],
            "normalizer": content.get("normalizer"),
            "pre_tokenizer": content.get("pre_tokenizer"),
        }
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def encode(self, text: str) -> list[int]:
        """Ids of a user's text. No text gives a special token: `"<|end|>"` is seven characters here.

        Raises:
            ValueError: the text holds half of a surrogate pair, which no Unicode text has.
        """
        return self._plain.encode(_valid_unicode(text), add_special_tokens=False).ids

    def encode_pieces(self, text: str, least: int = PIECE_TOKENS) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids of a long text, and where it can be cut so that each piece, encoded alone, gives its part of them.

        Args:
            text: A user's text.
            least: Tokens of a piece, the last one apart.

        Returns:
            (ids, (first token, first byte in UTF-8) of each piece; the first is (0, 0), which may be the only one).
        """
        encoding = self._plain.encode(_valid_unicode(text), add_special_tokens=False)
        ids, words, spans = encoding.ids, encoding.word_ids, encoding.offsets
        pieces, start, begin, begin_bytes, num_failed = [(0, 0)], 0, 0, 0, 0
        stop = least
        while stop < len(ids) and num_failed < _MAX_FAILED_CUTS:
            if words[stop] == words[stop - 1] or spans[stop][0] < spans[stop - 1][1]:
                stop += 1
                continue
            piece = text[begin : spans[stop][0]]
            if self._plain.encode(piece, add_special_tokens=False).ids == ids[start:stop]:
                start, begin, begin_bytes = stop, spans[stop][0], begin_bytes + len(piece.encode())
                pieces.append((start, begin_bytes))
            else:  # some normalizers and splits look further than a word
                num_failed += 1
            stop += least
        while len(pieces) > 1 and self._plain.encode(text[begin:], add_special_tokens=False).ids != ids[start:]:
            pieces.pop()
            start, begin_bytes = pieces[-1]
            begin = len(text.encode()[:begin_bytes].decode())
        return ids, pieces

    def encode_template(self, text: str) -> list[int]:
        """Ids of our own text, in which special tokens count. Never give it what a user wrote."""
        return self._template.encode(_valid_unicode(text), add_special_tokens=False).ids

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids; special tokens and ids beyond the text (audio units) are dropped.

        Bytes that are no UTF-8 (a character cut in two) become U+FFFD.
        """
        first, end = len(SPECIAL_TOKENS), self.vocab_size
        return self._template.decode([int(i) for i in ids if first <= int(i) < end], skip_special_tokens=False)

    def id(self, token: str) -> int:
        """Id of one token, such as `"<|image|>"`.

        Raises:
            ValueError: there is no such token.
        """
        token_id = self._template.token_to_id(token)
        if token_id is None:
            raise ValueError(f"there is no token {token!r}; special tokens are {' '.join(SPECIAL_TOKENS)}")
        return token_id


def _valid_unicode(text: str) -> str:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"text is not valid Unicode at character {error.start} (half of a surrogate pair, "
            f"{text[error.start]!r}); repair it, e.g. with text.encode('utf-16', 'surrogatepass').decode('utf-16')"
        ) from error
    return text
