"""Other people's data as rows: CSV, folders, LLaVA and ShareGPT, COCO, LibriSpeech, Common Voice, OBELICS, MMC4, text.

Each reader yields (where, row) pairs in the manifest's form (`manifest.py`), which are then checked like a manifest's.
A row that can't be told is an exception in place of the row: it is counted and named.
"""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from mmllm.data.manifest import BadRows, ManifestError, Row, read_manifest, row_from_dict

IMAGES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp")
SOUNDS = (".flac", ".wav", ".ogg", ".mp3", ".opus")
_ROLES = {"human": "user", "user": "user", "system": "user", "gpt": "assistant", "assistant": "assistant"}
_SLOTS = {"<image>": "image", "<audio>": "audio"}

Found = Iterator[tuple[str, dict[str, Any] | ManifestError]]


def read_rows(
    path: str | Path, bad: BadRows | None = None, form: str = "auto", media: str | Path | None = None
) -> list[Row]:
    """The good rows of an input of any form.

    Args:
        path: A file or folder.
        bad: Takes the rows that are skipped; without it, any bad row is an error.
        form: A key of `FORMS`, or `auto`: told from the file.
        media: What its paths are relative to; by default the folder in which it lies.

    Raises:
        FileNotFoundError: There is no such file or folder.
        ManifestError: Its form isn't known, it is empty, or has more bad rows than `bad` allows.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such manifest")
    if form == "auto":
        path = path / "manifest.jsonl" if (path / "manifest.jsonl").is_file() else path
        form = told_form(path)
    if form not in FORMS:
        raise ManifestError(f"format is {form!r}; it must be one of auto, {', '.join(FORMS)}")
    if form == "manifest" and media is None:
        return read_manifest(path, bad)
    folder = Path(media) if media is not None else path if path.is_dir() else path.parent
    own = bad if bad is not None else BadRows(0.0)
    since, count = len(own.reasons), 0
    rows: list[Row] = []
    for where, value in FORMS[form](path, folder):
        count += 1
        try:
            if isinstance(value, ManifestError):
                raise value
            rows.append(row_from_dict(value, folder, where))
        except ManifestError as error:
            own.add(where, error)
    if not count:
        raise ManifestError(f"{path}: holds no rows of the form {form}; see --format for others")
    own.check(count, str(path), since)
    return rows


def told_form(path: Path) -> str:
    """The form of an input, told from its name and its first record.

    Raises:
        ManifestError: It can't be told.
    """
    if path.is_dir():
        return "librispeech" if next(path.rglob("*.trans.txt"), None) is not None else "folder"
    match path.suffix.lower():
        case ".txt":
            return "text"
        case ".csv":
            return "csv"
        case ".tsv":
            with path.open(encoding="utf-8-sig", newline="") as stream:
                header = set(next(csv.reader(stream, delimiter="\t"), []))
            return "commonvoice" if {"client_id", "path", "sentence"} <= header else "csv"
        case ".json" | ".jsonl" | ".parquet":
            return _told_records(path)
    raise ManifestError(f"{path}: can't tell its form; name it with --format ({', '.join(FORMS)})")


def _told_records(path: Path) -> str:
    if path.suffix.lower() == ".json" and isinstance(whole := _json(path), dict) and "annotations" in whole:
        return "coco"
    try:
        first = next((value for _, value in _records(path)), None)
    except ManifestError:
        first = None  # read_manifest says what is wrong
    match first:
        case {"conversations": _} | {"messages": _}:
            return "llava"
        case {"text_list": _}:
            return "mmc4"
        case {"texts": list(), "images": list()}:
            return "obelics"
    return "manifest"


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ManifestError(f"{path}: not JSON: {error}") from error


def _records(path: Path) -> Found:
    """The records of a JSONL file, a JSON list, or a parquet file."""
    match path.suffix.lower():
        case ".json":
            whole = _json(path)
            for number, value in enumerate(whole if isinstance(whole, list) else [whole]):
                yield f"{path}:{number}", value
        case ".parquet":
            try:
                import pyarrow.parquet as parquet  # pyright: ignore[reportMissingImports]
            except ModuleNotFoundError as error:
                raise ModuleNotFoundError(f"{path}: reading parquet needs pyarrow; pip install pyarrow") from error
            number = 0
            for batch in parquet.ParquetFile(path).iter_batches(256):
                for value in batch.to_pylist():
                    yield f"{path}:{number}", value
                    number += 1
        case _:
            with path.open(encoding="utf-8-sig") as stream:
                for number, line in enumerate(stream, start=1):
                    if line.strip():
                        try:
                            yield f"{path}:{number}", json.loads(line)
                        except (ValueError, RecursionError) as error:
                            yield f"{path}:{number}", ManifestError(f"not JSON: {error}")


def _manifest(path: Path, folder: Path) -> Found:
    yield from _records(path)


def _csv(path: Path, folder: Path) -> Found:
    """A header with `text` and `image` or `audio`; other columns are metadata, numbers where they are such."""
    with path.open(encoding="utf-8-sig", newline="") as stream:
        reader = csv.DictReader(stream, delimiter="\t" if path.suffix.lower() == ".tsv" else ",")
        for row in reader:
            where = f"{path}:{reader.line_num}"
            if None in row or None in row.values():
                yield where, ManifestError(f"has another number of fields than the header's {reader.fieldnames}")
                continue
            texts = ("id", "text", "image", "audio", "question", "answer")
            yield where, {key: value if key in texts else _number(value) for key, value in row.items() if value != ""}


def _number(value: str) -> Any:
    for kind in (int, float):
        try:
            return kind(value)
        except ValueError:
            continue
    return value


def _folder(path: Path, folder: Path) -> Found:
    """Each picture or sound with a text of the same name beside it; or plain texts, where there is nothing else."""
    files = sorted(item for item in path.rglob("*") if item.is_file() and not item.name.startswith("."))
    media = [item for item in files if item.suffix.lower() in IMAGES + SOUNDS]
    for item in media or [item for item in files if item.suffix.lower() == ".txt"]:
        name = item.relative_to(path)
        text = item.with_suffix(".txt")
        if not text.is_file():
            yield str(item), ManifestError(f"{name} has no {text.name} beside it")
            continue
        row = {"id": name.with_suffix("").as_posix(), "text": _read_text(text)}
        if item in media:
            row["image" if item.suffix.lower() in IMAGES else "audio"] = str(item.absolute())
        yield str(item), row


def _read_text(path: Path) -> str:
    return path.read_bytes().decode("utf-8-sig", "replace").strip()


def _text(path: Path, folder: Path) -> Found:
    """A file is a document."""
    yield str(path), {"id": path.stem, "text": _read_text(path)}


def _llava(path: Path, folder: Path) -> Found:
    """LLaVA's `conversations` (`from`, `value`) and ShareGPT's or OpenAI's `messages` (`role`, `content`).

    `<image>` in a text stands for the next picture of `image` or `images`; pictures without a mark come first.
    """
    for number, (where, record) in enumerate(_records(path)):
        if isinstance(record, ManifestError):
            yield where, record
            continue
        try:
            yield where, _conversation(record, str(record.get("id", f"chat{number}")))
        except (ManifestError, KeyError, TypeError, AttributeError) as error:
            yield where, error if isinstance(error, ManifestError) else ManifestError(f"no conversation: {error!r}")


def _conversation(record: dict[str, Any], name: str) -> dict[str, Any]:
    turns = record.get("conversations") or record.get("messages") or []
    left = {kind: list(_listed(record, kind)) for kind in _SLOTS.values()}
    texts = [str(turn.get("value", turn.get("content", ""))) for turn in turns]
    marked = {kind: sum(text.count(mark) for text in texts) for mark, kind in _SLOTS.items()}
    segments: list[dict[str, Any]] = []
    for kind, files in left.items():
        unmarked = len(files) - marked[kind]
        if unmarked < 0:
            raise ManifestError(f"{marked[kind]} marks for {kind} but {len(files)} files; give one for each")
        segments += [{kind: files.pop(0), "role": "user"} for _ in range(unmarked)]
    for turn, text in zip(turns, texts, strict=True):
        role = _ROLES.get(str(turn.get("from", turn.get("role"))))
        if role is None:
            raise ManifestError(f"unknown role {turn.get('from', turn.get('role'))!r}; known are {', '.join(_ROLES)}")
        segments += [{**piece, "role": role} for piece in _pieces(text, left)]
    if not any(segment["role"] == "assistant" for segment in segments):
        raise ManifestError("nobody answers in this conversation")
    return {"id": name, "segments": segments}


def _listed(record: dict[str, Any], kind: str) -> list[str]:
    value = record.get(f"{kind}s", record.get(kind))
    return [] if value is None else value if isinstance(value, list) else [value]


def _pieces(text: str, left: dict[str, list[str]]) -> list[dict[str, Any]]:
    """A text cut at its marks, each replaced by the next file."""
    pieces: list[dict[str, Any]] = []
    while text:
        place, mark = min(((text.find(mark), mark) for mark in _SLOTS if mark in text), default=(len(text), ""))
        before = text[:place].strip("\n")
        if before.strip():
            pieces.append({"text": before})
        if mark:
            kind = _SLOTS[mark]
            pieces.append({kind: left[kind].pop(0)})
        text = text[place + len(mark) :]
    return pieces


def _coco(path: Path, folder: Path) -> Found:
    """COCO captions: one row for each annotation; `image_id` keeps a picture's captions together."""
    whole = _json(path)
    names = {image["id"]: image["file_name"] for image in whole["images"]}
    for number, annotation in enumerate(whole["annotations"]):
        where = f"{path}:{number}"
        if annotation.get("image_id") not in names or "caption" not in annotation:
            yield where, ManifestError(f"annotation {annotation.get('id')} has no caption, or its image isn't listed")
            continue
        image = annotation["image_id"]
        row = {"id": f"{image}-{annotation.get('id', number)}", "text": annotation["caption"].strip()}
        yield where, {**row, "image": names[image], "image_id": image}


