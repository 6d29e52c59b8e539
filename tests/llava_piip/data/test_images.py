from __future__ import annotations

import base64
import hashlib
import io
import json
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image

from llava_piip.data import DataError, ImageFolder, Problem
from llava_piip.data.images import viewed_image
from llava_piip.image_processing import rgb_image
from piip_core.errors import ConfigError

GOLDEN = json.loads((Path(__file__).parents[2] / "data" / "goldens" / "llava_image_modes.json").read_text())
KINDS = {case["case"]: case for case in GOLDEN["cases"] if case["case"] not in GOLDEN["skip_equality"]}


def problem(folder: ImageFolder, name: str) -> tuple[Problem, str]:
    with pytest.raises(DataError) as error:
        folder.open(name)
    assert repr(name) in str(error.value)
    return error.value.problem, str(error.value)


def noise(path: Path, size: tuple[int, int] = (64, 48)) -> bytes:
    """A file of random pixels, in the format of its name."""
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path.read_bytes()


@pytest.mark.parametrize("case", KINDS)
def test_kinds_of_files_give_the_public_pixels(tmp_path, case):
    """RGB bit by bit, whatever the file is called."""
    (tmp_path / "picture.jpg").write_bytes(base64.b64decode(KINDS[case]["file_base64"]))
    folder = ImageFolder(tmp_path)
    if "exception" in KINDS[case]["rgb_sha256"]:
        kind, _ = problem(folder, "picture.jpg")
        assert kind is Problem.BROKEN
    else:
        image = folder.open("picture.jpg")
        assert image.mode == "RGB" and list(image.size) == KINDS[case]["file"]["size_wh"]
        assert hashlib.sha256(image.tobytes()).hexdigest() == KINDS[case]["rgb_sha256"]["sha"]


def test_names_inside(images):
    folder = ImageFolder(images)
    assert folder.open("sub/green.png").getpixel((0, 0)) == (0, 255, 0)
    assert folder.open("./red.png").getpixel((0, 0)) == (255, 0, 0)
    assert folder.open(str(images / "red.png")).getpixel((0, 0)) == (255, 0, 0)


def test_a_relative_and_a_linked_root(images, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = ImageFolder("images")
    (tmp_path / "link").symlink_to(images)
    monkeypatch.chdir("/")
    assert folder.open("red.png").size == (8, 6)
    linked = ImageFolder(tmp_path / "link")
    assert linked.open("red.png").size == (8, 6)
    assert linked.open(str(tmp_path / "link" / "red.png")).size == (8, 6)
    assert linked.open(str(images / "red.png")).size == (8, 6)


@pytest.mark.parametrize(
    "name", ["../secret.png", "sub/../../secret.png", "sub/../red.png", "..", "..\\secret.png", "a\0b", "a\ud83db"]
)
def test_names_with_dots(images, name):
    noise(images.parent / "secret.png")
    kind, text = problem(ImageFolder(images), name)
    assert kind is Problem.OUTSIDE and "correct the entry" in text


@pytest.mark.parametrize(
    ("stored", "named"),
    [
        ("sub/green.png", "sub\\green.png"),
        ("sub/gre\u0301en.png", "sub/gr\u00e9en.png"),
        ("sub/gr\u00e9en.png", ".\\sub\\gre\u0301en.png"),
    ],
)
def test_names_written_in_another_way(images, stored, named):
    """Back-slashes, and accents composed or apart."""
    (images / "sub" / "green.png").rename(images / stored)
    assert ImageFolder(images).open(named).getpixel((0, 0)) == (0, 255, 0)


def test_absolute_names_outside(images):
    noise(images.parent / "secret.png")
    noise(images.parent / "images2.png")  # has the folder's name as its start
    for name in ("secret.png", "images2.png", "gone.png"):
        kind, text = problem(ImageFolder(images), str(images.parent / name))
        assert kind is Problem.OUTSIDE and "lies outside" in text
        kind, _ = problem(ImageFolder(images, follow_links=True), str(images.parent / name))
        assert kind is Problem.OUTSIDE


@pytest.mark.parametrize("link", ["file", "folder"])
def test_links_out_of_the_folder(images, tmp_path, link):
    (tmp_path / "elsewhere").mkdir()
    noise(tmp_path / "elsewhere" / "a.png")
    if link == "file":
        (images / "a.png").symlink_to(tmp_path / "elsewhere" / "a.png")
    else:
        (images / "coco").symlink_to(tmp_path / "elsewhere")
    name = "a.png" if link == "file" else "coco/a.png"
    kind, text = problem(ImageFolder(images), name)
    assert kind is Problem.OUTSIDE and "follow_links=True" in text
    assert ImageFolder(images, follow_links=True).open(name).size == (64, 48)
    (images / "inner").symlink_to(images / "sub")
    assert ImageFolder(images).open("inner/green.png").size == (8, 6)


@pytest.mark.parametrize("name", ["red.jpg", "coco/train2017/1.jpg", "red.png/1.jpg", "dangling.png"])
def test_missing_files(images, name):
    (images / "dangling.png").symlink_to(images / "nothing.png")
    kind, text = problem(ImageFolder(images), name)
    assert kind is Problem.MISSING and f"{name!r} is missing in" in text


def test_a_loop_of_links_and_too_long_names(images):
    (images / "one").symlink_to("two")
    (images / "two").symlink_to("one")
    assert problem(ImageFolder(images), "one")[0] is Problem.UNREADABLE
    assert problem(ImageFolder(images), "x" * 5000)[0] is Problem.UNREADABLE


def test_empty_files_folders_and_pipes(images):
    (images / "empty.jpg").touch()
    assert problem(ImageFolder(images), "empty.jpg")[0] is Problem.EMPTY
    assert problem(ImageFolder(images), "sub")[0] is Problem.UNREADABLE
    os.mkfifo(images / "pipe.png")  # opening one would wait for ever
    assert problem(ImageFolder(images), "pipe.png")[0] is Problem.UNREADABLE


def test_unreadable_devices(images, monkeypatch):
    def fail(*args, **kwargs):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(Image, "open", fail)
    kind, text = problem(ImageFolder(images), "red.png")
    assert kind is Problem.UNREADABLE and "Input/output error" in text


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".gif", ".webp", ".bmp", ".tif"])
@pytest.mark.parametrize("share", [0.02, 0.5, 0.9])
def test_truncated_files(tmp_path, suffix, share):
    content = noise(tmp_path / f"whole{suffix}")
    (tmp_path / f"part{suffix}").write_bytes(content[: int(share * len(content))])
    kind, text = problem(ImageFolder(tmp_path), f"part{suffix}")
    assert kind is Problem.BROKEN and "load it again" in text


