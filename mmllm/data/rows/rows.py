"""Manifests: one JSON object a line, naming a text, a picture, a sound, or a document of segments.

A row has `id`, and `text` with `image` or `audio` (paths relative to the manifest), or `segments`: a list of
`{"text": …}`, `{"image": path}`, `{"audio": path}`, with `question` and `answer` if there is one. Segments with a
`role` (`user`, `assistant`) are a conversation. Any other key is metadata.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import soundfile

Kind = Literal["caption", "interleaved", "text", "audio"]
KINDS: tuple[Kind, ...] = ("caption", "interleaved", "text", "audio")

ROLES = ("user", "assistant")

_logger = logging.getLogger(__name__)
_OWN_KEYS = ("id", "text", "image", "audio", "segments")
_MEDIA_KEYS = ("image", "audio")
_MEDIA_SUFFIXES = (
    ".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".wav", ".flac", ".mp3", ".ogg", ".opus",
)  # fmt: skip
_SHOWN = 5


class ManifestError(ValueError):
    """A manifest, or too many of its rows, can't be used. The message names the file and the rows."""


@dataclass(frozen=True)
class Row:
    """One line of a manifest, checked; its files exist but haven't been read."""

    id: str
    kind: Kind
    where: str
    """`file:line`, for messages."""
    text: str = ""
    image: Path | None = None
    audio: Path | None = None
    segments: tuple[dict[str, Any], ...] = ()
    """Each with one key: `text` (str), `image` or `audio` (Path); in a conversation also `role`."""
    metadata: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """As JSON, for tasks of other processes and machines; `from_json` gives the same row again."""
        segments = [
            {key: _path_to_json(value) if key in _MEDIA_KEYS else value for key, value in segment.items()}
            for segment in self.segments
        ]
        image, audio = _path_to_json(self.image), _path_to_json(self.audio)
        return {**vars(self), "image": image, "audio": audio, "segments": segments}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Row:
        """The row of which `to_json` made this."""
        segments = tuple(
            {key: _path_from_json(item) if key in _MEDIA_KEYS else item for key, item in segment.items()}
            for segment in value["segments"]
        )
        image, audio = _path_from_json(value["image"]), _path_from_json(value["audio"])
        return cls(**{**value, "image": image, "audio": audio, "segments": segments})


def _path_to_json(path: Path | None) -> str | None:
    return None if path is None else str(path)


def _path_from_json(value: str | None) -> Path | None:
    return None if value is None else Path(value)


@dataclass
class BadRows:
    """Rows that were skipped: counted, named and bounded."""

    max_fraction: float
    reasons: list[str] = field(default_factory=list)

    def add(self, where: str, reason: object) -> None:
        """Note a skipped row.

        Args:
            where: Its `file:line`.
            reason: What is wrong with it.
        """
        message = f"{where}: {reason}"
        _logger.warning("skipped %s", message)
        self.reasons.append(message)

    def check(self, num_rows: int, name: str, since: int = 0) -> None:
        """Refuse a manifest of which too many rows were skipped.

        Args:
            num_rows: How many rows were looked at, bad ones included.
            name: The manifest.
            since: Only the bad rows from this one on are the manifest's.

        Raises:
            ManifestError: More than `max_fraction` of the rows (rounded up), or all of them, are bad.
        """
        reasons = self.reasons[since:]
        num_bad = len(reasons)
        allowed = math.ceil(self.max_fraction * num_rows)
        if num_bad and (num_bad > allowed or num_bad >= num_rows):
            shown = "; ".join(reasons[:_SHOWN]) + ("; …" if num_bad > _SHOWN else "")
            raise ManifestError(
                f"{name}: {num_bad} of {num_rows} rows can't be used, at most {min(allowed, num_rows - 1)} may be: "
                f"{shown}. Mend them, or raise --max_bad_fraction (now {self.max_fraction})"
            )


_OF_FILES = {errno.EACCES, errno.EPERM, errno.EISDIR, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.EINVAL}


