from __future__ import annotations

import errno
import io
import struct

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from mmllm.data.samples.decode import ImageTransform, decode_file, decode_image


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


CHECKS = np.array([[0, 1], [1, 0]])


@pytest.mark.parametrize("kind", ["?", "u1", "<u2", ">u2", "<i4", ">i4", "i8", "u8", "f4", ">f8", "f2"])
def test_masks_are_black_and_white(kind):
    wanted = (CHECKS * 255).tolist()
    assert pixels(CHECKS.astype(kind))[:, :, 0].tolist() == wanted
    assert pixels(CHECKS.astype(kind)[None])[:, :, 2].tolist() == wanted
    if kind not in ("u1", ">u2", ">i4", ">f8"):
        assert pixels(torch.from_numpy(CHECKS.astype(kind)))[:, :, 0].tolist() == wanted
    if kind != "u1":  # eight bits of colour may be that dark
        assert pixels(np.stack([CHECKS.astype(kind)] * 3, 2))[:, :, 1].tolist() == wanted
    assert pixels(np.stack([CHECKS.astype(np.uint8)] * 3, 2)).max() == 1
    assert pixels(np.zeros((4, 4), dtype=kind)).max() == 0
    assert pixels(torch.tensor(CHECKS, dtype=torch.bfloat16))[:, :, 0].tolist() == wanted


def test_floats_a_little_outside_are_clipped_and_far_outside_refused():
    ringing = np.array([[-0.2, 0.0], [0.5, 1.2]])
    assert pixels(ringing)[:, :, 0].tolist() == [[0, 0], [128, 255]]
    sharp = np.zeros((8, 8), dtype=np.float32)
    sharp[:, 4:] = 1
    edges = np.asarray(Image.fromarray(sharp).resize((64, 64), Image.Resampling.LANCZOS))
    assert edges.min() < 0 and edges.max() > 1 and pixels(edges).max() == 255
    for far in (255.0, 1.3, -0.3, -1.0):
        with pytest.raises(ValueError, match=rf"row 7: the array holds {far:g}; give uint8, uint16, or floats in"):
            decode_image(np.array([[0.0, far]], dtype=np.float32), "row 7")
    for wrong in (np.array([["a"]]), np.array([[1j]]), np.array([[None]])):
        with pytest.raises(ValueError, match="row 7: the array holds"):
            decode_image(wrong, "row 7")


DEEP = np.array([[0, 257 * 100], [257 * 200, 65535]])
LEVELS = [[0, 100], [200, 255]]


def grey(source: object) -> list[list[int]]:
    return pixels(source)[:, :, 0].tolist()


