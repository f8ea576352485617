from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image

from mmllm.data.samples.decode import ImageTransform, decode_image


def encoded(picture: Image.Image, form: str = "PNG", **options: object) -> bytes:
    stream = io.BytesIO()
    picture.save(stream, form, **options)
    return stream.getvalue()


def pixels(source: object) -> np.ndarray:
    return np.asarray(decode_image(source))  # pyright: ignore[reportArgumentType]


def test_transparency_is_laid_over_white():
    assert (pixels(encoded(Image.new("RGBA", (3, 2), (10, 20, 30, 0)))) == 255).all()
    assert (pixels(encoded(Image.new("RGBA", (3, 2), (10, 20, 30, 255)))) == [10, 20, 30]).all()
    assert (pixels(encoded(Image.new("LA", (3, 2), (0, 0)))) == 255).all()
    palette = Image.new("P", (2, 2), 0)
    palette.putpalette([200, 0, 0] + [0] * 765)
    assert (pixels(encoded(palette)) == [200, 0, 0]).all()
    assert (pixels(encoded(palette, transparency=0)) == 255).all()


def test_cmyk_grey_one_bit_and_16_bit():
    assert pixels(encoded(Image.new("CMYK", (8, 8), (0, 0, 0, 0)), "JPEG")).min() > 250
    assert (pixels(encoded(Image.new("L", (2, 2), 77))) == 77).all()
    assert (pixels(encoded(Image.new("1", (2, 2), 1))) == 255).all()
    deep = Image.fromarray(np.array([[0, 257 * 100], [257 * 200, 65535]], dtype=np.uint16))
    assert pixels(encoded(deep))[:, :, 0].tolist() == [[0, 100], [200, 255]]


def test_an_animation_gives_its_first_frame():
    frames = [Image.new("RGB", (4, 4), colour) for colour in ((255, 0, 0), (0, 255, 0))]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert (pixels(data) == [255, 0, 0]).all()


def test_exif_orientation_is_applied():
    picture = Image.fromarray(np.array([[[255, 0, 0], [0, 0, 255]]], dtype=np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6  # turn right
    assert pixels(encoded(picture, exif=exif)).shape == (2, 1, 3)


def test_arrays_and_tensors_mean_the_same():
    array = np.random.default_rng(0).integers(0, 255, (5, 7, 3), dtype=np.uint8)
    assert (pixels(array) == array).all()
    assert (pixels(torch.from_numpy(array.transpose(2, 0, 1).copy())) == array).all()
    assert (pixels(array.astype(np.float32) / 255) == array).all()
    assert (pixels(np.full((3, 3, 3), 200, dtype=np.uint16)) == 1).all()  # almost black, however dark the rest is


@pytest.mark.parametrize("mode", ["squash", "pad", "crop"])
@pytest.mark.parametrize("size", [(1, 1), (20_000, 1), (1, 20_000), (20_000, 30), (33, 47)])
def test_any_size_becomes_a_square(mode, size):
    out = ImageTransform(16, mode=mode)(Image.new("RGB", size, (9, 9, 9)))
    assert out.shape == (3, 16, 16) and out.dtype == np.uint8


@pytest.mark.parametrize("size", [(500, 375), (33, 47), (400, 51), (136, 128)])
def test_squashing_is_pillows_within_a_level(size):
    rng = np.random.default_rng(0)
    noise = Image.fromarray(rng.integers(0, 255, (size[1], size[0], 3), dtype=np.uint8))
    photo = noise.resize((size[0] // 8, size[1] // 8)).resize(size, Image.Resampling.BICUBIC)
    for side in (16, 22, 34, 224):
        for picture, share in ((photo, 1.0), (noise, 0.99)):  # noise overshoots, and is clipped elsewhere
            theirs = np.asarray(picture.resize((side, side), Image.Resampling.BICUBIC)).transpose(2, 0, 1)
            assert (np.abs(ImageTransform(side)(picture).astype(int) - theirs) <= 1).mean() >= share


def test_a_cut_jpeg_is_named():
    data = encoded(Image.effect_noise((64, 64), 90).convert("RGB"), "JPEG")
    for size in (len(data) // 2, len(data) - 40):
        with pytest.raises(ValueError, match="broken or truncated"):
            decode_image(data[:size], "row 7")


def test_crop_equals_open_clips_transform():
    from open_clip.transform import image_transform

    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 40, 3), dtype=np.uint8))
    theirs = image_transform(24, is_train=False, mean=(0, 0, 0), std=(1, 1, 1))(picture)
    ours = ImageTransform(24, mode="crop")(picture)
    assert np.abs(ours / 255 - np.asarray(theirs)).max() < 1e-6


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (b"", "empty"),
        (b"nonsense" * 40, "not a picture"),
        (encoded(Image.effect_noise((64, 64), 90))[:900], "broken or truncated"),
        (encoded(Image.new("RGB", (9000, 9000))), "more than"),
        (np.zeros((3, 0, 3), dtype=np.uint8), "shape"),
        (np.full((3, 3), np.nan, dtype=np.float32), "NaN"),
        (np.linspace(-1, 1, 9, dtype=np.float32).reshape(3, 3), r"holds -1; give uint8"),
        (17, "int"),
    ],
    ids=["empty", "nonsense", "truncated", "bomb", "no pixels", "nan", "negative", "type"],
)
def test_what_is_no_picture_is_named(source, message):
    with pytest.raises(ValueError, match=message) as caught:
        decode_image(source, "row 7")
    assert "row 7" in str(caught.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"cat\.png"):
        decode_image(tmp_path / "cat.png")


def test_a_bad_mode_is_refused():
    with pytest.raises(ValueError, match="mode"):
        ImageTransform(8, mode="stretch")  # pyright: ignore[reportArgumentType]
