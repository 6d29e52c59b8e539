"""tools/analyze_model.py on a Detectron2 LazyConfig."""

import json
from pathlib import Path

import pytest

pytest.importorskip("detectron2")

CONFIGS = Path(__file__).parents[2] / "projects/PIIP/configs"


@pytest.fixture(scope="module")
def tool(load_tool):
    return load_tool("analyze_model")


def test_mask_rcnn_config(tool, capsys):
    from piip_core import zoo
    from piip_core.flops import published_count

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
