"""What an image processor's config says of pictures, as an `ImageTransform` with the same pixels; and back."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from open_clip.transform import PreprocessCfg, merge_preprocess_dict

from mmllm.data.samples.decode import ImageTransform
from mmllm.data.samples.library_transforms import Resample
from mmllm.interop.foreign_config import read_json, refuse_custom_code
from mmllm.interop.library import transformers_library

PREPROCESSOR = "preprocessor_config.json"
PROCESSOR = "processor_config.json"
_RESAMPLES: dict[int, Resample] = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}
"""By Pillow's numbers."""
_BY_MODEL = {
    "clip_vision_model": "CLIPImageProcessor",
    "siglip_vision_model": "SiglipImageProcessor",
    "siglip2_vision_model": "Siglip2ImageProcessor",
}
"""Of checkpoints that don't name theirs, as transformers chooses it."""
_KNOWN = (*_BY_MODEL.values(), "LlavaImageProcessor")
_OPEN_CLIP_MODES = {"shortest": "crop", "squash": "squash", "longest": "pad"}


def transform_of_folder(folder: Path, model_type: str, side: int, num_patches: int | None = None) -> ImageTransform:
    """How a checkpoint of transformers wants its pictures.

    Args:
        folder: with `preprocessor_config.json`, or `processor_config.json` that has it inside.
        model_type: of the vision model.
        side: in pixels, what the vision model takes.
        num_patches: of a picture, where its config gives them in the place of a size.

    Raises:
        FileNotFoundError: neither file is there.
        ValueError: what the processor does can't be done here to the pixel, or its pictures aren't the model's.
    """
    path, values = _values(folder)
    refuse_custom_code(path, values)
    processor = _processor(path, values, model_type)
    return _transform(path, processor, side, num_patches)


def _values(folder: Path) -> tuple[Path, dict[str, Any]]:
    """The image processor's config, the one inside of the processor's first, as transformers looks for it."""
    if (folder / PROCESSOR).is_file():
        values = read_json(folder / PROCESSOR).get("image_processor")
        if isinstance(values, dict):
            return folder / PROCESSOR, values
    if (folder / PREPROCESSOR).is_file():
        return folder / PREPROCESSOR, read_json(folder / PREPROCESSOR)
    raise FileNotFoundError(
        f"{folder} has no {PREPROCESSOR} (nor {PROCESSOR} with it), so that nothing says how its pictures are scaled "
        f"and normalized; copy that of the checkpoint into the folder"
    )


def _processor(path: Path, values: dict[str, Any], model_type: str) -> Any:
    """The image processor with what it has by default."""
    given = values.get("image_processor_type") or values.get("feature_extractor_type") or _BY_MODEL[model_type]
    name = given.removesuffix("Fast").removesuffix("Pil").replace("FeatureExtractor", "ImageProcessor")
    if name not in _KNOWN:
        raise ValueError(f"{path}: image_processor_type is {given!r}; wanted one of {', '.join(_KNOWN)}")
    options = {key: value for key, value in values.items() if not key.endswith(("_type", "processor_class"))}
    try:
        return getattr(transformers_library(), name)(**options)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path} is no config of a {name}: {error}") from error


def _transform(path: Path, processor: Any, side: int, num_patches: int | None) -> ImageTransform:
    wanted = {"do_resize": True, "do_rescale": True}
    for key, value in wanted.items():
        if getattr(processor, key) is not value:
            raise ValueError(f"{path}: {key} is {getattr(processor, key)}; only {str(value).lower()} can be imported")
    if abs(processor.rescale_factor * 255 - 1) > 1e-6:
        raise ValueError(f"{path}: rescale_factor is {processor.rescale_factor}; only 1/255 can be imported")
    resample = _resample(path, processor.resample)
    mean, std = _statistics(processor)
    if num_patches is not None:
        _check_patches(path, processor, num_patches, side)
        return ImageTransform(side, mean, std, "squash", resample, "transformers")
    mode, resized = _resized(path, processor)
    size = _square(path, "crop_size", processor.crop_size) if processor.do_center_crop else resized
    if size != side:
        key = "crop_size" if processor.do_center_crop else "size"
        raise ValueError(f"{path}: {key} makes pictures of {size} pixels, but the vision model's image_size is {side}")
    fill = None
    if getattr(processor, "do_pad", False):
        if type(processor).__name__ != "LlavaImageProcessor":
            raise ValueError(f"{path}: do_pad is true; only a LlavaImageProcessor's can be imported")
        mode, fill = "pad", _three(tuple(int(value * 255) for value in processor.image_mean))
    return ImageTransform(size, mean, std, mode, resample, "transformers", resized if resized != size else None, fill)


