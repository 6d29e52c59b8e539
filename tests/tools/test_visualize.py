"""tools/visualize.py on models by name."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from piip_core import BranchConfig, DensePIIP, InteractionConfig, PIIPConfig, ViTConfig, zoo
from piip_core.checkpoints import write_checkpoint


@pytest.fixture(scope="module")
def tool(load_tool):
    return load_tool("visualize")


@pytest.fixture
def tiny_zoo(monkeypatch):
    """Lets every name stand for a tiny model."""
    branches = tuple(
        BranchConfig(network=ViTConfig(embed_dim=dim, depth=2, num_heads=2, pos_grid=4), image_size=size)
        for dim, size in ((32, 64), (16, 128))
    )
    interaction = InteractionConfig(num_interactions=2, num_heads=4)
    entry = zoo.ZooEntry(name="tiny", config=PIIPConfig(branches=branches, interaction=interaction), pad_divisor=32)
    monkeypatch.setattr(zoo, "get", lambda name: entry)
    return entry


@pytest.fixture
def photo(tmp_path):
    path = tmp_path / "photo.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8)).save(path)
    return str(path)


def run(tool, output, *arguments):
    tool.main([*arguments, "--output", str(output), "--device", "cpu"])
    return json.loads((output / "visualization.json").read_text())


def test_published_model(tool, tiny_zoo, photo, tmp_path, capsys):
    facts = run(tool, tmp_path / "out", "--model", "x", "--image", photo, "--query", "10,50", "--block", "0,1")
    # the largest image of 128 pixels goes with a short side of 128 * 800 // 1333 = 76, so 80 x 60 becomes 101 x 76
    assert (facts["resized_to"], facts["padded_to"]) == ([76, 101], [96, 128])
    assert (facts["model"], facts["query"]) == ("tiny (random weights)", [10, 50])
    assert [entry["block"] for entry in facts["views"]] == [0, 1]
    assert {path.name for path in (tmp_path / "out").iterdir()} == {*facts["files"], "visualization.json"}
    assert "attention.png" in capsys.readouterr().out


def test_weights_are_those_of_the_file(tool, tiny_zoo, photo, tmp_path):
    torch.manual_seed(3)
    model = DensePIIP(tiny_zoo.config)
    unit = model.pyramid.interactions[1].units["1_2"]
    torch.nn.init.constant_(unit.into_low.attn.sampling_offsets.bias, 2.0)
    write_checkpoint(tmp_path / "model.pth", model.state_dict())
    arguments = ("--model", "x", "--image", photo, "--interaction", "1", "--weights", str(tmp_path / "model.pth"))
    facts = run(tool, tmp_path / "out", *arguments)
    reading = facts["readings"][0]
    assert facts["model"] == "tiny" and (reading["reader"], reading["source"]) == (1, 2)
    # two cells of 16 pixels to the right and down
    np.testing.assert_allclose(np.array(reading["points"]) - reading["at"], 32, atol=1e-3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "one of the arguments --model --config-file is required"),
        (("--model", "x", "--config-file", "y.py"), "not allowed with"),
        (("--config-file", "y.py"), "--config-file needs --checkpoint"),
        (("--model", "x", "--checkpoint", "y.pth"), "--checkpoint goes with --config-file only"),
        (("--model", "x", "--query", "10"), "expected X,Y"),
        (("--model", "x", "--block", "a"), "expected whole numbers"),
    ],
)
def test_arguments_that_do_not_go_together(tool, capsys, arguments, message):
    with pytest.raises(SystemExit) as stopped:
        tool.main([*arguments, "--image", "photo.jpg", "--output", "out"])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--query", "80,5"), "query 80,5: outside of the image of 80 x 60"),
        (("--weights", "gone.pth"), r"gone\.pth: no such file"),
    ],
)
def test_mistakes_get_one_line(tool, tiny_zoo, photo, tmp_path, arguments, message):
    with pytest.raises(SystemExit, match=f"visualize: {message}"):
        run(tool, tmp_path / "out", "--model", "x", "--image", photo, *arguments)
    assert not (tmp_path / "out").exists()


def test_unknown_model(tool, photo, tmp_path):
    with pytest.raises(SystemExit, match=r"close matches are.*vit_b_1024"):
        run(tool, tmp_path / "out", "--model", "vit_b", "--image", photo)
