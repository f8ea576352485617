"""Text tokens: byte-level BPE trained here, or a checkpoint's own, with special tokens that no user's text forges.

Those of a checkpoint may be byte-level BPE, BPE of SentencePiece's kind with bytes to fall back on, or Unigram.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from tokenizers import Encoding, Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.decoders import Decoder
from tokenizers.models import BPE, Unigram
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer

from mmllm_tokenizers.vocab import END, SPECIAL_TOKENS

PIECE_TOKENS = 512
_MAX_FAILED_CUTS = 8
GUARD = "\ufdd0"
"""A noncharacter: Unicode keeps it for a program's own use, and no text has it."""
_TURN = re.compile(r"<[|｜].*[|｜]>", re.DOTALL)
"""Tokens that mark turns, though some checkpoints don't call them special: DeepSeek's `<｜User｜>`."""
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


@dataclass(frozen=True)
class ForeignText:
    """What a checkpoint's own tokenizer has beside its `tokenizer.json`, once it is one of ours.

    Its ids stay as they are. Our special tokens that it lacks lie behind its embedding's last row, padding included.
    """

    size: int
    """Ids of text: tokens, rows without a token, and our special tokens."""
    special_ids: Mapping[str, int]
    """Id of each of `SPECIAL_TOKENS`: a special token of its own of that name, or one behind its ids."""
    end_ids: tuple[int, ...] = ()
    """What ends a text or a turn, as its generation config says."""
    named: Mapping[str, str] = field(default_factory=dict)
    """What chat templates call its special tokens: `bos_token`, `eos_token`, …"""

    def to_dict(self) -> dict[str, Any]:
        """As JSON-serializable values."""
        return {
            "size": self.size,
            "special_ids": dict(self.special_ids),
            "end_ids": list(self.end_ids),
            "named": dict(self.named),
        }

    @staticmethod
    def from_dict(values: Any, where: str) -> ForeignText:
        """The inverse of `to_dict`.

        Raises:
            ValueError: a key is missing or unknown, or a value of another kind.
        """
        known = {each.name for each in fields(ForeignText)}
        if not isinstance(values, Mapping) or set(values) != known:
            got = sorted(values) if isinstance(values, Mapping) else type(values).__name__
            raise ValueError(f"{where}.text has {got}; it must have the keys {sorted(known)}: import it again")
        numbers = [values["size"], *values["special_ids"].values(), *values["end_ids"]]
        if not all(isinstance(number, int) and number >= 0 for number in numbers):
            raise ValueError(f"{where}.text has an id that is no number of 0 or more; import it again")
        return ForeignText(values["size"], dict(values["special_ids"]), tuple(values["end_ids"]), dict(values["named"]))


