"""Content of pictures: data URIs, formats, sizes, bombs."""

import base64
import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from llava_piip.serve.fetching import FetchError, FetchPolicy, decode_image, fetch_image


@pytest.fixture
def picture(png, pictures):
    return png(pictures[0])


def data_uri(content, kind="image/png"):
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def test_data_uri(picture, pictures):
    for kind in ("image/png", "image/jpeg", "image/svg+xml", "IMAGE/PNG", "image/png;name=a.png"):  # content decides
        assert np.array_equal(np.asarray(fetch_image(data_uri(picture, kind))), np.asarray(pictures[0]))


@pytest.mark.parametrize(
    "url",
    [
        "data:",
        "data:,",
        "data:image/png,abc",
        "data:image/png;base64",
        "data:text/html;base64,aGVsbG8=",
        "data:image/png;base64,a",
        "data:image/png;base64,aGVs bG8=",
        "data:image/png;base64,äöü=",
        "data:image/png;base64,",
        "data:image/png;base64,aGVsbG8=",
        "DATA:application/octet-stream;base64,aGVsbG8=",
    ],
)
def test_data_uri_that_is_no_picture(url):
    with pytest.raises(FetchError, match=r"^here: "):
        fetch_image(url, field="here")


def test_size_of_data_uri():
    policy = FetchPolicy(max_bytes=3000)
    with pytest.raises(FetchError, match="more than 3000 bytes"):
        fetch_image(data_uri(b"x" * 3001), policy=policy)
    with pytest.raises(FetchError, match="not a complete picture"):  # not its size
        fetch_image(data_uri(b"x" * 3000), policy=policy)


def bomb(width, height):
    """A PNG of some hundred bytes that says it has so many pixels."""

    def block(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    rows = zlib.compress(b"\0" * 100_000)
    return b"\x89PNG\r\n\x1a\n" + block(b"IHDR", header) + block(b"IDAT", rows) + block(b"IEND", b"")


@pytest.mark.parametrize("size", [(7000, 7000), (60_000, 60_000), (2**31 - 1, 2**31 - 1), (1, 9000), (9000, 1)])
def test_decompression_bombs(size):
    with pytest.raises(FetchError, match=r"pixels|not a complete picture") as caught:
        decode_image(bomb(*size), field="here")
    assert caught.value.field == "here"


@pytest.mark.parametrize("kind", ["TIFF", "PPM", "ICO", "PDF", "EPS", "TGA"])
def test_formats_that_are_not_read(kind, pictures):
    file = io.BytesIO()
    pictures[0].save(file, kind)
    with pytest.raises(FetchError, match="expected one of JPEG, PNG, GIF, WEBP"):
        decode_image(file.getvalue())


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "WEBP"])
def test_broken_and_whole_pictures(kind, pictures):
    file = io.BytesIO()
    Image.new("RGB", (300, 200), "red").save(file, kind)
    assert decode_image(file.getvalue()).getpixel((5, 5))[0] > 250
    noise = np.random.default_rng(0).integers(0, 256, (200, 300, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).save(file, kind)
    with pytest.raises(FetchError, match="not a complete picture"):
        decode_image(file.getvalue()[: len(file.getvalue()) // 2])
