import json

import pytest

from piip_core import zoo


@pytest.fixture(scope="module")
def tool(load_tool):
    return load_tool("analyze_model")


def test_model_json_and_table(tool, capsys):
    tool.main(["vit_b_1024", "--json", "--input", "600", "1000"])
    report = json.loads(capsys.readouterr().out)
    assert report["name"] == "vit_b_1024"
    assert report["input_size"] == [640, 1024]  # padded to the model's 64
    assert sum(row["flops"] or 0 for row in report["modules"]) == report["flops"]
    tool.main(["vit_b_1024", "--input", "600", "1000"])
    lines = capsys.readouterr().out.splitlines()
    assert "640 x 1024" in lines[0] and lines[-1].split("|")[1].strip() == "total"
    assert f"{report['flops'] / 1e9:.1f}" in lines[-1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required: config"),
        (["vit_b_1024", "model.backbone=1"], "model.backbone=1"),
        (["vit_b_1024", "--input", "0", "64"], "--input 0 64"),
    ],
)
def test_arguments_that_do_not_go_together(tool, capsys, arguments, message):
    with pytest.raises(SystemExit) as stopped:
        tool.main(arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_unknown_model(tool):
    with pytest.raises(SystemExit, match=r"close matches are.*vit_b_1024"):
        tool.main(["vit_b"])


@pytest.fixture
def memory(tool, capsys, monkeypatch, tiny_config):
    """Runs the tool with --memory on a model of three branches with two blocks each, the first 32 wide."""
    entry = zoo.ZooEntry(name="tiny", config=tiny_config(), pad_divisor=32)
    monkeypatch.setattr(zoo, "find", lambda name: entry)

    def run(*arguments):
        tool.main(["tiny", "--memory", "--input", "250", "250", *arguments])
        return capsys.readouterr().out

    return run


def test_memory(memory):
    report = json.loads(memory("--json", "--gpu-memory", "0.1"))
    assert report["setting"]["input_size"] == [256, 256]
    by_way = {(way["stage"], way["checkpointing"]): way for way in report["estimates"]}
    assert len(by_way) == 11
    assert by_way[0, False]["states"]["parameters"] == 4 * report["params"]
    peaks = [by_way[0, checkpointing]["activations"]["peak"] for checkpointing in (True, "cheap", False)]
    assert peaks == sorted(peaks)
    for way in by_way.values():
        assert sum(way["activations"]["kept"].values()) == way["activations"]["saved"]
    # float32 copies of 2 images through 2 blocks of width 32 at 8 x 8 tokens are the least that is kept
    assert by_way[0, True]["activations"]["saved"] > 4 * 2 * 2 * 32 * 8 * 8
    fits = [way["fits"] for way in report["estimates"]]
    assert fits == [way["total"] <= 0.9 * 0.1 * 2**30 for way in by_way.values()] and any(fits)
    assert "fits on 8 x 0.1 GB" in report["answer"]


def test_what_is_kept_by_module(memory):
    table = memory("--kept").split("kept, MB")[1]
    rows = {
        name.strip(): list(map(float, cells))
        for name, *cells in (row.strip("|").split("|") for row in table.splitlines()[2:])
    }
    off, cheap, everything = rows["all"]
    assert 0 < everything < cheap < off
    assert [sum(column) for column in zip(*rows.values(), strict=True)] == pytest.approx(
        [2 * off, 2 * cheap, 2 * everything], abs=2
    )
    norm = rows["DensePIIP.feature_pyramid.levels.4.1"]
    assert norm[0] > 0 == norm[1] == norm[2]


def test_memory_that_is_not_enough(memory):
    lines = memory("--gpu-memory", "0.001").splitlines()
    assert "2 x 256 x 256 pixels" in lines[0]
    assert "The backbone alone" in lines[-2]
    assert lines[-1].startswith("tiny does not fit on 8 x 0.001 GB: the least is")


def test_classifiers_are_counted_with_their_heads(tool, capsys):
    tool.main(["piip_tsb_368_192_128", "--json"])
    report = json.loads(capsys.readouterr().out)
    entry = zoo.classification("piip_tsb_368_192_128")
    assert report["input_size"] == [368, 368]
    assert report["params"] / 1e6 == pytest.approx(entry.published.params_m, rel=0.003)
    assert report["flops"] / 1e9 == pytest.approx(entry.published.flops_g, rel=0.003)
    head = report["modules"][-1]
    assert head["name"] == "head" and head["params"] == head["params_published_count"]