class TextTokenizer:
    """A text tokenizer that knows `SPECIAL_TOKENS`, whatever their ids are.

    Args:
        tokenizer: a Hugging Face tokenizer, of `train_text_tokenizer` or of a `tokenizer.json`.
        foreign: where it is a checkpoint's own, in which our special tokens need not be.
        written: its `tokenizer.json` to the letter, which `save` writes again; None: as the library writes it.

    Raises:
        ValueError: the tokenizer lacks a special token, or has tokens where `foreign` puts ours.
    """

    def __init__(self, tokenizer: Tokenizer, foreign: ForeignText | None = None, written: str | None = None) -> None:
        self.foreign = foreign
        self._written = written
        # Two objects of one model: whether special tokens are looked for is a switch of the object.
        serialized = tokenizer.to_str()
        self._template = Tokenizer.from_str(serialized)
        self._template.no_truncation()
        self._template.no_padding()
        self.num_tokens: int = self._num_tokens()
        """Ids up to the tokenizer's last token; behind them are rows without a token, and our special tokens."""
        self.special_ids: dict[str, int] = self._special_ids()
        """Id of each of `SPECIAL_TOKENS`."""
        added = self._template.get_added_tokens_decoder()
        theirs = {token_id for token_id, token in added.items() if token.special}
        self.hidden_ids: frozenset[int] = frozenset(theirs | set(self.special_ids.values()))
        """Special tokens, ours and the tokenizer's own: no user's text gives one, and none is written as text."""
        self._forgeable_ids = self.hidden_ids - {_unknown_id(self._template)}  # which words without a token do give
        turns = {i for i, token in added.items() if _TURN.fullmatch(token.content)}
        self._control_ids = self._forgeable_ids | turns
        self._plain = Tokenizer.from_str(_without_control_pieces(serialized, {added[i].content for i in theirs}))
        self._plain.no_truncation()
        self._plain.no_padding()
        self._plain.encode_special_tokens = True  # i.e. encode their characters, as of any other text
        theirs_to_id = self._template.token_to_id
        self._our_names = [name for name, token_id in self.special_ids.items() if token_id != theirs_to_id(name)]
        self._ours = re.compile("(" + "|".join(map(re.escape, self._our_names)) + ")") if self._our_names else None

    def _num_tokens(self) -> int:
        return max(self._template.get_vocab(with_added_tokens=True).values(), default=-1) + 1

    def _special_ids(self) -> dict[str, int]:
        if self.foreign is None:
            ids = {token: self._template.token_to_id(token) for token in SPECIAL_TOKENS}
            missing = [token for token, token_id in ids.items() if token_id is None]
            if missing:
                raise ValueError(
                    f"this tokenizer has no special token {missing[0]}; train one with `mmllm tokenizer train-text`, "
                    f"or import the checkpoint that it belongs to with `mmllm import`"
                )
            return {token: token_id for token, token_id in ids.items() if token_id is not None}
        ids = dict(self.foreign.special_ids)
        if sorted(ids) != sorted(SPECIAL_TOKENS) or len(set(ids.values())) < len(ids):
            raise ValueError(
                f"the special tokens are {ids}; wanted an id of its own for each of {' '.join(SPECIAL_TOKENS)}: import "
                f"the checkpoint again"
            )
        added = self._template.get_added_tokens_decoder()
        for token, token_id in ids.items():
            is_theirs = token_id in added and added[token_id].special
            if not (is_theirs or self.num_tokens <= token_id < self.foreign.size):
                raise ValueError(
                    f"special token {token} has id {token_id}, which is neither a special token of this tokenizer nor "
                    f"between its {self.num_tokens} tokens and {self.foreign.size}: import the checkpoint again"
                )
        beyond = [token_id for token_id in self.foreign.end_ids if token_id >= self.foreign.size]
        if beyond:
            raise ValueError(f"text ends with id {beyond[0]}, but there are {self.foreign.size}: import it again")
        return ids

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickled as its JSON: the library's own pickle forgets the switch, and users could write special tokens."""
        return type(self)._from_json, (self._template.to_str(), self.foreign)

    @classmethod
    def _from_json(cls, serialized: str, foreign: ForeignText | None = None) -> TextTokenizer:
        return cls(Tokenizer.from_str(serialized), foreign)

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> TextTokenizer:
        """A tokenizer trained on `texts`; see `train_text_tokenizer`."""
        return cls(train_text_tokenizer(texts, vocab_size))

    @classmethod
    def load(cls, path: str | Path, foreign: ForeignText | None = None) -> TextTokenizer:
        """Reads a `tokenizer.json`.

        Args:
            path: the file.
            foreign: as of the constructor.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is no Hugging Face tokenizer, or one with other special tokens.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"{path} does not exist; `mmllm tokenizer train-text` writes it")
        with unreadable(lambda error: ValueError(f"{path} is not a Hugging Face tokenizer: {error}")):
            written = path.read_text(encoding="utf-8")
            tokenizer = Tokenizer.from_str(written)
        try:
            return cls(tokenizer, foreign, None if foreign is None else written)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error

    def save(self, path: str | Path) -> None:
        """Writes a `tokenizer.json`."""
        written = self._template.to_str(pretty=True) if self._written is None else self._written
        Path(path).write_text(written, encoding="utf-8")

    @property
    def vocab_size(self) -> int:
        """Number of ids, special tokens included, and of a foreign tokenizer the rows without a token."""
        return self._template.get_vocab_size() if self.foreign is None else self.foreign.size

    @property
    def end_ids(self) -> tuple[int, ...]:
        """What ends a text: `<|end|>`, and what else a foreign checkpoint writes there."""
        more = () if self.foreign is None else self.foreign.end_ids
        return tuple(dict.fromkeys((self.special_ids[END], *more)))

    @property
    def hash(self) -> str:
        """SHA-256 of what decides the ids: vocabulary, merges, special tokens and splitting."""
        content = json.loads(self._template.to_str())
        parts = {
            "vocab": content["model"]["vocab"],
            "merges": content["model"].get("merges"),
            "added": [[token["id"], token["content"]] for token in content["added_tokens"]],
            "normalizer": content.get("normalizer"),
            "pre_tokenizer": content.get("pre_tokenizer"),
        }
        if self.foreign is not None:
            switches = {key: value for key, value in content["model"].items() if key not in ("vocab", "merges")}
            parts |= {"foreign": self.foreign.to_dict(), "model": switches, "tokens": content["added_tokens"]}
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def encode(self, text: str) -> list[int]:
        """Ids of a user's text. No text gives a special token: `"<|end|>"` is seven characters here.

        Raises:
            ValueError: the text holds half of a surrogate pair, which no Unicode text has, or a noncharacter of Unicode
                that would make a special token of it.
        """
        return self._encode_plain(text).ids

    def _encode_plain(self, text: str) -> Encoding:
        encoding = self._plain.encode(_valid_unicode(text), add_special_tokens=False)
        forged = self._forgeable_ids.intersection(encoding.ids)
        if forged:
            token = self._template.id_to_token(min(forged))
            raise ValueError(f"text would give the special token {token!r}; leave out the noncharacter {GUARD!r}")
        return encoding

    def encode_pieces(self, text: str, least: int = PIECE_TOKENS) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids of a long text, and where it can be cut so that each piece, encoded alone, gives its part of them.

        Args:
            text: A user's text.
            least: Tokens of a piece, the last one apart.

        Returns:
            (ids, (first token, first byte in UTF-8) of each piece; the first is (0, 0), which may be the only one).
        """
        encoding = self._encode_plain(text)
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
        return self._encode_with_ours(text, add_special_tokens=False)

    def encode_as_transformers(self, text: str) -> list[int]:
        """Ids as transformers' tokenizer gives them: special tokens count, and those that frame a text are added."""
        return self._encode_with_ours(text, add_special_tokens=True)

    def _encode_with_ours(self, text: str, add_special_tokens: bool) -> list[int]:
        if self._ours is None or add_special_tokens:
            return self._template.encode(_valid_unicode(text), add_special_tokens=add_special_tokens).ids
        ids: list[int] = []
        for number, part in enumerate(self._ours.split(_valid_unicode(text))):
            if number % 2:
                ids.append(self.special_ids[part])
            elif part:
                ids += self._template.encode(part, add_special_tokens=False).ids
        return ids

    def encode_marked(self, text: str, guard: str) -> list[int]:
        """Ids of a rendered template: its special tokens count, but those of users' words, which `guard` breaks, don't.

        They are what transformers gives for it, where the words spell no special token.

        Args:
            text: what a template made.
            guard: a character that stands inside of each special token of the users' words, and is taken out here.

        Raises:
            ValueError: as `encode`.
        """
        return self.encode_marked_spans(text, guard)[0]

    def encode_marked_spans(self, text: str, guard: str) -> tuple[list[int], list[tuple[int, int]]]:
        """As `encode_marked`; also of each id which characters it stands for, counted without guards.

        Returns:
            (ids, (first character, the one behind the last) of each).
        """
        control = self.control_tokens
        names = re.compile("|".join(map(re.escape, sorted(control, key=len, reverse=True))))
        spelt, plain = names.findall(text), text.replace(guard, "")
        wanted = [i for found in spelt if (i := self.id(found)) in self._control_ids]
        if names.findall(plain) == spelt:
            ids, spans = self._with_spans(self._template, plain, self._ours, self.special_ids)
            if [i for i in ids if i in self._control_ids] == wanted:  # normalizers may make some of other characters
                return ids, spans
        private = names.sub(lambda found: GUARD + found[0], text).replace(guard, "")
        ours = {GUARD + name: self.special_ids[name] for name in self._our_names}
        split = re.compile("(" + "|".join(map(re.escape, ours)) + ")") if ours else None
        ids, spans = self._with_spans(self._private, private, split, ours)
        if [i for i in ids if i in self._control_ids] != wanted:
            raise ValueError("the messages' words would give special tokens; leave out what looks like parts of them")
        before = list(itertools.accumulate((letter == GUARD for letter in private), initial=0))
        return ids, [(start - before[start], stop - before[stop]) for start, stop in spans]

    def _with_spans(
        self, tokenizer: Tokenizer, text: str, split: re.Pattern[str] | None, named: Mapping[str, int]
    ) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids of a text and the characters of each; every other part of the split is a token of ours."""
        ids: list[int] = []
        spans: list[tuple[int, int]] = []
        start = 0
        for number, part in enumerate(split.split(_valid_unicode(text)) if split else [_valid_unicode(text)]):
            if number % 2:
                ids.append(named[part])
                spans.append((start, start + len(part)))
            elif part:
                found = tokenizer.encode(part, add_special_tokens=False)
                ids += found.ids
                spans += [(start + first, start + stop) for first, stop in found.offsets]
            start += len(part)
        return ids, spans

    @functools.cached_property
    def _private(self) -> Tokenizer:
        """The tokenizer with another name for each special token, one that no text has: the guard stands before it."""
        names = self.control_tokens.difference(self._our_names)
        private = Tokenizer.from_str(_without_control_pieces(self._template.to_str(), names, everywhere=True))
        private.no_truncation()
        private.no_padding()
        return private

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids; special tokens and ids beyond the text (audio units) are dropped.

        Bytes that are no UTF-8 (a character cut in two) become U+FFFD.
        """
        numbers = (int(token_id) for token_id in ids)
        kept = [i for i in numbers if 0 <= i < self.num_tokens and i not in self.hidden_ids]
        return self._template.decode(kept, skip_special_tokens=False)

    @property
    def decoder(self) -> Decoder | None:
        """How tokens become a text; None: they are joined by spaces."""
        return self._template.decoder

    @property
    def decoder_settings(self) -> dict[str, Any] | None:
        """The decoder as `tokenizer.json` has it."""
        return None if self.decoder is None else json.loads(self.decoder.__getstate__())

    def token(self, token_id: int) -> str:
        """How an id of a special token is written; a token of our own that lies behind the tokenizer's by its name."""
        if token_id < self.num_tokens:
            return self._template.id_to_token(token_id) or ""
        return next(name for name, each in self.special_ids.items() if each == token_id)

    @property
    def control_tokens(self) -> set[str]:
        """How the special tokens are written, ours and the tokenizer's own, and what else marks turns."""
        return {self.token(token_id) for token_id in self.hidden_ids | self._control_ids} | set(self.special_ids)

    def id(self, token: str) -> int:
        """Id of one token, such as `"<|image|>"`.

        Raises:
            ValueError: there is no such token.
        """
        token_id = self.special_ids.get(token, self._template.token_to_id(token))
        if token_id is None:
            raise ValueError(f"there is no token {token!r}; special tokens are {' '.join(SPECIAL_TOKENS)}")
        return token_id


