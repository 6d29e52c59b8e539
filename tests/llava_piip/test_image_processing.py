"""Pictures of all kinds against recorded results, against torchvision, and against each other."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.v2 import functional as tvF
from transformers import AutoImageProcessor

from checkers import GoldenCase, find_cases
from checkers.llava.images import verify_image_modes, verify_preprocess
from llava_piip.image_processing import ImageError, PIIPImageProcessor, rgb_image
from piip_core.errors import ConfigError

GOLDENS = Path(__file__).parents[1] / "data" / "goldens"
MEAN, STD = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]]).view(2, 3, 1, 1)


def picture(width, height, seed=0):
    generator = np.random.default_rng(seed)
    small = Image.fromarray(generator.integers(0, 256, (5, 5, 3), dtype=np.uint8))
    return small.resize((width, height), Image.Resampling.BICUBIC)


def process(images, size=32, **settings):
    return PIIPImageProcessor(size=size, **settings)(images=images, return_tensors="pt")["pixel_values"]


def levels(pixels):
    return ((pixels * STD + MEAN) * 255).round()


def golden(name, change=None) -> GoldenCase:
    (case,) = find_cases([GOLDENS / f"{name}.json"])
    info = json.loads(json.dumps(case.info))
    if change:
        change(info)
    return GoldenCase(case.path, info)


def test_recorded_files_are_all_reproduced():
    case = golden("llava_image_modes")
    comparisons = verify_image_modes(case).comparisons
    assert [c for c in comparisons if not c.passed] == []
    paths = {f"{p['case']}.{path}" for p in case.info["cases"] for path in p if path.startswith(("train", "eval"))}
    assert len(paths) == 81
    covered = {name for name in paths if any(c.name == name or c.name.startswith(f"{name}.") for c in comparisons)}
    assert covered == paths


@pytest.mark.parametrize("number", range(2))
def test_recorded_arrays_are_reproduced(number):
    comparison = verify_preprocess(golden("llava_preprocess_wide")).comparisons[number]
    assert comparison.passed and comparison.error < 1e-6, comparison


@pytest.mark.parametrize("field", ["values", "mean", "std", "abs_sum", "shape"])
def test_a_wrong_record_fails(field):
    def change(info):
        record = info["cases"][0]["train_pad_64"]
        if field == "values":
            record["values"][3][1] += 0.1
        elif field == "abs_sum":
            record["abs_sum"] *= 1.1
        else:
            record[field][0] += 1

    failed = [c.name for c in verify_image_modes(golden("llava_image_modes", change)).comparisons if not c.passed]
    assert failed == [f"rgb_landscape_odd.train_pad_64.{field}"]


@pytest.mark.parametrize("size", [(61, 37), (37, 61), (200, 9), (25, 3), (3, 25), (25, 1), (1, 25), (32, 32)])
@pytest.mark.parametrize("pad", [True, False])
def test_values_are_torchvisions(size, pad):
    """Its resizing of tensors rounds differently, by at most two levels."""
    image = picture(*size)
    tensor, (width, height) = tvF.pil_to_tensor(image), size
    if pad:
        left, top = (max(size) - width) // 2, (max(size) - height) // 2
        tensor = tvF.pad(
            tensor, [left, top, max(size) - width - left, max(size) - height - top], fill=[123.0, 116.0, 103.0]
        )
    resized = [int(40 * side / min(tensor.shape[-2:])) for side in tensor.shape[-2:]]
    tensor = tvF.resize(tensor, resized, tvF.InterpolationMode.BICUBIC, antialias=True)
    top, left = ((side - 40) // 2 for side in resized)
    want = tensor[:, top : top + 40, left : left + 40]
    (got,) = process(image, 40, pad_to_square=pad)
    assert got.dtype == torch.float32 and got.shape == (3, 40, 40)
    assert (levels(got) - want).abs().max() <= 2


def test_padding_has_the_colour_of_the_mean_and_is_centred():
    white = Image.new("RGB", (32, 16), "white")
    (pixels,) = process(white)
    assert torch.equal(levels(pixels)[:, 0, 0], torch.tensor([123.0, 116.0, 103.0]))
    assert torch.equal(levels(pixels)[:, 8:24].unique(), torch.tensor([255.0]))
    (black,) = process(white, background_color=(0, 0, 0))
    assert torch.equal(levels(black)[:, :8].unique(), torch.tensor([0.0]))


@pytest.mark.parametrize("size", [(50, 33), (25, 1), (1, 25), (25, 3), (3, 25), (3, 3), (1, 1)])
def test_arrays_and_tensors_are_what_pictures_are(size):
    image = picture(*size)
    array = np.array(image)
    tensor = torch.from_numpy(array).permute(2, 0, 1)
    want = process(image)
    rgba = np.concatenate([array, np.zeros_like(array[..., :1])], axis=-1)
    for same in (array, tensor, [array], (tensor,), [[image]], array[None], tensor[None], rgba):
        assert torch.equal(process(same), want)
    if size == (50, 33):  # clear without being told
        assert torch.equal(process(array.transpose(2, 0, 1)), want)
        assert torch.equal(process(tensor.permute(1, 2, 0)), want)


def test_gray_arrays():
    gray = picture(40, 24).convert("L")
    array = np.array(gray)
    want = process(gray)
    for same in (array, array[..., None], torch.from_numpy(array), torch.from_numpy(array)[None]):
        assert torch.equal(process(same), want)
    assert torch.equal(process(gray.convert("RGB")), want)


def test_batch_of_different_sizes_keeps_the_order():
    images = [picture(40, 24, seed) for seed in range(2)] + [picture(24, 40, 2)]
    batch = process(images)
    assert batch.shape == (3, 3, 32, 32)
    for pixels, image in zip(batch, images, strict=True):
        assert torch.equal(pixels, process(image)[0])
    assert torch.equal(process([images[:1], images[1:]]), batch)


def test_one_pixel_is_a_plain_square():
    for pad in (True, False):
        (pixels,) = process(Image.new("RGB", (1, 1), (10, 20, 30)), pad_to_square=pad)
        assert torch.equal(levels(pixels), torch.tensor([10.0, 20.0, 30.0]).view(3, 1, 1).expand(3, 32, 32))


@pytest.mark.parametrize("mode", ["P", "CMYK", "RGBA", "LA", "1", "YCbCr"])
def test_modes_become_rgb(mode):
    image = picture(40, 24).convert("L" if mode == "LA" else "RGB").convert(mode)
    assert torch.equal(process(image), process(image.convert("RGB")))


def test_transparency_is_dropped_and_not_blended():
    image = picture(40, 24)
    transparent = image.copy()
    transparent.putalpha(0)
    assert torch.equal(process(transparent), process(image))


def test_sixteen_bits_are_scaled():
    wide = Image.fromarray(np.linspace(0, 65535, 32, dtype=np.uint16)[None].repeat(32, 0))
    (pixels,) = process(wide)
    assert torch.equal(levels(pixels)[0, 0], (torch.from_numpy(np.asarray(wide)[0].astype(np.int64)) // 257).float())


def test_first_frame_and_stored_orientation(tmp_path):
    frames = [picture(40, 24, seed).convert("P") for seed in range(3)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert torch.equal(process(Image.open(tmp_path / "a.gif")), process(frames[0].convert("RGB")))
    image = picture(40, 24)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    image.save(tmp_path / "a.png", exif=exif)
    assert torch.equal(process(Image.open(tmp_path / "a.png")), process(image))


def test_padding_before_conversion_is_only_another_colour_for_inks():
    """As the public evaluation did where it did not convert first; gray pictures, where it stopped, are converted."""
    cmyk = picture(32, 16).convert("CMYK")
    first, after = process(cmyk)[0], process(cmyk, convert_before_padding=False)[0]
    assert torch.equal(first[:, 10:22], after[:, 10:22]) and not torch.equal(first[:, :6], after[:, :6])
    gray = picture(32, 16).convert("L")
    assert torch.equal(process(gray, convert_before_padding=False), process(gray))


def test_saved_and_loaded_it_is_the_same(tmp_path):
    processor = PIIPImageProcessor(
        size={"height": 48, "width": 48}, pad_to_square=False, background_color=[1, 2, 3], image_mean=[0.5, 0.5, 0.5]
    )
    processor.save_pretrained(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["preprocessor_config.json"]
    loaded = AutoImageProcessor.from_pretrained(tmp_path)
    assert type(loaded) is PIIPImageProcessor and loaded.to_dict() == processor.to_dict()
    assert (loaded.image_size, loaded.pad_to_square, loaded.background_color) == (48, False, (1, 2, 3))
    image = picture(61, 37)
    assert torch.equal(
        loaded(image, return_tensors="pt")["pixel_values"], processor(image, return_tensors="pt").pixel_values
    )
    assert PIIPImageProcessor.from_pretrained(tmp_path, pad_to_square=True).pad_to_square is True


def test_settings_of_one_call_do_not_last():
    processor, image = PIIPImageProcessor(size=32), picture(61, 37)
    one = processor(image, size=48, pad_to_square=False, return_tensors="pt").pixel_values
    assert torch.equal(one, process(image, 48, pad_to_square=False))
    assert torch.equal(processor(image, return_tensors="pt").pixel_values, process(image, 32))
    assert isinstance(processor(image).pixel_values, np.ndarray)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("cat.jpg", "image 0: str 'cat.jpg': expected a PIL image"),
        (None, "image 0: NoneType"),
        ([], "no images were given"),
        ([picture(4, 4), b"x"], "image 1: bytes"),
        (np.zeros((8, 8, 3)), "float64 of shape .8, 8, 3.: expected uint8"),
        (torch.zeros(3, 8, 8, dtype=torch.bfloat16), "bfloat16 of shape .3, 8, 8.: expected uint8"),
        (np.zeros((8, 8), np.uint16), "uint16 of shape .8, 8.: expected uint8"),
        (np.zeros((8, 8, 2), np.uint8), "shape .8, 8, 2."),
        (np.zeros((2, 2, 8, 8, 3), np.uint8), "shape .2, 2, 8, 8, 3."),
        (np.zeros((0, 8, 3), np.uint8), "no empty side"),
        (torch.zeros(8, dtype=torch.uint8), "shape .8,."),
        (Image.new("F", (4, 4)), "image 0: an image of mode 'F'"),
        (Image.new("I", (4, 4)), "image 0: an image of mode 'I'"),
        (Image.new("L", (1, 20000)), "20000 x 20000 on the way to a square.*MAX_IMAGE_PIXELS"),
    ],
)
def test_no_usable_picture(given, message):
    with pytest.raises(ImageError, match=message):
        process(given)


def test_thin_pictures(monkeypatch):
    """A padded one stays small enough; a cropped one grows to 32 x 131072 before the crop."""
    thin = picture(4096, 1)
    assert process(thin).shape == (1, 3, 32, 32)
    assert process(thin, pad_to_square=False).isfinite().all()
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 2**20)
    with pytest.raises(ImageError, match="4096 x 1 pixels have to become 131072 x 32"):
        process(thin, pad_to_square=False)


@pytest.mark.parametrize("pad", [True, False])
def test_broken_file_is_named(tmp_path, pad):
    picture(80, 64).save(tmp_path / "whole.jpg")
    data = (tmp_path / "whole.jpg").read_bytes()
    (tmp_path / "broken.jpg").write_bytes(data[: len(data) // 2])
    images = [picture(8, 4), Image.open(tmp_path / "broken.jpg")]
    for convert in (True, False):
        with pytest.raises(ImageError, match=r"image 1: .*broken.jpg cannot be read .*truncated"):
            process(images, pad_to_square=pad, convert_before_padding=convert)
    with pytest.raises(ImageError, match=r"broken.jpg"):
        rgb_image(images[1])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"size": {"shortest_edge": 336}}, "size=.*expected the side"),
        ({"size": {"height": 336, "width": 224}}, "size="),
        ({"size": 0}, "size=0"),
        ({"size": 33.5}, "size=33.5"),
        ({"size": "large"}, "size='large'"),
        ({"pad_to_square": "no"}, "pad_to_square='no': expected True or False"),
        ({"pad_to_sqare": False}, "pad_to_sqare: no such setting of images; known: .*pad_to_square"),
        ({"do_center_crop": False}, "do_center_crop: no such setting"),
        ({"background_color": (1, 2)}, "background_color="),
        ({"image_mean": 0.5}, "image_mean=0.5"),
    ],
)
def test_settings_that_cannot_work(settings, message):
    with pytest.raises(ConfigError, match=message):
        PIIPImageProcessor(**settings)


def test_unknown_range_is_refused_however_it_is_padded():
    with pytest.raises(ImageError, match="mode 'F'"):
        process(Image.new("F", (4, 2)), convert_before_padding=False)


def test_recorded_files_under_another_pillow(monkeypatch):
    """Digests belong to one version; values and sums are compared under any."""
    case = golden("llava_image_modes", lambda info: info.update(pillow="other"))
    names = {c.name for c in verify_image_modes(case).comparisons}
    assert not any(name.endswith(("uint8", "sha256")) for name in names)
    assert "palette_P.train_pad_64.values" in names
