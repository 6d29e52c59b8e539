"""The export tool; what it exports is tested with the package."""

import dataclasses
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from piip_core import BranchConfig, ClassifierConfig, PIIPClassifier, PIIPConfig, ViTConfig, zoo

ROOT = Path(__file__).parents[2]
RUN = """
import sys, torch
sys.modules.update(dict.fromkeys(("piip", "piip_core", "timm")))  # importing them fails
folder = sys.argv[1]
run = torch.export.load(f"{folder}/model.pt2").module()
torch.save(run(torch.load(f"{folder}/image.pt")), f"{folder}/logits.pt")
assert not [name for name, module in sys.modules.items() if module and name.startswith("piip")]
"""


@pytest.fixture
def tiny_row(load_tool, monkeypatch):
    """The tool, with a published row of one small branch."""
    branch = BranchConfig(network=ViTConfig(embed_dim=8, depth=1, num_heads=1, pos_grid=2), image_size=32)
    config = ClassifierConfig(pyramid=PIIPConfig(branches=(branch,), merging=None), num_classes=4, pooling="average")
    entry = dataclasses.replace(zoo.classification_entries()[0], config=config, training_config=config)
    monkeypatch.setattr(zoo, "find", lambda name: entry)
    return load_tool("export_model"), config


def test_exports_a_checkpoint_to_a_program_that_needs_nothing_of_ours(
    tiny_row, randomize, run_python, tmp_path, capsys
):
    tool, config = tiny_row
    model = randomize(PIIPClassifier(dataclasses.replace(config, num_classes=3))).eval()
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    output = tmp_path / "model.pt2"
    arguments = ["a_row", "--checkpoint", str(tmp_path / "model.safetensors"), "--output", str(output)]
    assert tool.main([*arguments, "--image-size", "32", "48"]) == 0
    out = capsys.readouterr().out
    assert "images: 32 x 48, mean [123.675, 116.28, 103.53]" in out and "largest difference from PyTorch" in out

    image = torch.randn(3, 3, 32, 48)
    torch.save(image, tmp_path / "image.pt")
    done = run_python(RUN, str(tmp_path))
    assert done.returncode == 0, done.stderr
    with torch.no_grad():
        torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), model(image), rtol=1e-5, atol=1e-6)


def test_lazy_config(load_tool):
    pytest.importorskip("detectron2")
    configs, mean, _ = load_tool("export_model").from_lazy_config(
        str(ROOT / "projects/PIIP/configs/COCO/mask_rcnn_piip_tsb_1120_896_448_1x.py"), []
    )
    assert configs == [zoo.get("piip_tsb_1120_896_448").config] and mean == [127.5, 127.5, 127.5]


def test_mistakes_are_named(load_tool, tmp_path, capsys):
    tool = load_tool("export_model")
    for arguments, message in (
        (["piip_tsb", "--output", str(tmp_path / "x.onnx")], "close matches are piip_tsb_"),
        (["piip_tsb_368_192_128", "a=1", "--output", str(tmp_path / "x.onnx")], "go with a LazyConfig file only"),
        (["none.py", "--output", str(tmp_path / "x.onnx")], "none.py"),
    ):
        assert tool.main(arguments) == 1
        assert message in capsys.readouterr().err
    for arguments, message in (
        (["piip_tsb_368_192_128", "--output", "x.bin"], "expected a name ending in .onnx or .pt2"),
        (["piip_tsb_368_192_128", "--output", "x.onnx", "--image-size", "1", "2", "3"], "one or two positive numbers"),
        (["piip_tsb_368_192_128", "--output", "x.onnx", "--ema"], "--ema: expected --checkpoint"),
    ):
        with pytest.raises(SystemExit):
            tool.main(arguments)
        assert message in capsys.readouterr().err
