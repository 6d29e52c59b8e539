"""tools/plan.py: proposals for a budget, their picture and their config."""

import json

import pytest

from piip_core import zoo
from piip_tools import planner
from piip_tools.flops import published_count


@pytest.fixture(scope="module")
def tool(load_tool):
    return load_tool("plan")


def test_table(tool, capsys):
    tool.main(["--budget", "450G", "--top", "4"])
    out = capsys.readouterr().out
    assert out.startswith("3 branches within 450G, baseline ViT-B 1024")
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in out.splitlines() if line.startswith("| ")]
    header, *rows = rows
    assert [row[0] for row in rows] == ["1", "2", "3", "4"]
    for row in rows:
        cells = dict(zip(header, row, strict=True))
        config = zoo.deit_pyramid(cells["models"], tuple(map(int, cells["images"].split("/"))), window_size=14)
        total = published_count(config).total
        assert cells["#FLOPs"] == f"{total.macs / 1e9:.0f}G" and cells["#Param"] == f"{total.params / 1e6:.0f}M"
        assert (cells["nearest published"], cells["its box AP"]) == ("1568/1120/672, 453G", "46.5")
    for rule in planner.RULES:
        assert f"- {rule.key}: {rule.text}" in out


def test_json_with_parameters_limit(tool, capsys):
    tool.main(["--budget", "1T", "--max-params", "200M", "--branches", "3", "--json"])
    plan = json.loads(capsys.readouterr().out)
    assert plan["budget"] == {"kind": "flops", "limit": 1e12} and plan["max_params"] == 200_000_000
    assert plan["baseline"] == "vit_l_1024" and plan["machine"] is None
    for proposal in plan["proposals"]:
        assert proposal["params_published_count"] <= 200e6 and proposal["flops_published_count"] <= 1e12
        assert proposal["nearest_published"]["box_ap"] in (43.6, 45.0, 46.5)


def test_measured_budget(tool, capsys, monkeypatch):
    runs = []

    def measure(candidate, machine):
        runs.append(machine)
        return planner.Measured(seconds=candidate.flops / 100e9, peak_bytes=2_000_000_000)

    monkeypatch.setattr(planner, "measure", measure)
    arguments = ["--budget", "3s", "--branches", "2", "--runs", "3", "--device", "cpu", "--threads", "1"]
    tool.main([*arguments, "--dtype", "bfloat16"])
    out = capsys.readouterr().out
    assert runs == [planner.Machine(device="cpu", dtype="bfloat16", threads=1)] * 3
    assert "bfloat16, 1 of" in out and "2.00GB" in out and "2 branches within 3000ms" in out
    tool.main([*arguments, "--json"])
    plan = json.loads(capsys.readouterr().out)
    assert len(plan["measured"]) == 3 and "float32" in plan["machine"]
    assert all(p["seconds"] <= 3 and p["peak_bytes"] == 2_000_000_000 for p in plan["proposals"])


def test_written_config_is_the_proposal(tool, capsys, tmp_path, monkeypatch):
    pytest.importorskip("detectron2")
    from detectron2.config import instantiate

    from piip.lazy_config import load_config

    path = tmp_path / "my_pyramid.py"
    tool.main(["--budget", "900G", "--write", str(path), "--choose", "2", "--json"])
    proposal = json.loads(capsys.readouterr().out)["proposals"][1]
    assert 10 <= len(path.read_text().splitlines()) <= 32
    monkeypatch.chdir(tmp_path)  # the file works wherever it lies
    cfg = load_config("my_pyramid.py", ["model.backbone.bottom_up.config.branches.branch1.drop_path_rate=0.3"])
    branches = cfg.model.backbone.bottom_up.config.branches
    assert branches.branch1.drop_path_rate == 0.3
    sizes, sides = proposal["models"], tuple(proposal["image_sizes"])
    expected = zoo.deit_pyramid(sizes, sides, window_size=proposal["window_size"])
    branches.branch1.drop_path_rate = expected.branches[0].drop_path_rate
    assert instantiate(cfg.model.backbone.bottom_up.config) == expected
    assert cfg.train.output_dir == f"output/mask_rcnn_{proposal['name']}_1x" and cfg.train.max_iter == 12 * 7330
    assert list(cfg.dataloader.test.mapper.augmentations[0].scales[0]) == [sides[0], sides[0] * 800 // 1333]
    # a second one does not take its place by accident
    with pytest.raises(SystemExit):
        tool.main(["--budget", "450G", "--write", str(path)])
    assert "the file exists; --force replaces it" in capsys.readouterr().err
    tool.main(["--budget", "450G", "--write", str(path), "--force"])
    assert "PIIP-TSB" in path.read_text()


def test_picture(tool, tmp_path):
    image = pytest.importorskip("PIL.Image")
    path = tmp_path / "plan.png"
    tool.main(["--budget", "450G", "--picture", str(path)])
    assert path.stat().st_size < 150_000
    with image.open(path) as picture:
        colours = picture.convert("RGB").getcolors(maxcolors=1 << 20)
    # the proposals' red is there, and the families' colours
    found = {colour for _, colour in colours}
    assert {(0xC0, 0x27, 0x2D), (0x0B, 0x7D, 0x8C), (0x4A, 0x3F, 0xB5), (0xE0, 0x8A, 0x00)} <= found


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give --budget, --max-params or both"),
        (["--budget", "450G", "--branches", "5"], "invalid choice"),
        (["--budget", "450G", "--top", "0"], "--top 0: expected at least 1"),
        (["--budget", "450G", "--write", "plan.yaml"], "expected a file name that ends in .py"),
        (["--budget", "450G", "--picture", "missing/plan.png"], "in a folder that exists"),
    ],
)
def test_mistakes(tool, capsys, arguments, message):
    with pytest.raises(SystemExit) as stopped:
        tool.main(arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--budget", "450"], "plan: budget '450': expected a positive number with a unit"),
        (["--budget", "10G"], "plan: no pyramid of 3 branches fits into 10G: the cheapest"),
        (["--max-params", "few"], "plan: 'few': expected a positive number of parameters"),
        (["--budget", "450G", "--models", "TT"], "plan: models 'TT'"),
        (["--budget", "450G", "--choose", "9", "--write", "never.py"], "plan: --choose 9: there are 6 proposals"),
        (["--budget", "1s", "--device", "meta"], "plan: device 'meta': expected cpu or cuda"),
    ],
)
def test_one_line_errors(tool, arguments, message):
    with pytest.raises(SystemExit) as stopped:
        tool.main(arguments)
    assert str(stopped.value.code).startswith(message) and "\n" not in stopped.value.code
