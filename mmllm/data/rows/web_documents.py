"""OBELICS and MMC4: texts and pictures of web pages."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mmllm.data.rows.bad_rows import ManifestError
from mmllm.data.rows.inputs import Found, Input, each_record, record_id
from mmllm.data.rows.media_files import drop_embedded, local_image
from mmllm.data.rows.records import is_null

_UNKEPT = ("similarity_matrix",)
"""Of MMC4: how much each text is like each picture, larger than the document."""
_MEANT = ("id", "text", "image", "audio", "segments", "question", "answer", "missing_images")


def obelics_rows(given: Input) -> Found:
    """OBELICS: `texts` and `images` of one length, one of the two `None` at each place (else the picture comes first).

    An image is a path in the media folder, or an address of which that folder holds a copy, named as the address ends
    or by the SHA-256 of it; or it is embedded. Pictures that are missing are left out and counted (`missing_images`).
    """
    return each_record(given, "OBELICS document", lambda record, number: _obelics_row(record, number, given))


def _obelics_row(record: dict[str, Any], number: int, given: Input) -> dict[str, Any]:
    texts, images = record.get("texts"), record.get("images")
    if not isinstance(texts, list) or not isinstance(images, list):
        raise ManifestError("an OBELICS document needs the lists 'texts' and 'images'")
    if len(texts) != len(images):
        raise ManifestError(f"{len(texts)} texts but {len(images)} images; give both lists one length, with nulls")
    pieces: list[tuple[str, Any]] = []
    for text, image in zip(texts, images, strict=True):
        pieces += [(kind, value) for kind, value in (("image", image), ("text", text)) if value and not is_null(value)]
    return _document(record, number, pieces, ("texts", "images"), given)


def mmc4_rows(given: Input) -> Found:
    """MMC4: each picture of `image_info` stands before the text of `text_list` that it was matched with."""
    return each_record(given, "MMC4 document", lambda record, number: _mmc4_row(record, number, given))


def _mmc4_row(record: dict[str, Any], number: int, given: Input) -> dict[str, Any]:
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
    pieces: list[tuple[str, Any]] = []
    for place, text in enumerate(texts):
        pieces += [("image", name) for name in before.get(place, ())]
        pieces.append(("text", text if not pieces or pieces[-1][0] == "image" else f" {text}"))
    return _document(record, number, pieces, ("text_list", "image_info"), given)


def _document(
    record: dict[str, Any], number: int, pieces: Sequence[tuple[str, Any]], used: Sequence[str], given: Input
) -> dict[str, Any]:
    """The pieces as segments; what else the record says is metadata."""
    segments: list[dict[str, Any]] = []
    num_missing = 0
    for kind, value in pieces:
        if kind == "image" and not isinstance(value, str):
            segments.append({"image": value})
        elif not isinstance(value, str):
            raise ManifestError(f"has the {kind} {value!r}, which is no text")
        elif kind == "text":
            segments += [{"text": value}] if value.strip() else []
        elif (found := local_image(value, given.folder)) is not None:
            segments.append({"image": str(found.absolute())})
        else:
            num_missing += 1
    name = record_id(record, f"document{number}")
    if not segments:
        raise ManifestError(f"{name}: nothing is left of it; {num_missing} pictures aren't in {given.folder}")
    others = {key: value for key, value in record.items() if key not in (*used, *_UNKEPT, "id") and not is_null(value)}
    given.bad.left_out.update(f"values of the column {key!r}" for key in _UNKEPT if key in record)
    others = {f"source_{key}" if key in _MEANT else key: value for key, value in others.items()}
    if num_missing:
        given.bad.left_out["pictures that aren't in the media folder"] += num_missing
        others["missing_images"] = num_missing
    has_images = any("image" in segment for segment in segments)
    return {"id": name, "segments": segments, **drop_embedded(others, has_images, given.bad)}
