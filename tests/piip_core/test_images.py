"""Image files of every kind against what a viewer shows, written out in numpy, or refused by name."""

from __future__ import annotations

import io
import struct
import unicodedata
import zlib

import numpy as np
import pytest
import tifffile
from PIL import Image

from piip_core.images import (
    ImageTooLargeError,
    UnreadableImageError,
    image_endings,
    image_formats,
    image_size,
    opened_image,
    read_image,
    spellings,
    stored_values,
)

SHOWN = np.random.default_rng(0).integers(0, 256, (5, 9, 3), dtype=np.uint8)
# How a camera stores what a viewer shows for each tag (Exif 2.3, 4.6.4 A)
STORED = {
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: np.rot90,
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: np.rot90(a, -1),
}


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(values, bits, colour, *, before=b"", after=b""):
    """A PNG file of (H, W, C) numbers with 2, 4, 8 or 16 bits each; the channels follow from the colour type."""
    height, width = values.shape[:2]
    rows = b""
    for row in values.reshape(height, -1):
        digits = "".join(f"{value:0{bits}b}" for value in row.tolist())
        digits += "0" * (-len(digits) % 8)
        rows += b"\0" + int(digits, 2).to_bytes(len(digits) // 8, "big")
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + before + chunk(b"IDAT", zlib.compress(rows)) + after + chunk(b"IEND", b"")


def tag(orientation):
    exif = Image.Exif()
    exif[274] = orientation
    return exif


def tiff_tag(orientation):
    """The tag alone, as it stands in PNG's eXIf."""
    return b"II*\0\x08\0\0\0\x01\0" + struct.pack("<HHIHH", 274, 3, 1, orientation, 0) + b"\0\0\0\0"


def xmp(orientation):
    return b"XML:com.adobe.xmp\0\0\0\0\0" + f'<x tiff:Orientation="{orientation}"/>'.encode()


@pytest.mark.parametrize("orientation", STORED)
@pytest.mark.parametrize("kind", ["png", "png late", "png xmp", "webp", "tif", "deflate tif", "pages tif"])
def test_orientation_is_applied_once(tmp_path, kind, orientation):
    pixels = np.ascontiguousarray(STORED[orientation](SHOWN))
    path, image, exif = tmp_path / f"image.{kind.split()[-1]}", Image.fromarray(pixels), tag(orientation)
    if kind == "png late":  # where ExifTool writes it
        path.write_bytes(png(pixels, 8, 2, after=chunk(b"eXIf", tiff_tag(orientation))))
    elif kind == "png xmp":
        path.write_bytes(png(pixels, 8, 2, before=chunk(b"iTXt", xmp(orientation))))
    elif kind == "deflate tif":
        image.save(path, exif=exif, compression="tiff_deflate")
    elif kind == "pages tif":
        image.save(path, exif=exif, save_all=True, append_images=[image])
    else:
        image.save(path, exif=exif, **({"lossless": True} if kind == "webp" else {}))
    assert np.array_equal(read_image(path), SHOWN)
    with opened_image(path) as opened:
        assert image_size(opened) == SHOWN.shape[:2]


@pytest.mark.parametrize("orientation", STORED)
@pytest.mark.parametrize("ending", ["jpg", "mpo", "avif"])
def test_orientation_of_lossy_files(tmp_path, ending, orientation):
    if ending == "avif" and "AVIF" not in image_formats():
        pytest.skip("this Pillow has no AVIF")
    blocks = np.kron(SHOWN, np.ones((16, 16, 1), np.uint8))
    path = tmp_path / f"image.{ending}"
    Image.fromarray(np.ascontiguousarray(STORED[orientation](blocks))).save(path, exif=tag(orientation), quality=95)
    difference = np.abs(read_image(path)[8::16, 8::16].astype(int) - SHOWN)
    assert difference.mean() < 12  # another turn differs by 60 and more
    with opened_image(path) as opened:
        assert image_size(opened) == blocks.shape[:2]


def test_pixels_with_a_damaged_tag_are_read(tmp_path):
    damaged = png(SHOWN, 8, 2, before=chunk(b"eXIf", b"no tags at all"))
    (tmp_path / "a.png").write_bytes(damaged)
    assert np.array_equal(read_image(tmp_path / "a.png"), SHOWN)


@pytest.mark.parametrize("orientation", [1, *STORED])
@pytest.mark.parametrize(("bits", "colour"), [(2, 0), (4, 0), (8, 0), (16, 0), (2, 3), (4, 3), (8, 3)])
def test_stored_values_are_those_of_the_file(tmp_path, bits, colour, orientation):
    """PIL.Image.Image.tile, in piip_core/images.py: it tells 2 and 4 bits of grey from 8."""
    values = np.random.default_rng(1).integers(0, 4, (5, 9))
    palette = chunk(b"PLTE", bytes(range(12))) if colour == 3 else b""
    turned = STORED.get(orientation, np.array)(values)
    content = png(turned, bits, colour, before=palette + chunk(b"eXIf", tiff_tag(orientation)))
    (tmp_path / "a.png").write_bytes(content)
    with opened_image(tmp_path / "a.png") as image:
        assert np.array_equal(stored_values(image), values)


def tiff(values, **kwargs):
    file = io.BytesIO()
    tifffile.imwrite(file, values, photometric="minisblack" if values.ndim == 2 else "rgb", **kwargs)
    return file.getvalue()


DEEP = SHOWN.astype(np.uint16) * 16
BIG_ENDIAN = DEEP.astype(">u2").tobytes()
REFUSED = {
    "grey.png": png(DEEP[..., :1], 16, 0),
    "grey_alpha.png": png(DEEP[..., :2], 16, 4),
    "rgb.png": png(DEEP, 16, 2),
    "rgba.png": png(np.concatenate([DEEP, DEEP[..., :1]], 2), 16, 6),
    "rgb.ppm": b"P6 9 5 65535\n" + BIG_ENDIAN,
    "rgb_12_bit.ppm": b"P6 9 5 4095\n" + BIG_ENDIAN,
    "plain.ppm": b"P3 9 5 65535\n" + " ".join(map(str, DEEP.ravel().tolist())).encode(),
    "grey.pgm": b"P5 9 5 65535\n" + DEEP[..., 0].astype(">u2").tobytes(),
    "float.pfm": b"Pf 9 5 -1\n" + DEEP[..., 0].astype("<f4").tobytes(),
    "grey.tif": tiff(DEEP[..., 0]),
    "rgb.tif": tiff(DEEP),
    "rgb_in_planes.tif": tiff(
        np.moveaxis(DEEP, -1, 0), planarconfig="separate"
    ),  # Pillow takes the low bytes for the pixels
    "float.tif": tiff(DEEP[..., 0].astype(np.float32)),
    "signed_16.tif": tiff(DEEP[..., 0].astype(np.int16)),
    "signed_8.tif": tiff(SHOWN[..., 0].view(np.int8)),
}


@pytest.mark.parametrize("name", REFUSED)
def test_other_values_than_8_bits_are_refused_by_the_file_and_not_by_pillow_s_mode(tmp_path, name):
    """PIL.Image.Image.tile, in piip_core/images.py: it tells 16 bits of colour from 8."""
    (tmp_path / name).write_bytes(REFUSED[name])
    words = "signed values" if name == "signed_8.tif" else "more than 8 bits per channel"
    with pytest.raises(UnreadableImageError, match=f"{name}: .*{words}.*: expected 8-bit grey, RGB or CMYK"):
        read_image(tmp_path / name)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("rgb.tif", tiff(SHOWN)),
        ("rgb_in_planes.tif", tiff(np.moveaxis(SHOWN, -1, 0), planarconfig="separate")),
        ("rgb.ppm", b"P6 9 5 255\n" + SHOWN.tobytes()),
        ("rgba.png", png(np.concatenate([SHOWN, SHOWN[..., :1]], 2), 8, 6)),
    ],
)
def test_8_bits_are_read(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    assert np.array_equal(read_image(tmp_path / name), SHOWN)


@pytest.mark.parametrize("name", ["a.gif", "a.webp", "a.png", "a.tif"])
def test_the_first_frame_stands_for_an_animation(tmp_path, name):
    frames = [Image.fromarray(np.full((4, 6), value, np.uint8)) for value in (40, 90, 140)]
    options = {"lossless": True} if name == "a.webp" else {}
    frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:], **options)
    assert np.array_equal(read_image(tmp_path / name), np.full((4, 6, 3), 40))


