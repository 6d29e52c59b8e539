"""tools/plan.py: proposals for a budget, their picture and their config."""

import pytest

from piip_core import zoo
from piip_tools.flops.published import published_count
from piip_tools.planner.proposals import RULES, Measured, propose


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
    for rule in RULES:
        assert f"- {rule.key}: {rule.text}" in out


def test_measured_budget(tool, capsys, monkeypatch):
    runs = []

    def measure(candidate, **machine):
        runs.append(machine)
        return Measured(seconds=candidate.flops / 100e9, peak_bytes=2_000_000_000)

    monkeypatch.setattr(tool, "measure", measure)
    arguments = ["--budget", "3s", "--branches", "2", "--runs", "3", "--device", "cpu", "--threads", "1"]
    tool.main([*arguments, "--dtype", "bfloat16"])
    out = capsys.readouterr().out
    assert runs == [{"device": "cpu", "dtype": "bfloat16", "threads": 1}] * 3
    assert "1 CPU thread(s), bfloat16" in out and "2.00GB" in out and "2 branches within 3000ms" in out


def test_written_config_is_the_proposal(tool, capsys, tmp_path, monkeypatch):
    pytest.importorskip("detectron2")
    from detectron2.config import instantiate

    from piip.lazy_config import load_config

    path = tmp_path / "my_pyramid.py"
    tool.main(["--budget", "900G", "--write", str(path), "--choose", "2"])
    proposal = propose(3, flops_limit=900e9)[1].candidate
    assert 10 <= len(path.read_text().splitlines()) <= 32
    monkeypatch.chdir(tmp_path)  # the file works wherever it lies
    cfg = load_config("my_pyramid.py", ["model.backbone.bottom_up.config.branches.branch1.drop_path_rate=0.3"])
    branches = cfg.model.backbone.bottom_up.config.branches
    assert branches.branch1.drop_path_rate == 0.3
    branches.branch1.drop_path_rate = proposal.config.branches[0].drop_path_rate
    assert instantiate(cfg.model.backbone.bottom_up.config) == proposal.config
    assert cfg.train.output_dir == f"output/mask_rcnn_{proposal.name}_1x" and cfg.train.max_iter == 12 * 7330
    side = proposal.image_sizes[0]
    assert list(cfg.dataloader.test.mapper.augmentations[0].scales[0]) == [side, side * 800 // 1333]
    # a second one does not take its place by accident
    with pytest.raises(SystemExit):
        tool.main(["--budget", "450G", "--write", str(path)])
    assert "the file exists already" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("task", "branches", "gflops"),
    [
        ("detection", "dinov3:s,b", 450),
        ("detection", "dinov3_convnext:t,s", 300),
        ("segmentation", "vit_pe_spatial_tiny_patch16_512,siglip2:b", 330),
        ("classification", "dinov3:s,b", 30),
    ],
)
def test_written_configs_of_named_networks(tool, capsys, tmp_path, task, branches, gflops):
    pytest.importorskip("detectron2")
    from detectron2.config import instantiate

    from piip.lazy_config import load_config
    from piip_core.meta import on_meta

    path = tmp_path / "my_pyramid.py"
    tool.main(["--branches", branches, "--budget-gflops", str(gflops), "--task", task, "--write", str(path)])
    out, text = capsys.readouterr().out, path.read_text()
    assert out.startswith(f"{branches} within {gflops}G")
    assert ("dinov3-license" in out) == ("dinov3-license" in text) == ("dinov3" in branches)
    (best, *_) = propose(2, flops_limit=gflops * 1e9, models=zoo.families.parse(branches), task=task)
    assert 0.9 * gflops * 1e9 <= best.candidate.flops <= gflops * 1e9 and "spent" in best.met
    cfg = load_config(str(path), ["train.load_pretrained=False"])
    with on_meta():
        model = instantiate(cfg.model)
    (config,) = (m.config for m in model.modules() if type(m).__name__ == "PIIP")
    expected = best.candidate.config
    expected = getattr(expected, "pyramid", expected).branches
    assert [(b.network, b.image_size, b.pretrained) for b in config.branches] == [
        (b.network, b.image_size, b.pretrained) for b in expected
    ]
    cfg.optimizer.params.model = model
    assert len(instantiate(cfg.optimizer).param_groups) > 1


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
        (["--budget", "450G", "--branches", "5"], "--branches 5: expected 2, 3 or 4"),
        (["--budget", "450G", "--task", "classification"], "--branches 3: expected 2, 3 or 4 for detection"),
        (["--budget", "450G", "--branches", "dinov3:s,l", "--models", "SL"], "--models SL: expected with a number"),
        (["--budget", "450G", "--top", "0"], "--top 0: expected at least 1"),
        (["--budget", "1s", "--device", "meta"], "argument --device: meta: expected cpu, cuda or cuda:N"),
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
        (["--budget", "450G", "--branches", "resnet50,dinov3:l"], "plan: TimmConfig.name='resnet50': timm's class is"),
        (["--budget", "450G", "--branches", "dinov3:b,s"], "plan: dinov3:b,s: expected the smallest network first"),
        (["--budget", "450G", "--choose", "9", "--write", "never.py"], "plan: --choose 9: there are 6 proposals"),
    ],
)
def test_one_line_errors(tool, arguments, message):
    with pytest.raises(SystemExit) as stopped:
        tool.main(arguments)
    assert str(stopped.value.code).startswith(message) and "\n" not in stopped.value.code
