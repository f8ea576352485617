"""Other people's data as rows: CSV, folders, LLaVA and ShareGPT, COCO, LibriSpeech, Common Voice, OBELICS, MMC4, text.

Each reader yields (where, row) pairs in the manifest's form (`manifest.py`), which are then checked like a manifest's.
A row that can't be told is an exception in place of the row: it is counted and named.
"""

from __future__ import annotations

import csv
import hashlib
from collections.abc import Callable
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from mmllm.data.rows.read import Found, read_json, read_records, read_table
from mmllm.data.rows.rows import BadRows, ManifestError, Row, read_manifest, row_from_dict

IMAGES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")
SOUNDS = (".flac", ".wav", ".ogg", ".mp3", ".opus")
_UNREAD = (".heic", ".heif", ".avif", ".jp2", ".svg", ".psd", ".m4a", ".aac", ".wma", ".mp4", ".mov", ".mkv", ".webm")
"""Pictures, sounds and films that aren't read: the text beside one is a caption, and no text of its own."""
_LOOKED_AT = 20
"""Records from which the form is told: the first may be an odd one."""
_ROLES = {"human": "user", "user": "user", "system": "user", "gpt": "assistant", "assistant": "assistant"}
_SLOTS = {"<image>": "image", "<audio>": "audio"}


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
    if form == "manifest" and media is None and path.suffix.lower() not in (".json", ".parquet"):
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
            with path.open(encoding="utf-8-sig", errors="replace") as stream:
                header = set(next(csv.reader([stream.readline()], delimiter="\t"), []))
            return "commonvoice" if {"client_id", "path", "sentence"} <= header else "csv"
        case ".json" | ".jsonl" | ".parquet":
            return _told_records(path)
    raise ManifestError(f"{path}: can't tell its form; name it with --format ({', '.join(FORMS)})")


def _told_records(path: Path) -> str:
    if path.suffix.lower() == ".json" and _is_coco(path):
        return "coco"
    try:
        records = [value for _, value in islice(read_records(path), _LOOKED_AT)]
    except ManifestError:
        records = []  # the form's reader says what is wrong
    for record in records:
        match record:
            case {"conversations": _} | {"messages": _}:
                return "llava"
            case {"text_list": _}:
                return "mmc4"
            case {"texts": list(), "images": list()}:
                return "obelics"
    return "manifest"


def _is_coco(path: Path) -> bool:
    try:
        whole = read_json(path)
    except ManifestError:
        return False
    return isinstance(whole, dict) and "annotations" in whole


def _each(path: Path, what: str, read: Callable[[dict[str, Any], int], dict[str, Any]]) -> Found:
    """What `read` makes of each record and its number; a record that it can't read is a bad row, not the end."""
    for number, (where, record) in enumerate(read_records(path)):
        if isinstance(record, dict):
            yield where, _tried(what, partial(read, record, number))
        elif isinstance(record, ManifestError):
            yield where, record
        else:
            yield where, ManifestError(f"no {what}: a JSON object is wanted, got {type(record).__name__}")


def _tried(what: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any] | ManifestError:
    try:
        return make()
    except ManifestError as error:
        return error
    except (LookupError, TypeError, AttributeError, ValueError, OSError, RuntimeError) as error:
        return ManifestError(f"no {what}: {error!r}")


def _manifest(path: Path, folder: Path) -> Found:
    yield from read_records(path)


