"""The real digits as folders of images."""

import numpy as np
import pytest
from PIL import Image
from torchvision.datasets import ImageFolder

from piip_core.errors import UserError
from piip_digits.data_sets import prepare_digit_images
from piip_digits.scenes import load_samples, split_samples


def test_every_digit_is_in_one_split_below_its_class(tmp_path):
    """Read by torchvision; shrunk again, an image is the sample it was made of."""
    root = tmp_path / "digits"
    assert prepare_digit_images(root, image_size=80)
    samples, seen = load_samples(), []
    for split in ("train", "val"):
        folder = ImageFolder(str(root / split))
        assert folder.classes == [str(digit) for digit in range(10)]
        indices = [int(path[-8:-4]) for path, _ in folder.samples]
        assert sorted(indices) == split_samples(split).tolist()
        assert [label for _, label in folder.samples] == samples.target[indices].tolist()
        seen += indices
        small = Image.open(folder.samples[7][0]).resize((10, 10), Image.Resampling.BOX)
        found, expected = np.asarray(small, dtype=float)[1:-1, 1:-1].ravel(), samples.images[indices[7]].ravel()
        assert np.corrcoef(found, expected)[0, 1] > 0.98
    assert sorted(seen) == list(range(1797))
    assert not prepare_digit_images(root, image_size=80)


def test_another_kind_of_data_set_is_kept(tmp_path):
    (tmp_path / "manifest.json").write_text('{"format": 2, "scenes": {}, "config": {}}')
    with pytest.raises(UserError, match="not a digit data set of this kind"):
        prepare_digit_images(tmp_path)
    with pytest.raises(ValueError, match="image_size=7: expected at least 8"):
        prepare_digit_images(tmp_path / "new", image_size=7)


def test_the_command_writes_either_data_set(load_script, tmp_path, capsys):
    prepare = load_script("prepare").main
    for arguments, found in (["--single"], "val/9"), (["--num-train", "1", "--num-val", "1"], "labels/val"):
        root = tmp_path / found.split("/")[0]
        assert prepare(["digits", str(root), *arguments]) == 0
        assert (root / found).is_dir()
    assert capsys.readouterr().out.splitlines() == [f"{tmp_path}/val: written", f"{tmp_path}/labels: written"]
    with pytest.raises(SystemExit, match="error: num_train=0: expected at least 1"):
        prepare(["digits", str(tmp_path / "new"), "--num-train", "0"])
