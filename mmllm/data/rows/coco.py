"""COCO captions."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from mmllm.data.rows.bad_rows import ManifestError
from mmllm.data.rows.records import Found, read_json, tried


def is_coco(path: Path) -> bool:
    """Whether a JSON file holds COCO's annotations."""
    try:
        whole = read_json(path)
    except ManifestError:
        return False
    return isinstance(whole, dict) and "annotations" in whole


def coco_rows(path: Path, folder: Path) -> Found:
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
        yield f"{path}:{number}", tried("annotation", partial(_coco_row, annotation, number, names))


def _coco_row(annotation: dict[str, Any], number: int, names: dict[Any, str]) -> dict[str, Any]:
    image, name = annotation.get("image_id"), annotation.get("id", number)
    if image not in names:
        raise ManifestError(f"annotation {name}: its image {image!r} isn't listed with an id and a file_name")
    if not isinstance(annotation.get("caption"), str):
        raise ManifestError(f"annotation {name}: its caption is {annotation.get('caption')!r}; it must be a text")
    return {"id": f"{image}-{name}", "text": annotation["caption"].strip(), "image": names[image], "image_id": image}
