"""tools/sweep.py --claim: its settings, what it trains, and the table; no training."""

import json
import statistics
from pathlib import Path

import pytest
import torch

pytest.importorskip("detectron2")

from detectron2.config import instantiate

from piip_core.classifier import PIIPClassifier
from piip_core.errors import UserError
from piip_core.meta import on_meta
from piip_core.zoo.ablations import ABLATIONS
from piip_tools import claim


def test_settings_cost_the_same():
    counts = {name: claim.executed_flops(name) for name in claim.SETTINGS}
    median = statistics.median(counts.values())
    assert {name: n for name, n in counts.items() if abs(n / median - 1) > claim.TOLERANCE} == {}


def test_every_setting_is_compared_with_one_of_the_paper():
    rows = [row for rows in claim.COMPARISONS.values() for row in rows]
    assert {name for name, _, _ in rows} == claim.SETTINGS.keys()
    for compared in claim.COMPARISONS.values():  # the paper's order
        scores = [ABLATIONS[printed].paper.box_ap for _, _, printed in compared]
        assert scores == sorted(scores, reverse=True)
    for name, printed in (("direct", "design_tsb_448_672_896"), ("cycle_up", "direction_cycle_up")):
        assert printed in [row[2] for row in rows if row[0] == name]
        assert claim.SETTINGS[name].interaction.units == ABLATIONS[printed].config.interaction.units


@pytest.fixture
def trained(monkeypatch):
    """Names of the folders that would have been trained; scores are numbers of the seed."""
    folders = []

    def train(cfg, folder, seed):
        folders.append(folder.parent.name)
        return {f"bbox/{name}": 10.0 + seed for name in ("AP", "AP50", "APs", "APm")}

    monkeypatch.setattr(claim, "train", train)
    monkeypatch.setattr(claim, "detector_config", lambda config, output: None)
    monkeypatch.setattr(claim, "prepare", lambda *args: None)
    return folders


def test_a_second_call_trains_only_what_is_missing(trained, tmp_path):
    claim.run_claim(tmp_path)
    assert trained == [f"{name}_{seed}" for seed in claim.SEEDS for name in claim.SETTINGS]  # seed after seed
    (tmp_path / "results/plain_1.json").unlink()
    other = tmp_path / "results/direct_2.json"
    other.write_text(other.read_text().replace('"image_size": 36', '"image_size": 40'))  # of another backbone
    shorter = tmp_path / "results/regular_0.json"
    shorter.write_text(shorter.read_text().replace('"steps": 300', '"steps": 150'))
    trained.clear()
    claim.run_claim(tmp_path)
    assert trained == ["regular_0", "plain_1", "direct_2"]
    trained.clear()
    claim.run_claim(tmp_path)
    assert trained == []


def test_a_failing_run_leaves_the_others(trained, tmp_path, monkeypatch):
    train = claim.train

    def fail(cfg, folder, seed):
        if folder.parent.name == "plain_0":
            raise UserError("plain_0 stopped")
        return train(cfg, folder, seed)

    monkeypatch.setattr(claim, "train", fail)
    with pytest.raises(UserError, match="plain_0 stopped"):
        claim.run_claim(tmp_path)
    assert {seed for _, seed in claim.finished_runs(tmp_path)} == {0} and "plain_0" not in trained


def test_table(trained, tmp_path, monkeypatch):
    monkeypatch.setattr(claim, "executed_flops", lambda name: 137_900_000)
    claim.run_claim(tmp_path)
    (tmp_path / "results/direct_2.json").unlink()
    for seed in claim.SEEDS:
        (tmp_path / f"results/plain_{seed}.json").unlink()
    lines = claim.claim_table(claim.finished_runs(tmp_path)).splitlines()
    rows = {cells[1]: cells for cells in ([cell.strip() for cell in line.split("|")[1:-1]] for line in lines)}
    assert rows["parameter-inverted pyramid"] == [
        *("Design", "parameter-inverted pyramid", "52/36/20", "0.138", "3", "11.0 ± 1.0", "11.0 ± 1.0", "46.6")
    ]
    assert rows["parameter-direct pyramid"][4:] == ["2", "10.5 ± 0.7", "10.5 ± 0.7", "42.6"]
    assert rows["the large network alone"][4:] == ["0", "-", "-", "43.8"]
    assert len(lines) == 2 + sum(map(len, claim.COMPARISONS.values()))


def test_the_detector_has_lengths_in_proportion_to_its_image(tmp_path):
    for name in ("inverted", "direct", "plain"):
        cfg = claim.detector_config(claim.SETTINGS[name], tmp_path)
        side = claim.SETTINGS[name].image_size
        assert cfg.data.train.scales == [[side, side]] == cfg.data.test.scales
        cfg.data.num_classes = 10
        with on_meta():
            model = instantiate(cfg.model)
        branches = model.backbone.bottom_up.features.pyramid.config.branches
        assert [Path(branch.pretrained).stem for branch in branches] == list("BST")[: len(branches)]
        largest = max(max(sizes) for sizes in cfg.model.proposal_generator.anchor_generator.sizes)
        assert largest == pytest.approx(0.3 * side)


def test_a_branch_starts_from_its_pretrained_network(monkeypatch, tmp_path):
    trained = {}

    def train(cfg, folder, seed):
        trained[folder.name] = PIIPClassifier(instantiate(cfg.model.config))
        folder.mkdir(parents=True)
        # As in the checkpoints of the trainer
        state = {f"network.{name}": tensor for name, tensor in trained[folder.name].state_dict().items()}
        torch.save({"model": state}, folder / "model_final.pth")

    monkeypatch.setattr(claim, "train", train)
    for network in claim.NETWORKS:
        claim._pretrain(network, tmp_path)
        claim._pretrain(network, tmp_path)  # there already
    cfg = claim.detector_config(claim.SETTINGS["inverted"], tmp_path)
    cfg.model.backbone.bottom_up.pretrained = True
    pyramid = instantiate(cfg.model.backbone.bottom_up).features.pyramid
    for branch, network in zip(pyramid.branches, claim.NETWORKS, strict=True):
        before = trained[f"pretraining_{network}"].pyramid.branches[0].state_dict()
        after = branch.state_dict()
        assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def test_the_command_says_why_it_stops(load_tool, monkeypatch, tmp_path, capsys):
    tool = load_tool("sweep")
    with pytest.raises(SystemExit):
        tool.main(["--output", str(tmp_path)])
    assert "goes with --claim only" in capsys.readouterr().err

    def fail(output):
        raise UserError(f"stopped in {output}")

    monkeypatch.setattr(claim, "run_claim", fail)
    with pytest.raises(SystemExit, match=f"sweep: stopped in {tmp_path}"):
        tool.main(["--claim", "--output", str(tmp_path)])
    monkeypatch.setattr(claim, "run_claim", lambda output: None)
    monkeypatch.setattr(claim, "finished_runs", lambda output: json.loads("{}"))
    tool.main(["--claim", "--output", str(tmp_path)])
    assert "| parameter-direct pyramid" in capsys.readouterr().out
