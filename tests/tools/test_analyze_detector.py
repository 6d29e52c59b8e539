"""tools/analyze_model.py on a Detectron2 LazyConfig."""

import json
from pathlib import Path

import pytest

from piip_core.meta import on_meta

pytest.importorskip("detectron2")

CONFIGS = Path(__file__).parents[2] / "projects/PIIP/configs"


@pytest.fixture(scope="module")
def tool(load_tool):
    return load_tool("analyze_model")


def test_mask_rcnn_config(tool, capsys):
    from piip_core import zoo
    from piip_tools.flops.published import published_count

    entry = zoo.get("piip_tsb_1120_896_448")
    path = str(CONFIGS / entry.config_file)
    tool.main([path, "model.roi_heads.num_classes=3", "--input", "600", "1000", "--json"])
    report = json.loads(capsys.readouterr().out)
    rows = {row["name"]: row for row in report["modules"]}
    assert report["input_size"] == [672, 1120]  # padded to 224
    assert report["flops_published_count"] == published_count(entry.config).total.macs
    levels = sum(168 * 280 // 4**k for k in range(4))
    assert sum(rows[f"backbone.fpn_output{k}"]["flops"] for k in (2, 3, 4, 5)) == levels * 9 * 256 * 256
    assert rows["roi_heads"]["flops"] is None
    # class and box scores of 3 classes instead of 80, and their masks
    assert rows["roi_heads"]["params"] == sum(
        (
            256 * 7 * 7 * 1024 + 1024 + 1024 * 1024 + 1024,
            1024 * (4 + 12) + 16,
            4 * (9 * 256 * 256 + 256) + 4 * 256 * 256 + 256 + 256 * 3 + 3,
        )
    )
    assert sum(row["params"] or 0 for row in report["modules"]) == report["params"]


def test_missing_file_and_unknown_override(tool):
    with pytest.raises(SystemExit, match=r"nothing\.py"):
        tool.main(["nothing.py"])


@pytest.mark.parametrize("name", ["mask_rcnn", "cascade_mask_rcnn", "dino", "upernet", "classifier"])
def test_memory_runs_all_of_the_model(name):
    """Every parameter, the heads' too, gets a gradient in the step without data."""
    from detectron2.config import instantiate

    from piip.lazy_config import load_config, skip_pretrained, training_size
    from piip_tools.flops.executed import padded_size
    from piip_tools.memory.dry_run import DryRun
    from piip_tools.memory.training_steps import size_divisor, training_step

    config = load_config(str(CONFIGS / f"demo/piip_digits_{name}.py"))
    skip_pretrained(config)
    pyramid = config.model.get("backbone", config.model)
    pyramid = pyramid.get("bottom_up", pyramid).config
    for branch in ("branch1", "branch2", "branch3"):
        pyramid.get("pyramid", pyramid).branches[branch].network.depth = 2  # as many as there are interactions
    with on_meta():
        model = instantiate(config.model)
    size = padded_size(*training_size(config), size_divisor(model))
    step, _ = training_step(model, 2, size)
    run, without = DryRun(model), {key for key, parameter in model.named_parameters() if parameter.requires_grad}
    for key, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(lambda _, key=key: without.discard(key))
    assert run.activations(step).saved > 0
    assert not without