def is_of_machine(error: Exception) -> bool:
    """Whether an error is the machine's and not a row's: no more files may be open, a mount is gone, ….

    What decoders and this package raise has no number; a file that was there when its row was checked is not the row's
    fault if it is gone.
    """
    return isinstance(error, OSError) and error.errno is not None and error.errno not in _OF_FILES


def read_manifest(path: str | Path, bad: BadRows | None = None) -> list[Row]:
    """The good rows of a manifest.

    Args:
        path: The JSONL file.
        bad: Takes the rows that are skipped; without it, any bad row is an error.

    Raises:
        FileNotFoundError: There is no such file.
        ManifestError: It is empty, isn't JSONL at all, or has more bad rows than `bad` allows.
    """
    path = Path(path)
    own = bad if bad is not None else BadRows(0.0)
    since = len(own.reasons)
    rows: list[Row] = []
    num_lines = 0
    for number, line in _lines(path):
        num_lines += 1
        where = f"{path}:{number}"
        try:
            rows.append(parse_row(line, path.parent, where))
        except ManifestError as error:
            own.add(where, error)
    if not num_lines:
        raise ManifestError(f"{path}: the manifest is empty; it needs one JSON object a line")
    own.check(num_lines, str(path), since)
    return rows


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    if path.is_dir():
        raise ManifestError(f"{path}: is a folder; name the manifest.jsonl in it")
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such manifest")
    try:
        with path.open(encoding="utf-8-sig") as stream:
            for number, line in enumerate(stream, start=1):
                if line.strip():
                    yield number, line
    except UnicodeDecodeError as error:
        raise ManifestError(f"{path}: not UTF-8 ({error.reason} at byte {error.start}); save it as UTF-8") from error


def parse_row(line: str, folder: Path, where: str) -> Row:
    """A checked row from its line.

    Args:
        line: One JSON object.
        folder: What its paths are relative to.
        where: `file:line`.

    Raises:
        ManifestError: It isn't a JSON object, or a key or file is missing, empty or of the wrong type.
    """
    try:
        value = json.loads(line)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ManifestError(f"not JSON: {error}") from error
    return row_from_dict(value, folder, where)


def row_from_dict(value: Any, folder: Path, where: str) -> Row:
    """A checked row from what its line holds.

    Args:
        value: The row.
        folder: What its paths are relative to.
        where: `file:line`.

    Raises:
        ManifestError: A key or file is missing, empty or of the wrong type.
    """
    if not isinstance(value, dict):
        raise ManifestError(f"a row must be a JSON object, got {type(value).__name__}")
    _check_unicode(value)
    metadata = {key: item for key, item in value.items() if key not in _OWN_KEYS}
    name = _id(value.get("id"), where)
    if "segments" in value:
        beside = [key for key in ("text", "image", "audio") if key in value]
        if beside:
            raise ManifestError(f"a row has {beside[0]!r} beside 'segments'; put it into a segment, where it belongs")
        return Row(name, "interleaved", where, segments=_segments(value, folder), metadata=metadata)
    if "image" in value and "audio" in value:
        raise ManifestError("a row has both 'image' and 'audio'; give one, or 'segments'")
    text = _text(value.get("text"), "text")
    if "image" in value:
        return Row(name, "caption", where, text, image=_file(value["image"], folder, "image"), metadata=metadata)
    if "audio" in value:
        return Row(name, "audio", where, text, audio=_file(value["audio"], folder, "audio"), metadata=metadata)
    _check_keys(metadata, folder)
    return Row(name, "text", where, text, metadata=metadata)


def _check_keys(metadata: dict[str, Any], folder: Path) -> None:
    """Refuses a text row of which another key names a picture or a sound: `image` or `audio` was misspelt."""
    for key, item in metadata.items():
        if isinstance(item, str) and item.lower().endswith(_MEDIA_SUFFIXES) and (folder / item).is_file():
            raise ManifestError(f"{key!r} names the file {item}, which 'image' or 'audio' should; rename the key")


def _id(value: Any, where: str) -> str:
    if value is None or value == "":
        return f"row{where.rpartition(':')[2]}"
    if isinstance(value, (list, dict)):
        raise ManifestError(f"'id' is {value!r}; give a string or a number, or leave it out")
    return str(value)