def test_flipped_bytes_never_escape_as_another_error(tmp_path):
    """Whatever a damaged file makes Pillow raise, it becomes the named error (or still is an image)."""
    rng = np.random.default_rng(1)
    folder, broken = ImageFolder(tmp_path), 0
    for suffix in (".jpg", ".png", ".gif", ".webp", ".bmp", ".tif", ".jp2", ".ppm"):
        content = np.frombuffer(noise(tmp_path / f"whole{suffix}", (16, 12)), dtype=np.uint8)
        for number in range(40):
            damaged = content.copy()
            damaged[rng.integers(0, min(len(content), 120), 4)] = rng.integers(0, 256, 4)
            (tmp_path / f"{number}{suffix}").write_bytes(damaged.tobytes())
            try:
                assert folder.open(f"{number}{suffix}").mode == "RGB"
            except DataError:
                broken += 1
    assert broken > 50


def test_something_else_instead_of_an_image(images):
    (images / "page.jpg").write_bytes(b"<!DOCTYPE html><title>404 Not Found</title>")
    kind, text = problem(ImageFolder(images), "page.jpg")
    assert kind is Problem.BROKEN and "<!DOCTYPE html>" in text
    (images / "code.jpg").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n%%EOF\n")
    assert problem(ImageFolder(images), "code.jpg")[0] is Problem.BROKEN  # a program: Pillow would run it


@pytest.mark.parametrize("side", [10_000, 60_000])  # above Pillow's limit, above twice the limit
def test_decompression_bombs(tmp_path, side):
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    content = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    (tmp_path / "bomb.png").write_bytes(content)
    kind, text = problem(ImageFolder(tmp_path), "bomb.png")
    assert kind is Problem.TOO_LARGE and "MAX_IMAGE_PIXELS" in text


def test_values_of_unknown_range(tmp_path):
    Image.fromarray(np.linspace(0, 1e6, 48, dtype=np.float32).reshape(6, 8)).save(tmp_path / "depth.tif")
    kind, text = problem(ImageFolder(tmp_path), "depth.tif")
    assert kind is Problem.UNUSABLE and "mode 'F'" in text