def _csv(path: Path, folder: Path) -> Found:
    """A header with `text` and `image` or `audio`; other columns are metadata, numbers where they are such."""
    texts = ("id", "text", "image", "audio", "question", "answer")
    for where, row in read_table(path, delimiter="\t" if path.suffix.lower() == ".tsv" else ","):
        if isinstance(row, ManifestError):
            yield where, row
            continue
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
    told = {item.with_suffix("") for item in media}
    for item in files:
        if item.suffix.lower() in _UNREAD and item.with_suffix(".txt").is_file() and item.with_suffix("") not in told:
            told.add(item.with_suffix(""))
            kinds = ", ".join(suffix[1:] for suffix in IMAGES + SOUNDS)
            yield (
                str(item),
                ManifestError(f"{item.relative_to(path)} isn't of a kind that is read ({kinds}); convert it"),
            )
    texts = [item for item in files if item.suffix.lower() == ".txt" and item.with_suffix("") not in told]
    for item in media or texts:
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

    `<image>` in a text stands for the next picture of `image` or `images`; pictures without a mark come first. A
    content may be a list of parts: `text`, `image_url` (of a picture in the media folder), and `image` or `audio`,
    which stand for the next one.
    """
    return _each(
        path, "conversation", lambda record, number: _conversation(record, _name(record, f"chat{number}"), folder)
    )


def _name(record: dict[str, Any], default: str) -> str:
    return default if record.get("id") is None else str(record["id"])


def _conversation(record: dict[str, Any], name: str, folder: Path) -> dict[str, Any]:
    turns = record.get("conversations") or record.get("messages") or []
    left = {kind: list(_listed(record, kind)) for kind in _SLOTS.values()}
    contents = [_content(turn.get("value", turn.get("content")), folder) for turn in turns]
    texts = [item for content in contents for item in content if isinstance(item, str)]
    marked = {kind: sum(text.count(mark) for text in texts) for mark, kind in _SLOTS.items()}
    segments: list[dict[str, Any]] = []
    for kind, files in left.items():
        unmarked = len(files) - marked[kind]
        if unmarked < 0:
            raise ManifestError(f"{marked[kind]} marks for {kind} but {len(files)} files; give one for each")
        segments += [{kind: files.pop(0), "role": "user"} for _ in range(unmarked)]
    for turn, content in zip(turns, contents, strict=True):
        role = _ROLES.get(str(turn.get("from", turn.get("role"))))
        if role is None:
            raise ManifestError(f"unknown role {turn.get('from', turn.get('role'))!r}; known are {', '.join(_ROLES)}")
        for item in content:
            pieces = _pieces(item, left) if isinstance(item, str) else [item]
            segments += [{**piece, "role": role} for piece in pieces]
    if not any(segment["role"] == "assistant" for segment in segments):
        raise ManifestError("nobody answers in this conversation")
    return {"id": name, "segments": segments}


def _content(value: Any, folder: Path) -> list[str | dict[str, Any]]:
    """What is said in a turn: texts, marks for the next picture or sound among them, and pictures with their paths.

    Raises:
        ManifestError: It says nothing, or has a part that isn't read.
    """
    if isinstance(value, (str, int, float)):
        return [str(value)]
    if not isinstance(value, list) or not value:
        raise ManifestError(f"a turn's content is {value!r}; give a text or a list of parts")
    found: list[str | dict[str, Any]] = []
    for part in value:
        match part:
            case str() | {"type": "text", "text": str()}:
                found.append(part if isinstance(part, str) else part["text"])
            case {"type": "image_url", "image_url": {"url": str() as url}} | {
                "type": "image_url",
                "image_url": str() as url,
            }:
                found.append({"image": _named_image(url, folder)})
            case {"type": "image", "image": str() as url} | {"type": "image", "url": str() as url}:
                found.append({"image": _named_image(url, folder)})
            case {"type": "image" | "audio" as kind, **others} if not any(others.values()):
                found.append(f"<{kind}>")
            case _:
                shown = repr(part)
                raise ManifestError(
                    f"a turn has the part {shown[:80]}{'…' if len(shown) > 80 else ''}; those of type text and "
                    f"image_url are read"
                )
    return found


def _named_image(url: str, folder: Path) -> str:
    found = None if url.startswith("data:") else _local_image(url.removeprefix("file://"), folder)
    if found is None:
        raise ManifestError(f"image_url {url[:80]!r} names no picture in {folder}; save it there, and name its path")
    return str(found.absolute())


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
    whole = read_json(path)
    if not isinstance(whole, dict) or not all(isinstance(whole.get(key), list) for key in ("images", "annotations")):
        raise ManifestError(f"{path}: COCO captions are an object with the lists 'images' and 'annotations'; one lacks")
    names: dict[Any, str] = {}
    for image in whole["images"]:
        match image:
            case {"id": int() | str() as its_id, "file_name": str() as name}:
                names[its_id] = name
    for number, annotation in enumerate(whole["annotations"]):
        yield f"{path}:{number}", _tried("annotation", partial(_coco_row, annotation, number, names))


def _coco_row(annotation: dict[str, Any], number: int, names: dict[Any, str]) -> dict[str, Any]:
    image, name = annotation.get("image_id"), annotation.get("id", number)
    if image not in names:
        raise ManifestError(f"annotation {name}: its image {image!r} isn't listed with an id and a file_name")
    if not isinstance(annotation.get("caption"), str):
        raise ManifestError(f"annotation {name}: its caption is {annotation.get('caption')!r}; it must be a text")
    return {"id": f"{image}-{name}", "text": annotation["caption"].strip(), "image": names[image], "image_id": image}


def _librispeech(path: Path, folder: Path) -> Found:
    """`SPEAKER/CHAPTER/SPEAKER-CHAPTER.trans.txt` beside the sounds."""
    for transcript in sorted(path.rglob("*.trans.txt")):
        lines = transcript.read_bytes().splitlines()
        for number, data in enumerate(lines, start=1):
            try:
                line = data.decode("utf-8-sig")
            except UnicodeDecodeError as error:
                yield f"{transcript}:{number}", ManifestError(f"not UTF-8: {error}")
                continue
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
    for where, row in read_table(path, delimiter="\t", quoting=csv.QUOTE_NONE):
        yield where, row if isinstance(row, ManifestError) else _tried("clip", partial(_clip, row, clips))


def _clip(row: dict[str, str], clips: Path) -> dict[str, Any]:
    values = {"id": Path(row["path"]).stem, "text": row["sentence"], "speaker": row["client_id"]}
    values["audio"] = str((clips / row["path"]).absolute())
    for theirs, ours in (("locale", "language"), ("age", "age"), ("gender", "gender"), ("accents", "accents")):
        if row.get(theirs):
            values[ours] = row[theirs]
    return values


def _obelics(path: Path, folder: Path) -> Found:
    """OBELICS: `texts` and `images` of one length, one of the two `None` at each place (else the picture comes first).

    An image is a path in the media folder, or an address of which that folder holds a copy, named as the address ends
    or by the SHA-256 of it. Pictures that are missing are left out and counted (`missing_images`).
    """
    return _each(path, "OBELICS document", lambda record, number: _obelics_row(record, number, folder))


def _obelics_row(record: dict[str, Any], number: int, folder: Path) -> dict[str, Any]:
    texts, images = record.get("texts"), record.get("images")
    if not isinstance(texts, list) or not isinstance(images, list):
        raise ManifestError("an OBELICS document needs the lists 'texts' and 'images'")
    if len(texts) != len(images):
        raise ManifestError(f"{len(texts)} texts but {len(images)} images; give both lists one length, with nulls")
    pieces: list[tuple[str, str]] = []
    for text, image in zip(texts, images, strict=True):
        pieces += [(kind, value) for kind, value in (("image", image), ("text", text)) if value]
    return _document(_name(record, f"document{number}"), pieces, folder)


def _mmc4(path: Path, folder: Path) -> Found:
    """MMC4: each picture of `image_info` stands before the text of `text_list` that it was matched with."""
    return _each(path, "MMC4 document", lambda record, number: _mmc4_row(record, number, folder))


def _mmc4_row(record: dict[str, Any], number: int, folder: Path) -> dict[str, Any]:
    texts = record.get("text_list")
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise ManifestError(f"text_list is {str(texts)[:80]}; it must be a list of texts")
    before: dict[int, list[str]] = {}
    for info in record.get("image_info") or ():
        name, place = info.get("image_name") or info.get("raw_url"), info.get("matched_text_index", 0)
        if not isinstance(place, int) or not 0 <= place < len(texts):
            raise ManifestError(f"picture {name!r} has the matched_text_index {place!r} of {len(texts)} texts")
        if name:
            before.setdefault(place, []).append(name)
    pieces: list[tuple[str, str]] = []
    for place, text in enumerate(texts):
        pieces += [("image", name) for name in before.get(place, ())]
        pieces.append(("text", text if not pieces or pieces[-1][0] == "image" else f" {text}"))
    return _document(_name(record, f"document{number}"), pieces, folder)


def _document(name: str, pieces: list[tuple[str, str]], folder: Path) -> dict[str, Any]:
    segments: list[dict[str, Any]] = []
    num_missing = 0
    for kind, value in pieces:
        if not isinstance(value, str):
            raise ManifestError(f"has the {kind} {value!r}, which is no text")
        if kind == "text":
            segments += [{"text": value}] if value.strip() else []
        elif (found := _local_image(value, folder)) is not None:
            segments.append({"image": str(found.absolute())})
        else:
            num_missing += 1
    if not segments:
        raise ManifestError(f"{name}: nothing is left of it; {num_missing} pictures aren't in {folder}")
    return {"id": name, "segments": segments, **({"missing_images": num_missing} if num_missing else {})}


def _local_image(value: str, folder: Path) -> Path | None:
    """The picture in the media folder that a path or an address names.

    Raises:
        ManifestError: The path leads out of the folder. Web documents come from strangers: one of them would put any
            file of this machine into the shards.
    """
    names = [value]
    if "://" in value:
        ending = value.partition("?")[0].rpartition("/")[2]
        digest = hashlib.sha256(value.encode()).hexdigest()
        names = [name for name in (ending, digest, *(digest + suffix for suffix in IMAGES)) if name not in ("", "..")]
    for name in names:
        try:
            path = folder / name
            if not path.resolve().is_relative_to(folder.resolve()):
                raise ManifestError(f"image {value!r} leads out of {folder}; put it there, or name it with --media")
            if path.is_file() and path.stat().st_size:
                return path
        except OSError:  # longer than a file's name may be
            continue
    return None


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
