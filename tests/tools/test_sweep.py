"""tools/sweep.py: tables of the ablations, and training of a setting."""

import argparse
import contextlib
import io
import json
import shlex
from pathlib import Path

import pytest

from piip_core.zoo.ablations import ABLATIONS, CHAT_ABLATIONS, FIGURE_SETTINGS, FIGURES, TABLES

TOOL = Path(__file__).parents[2] / "tools/sweep.py"


@pytest.fixture(scope="module")
def tool(load_tool):
    return load_tool("sweep")


@pytest.fixture(scope="module")
def tables(tool):
    """What it prints without arguments: all tables."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        tool.main([])
    return printed.getvalue()


def test_every_setting_has_a_line(tables):
    lines = [line for line in tables.splitlines() if line.startswith("|") and "_" in line]
    names = [next(cell for cell in map(str.strip, line.split("|")) if "_" in cell).strip("`") for line in lines]
    assert set(names) == ABLATIONS.keys() | CHAT_ABLATIONS.keys() and len(names) == len(set(names))
    assert [line.split(":")[0] for line in tables.splitlines() if line.startswith("Table ")] == [
        f"Table {n}" for n in TABLES
    ]
    assert "- resolution_l_1792: #Param: the paper repeats" in tables


def test_one_table(tool, capsys):
    tool.main(["--table", "XVI"])
    rows = [line.split("|")[1:-1] for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    header, _, *rows = [[cell.strip() for cell in row] for row in rows]
    assert [row[0] for row in rows] == [name for name, setting in ABLATIONS.items() if setting.table == "XVI"]
    (row,) = (row for row in rows if row[0] == "interactions_12_regular")
    assert row[2:10] == ["42.0", "-", "-", row[5], "-", "592G", row[8], row[9]]
    assert round(float(row[8].rstrip("G"))) == 592 and row[9].endswith("%")
    assert header[-1] == "FLOPs with merging" and float(row[-1].rstrip("G")) > float(row[8].rstrip("G"))


def test_the_table_of_piip_llava(tables):
    cells = [[cell.strip() for cell in line.split("|")] for line in tables.splitlines() if "`chat_" in line]
    assert [row[-2].strip("`") for row in cells] == list(CHAT_ABLATIONS)
    assert [row[-5:-3] for row in cells[:3]] == [["193G", "193.5G"], ["196G", "196.2G"], ["194G", "194.3G"]]
    assert "Table XI prints other scores" in tables


@pytest.mark.parametrize("number", FIGURES)
def test_figures(tool, capsys, tmp_path, number):
    pytest.importorskip("matplotlib")
    from PIL import Image

    tool.main(["--figure", number, "--plot", str(tmp_path / "figure.png")])
    out = capsys.readouterr().out
    for panel, curves in FIGURES[number].items():
        assert f"Figure {number}, {panel}" in out
        assert all(f"| {point.name} " in out for points in curves.values() for point in points)
    with Image.open(tmp_path / "figure.png") as image:
        assert image.format == "PNG" and image.width == 850 * len(FIGURES[number])


def test_a_figure_has_rings_at_printed_and_dots_at_counted_costs():
    pytest.importorskip("matplotlib")
    from piip_tools.flops.drawing import draw_figure

    (axes,) = draw_figure("title", FIGURES["8"]).axes
    lines = {marker: [line for line in axes.lines if line.get_marker() == marker] for marker in ".o|"}
    drawn = {marker: [p for line in found for p in line.get_xydata().tolist()] for marker, found in lines.items()}
    # Tables I and XVII
    printed = [(210, 43.5), (230, 43.2), (230, 43.6), (283, 44.0), (243, 43.9), (287, 45.0), (453, 46.6)]
    assert sorted(map(tuple, drawn["o"])) == sorted(printed)
    assert sorted(score for _, score in drawn["."]) == sorted(score for _, score in printed)
    assert all(abs(x - want) < 1.1 for (x, _), (want, _) in zip(sorted(drawn["."]), sorted(printed), strict=True))
    assert len(drawn["|"]) == len([name for name in FIGURE_SETTINGS if name.startswith("direction")])


@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_stages_of_piip_llava_are_left_to_deepspeed(tool, capsys, monkeypatch, tmp_path, stage):
    monkeypatch.chdir(tmp_path)
    Path("a b.json").write_text("[]")  # what the command names has to exist
    Path("output/ablations/chat_first_stage_all/stage1").mkdir(parents=True)
    started = []
    monkeypatch.setattr(tool.os, "execv", lambda program, command: started.extend([program, *command]))
    tool.main(["--train", f"chat_first_stage_all/{stage}", "--annotations", "a b.json"])
    program, *command = started
    assert program == tool.sys.executable and capsys.readouterr().out == f"{shlex.join(command)}\n"
    pytest.importorskip("transformers")
    from llava_piip.train.presets import parse_arguments

    monkeypatch.setenv("RANK", "0")
    without_gpu = ["--use_cpu", "true", "--bf16", "false", "--tf32", "false", "--deepspeed", "none"]
    model, data, training = parse_arguments([*command[4:], *without_gpu])
    assert (model.model, data.annotations) == ("chat_first_stage_all", ["a b.json"])
    runs = "output/ablations/chat_first_stage_all/"
    assert training.output_dir == runs + stage
    assert model.projector == (runs + "stage1" if stage == "stage2" else None)


def test_merging_fewer_branches_costs_less(tables):
    lines = [line.split("|") for line in tables.splitlines() if line.startswith("| out_b")]
    flops = {line[1].strip(): float(line[-2].strip(" G")) for line in lines}
    assert flops["out_b"] < flops["out_b_s"] < flops["out_b_s_t"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train.max_iter=3"], "train.max_iter=3: further arguments go with --train only"),
        (
            ["--train", "interactions_6"],
            "argument --train: no setting is named 'interactions_6'; expected interactions_0 or",
        ),
        (["--plot", "f.png"], "--plot f.png: goes with --figure only"),
        (["--write", "out_b", "out_b.py"], "expected a file name that ends in .yaml"),
        (["--train", "out_b", "--table", "IX"], "not allowed with"),
        (["--train", "chat_interactions_0"], "chat_interactions_0/stage1"),
        (["--write", "chat_interactions_0", "out.yaml"], "those of PIIP-LLaVA have no LazyConfig"),
        (["--figure", "6", "--plot", "six.xyz"], "--plot six.xyz: expected a file name that ends in .png"),
        (["--write", "out", "out.yaml"], "--write out: expected one of"),
    ],
)
def test_mistakes(tool, capsys, arguments, message):
    with pytest.raises(SystemExit) as stopped:
        tool.main(arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("name", [*ABLATIONS, "tbl_1568_1120_672", "interactions_4_deformable_1568_896_448"])
def test_written_configs_are_the_settings(tool, name, tmp_path):
    pytest.importorskip("detectron2")
    from detectron2.config import LazyConfig, instantiate

    setting, path = (ABLATIONS | FIGURE_SETTINGS)[name], tmp_path / "sweep.yaml"
    tool.main(["--write", name, str(path)])
    cfg = LazyConfig.load(str(path))
    assert instantiate(cfg.model.backbone.bottom_up.config) == setting.config
    assert cfg.model.backbone.bottom_up.pad_divisor == setting.pad_divisor
    # everything else is the published model's that it is compared with
    single, hybrid = len(setting.config.branches) == 1, setting.table == "II"
    assert cfg.optimizer.lr == (2e-4 if hybrid else 1e-4)
    assert cfg.optimizer.params.decay_rate == (0.95 if single else 0.8 if hybrid else 0.85)
    assert cfg.train.max_iter == 12 * 7330 and cfg.train.output_dir == f"output/ablations/{name}"
    # distributed training needs to know where parameters get no gradient
    assert cfg.train.ddp.find_unused_parameters == (setting.table == "IX")
    side, multi_scale = setting.image_size, "multi_scale" in name
    scale = [1333, 800] if multi_scale or hybrid else [side, side * 800 // 1333]
    assert cfg.dataloader.test.mapper.augmentations[0].scales == [scale]
    assert cfg.data.train.get("scales") == (None if multi_scale else [scale])
    assert cfg.data.train.get("crop") == (1024 if multi_scale else None)


def test_training_a_setting_at_reduced_size(tool, tmp_path, monkeypatch):
    """Two iterations on own data: what is started, and that it trains."""
    pytest.importorskip("detectron2")
    from piip.train import main
    from piip_digits.data_sets import prepare_digits

    data, output = tmp_path / "digits", tmp_path / "run"
    prepare_digits(data, num_train=4, num_val=1)
    branches = "model.backbone.bottom_up.config.branches.branch"
    overrides = [f"{branches}{i}.image_size={side}" for i, side in ((1, 64), (2, 96), (3, 128))]
    overrides += [f"{branches}{i}.network.embed_dim={width}" for i, width in ((1, 64), (2, 32), (3, 32))]
    overrides += [f"{branches}{i}.network.num_heads=2" for i in (1, 2, 3)]
    overrides += [
        "model.backbone.bottom_up.pad_divisor=32",
        "model.proposal_generator.post_nms_topk=[20,20]",
        "data.train.scales=[[128,128]]",
        f"data.train.annotations={data}/annotations/instances_train.json",
        f"data.train.images={data}/train",
        "data.test.annotations=null",
        "dataloader.train.total_batch_size=2",
        "dataloader.train.num_workers=0",
        "train.load_pretrained=False",
        "train.max_iter=2",
        "train.device=cpu",
        f"train.output_dir={output}",
    ]
    started = []
    monkeypatch.setattr(tool.os, "execv", lambda python, command: started.extend([python, *command]))
    monkeypatch.chdir(tmp_path)
    tool.main(["--train", "out_s", *overrides])
    python, *command, option, config = started[: -len(overrides)]
    assert command == [python, str(TOOL.with_name("lazyconfig_train_net.py"))] and option == "--config-file"
    main(argparse.Namespace(config_file=config, resume=False, eval_only=False, opts=started[-len(overrides) :]))
    metrics = json.loads((output / "metrics.json").read_text().splitlines()[-1])
    assert metrics["iteration"] == 1 and 0 < metrics["total_loss"] < 100
    assert (output / "model_final.pth").is_file()
    assert config == "output/ablations/out_s.yaml" and (tmp_path / config).is_file()