def test_a_huge_image_is_refused_for_its_size(tmp_path, monkeypatch):
    (tmp_path / "a.png").write_bytes(png(SHOWN, 8, 2))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 20)
    with pytest.raises(ImageTooLargeError, match=r"a.png: .*45 pixels.*limit of 40 pixels.*MAX_IMAGE_PIXELS"):
        read_image(tmp_path / "a.png")


def test_unreadable_files_are_named(tmp_path):
    (tmp_path / "text.jpg").write_text("no image")
    (tmp_path / "code.jpg").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n%%EOF\n")
    (tmp_path / "empty.jpg").touch()
    words = {"text.jpg": "cannot be decoded", "code.jpg": "cannot be decoded", "gone.jpg": "no such file"}
    for name, message in (words | {"empty.jpg": "the file is empty", "": "is a folder"}).items():
        with pytest.raises(UnreadableImageError, match=rf"{name}: {message}"):
            read_image(tmp_path / name)


def test_endings_are_those_of_files_that_are_read():
    assert {".jpg", ".jfif", ".mpo", ".png", ".gif", ".webp", ".tif", ".jp2"} <= set(image_endings())
    assert not {".eps", ".pdf", ".h5", ".mpg", ".txt"} & set(image_endings())


def test_spellings_look_like_the_name():
    composed, apart = (unicodedata.normalize(form, "café") for form in ("NFC", "NFD"))
    assert spellings(f"{composed}\\1.jpg") == [f"{composed}/1.jpg", f"{apart}\\1.jpg", f"{apart}/1.jpg"]
    assert spellings(apart) == [composed] and spellings("a/1.jpg") == []