def test_16_bits_are_scaled_by_the_file_or_refused(tmp_path):
    """A plane for each channel is what Pillow reads the low bytes of."""
    deep = np.random.default_rng(0).integers(0, 65536, (6, 8, 3), dtype=np.uint16)
    (tmp_path / "a.ppm").write_bytes(b"P6 8 6 65535\n" + deep.astype(">u2").tobytes())
    tifffile.imwrite(tmp_path / "a.tif", deep, photometric="rgb")
    tifffile.imwrite(tmp_path / "grey.tif", deep[..., 0], photometric="minisblack")
    folder = ImageFolder(tmp_path)
    for name, expected in (("a.ppm", deep), ("a.tif", deep), ("grey.tif", deep[..., :1])):
        assert np.abs(np.asarray(folder.open(name)) - expected / 257).max() <= 1
    tifffile.imwrite(tmp_path / "planes.tif", deep.transpose(2, 0, 1), photometric="rgb", planarconfig="separate")
    kind, text = problem(folder, "planes.tif")
    assert kind is Problem.UNUSABLE and "convert it to 8 bits" in text


def test_premultiplied_transparency(tmp_path):
    """Mode La, which Pillow converts to nothing but LA: 60 of 128 is 119.5 of 255."""
    image = Image.new("La", (8, 6), (60, 128))
    assert abs(rgb_image(image).getpixel((0, 0))[0] - 119.5) <= 1
    assert abs(viewed_image(image).getpixel((0, 0))[0] - (60 + 127)) <= 1  # on white


def test_transparency_needs_no_warning(tmp_path, recwarn):
    buffer = io.BytesIO()
    Image.new("P", (4, 4)).save(buffer, "PNG", transparency=b"\x00\x80")
    (tmp_path / "a.png").write_bytes(buffer.getvalue())
    ImageFolder(tmp_path).open("a.png")
    assert not list(recwarn)


def test_no_such_folder(tmp_path):
    with pytest.raises(ConfigError, match="is no folder"):
        ImageFolder(tmp_path / "gone")


def half_transparent(mode):
    """Red on the left, on the right nothing: behind it lies blue."""
    image = Image.new("RGBA", (4, 2), (255, 0, 0, 255))
    image.paste((0, 0, 255, 0), (2, 0, 4, 2))
    return image if mode == "RGBA" else image.convert(mode)


def half_transparent_palette(mode):
    """The same in colours of a palette; Pillow's own conversion to "PA" loses transparency before version 12."""
    image = Image.new(mode, (4, 2), 0 if mode == "P" else (0, 255))
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.paste(1 if mode == "P" else (1, 0), (2, 0, 4, 2))
    return image


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA", "P"])
def test_transparency_is_white_as_viewed_and_dropped_as_published(tmp_path, mode):
    if mode == "P":
        half_transparent_palette(mode).save(tmp_path / "a.png", transparency=1)
    elif mode == "PA":
        half_transparent_palette(mode).save(tmp_path / "a.tif")
    else:
        half_transparent(mode).save(tmp_path / "a.png")
    (name,) = (path.name for path in tmp_path.iterdir())
    folder = ImageFolder(tmp_path)
    viewed, published = (folder.open(name, as_viewed=as_viewed) for as_viewed in (True, False))
    assert viewed.mode == published.mode == "RGB"
    assert viewed.getpixel((3, 1)) == (255, 255, 255) and published.getpixel((3, 1)) != (255, 255, 255)
    assert viewed.getpixel((0, 0)) == published.getpixel((0, 0))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_tags_are_followed_as_viewed_alone(tmp_path, orientation):
    upright = Image.fromarray(np.arange(48, dtype=np.uint8).reshape(4, 4, 3) * 5)
    # How a camera stores it for each tag: the inverse of what a viewer does (Exif 2.3, 4.6.4 A)
    stored = {
        1: upright,
        2: upright.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
        3: upright.transpose(Image.Transpose.ROTATE_180),
        4: upright.transpose(Image.Transpose.FLIP_TOP_BOTTOM),
        5: upright.transpose(Image.Transpose.TRANSPOSE),
        6: upright.transpose(Image.Transpose.ROTATE_90),
        7: upright.transpose(Image.Transpose.TRANSVERSE),
        8: upright.transpose(Image.Transpose.ROTATE_270),
    }[orientation]
    exif = Image.Exif()
    exif[274] = orientation
    stored.save(tmp_path / "a.png", exif=exif)
    folder = ImageFolder(tmp_path)
    assert folder.open("a.png", as_viewed=True).tobytes() == upright.tobytes()
    assert folder.open("a.png").tobytes() == stored.tobytes()