@pytest.mark.parametrize("order", "<>")
def test_16_and_32_bits_of_either_byte_order(order):
    assert grey(DEEP.astype(f"{order}u2")) == LEVELS and grey(DEEP.astype(f"{order}i4")) == LEVELS
    assert grey(DEEP.astype(np.int64)) == LEVELS
    assert grey((DEEP // 257).astype(f"{order}i4")) == LEVELS
    for kind, white in (("u4", 2**32 - 1), ("i4", 2**31 - 1)):
        assert grey(np.round(DEEP / 65535 * white).astype(f"{order}{kind}")) == LEVELS
    for mode in ("I;16", "I;16B", "I", "F"):
        values = DEEP / 65535 if mode == "F" else DEEP
        kind = {"I;16": "<u2", "I;16B": ">u2", "I": "<i4", "F": "<f4"}[mode]
        picture = Image.fromarray(values.astype(kind))
        assert picture.mode == mode and grey(picture) == LEVELS
        assert grey(encoded(picture, "TIFF")) == LEVELS
    dark = np.full((2, 2), 200)
    for kind in ("<u2", ">u2"):  # almost black, in files as in arrays
        for form in ("PNG", "TIFF", "PPM"):
            if kind == "<u2" or form == "TIFF":
                assert grey(encoded(Image.fromarray(dark.astype(kind)), form)) == [[1, 1], [1, 1]], (kind, form)
    for wrong in (np.full((2, 2), 70_000, dtype=np.int64), np.full((2, 2), 70_000, dtype=f"{order}u4")):
        with pytest.raises(ValueError, match=r"row 7: the array holds 70000 as .*what is white is unclear"):
            decode_image(wrong, "row 7")


def tiff(values: np.ndarray, sample_format: int, order: str, photometric: int = 1) -> bytes:
    """A TIFF without compression, as other programs write them."""
    data = values.astype(values.dtype.newbyteorder(order)).tobytes()
    bits = values.dtype.itemsize * 8
    height, width = values.shape
    tags = [(256, width), (257, height), (258, bits), (259, 1), (262, photometric), (273, 8), (277, 1), (278, height),
            (279, len(data)), (339, sample_format)]  # fmt: skip
    entries = b"".join(struct.pack(f"{order}HHII", tag, 4, 1, value) for tag, value in tags)
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}I", 8 + len(data))
    return head + data + struct.pack(f"{order}H", len(tags)) + entries + bytes(4)


@pytest.mark.parametrize("order", "<>")
def test_tiffs_say_what_is_white(order):
    assert grey(tiff(DEEP.astype(np.uint16), 1, order)) == LEVELS
    assert grey(tiff((DEEP // 2).astype(np.int16), 2, order)) == LEVELS
    whole = tiff((DEEP / 65535 * (2**32 - 1)).astype(np.uint32), 1, order)
    if order == "<":
        assert grey(whole) == LEVELS
        assert grey(tiff((65535 - DEEP).astype(np.uint16), 1, order, photometric=0)) == LEVELS
    else:
        with pytest.raises(ValueError, match="row 7: not a picture that can be read"):  # Pillow doesn't
            decode_image(whole, "row 7")
    assert grey(tiff((1 - DEEP / 65535).astype(np.float32), 3, order, photometric=0)) == LEVELS
    assert grey(tiff((DEEP / 65535 * (2**31 - 1)).astype(np.int32), 2, order)) == LEVELS
    assert grey(tiff((DEEP / 65535).astype(np.float32), 3, order)) == LEVELS
    with pytest.raises(ValueError, match="row 7: the array holds 65535; give"):
        decode_image(tiff(DEEP.astype(np.float32), 3, order), "row 7")
    with pytest.raises(ValueError, match="row 7: the array holds -"):
        decode_image(tiff(-DEEP.astype(np.int32), 2, order), "row 7")


def test_deep_pictures_are_turned_and_see_through():
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encoded(Image.fromarray(DEEP.astype(np.uint16)), exif=exif)
    assert grey(data) == [[200, 0], [255, 100]]
    assert grey(encoded(Image.fromarray(DEEP.astype(np.uint16)), transparency=257 * 100)) == [[0, 255], [200, 255]]
    assert grey(encoded(Image.fromarray(DEEP.astype(np.uint16)), "TIFF", tiffinfo={274: 6})) == [[200, 0], [255, 100]]


def photo(size: tuple[int, int] = (200, 160)) -> Image.Image:
    rng = np.random.default_rng(0)
    small = Image.fromarray(rng.integers(0, 255, (size[1] // 4, size[0] // 4, 3), dtype=np.uint8))
    return small.resize(size, Image.Resampling.BICUBIC)


FORMS = [
    ("JPEG", {}), ("JPEG", {"progressive": True}), ("PNG", {}), ("GIF", {}), ("BMP", {}), ("WEBP", {}),
    ("WEBP", {"lossless": True}), ("AVIF", {}), ("TIFF", {}), ("TIFF", {"compression": "tiff_lzw"}), ("PPM", {}),
    ("JPEG2000", {}), ("JPEG2000", {"irreversible": True}), ("TIFF", {"compression": "jpeg"}),
]  # fmt: skip


@pytest.mark.parametrize(("form", "options"), FORMS)
def test_cut_pictures_are_named(form, options):
    data = encoded(photo(), form, **options)
    decode_image(data)
    for share in (0.02, 0.1, 0.3, 0.5, 0.7, 0.9, 0.99):
        with pytest.raises(
            ValueError, match=r"^row 7: (the picture is (broken or )?truncated|not a picture.*cut short)"
        ):
            decode_image(data[: int(len(data) * share)], "row 7")
    if form == "PNG":
        with pytest.raises(ValueError, match="row 7: the picture is truncated: its end is missing"):
            decode_image(data[:-9], "row 7")


@pytest.mark.parametrize(("form", "options"), FORMS)
def test_whatever_is_wrong_with_a_file_it_is_named(form, options):
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encoded(photo((40, 32)), form, exif=exif, **options)
    rng = np.random.default_rng(0)
    for _ in range(60):
        broken = bytearray(data)
        for place in rng.integers(0, min(len(data), int(rng.choice([40, 400, 40_000]))), int(rng.integers(1, 6))):
            broken[place] = rng.integers(0, 256)
        try:
            decode_image(bytes(broken), "row 7")
        except ValueError as error:
            assert "row 7" in str(error), error


def test_what_the_machine_does_wrong_is_no_broken_picture(monkeypatch):
    data = encoded(photo())
    for error in (OSError(errno.EMFILE, "Too many open files"), OSError(errno.ENOMEM, "no memory"), MemoryError()):

        def failing(*_: object, error: BaseException = error, **__: object) -> None:
            raise error

        monkeypatch.setattr(Image.Image, "load", failing)
        monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.load", failing)
        with pytest.raises(type(error)) as caught:
            decode_image(data, "row 7")
        assert caught.value is error


def test_what_a_file_is():
    def said(picture: Image.Image, form: str, **options: object) -> tuple[str, bool, bool, bool]:
        found = decode_file(encoded(picture, form, **options), "x")
        return found.form, found.is_plain, found.is_lossy, found.is_animated

    turned, upright = Image.Exif(), Image.Exif()
    turned[0x0112], upright[0x0112] = 6, 1
    upright[0x010F] = "camera"
    more = {"save_all": True, "append_images": [ImageOps.mirror(photo())]}
    assert said(photo(), "JPEG", exif=upright) == ("JPEG", True, True, False)
    assert said(photo().convert("L"), "JPEG") == ("JPEG", True, True, False)
    assert said(photo(), "JPEG", exif=turned) == ("JPEG", False, True, False)
    assert said(photo().convert("CMYK"), "JPEG") == ("JPEG", False, True, False)
    assert said(photo(), "MPO", **more) == ("MPO", True, True, True)
    assert said(photo(), "WEBP") == ("WEBP", True, True, False)
    assert said(photo(), "WEBP", lossless=True) == ("WEBP", True, False, False)
    assert said(photo(), "WEBP", exif=turned, lossless=True) == ("WEBP", False, False, False)
    assert said(photo(), "WEBP", **more) == ("WEBP", True, True, True)
    assert said(photo(), "WEBP", lossless=True, **more) == ("WEBP", True, False, True)
    assert said(photo().convert("RGBA"), "WEBP")[1:3] == (True, True)  # nothing is transparent: stored without
    assert said(Image.new("RGBA", (9, 9), (1, 2, 3, 4)), "WEBP")[1:3] == (False, True)
    assert said(photo(), "AVIF") == ("AVIF", True, True, False)
    assert said(photo(), "AVIF", exif=turned) == ("AVIF", False, True, False)
    assert said(photo(), "PNG", **more) == ("PNG", True, False, True)
    assert said(photo().quantize(16), "PNG") == ("PNG", False, False, False)
    assert said(photo(), "GIF", **more)[2:] == (False, True)
    assert said(photo(), "BMP") == ("BMP", True, False, False)
    assert said(photo(), "TIFF") == ("TIFF", True, False, False)
    assert said(photo(), "TIFF", compression="jpeg")[2:] == (True, False)
    assert said(photo(), "JPEG2000") == ("JPEG2000", True, False, False)
    assert said(photo(), "JPEG2000", irreversible=True) == ("JPEG2000", True, True, False)


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


def test_a_png_whose_checksums_do_not_fit_is_named():
    data = encoded(Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)))
    start = data.index(b"IDAT") + 4
    end = start + int.from_bytes(data[start - 8 : start - 4], "big")
    for place in (*range(start + 2, end, 997), end):  # the last: the checksum itself
        broken = data[:place] + bytes([data[place] ^ 0x10]) + data[place + 1 :]
        with pytest.raises(ValueError, match=r"^row 7: the picture is broken"):
            decode_image(broken, "row 7")
    with pytest.raises(ValueError, match=r"chunk IDAT at byte 33 doesn't fit.*copy or download it again"):
        decode_image(data[:end] + b"abcd" + data[end + 4 :], "row 7")


def test_what_comes_after_a_pngs_pixels_may_be_anything():
    data = encoded(photo())
    end = data.index(b"IEND") - 4
    note = struct.pack(">I", 4) + b"tEXtword" + b"abcd"  # a wrong checksum, of what isn't shown
    for more in (data[:end] + note + data[end:], data + b"more"):
        assert (pixels(more) == pixels(data)).all()


@pytest.mark.parametrize("shape", [(40, 40), (100, 333), (641, 479), (97, 31)])
def test_squashing_is_torchvisions_to_the_bit(shape):
    from torchvision.transforms.v2 import InterpolationMode
    from torchvision.transforms.v2.functional import resize_image

    array = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    chw = torch.from_numpy(array).permute(2, 0, 1)
    theirs = resize_image(chw, [16, 16], InterpolationMode.BICUBIC, antialias=True)
    np.testing.assert_array_equal(ImageTransform(16)(array), theirs.numpy())
