"""COCO captions, as COCO has them and as Karpathy's splits do."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from mmllm.data.rows.bad_rows import ManifestError
from mmllm.data.rows.inputs import Found, Input, tried
from mmllm.data.rows.records import read_json


def is_coco(path: Path) -> bool:
    """Whether a JSON file holds COCO's annotations, or Karpathy's images with sentences."""
    with path.open("rb") as stream:
        if not stream.read(1024).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"{"):
            return False
    try:
        whole = read_json(path)
    except ManifestError:
        return False
    return isinstance(whole, dict) and ("annotations" in whole or _has_sentences(whole))


def _has_sentences(whole: dict[str, Any]) -> bool:
    images = whole.get("images")
    return isinstance(images, list) and any(isinstance(image, dict) and "sentences" in image for image in images[:20])


def coco_rows(given: Input) -> Found:
    """One row for each caption; `image_id` keeps a picture's captions together.

    A picture without a caption is named. One that lacks its id or its file's name is counted, where no caption has
    named it.
    """
    whole = read_json(given.path)
    if isinstance(whole, dict) and _has_sentences(whole):
        yield from _karpathy_rows(given, whole["images"])
        return
    if not isinstance(whole, dict) or not all(isinstance(whole.get(key), list) for key in ("images", "annotations")):
        raise ManifestError(
            f"{given.path}: COCO captions are an object with the lists 'images' and 'annotations'; one lacks"
        )
    names: dict[Any, str] = {}
    twice: dict[Any, str] = {}
    """The other file of an image that is listed with two."""
    unusable: list[Any] = []
    """Ids of images that lack an id or a file's name."""
    for image in whole["images"]:
        match image:
            case {"id": int() | str() as its_id, "file_name": str() as name}:
                if names.setdefault(its_id, name) != name:
                    twice.setdefault(its_id, name)
            case {"id": int() | str() as its_id}:
                unusable.append(its_id)
            case _:
                unusable.append(None)
    told: set[Any] = set()
    for number, annotation in enumerate(whole["annotations"]):
        if isinstance(annotation, dict) and isinstance(annotation.get("image_id"), int | str):
            told.add(annotation["image_id"])
        yield f"{given.path}:{number}", tried("annotation", partial(_coco_row, annotation, number, names, twice))
    for its_id, name in names.items():
        if its_id not in told:
            yield str(given.path), ManifestError(f"image {its_id!r} ({name}) has no caption")
    if num_unusable := sum(its_id not in told for its_id in unusable):
        given.bad.left_out["images without an id or a file_name"] += num_unusable


def _coco_row(annotation: dict[str, Any], number: int, names: dict[Any, str], twice: dict[Any, str]) -> dict[str, Any]:
    image, name = annotation.get("image_id"), annotation.get("id", number)
    if image not in names:
        raise ManifestError(f"annotation {name}: its image {image!r} isn't listed with an id and a file_name")
    if image in twice:
        raise ManifestError(
            f"annotation {name}: image {image!r} is listed twice, as {names[image]} and {twice[image]}; give each "
            f"picture an id of its own"
        )
    if not isinstance(annotation.get("caption"), str):
        raise ManifestError(f"annotation {name}: its caption is {annotation.get('caption')!r}; it must be a text")
    return {"id": f"{image}-{name}", "text": annotation["caption"].strip(), "image": names[image], "image_id": image}


def _karpathy_rows(given: Input, images: list[Any]) -> Found:
    """One row a sentence; `split` and `image_id` are metadata."""
    for number, image in enumerate(images):
        where = f"{given.path}:{number}"
        sentences = image.get("sentences") if isinstance(image, dict) else None
        if not isinstance(sentences, list) or not sentences:
            yield where, ManifestError(f"image {number} has no sentences")
            continue
        for place, sentence in enumerate(sentences):
            yield where, tried("sentence", partial(_karpathy_row, given, image, number, sentence, place))


def _karpathy_row(
    given: Input, image: dict[str, Any], number: int, sentence: dict[str, Any], place: int
) -> dict[str, Any]:
    if not isinstance(sentence.get("raw"), str):
        raise ManifestError(f"image {number}: the raw text of its sentence {place} is {sentence.get('raw')!r}")
    its_id = image.get("cocoid", image.get("imgid", number))
    row = {
        "id": f"{its_id}-{sentence.get('sentid', place)}", "text": sentence["raw"].strip(),
        "image": _named(given.folder, image), "image_id": its_id,
    }  # fmt: skip
    return {**row, "split": image["split"]} if "split" in image else row


def _named(folder: Path, image: dict[str, Any]) -> str:
    """Where a picture lies: in the folder of its `filepath`, or among the others if it isn't there."""
    paths = list(_paths(image))
    return next((path for path in paths if (folder / path).is_file()), paths[0])


def _paths(image: dict[str, Any]) -> Iterator[str]:
    if not isinstance(image.get("filename"), str):
        raise ManifestError(f"its filename is {image.get('filename')!r}; it must be a text")
    if isinstance(image.get("filepath"), str):
        yield f"{image['filepath']}/{image['filename']}"
    yield image["filename"]