def _librispeech(path: Path, folder: Path) -> Found:
    """`SPEAKER/CHAPTER/SPEAKER-CHAPTER.trans.txt` beside the sounds."""
    for transcript in sorted(path.rglob("*.trans.txt")):
        for number, line in enumerate(transcript.read_text(encoding="utf-8").splitlines(), start=1):
            name, _, text = line.strip().partition(" ")
            if not name:
                continue
            sounds = [transcript.with_name(name + ending) for ending in SOUNDS]
            sound = next((item for item in sounds if item.is_file()), sounds[0])
            speaker, _, rest = name.partition("-")
            row = {"id": name, "text": text, "audio": str(sound.absolute()), "speaker": speaker}
            yield f"{transcript}:{number}", {**row, "chapter": rest.partition("-")[0]}


def _common_voice(path: Path, folder: Path) -> Found:
    """One of Common Voice's `.tsv` files, beside the folder `clips`."""
    clips = folder / "clips" if (folder / "clips").is_dir() else folder
    with path.open(encoding="utf-8-sig", newline="") as stream:
        reader = csv.DictReader(stream, delimiter="\t", quoting=csv.QUOTE_NONE)
        for row in reader:
            values = {"id": Path(row["path"]).stem, "text": row["sentence"], "speaker": row["client_id"]}
            values["audio"] = str((clips / row["path"]).absolute())
            for theirs, ours in (("locale", "language"), ("age", "age"), ("gender", "gender"), ("accents", "accents")):
                if row.get(theirs):
                    values[ours] = row[theirs]
            yield f"{path}:{reader.line_num}", values


