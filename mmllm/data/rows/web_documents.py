"""OBELICS and MMC4: texts and pictures of web pages."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mmllm.data.rows.bad_rows import ManifestError
from mmllm.data.rows.media_files import local_image
from mmllm.data.rows.records import Found, each_record, record_id


def obelics_rows(path: Path, folder: Path) -> Found:
    """OBELICS: `texts` and `images` of one length, one of the two `None` at each place (else the picture comes first).

    An image is a path in the media folder, or an address of which that folder holds a copy, named as the address ends
    or by the SHA-256 of it. Pictures that are missing are left out and counted (`missing_images`).
    """
    return each_record(path, "OBELICS document", lambda record, number: _obelics_row(record, number, folder))


def _obelics_row(record: dict[str, Any], number: int, folder: Path) -> dict[str, Any]:
    texts, images = record.get("texts"), record.get("images")
    if not isinstance(texts, list) or not isinstance(images, list):
        raise ManifestError("an OBELICS document needs the lists 'texts' and 'images'")
    if len(texts) != len(images):
        raise ManifestError(f"{len(texts)} texts but {len(images)} images; give both lists one length, with nulls")
    pieces: list[tuple[str, str]] = []
    for text, image in zip(texts, images, strict=True):
        pieces += [(kind, value) for kind, value in (("image", image), ("text", text)) if value]
    return _document(record_id(record, f"document{number}"), pieces, folder)


def mmc4_rows(path: Path, folder: Path) -> Found:
    """MMC4: each picture of `image_info` stands before the text of `text_list` that it was matched with."""
    return each_record(path, "MMC4 document", lambda record, number: _mmc4_row(record, number, folder))


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
    return _document(record_id(record, f"document{number}"), pieces, folder)


def _document(name: str, pieces: list[tuple[str, str]], folder: Path) -> dict[str, Any]:
    segments: list[dict[str, Any]] = []
    num_missing = 0
    for kind, value in pieces:
        if not isinstance(value, str):
            raise ManifestError(f"has the {kind} {value!r}, which is no text")
        if kind == "text":
            segments += [{"text": value}] if value.strip() else []
        elif (found := local_image(value, folder)) is not None:
            segments.append({"image": str(found.absolute())})
        else:
            num_missing += 1
    if not segments:
        raise ManifestError(f"{name}: nothing is left of it; {num_missing} pictures aren't in {folder}")
    return {"id": name, "segments": segments, **({"missing_images": num_missing} if num_missing else {})}