@contextlib.contextmanager
def unreadable(said: Callable[[BaseException], ValueError]) -> Iterator[None]:
    """Turns whatever the tokenizers library makes of a damaged file into an error of ours.

    On bad JSON it raises a bare Exception; where its own code panics, what it raises isn't even one.
    """
    try:
        yield
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise said(error) from error


def _unknown_id(tokenizer: Tokenizer) -> int | None:
    """Id of what has no token, where the model has such an id."""
    model: Any = tokenizer.model
    if isinstance(model, Unigram):
        return json.loads(tokenizer.to_str())["model"].get("unk_id")
    unknown = getattr(model, "unk_token", None)
    return None if unknown is None else tokenizer.token_to_id(unknown)


def _without_control_pieces(serialized: str, special: set[str], everywhere: bool = False) -> str:
    """The tokenizer without its special tokens among the pieces that its model can give.

    Unigram's vocabulary holds `</s>` as a piece like any other, and BPE that looks whole words up (`ignore_merges`)
    finds it too: users' text would give it. Such pieces get a name that no text has; ids stay.

    Args:
        serialized: `tokenizer.json`.
        special: how its special tokens are written.
        everywhere: all of them get such a name, not only those that are pieces.
    """
    content = json.loads(serialized)
    model = content["model"]
    vocab = model.get("vocab")
    if isinstance(vocab, list):  # Unigram: [piece, score]
        hidden = special.intersection(piece for piece, _ in vocab)
        model["vocab"] = [[GUARD + piece if piece in hidden else piece, score] for piece, score in vocab]
    else:
        hidden = special.intersection(vocab) if everywhere or model.get("ignore_merges") else set()
        merges = [merge.split(" ") if isinstance(merge, str) else merge for merge in model.get("merges", ())]
        hidden = hidden.difference(*merges, ("".join(merge) for merge in merges)) if hidden else hidden
        model["vocab"] = {GUARD + token if token in hidden else token: number for token, number in vocab.items()}
    if not hidden and not everywhere:
        return serialized
    for token in content["added_tokens"]:  # under the same ids, so that those of other added tokens stay
        if token["content"] in (special if everywhere else hidden):
            token |= {"content": GUARD + token["content"], **({"normalized": False} if everywhere else {})}
    if model.get("unk_token") in hidden:
        model["unk_token"] = GUARD + model["unk_token"]
    content["post_processor"] = None
    return json.dumps(content, ensure_ascii=False)


def _valid_unicode(text: str) -> str:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"text is not valid Unicode at character {error.start} (half of a surrogate pair, "
            f"{text[error.start]!r}); repair it, e.g. with text.encode('utf-16', 'surrogatepass').decode('utf-16')"
        ) from error
    return text