def _obelics(path: Path, folder: Path) -> Found:
    """OBELICS: `texts` and `images` of one length, one of the two `None` at each place.

    An image is a local path, or an address of which the media folder holds a copy, named as the address ends or by
    the SHA-256 of it. Pictures that are missing are left out and counted (`missing_images`).
    """
    for number, (where, record) in enumerate(_records(path)):
        if isinstance(record, ManifestError):
            yield where, record
            continue
        pairs = zip(record["texts"], record["images"], strict=False)
        pieces = [("text", text) if text else ("image", image) for text, image in pairs if text or image]
        yield where, _document(str(record.get("id", f"document{number}")), pieces, folder)


def _mmc4(path: Path, folder: Path) -> Found:
    """MMC4: each picture of `image_info` stands before the text of `text_list` that it was matched with."""
    for number, (where, record) in enumerate(_records(path)):
        if isinstance(record, ManifestError):
            yield where, record
            continue
        before: dict[int, list[str]] = {}
        for info in record.get("image_info") or ():
            name = info.get("image_name") or info.get("raw_url")
            if name:
                before.setdefault(int(info.get("matched_text_index", 0)), []).append(name)
        pieces: list[tuple[str, str]] = []
        for place, text in enumerate(record["text_list"]):
            pieces += [("image", name) for name in before.get(place, ())]
            pieces.append(("text", text if not pieces or pieces[-1][0] == "image" else f" {text}"))
        yield where, _document(str(record.get("id", f"document{number}")), pieces, folder)


def _document(name: str, pieces: list[tuple[str, str]], folder: Path) -> dict[str, Any] | ManifestError:
    segments: list[dict[str, Any]] = []
    num_missing = 0
    for kind, value in pieces:
        if kind == "text":
            segments += [{"text": value}] if value.strip() else []
        elif (found := _local_image(value, folder)) is not None:
            segments.append({"image": str(found.absolute())})
        else:
            num_missing += 1
    if not segments:
        return ManifestError(f"{name}: nothing is left of it; {num_missing} pictures aren't in {folder}")
    return {"id": name, "segments": segments, **({"missing_images": num_missing} if num_missing else {})}


def _local_image(value: str, folder: Path) -> Path | None:
    names = [value]
    if "://" in value:
        ending = value.partition("?")[0].rpartition("/")[2]
        digest = hashlib.sha256(value.encode()).hexdigest()
        names = [ending, digest, *(digest + suffix for suffix in IMAGES)]
    candidates = [folder / name for name in names if name]
    return next((item for item in candidates if item.is_file() and item.stat().st_size), None)


FORMS: dict[str, Callable[[Path, Path], Found]] = {
    "manifest": _manifest,
    "csv": _csv,
    "folder": _folder,
    "llava": _llava,
    "coco": _coco,
    "librispeech": _librispeech,
    "commonvoice": _common_voice,
    "obelics": _obelics,
    "mmc4": _mmc4,
    "text": _text,
}