def _text(value: Any, key: str) -> str:
    if value is None:
        raise ManifestError(f"{key!r} is missing")
    if not isinstance(value, str):
        raise ManifestError(f"{key!r} must be a string, got {type(value).__name__}")
    if not value.strip():
        raise ManifestError(f"{key!r} is empty")
    return value


def _check_unicode(value: dict[str, Any]) -> None:
    """Refuses half surrogate pairs, which no file could hold, wherever they stand."""
    for key, item in value.items():
        try:
            json.dumps([key, item], ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise ManifestError(f"{key!a} holds half a surrogate pair, which is no Unicode text") from error
        except (TypeError, ValueError, RecursionError) as error:
            raise ManifestError(f"{key!r} holds what JSON can't: {error}") from error


def _file(value: Any, folder: Path, key: str) -> Path:
    if not isinstance(value, str) or not value:
        raise ManifestError(f"{key!r} must be a path, got {value!r}")
    path = folder / value
    try:
        found, is_empty = path.is_file(), path.is_file() and not path.stat().st_size
    except (OSError, ValueError) as error:
        raise ManifestError(f"{key} {value!r} can't be looked up: {error}") from error
    if not found:
        raise ManifestError(f"{key} file {path} doesn't exist")
    if is_empty:
        raise ManifestError(f"{key} file {path} is empty (0 bytes)")
    return path


def _segments(value: dict[str, Any], folder: Path) -> tuple[dict[str, Any], ...]:
    items = value["segments"]
    if not isinstance(items, list) or not items:
        raise ManifestError("'segments' must be a list with at least one segment")
    segments = []
    for number, item in enumerate(items):
        kinds = [key for key in ("text", "image", "audio") if isinstance(item, dict) and key in item]
        if len(kinds) > 1:
            raise ManifestError(f"segment {number} has the keys {', '.join(kinds)}; give each a segment of its own")
        match item:
            case {"text": str() as text} if text.strip():
                segment: dict[str, Any] = {"text": text}
            case {"image": path}:
                segment = {"image": _file(path, folder, f"segment {number} image")}
            case {"audio": path}:
                segment = {"audio": _file(path, folder, f"segment {number} audio")}
            case _:
                raise ManifestError(f"segment {number} is {item!r}; give one of 'text', 'image' or 'audio', not empty")
        if (role := item.get("role")) is not None:
            if role not in ROLES:
                raise ManifestError(f"segment {number} has the role {role!r}; it must be one of {', '.join(ROLES)}")
            segment["role"] = role
        segments.append(segment)
    if ("question" in value) != ("answer" in value):
        raise ManifestError("'question' and 'answer' go together; one is missing")
    if "question" in value:
        _text(value["question"], "question")
        _text(value["answer"], "answer")
    return tuple(segments)


def row_media(row: Row) -> list[tuple[str, Path]]:
    """The pictures and sounds of a row, in order, each with "image" or "audio"."""
    own = [(kind, path) for kind, path in (("image", row.image), ("audio", row.audio)) if path is not None]
    return own + [item for segment in row.segments for item in segment.items() if isinstance(item[1], Path)]


def row_files(row: Row) -> list[Path]:
    """The files of `row_media`."""
    return [path for _, path in row_media(row)]


def with_absolute_paths(row: Row) -> Row:
    """The row, to be read from whatever working directory."""
    image, audio = (path.absolute() if path is not None else None for path in (row.image, row.audio))
    segments = tuple(
        {key: value.absolute() if isinstance(value, Path) else value for key, value in segment.items()}
        for segment in row.segments
    )
    return replace(row, image=image, audio=audio, segments=segments)


def sound_seconds(path: Path) -> float:
    """A sound's length by its header; 0 where that can't be read."""
    try:
        return float(soundfile.info(str(path)).duration)
    except (OSError, RuntimeError):
        return 0.0


def even_hash(text: str) -> float:
    """A number in [0, 1) from a text. CRC won't do: texts that differ in one letter get numbers that hardly differ."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") / 2**64


class Digests:
    """What is in files, told by a hash: each is read once."""

    def __init__(self) -> None:
        self._known: dict[Path, str] = {}

    def know(self, path: Path, digest: str) -> None:
        """Take a file's SHA-1 as read."""
        self._known[path] = digest

    def __call__(self, path: Path) -> str:
        """The SHA-1 of a file."""
        if path not in self._known:
            with path.open("rb") as stream:
                self._known[path] = hashlib.file_digest(stream, "sha1").hexdigest()
        return self._known[path]


def _shown(row: Row, digests: Digests) -> str:
    """What rows of one picture, one sound or one text have in common: never parted by a split.

    Files are told by what is in them, wherever they lie and whatever they are called; a document goes with its first.
    """
    files = row_files(row)
    if files:
        return digests(files[0])
    return row.id if row.segments else row.text


def without_shown(rows: Sequence[Row], heldout: Sequence[Row], digests: Digests) -> list[Row]:
    """The rows that show nothing of what held-out rows show: scores of what was trained on are no results.

    Files are told by what is in them, wherever they lie: a row goes if any of its pictures or sounds is in a held-out
    row, be it a caption's or a document's. Rows without files are told by their text.

    Raises:
        ManifestError: None would be left.
    """

    def contents(row: Row) -> set[str]:
        files = {digests(path) for path in row_files(row)}
        texts = [segment["text"] for segment in row.segments] if not files else []
        return files or {"\0".join(["text", row.text, *texts])}

    tested = set[str]().union(*map(contents, heldout))
    kept = [row for row in rows if tested.isdisjoint(contents(row))]
    if rows and not kept:
        raise ManifestError(
            f"each of the {len(rows)} training rows shows a picture, a sound or a text of the held-out rows; hold "
            f"other rows out (--test, --holdout KEY=VALUE)"
        )
    if len(kept) < len(rows):
        _logger.warning("%d rows are left out: what they show is held out as well", len(rows) - len(kept))
    return kept


def split_rows(
    rows: Sequence[Row], holdout: str | float, seed: int = 0, digests: Digests | None = None
) -> tuple[list[Row], list[Row]]:
    """Rows to train on and rows held out.

    Args:
        rows: The rows.
        holdout: `KEY=VALUE` holds out the rows whose metadata has that value; a number holds out that
            fraction of them, chosen by the hash of what they show (so that adding rows moves none, and rows of one
            picture, one sound or one text stay together), of each kind one at least.
        seed: Changes the choice by fraction.
        digests: Of files that were read before.

    Returns:
        `(train, heldout)`, each in the rows' order.

    Raises:
        ManifestError: `holdout` can't be read, or one of the two parts would be empty.
    """
    if isinstance(holdout, str) and "=" in holdout:
        key, _, wanted = holdout.partition("=")
        mask = [str(row.metadata.get(key)) == wanted for row in rows]
    else:
        try:
            fraction = float(holdout)
        except ValueError as error:
            raise ManifestError(f"holdout is {holdout!r}; give KEY=VALUE or a fraction") from error
        digests = digests or Digests()
        hashes = [even_hash(f"{seed}:{_shown(row, digests)}") for row in rows]
        least = _least_of_each_kind(rows, hashes) if fraction > 0 else set[float]()
        mask = [value < fraction or value in least for value in hashes]
    heldout = [row for row, out in zip(rows, mask, strict=True) if out]
    train = [row for row, out in zip(rows, mask, strict=True) if not out]
    if not heldout or not train:
        keys = sorted({key for row in rows for key in row.metadata})
        raise ManifestError(
            f"holdout {holdout!r} leaves {len(train)} rows to train and {len(heldout)} to test; both need some "
            f"(metadata keys: {', '.join(keys) or 'none'})"
        )
    return train, heldout


def _least_of_each_kind(rows: Sequence[Row], hashes: Sequence[float]) -> set[float]:
    """The least hash of each kind that would be left with another to train on; if none would, the least of all."""
    of_kinds = [{value for row, value in zip(rows, hashes, strict=True) if row.kind == kind} for kind in KINDS]
    return {min(values) for values in of_kinds if len(values) > 1} or set(sorted(hashes)[:1])