def _resized(path: Path, processor: Any) -> tuple[Any, int]:
    """Whether the proportions stay, and how long sides are scaled."""
    size = {key: value for key, value in dict(processor.size).items() if value is not None}
    match sorted(size):
        case ["height", "width"]:
            return "squash", _square(path, "size", size)
        case ["shortest_edge"] if processor.do_center_crop or getattr(processor, "do_pad", False):
            return "crop", int(size["shortest_edge"])
        case ["shortest_edge"]:
            raise ValueError(
                f"{path}: size is {size} and do_center_crop false, so that pictures aren't squares; only squares can "
                f"be imported"
            )
    raise ValueError(f"{path}: size is {size}; wanted height and width, or shortest_edge")


def _square(path: Path, key: str, size: Any) -> int:
    height, width = (dict(size).get(name) for name in ("height", "width"))
    if height is None or height != width:
        raise ValueError(f"{path}: {key} is {height} x {width}; only squares can be imported")
    return int(height)


def _check_patches(path: Path, processor: Any, num_patches: int, side: int) -> None:
    """Refuses patches that aren't the model's own, whose positions would have to be scaled."""
    if processor.max_num_patches != num_patches or processor.patch_size**2 * num_patches != side**2:
        raise ValueError(
            f"{path}: max_num_patches is {processor.max_num_patches} of patch_size {processor.patch_size}, but the "
            f"vision model's are {num_patches} on {side} x {side} pixels; give the model's own"
        )


def _resample(path: Path, value: Any) -> Resample:
    number = 2 if value is None else int(value)  # as the processors do where nothing is said
    if number not in _RESAMPLES:
        wanted = ", ".join(f"{key} ({name})" for key, name in _RESAMPLES.items())
        raise ValueError(f"{path}: resample is {value}; wanted one of {wanted}")
    return _RESAMPLES[number]


def _statistics(processor: Any) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
    if not processor.do_normalize:
        return (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    return _three(processor.image_mean), _three(processor.image_std)


def _three(values: Any) -> Any:
    """Of red, green and blue, one number standing for all."""
    red, green, blue = (values,) * 3 if isinstance(values, (int, float)) else values
    return red, green, blue


def transform_of_open_clip(where: str, preprocess: Mapping[str, Any], side: int) -> ImageTransform:
    """How an open_clip model wants its pictures.

    Args:
        where: what errors begin with.
        preprocess: `preprocess_cfg` of `open_clip_config.json`, or what open_clip knows of a tag.
        side: in pixels, what the image tower takes, whatever `preprocess` says: so it is in open_clip.

    Raises:
        ValueError: open_clip has no such way.
    """
    values = merge_preprocess_dict(PreprocessCfg(), dict(preprocess))
    if values["resize_mode"] not in _OPEN_CLIP_MODES:
        raise ValueError(
            f"{where}: resize_mode is {values['resize_mode']!r}; open_clip has {', '.join(_OPEN_CLIP_MODES)}"
        )
    mode: Any = _OPEN_CLIP_MODES[values["resize_mode"]]
    resample: Resample = "bilinear" if values["interpolation"] == "bilinear" else "bicubic"  # "random" too is bicubic
    fill = _three(values["fill_color"]) if mode == "pad" else None
    return ImageTransform(side, _three(values["mean"]), _three(values["std"]), mode, resample, "open_clip", fill=fill)


def image_processor_of(transform: ImageTransform, model_type: str) -> tuple[dict[str, Any], list[str]]:
    """The config of transformers' image processor that makes the same pictures, or nearly.

    Args:
        transform: how pictures are made here.
        model_type: of the vision model that they are for.

    Returns:
        The config, and what of the pixels will differ.
    """
    name, resized, notes = _BY_MODEL[model_type], transform.resized or transform.size, []
    size = {"shortest_edge": resized} if transform.mode == "crop" else {"height": resized, "width": resized}
    options: dict[str, Any] = {"do_center_crop": transform.mode == "crop" or resized != transform.size}
    if transform.mode == "pad":
        name, options["do_pad"] = "LlavaImageProcessor", True
        ground = tuple(int(value * 255) for value in transform.mean)
        if transform.library == "transformers" and transform.fill not in (None, ground):
            notes.append(f"padding is of colour {ground} there, and of {transform.fill} here")
    elif options["do_center_crop"]:
        name = "CLIPImageProcessor"
    if name == "SiglipImageProcessor":
        del options["do_center_crop"]
    else:
        options["crop_size"] = {"height": transform.size, "width": transform.size}
    if transform.library != "transformers":
        notes.append(
            f"pictures are scaled by {name}, whose pixels are nearly those that {transform.library or 'this library'} "
            f"makes with mode {transform.mode!r}: levels differ by a few of 255, and edges by a pixel"
        )
    numbers = {name: number for number, name in _RESAMPLES.items()}
    return {
        **options,
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": list(transform.mean),
        "image_processor_type": name,
        "image_std": list(transform.std),
        "resample": numbers[transform.resample],
        "rescale_factor": 1 / 255,
        "size": size,
    }, notes
