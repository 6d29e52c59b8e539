import json

import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image
from torch import nn

from piip_core.checkpoints import load_checkpoint, write_checkpoint
from piip_core.errors import CheckpointError, ConfigError, UserError
from piip_core.pyramid import PIIP
from piip_core.visualization import draw_attention, find_pyramid, trace_pyramid, visualize


def test_files_and_what_they_say(tiny_model, make_scene, tmp_path):
    scene = make_scene(query=(70, 50))
    files = visualize(tiny_model, scene, tmp_path / "new" / "folder", name="tiny", blocks=[1, 0, 1], interaction=0)
    assert [file.name for file in files] == ["attention.png", "sampling.png", "spectra.png", "visualization.json"]
    assert sorted(files) == sorted((tmp_path / "new" / "folder").iterdir())  # nothing half-written is left
    for file in files[:3]:
        with Image.open(file) as drawn:
            drawn.load()
            assert min(drawn.size) > 300
    facts = json.loads(files[3].read_text())
    assert facts["files"] == ["attention.png", "sampling.png", "spectra.png"]
    assert (facts["image_size"], facts["padded_to"], facts["query"]) == ([96, 128], [96, 128], [70, 50])
    views, readings = facts["views"], facts["readings"]
    assert [view["block"] for view in views] == [1, 0, 1]
    assert [(view["cells"]["rows"], view["cells"]["columns"]) for view in views] == [(3, 4), (4, 6), (6, 8)]
    assert [view["cell"] for view in views] == [[1, 2], [2, 3], [3, 4]]
    assert (views[2]["window"], views[2]["attention"]["window"]) == ([3, 3], [3, 3, 6, 6])
    assert np.array(readings[0]["points"]).shape == (4, 4, 2)
    assert len(facts["before"]) == len(facts["after"]) == 3


def test_outside_of_the_window_it_is_dark(tiny_model, make_scene):
    """The rendered pixels of Branch 3's panel: only the window of the query, rows and columns 3 to 5, is lit."""
    scene = make_scene(query=(70, 50))
    scene.image[:] = 200
    figure = draw_attention(scene, trace_pyramid(tiny_model.pyramid, scene), "title")
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    pixels = np.asarray(canvas.buffer_rgba())[..., :3].astype(int).sum(axis=-1)
    axes = figure.axes[3]
    for row in range(6):
        for column in range(8):
            # beside the middle of the cell, away from frames
            x, y = axes.transData.transform((16 * column + 5, 16 * row + 5))
            lit = pixels[round(pixels.shape[0] - y), round(x)] > 250
            assert lit == (3 <= row < 6 and 3 <= column < 6), (row, column)


def test_single_branch_has_no_sampling(tiny_config, make_scene, tmp_path):
    config = tiny_config(dims=(32,), sizes=(128,), merging=None)
    files = visualize(PIIP(config).eval(), make_scene(), tmp_path, name="single")
    assert [file.name for file in files] == ["attention.png", "spectra.png", "visualization.json"]
    with pytest.raises(UserError, match="interaction 0: the model has 0 interactions"):
        visualize(PIIP(config).eval(), make_scene(), tmp_path, name="single", interaction=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"interaction": 2}, "interaction 2: the model has 2 interactions; expected an index from 0 to 1"),
        ({"interaction": -1}, "interaction -1"),
        ({"blocks": [2]}, "block 2: branch 1 has 2 blocks; expected 0 to 1"),
        ({"blocks": [0, 1]}, "one index for all branches or 3"),
    ],
)
def test_what_does_not_exist(tiny_model, make_scene, tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        visualize(tiny_model, make_scene(), tmp_path / "out", name="tiny", **options)
    assert not (tmp_path / "out").exists()


def test_the_one_pyramid_of_a_model(tiny_model):
    assert find_pyramid(nn.Sequential(nn.ReLU(), tiny_model)) is tiny_model.pyramid
    with pytest.raises(ConfigError, match="0 PIIP modules"):
        find_pyramid(nn.ReLU())
    with pytest.raises(ConfigError, match="2 PIIP modules"):
        find_pyramid(nn.ModuleList([tiny_model, PIIP(tiny_model.pyramid.config)]))


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_weights_from_the_checkpoint_of_a_larger_model(tiny_model, tmp_path, suffix):
    path = tmp_path / f"detector{suffix}"
    write_checkpoint(path, nn.ModuleDict({"backbone": tiny_model, "head": nn.Linear(2, 2)}).state_dict())
    pyramid = PIIP(tiny_model.pyramid.config)
    load_checkpoint(pyramid, path)
    for name, tensor in tiny_model.pyramid.state_dict().items():
        assert torch.equal(pyramid.state_dict()[name], tensor), name


def test_weights_that_do_not_fit(tiny_model, tiny_config, tmp_path):
    state = tiny_model.pyramid.state_dict()
    write_checkpoint(tmp_path / "part.pth", dict(list(state.items())[:-1]))
    write_checkpoint(tmp_path / "twice.pth", state | {f"ema.{name}": tensor for name, tensor in state.items()})
    write_checkpoint(tmp_path / "wide.pth", PIIP(tiny_config(dims=(64, 24, 16), window_size=3)).state_dict())
    for name, message in (("part", "0 complete"), ("twice", "2 complete"), ("wide", "has shape")):
        with pytest.raises(CheckpointError, match=rf"{name}\.pth.*{message}"):
            load_checkpoint(PIIP(tiny_model.pyramid.config), tmp_path / f"{name}.pth")
