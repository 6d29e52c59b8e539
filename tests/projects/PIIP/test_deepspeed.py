"""Two processes under DeepSpeed: the losses and weights of two without, also after kill -9 in the middle of a save."""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import sys
from pathlib import Path

import pytest

pytest.importorskip("detectron2")

import torch
from detectron2.config import instantiate
from omegaconf import OmegaConf
from safetensors.torch import load_file

from piip.checkpointer import RUN_STATE, CategoryTable, read_categories
from piip.deepspeed_training import (
    DeepSpeedCheckpointer,
    build_engine,
    deepspeed_config,
    export_checkpoint,
    run_folder,
    zero_stage,
)
from piip.hooks import FINAL_AVERAGE, ClipNorm
from piip.lazy_config import follow_annotations, load_config
from piip.train import evaluate_only, main
from piip_core.checkpoints import read_checkpoint
from piip_core.deepspeed_start import import_deepspeed
from piip_core.errors import CheckpointError, ConfigError
from piip_core.training_checkpoints import OutputFolderError

HERE = Path(__file__).parent
CONFIG, DINO, CLASSIFIER = (str(HERE / f"tiny_{name}.py") for name in ("piip_mask_rcnn", "dino", "classifier"))
# In float32, ZeRO adds up the same numbers as DistributedDataParallel with two processes, in stage 3 in another order
# (2^-24 relative); updates are at most 1e-3
WEIGHT = dict(rtol=0, atol=1e-5)


def losses(run: Path) -> dict[int, float]:
    lines = [json.loads(line) for line in (run / "metrics.json").read_text().splitlines()]
    return {line["iteration"]: line["total_loss"] for line in lines if "total_loss" in line}


def results(run: Path) -> list[dict]:
    entries = json.loads((run / "inference" / "coco_instances_results.json").read_text())
    return sorted(entries, key=lambda entry: (entry["image_id"], -entry["score"]))


@pytest.fixture(scope="module")
def runs(shared_coco, shared_folders, tmp_path_factory, launch) -> Path:
    """Folders of finished runs: ddp, zero1, zero3, which was killed while it saved and resumed, and two in bfloat16.

    And of classifiers with averaged weights: classes_ddp and classes_zero2, which was resumed; of DINO: dino_ddp and
    dino_zero3.
    """
    folder = tmp_path_factory.mktemp("runs")
    data = [*shared_coco.overrides("train"), "data.test.annotations=null"]
    with_test = shared_coco.overrides("train", "test")

    def spec(name, *opts, **more):
        return {"opts": [f"train.output_dir={folder / name}", *opts], **more}

    zero3 = ("train.deepspeed.stage=3", "train.checkpointer.max_to_keep=2")

    def classes(name, *opts, **more):
        return spec(name, *shared_folders.overrides(), *opts, config_file=CLASSIFIER, **more)

    def dino(name, *opts):
        return spec(name, *data, "train.max_iter=2", *opts, config_file=DINO)

    divide_all = folder / "divide_all.json"  # DeepSpeed leaves parameters whole that are as small as these
    divide_all.write_text('{"zero_optimization": {"stage3_param_persistence_threshold": 0}}')
    zero2 = "train.deepspeed.stage=2"
    cheap = "model.backbone.bottom_up.use_act_checkpoint=cheap"
    to_be_killed = [
        spec("ddp", *data),
        spec("zero1", *data, cheap, "train.deepspeed.stage=1"),
        spec("ddp_bf16", *data, "train.amp.enabled=True"),
        spec("zero2_bf16", *data, "train.amp.enabled=True", "train.deepspeed.stage=2"),
        classes("classes_ddp"),
        classes("classes_zero2", zero2),
        dino("dino_ddp"),
        dino("dino_zero3", "train.deepspeed.stage=3", f"train.deepspeed.config={divide_all}"),
        spec("zero3", *data, *zero3, kill_at="checkpoint-4"),
    ]
    to_be_resumed = [
        classes("classes_zero2", zero2, resume=True, forget=str(folder / "classes_zero2" / "checkpoint-4")),
        spec("zero3", *with_test, *zero3, resume=True),
    ]
    statuses = launch(folder, CONFIG, to_be_killed, to_be_resumed)
    assert statuses[0][0] == -signal.SIGKILL and statuses[1] == [0, 0]
    return folder


@pytest.mark.parametrize("name", ["zero1", "zero3"])
def test_weights_are_those_without_deepspeed_also_after_an_interruption(runs, name):
    weights = load_file(runs / name / "model_final.safetensors")
    whole = torch.load(runs / "ddp" / "model_final.pth", weights_only=True)["model"]
    assert weights.keys() == whole.keys()
    for key, tensor in whole.items():
        torch.testing.assert_close(weights[key], tensor, **WEIGHT, msg=key)


def test_classifiers_and_their_averages_are_those_without_deepspeed_also_after_an_interruption(runs):
    expected = torch.load(runs / "classes_ddp" / "model_final.pth", weights_only=True)["model"]
    averages = [load_file(runs / name / FINAL_AVERAGE) for name in ("classes_zero2", "classes_ddp")]
    weights = load_file(runs / "classes_zero2" / "model_final.safetensors")
    for found, wanted in ((weights, expected), averages):
        assert found.keys() == wanted.keys()
        for key, tensor in wanted.items():
            torch.testing.assert_close(found[key], tensor, **WEIGHT, msg=key)
    assert any((averages[0][key] - tensor).abs().max() > 1e-4 for key, tensor in expected.items())


def test_two_processes_count_every_image_once(runs, shared_folders, tmp_path):
    """Nine images, of which one process has five."""
    for name, file in (("", "model_final.pth"), ("ema/", FINAL_AVERAGE)):
        opts = [f"train.init_checkpoint={runs / 'classes_ddp' / file}", *shared_folders.overrides()]
        cfg = load_config(CLASSIFIER, opts)
        follow_annotations(cfg, training=False)
        alone = evaluate_only(cfg)["classification"]["top1"]
        for run in ("classes_ddp", "classes_zero2"):
            lines = [json.loads(line) for line in (runs / run / "metrics.json").read_text().splitlines()]
            found = [line[f"{name}classification/top1"] for line in lines if f"{name}classification/top1" in line]
            assert found[-1] == pytest.approx(alone) and 0 < alone < 100


def test_losses_are_those_without_deepspeed(runs):
    expected = losses(runs / "ddp")
    assert expected.keys() == {0, 1, 2, 3} and expected[3] != pytest.approx(expected[0], rel=0.01)
    assert losses(runs / "zero1") == pytest.approx(expected, rel=0, abs=1e-6)


def test_dino_is_the_same_where_all_parameters_are_divided(runs):
    found, expected = (losses(runs / name) for name in ("dino_zero3", "dino_ddp"))
    assert expected.keys() == {0, 1} and found == pytest.approx(expected, rel=1e-5)
    weights = load_file(runs / "dino_zero3" / "model_final.safetensors")
    whole = torch.load(runs / "dino_ddp" / "model_final.pth", weights_only=True)["model"]
    assert weights.keys() == whole.keys()
    for key, tensor in whole.items():
        parts = weights[key], tensor
        if key.rpartition(".")[2] == "in_proj_bias":
            # That of the keys has no gradient but what rounding leaves, of which AdamW makes whole steps
            parts = [part.unflatten(0, (3, -1))[[0, 2]] for part in parts]
        torch.testing.assert_close(*parts, **WEIGHT, msg=key)


def test_bfloat16_is_the_same_too(runs):
    """Gradients are summed in float32 where autocast's cache, which we turn off, sums them in bfloat16."""
    found, expected, float32 = (losses(runs / name) for name in ("zero2_bf16", "ddp_bf16", "ddp"))
    assert found[0] == pytest.approx(expected[0], rel=0, abs=1e-6)  # before the first update
    assert float32[0] != pytest.approx(expected[0], rel=0, abs=1e-4)
    assert found == pytest.approx(expected, rel=0, abs=5e-3)
    assert load_file(runs / "zero2_bf16" / "model_final.safetensors")["roi_heads.box_head.fc1.weight"].dtype == (
        torch.float32
    )


def test_a_killed_save_leaves_the_last_good_checkpoint_and_no_debris_after_resuming(runs):
    run = run_folder(str(runs / "zero3"))
    assert not (run.path / run.STAGING).exists()
    assert [path.name for path in run.checkpoints()] == ["checkpoint-2", "checkpoint-4"]
    final = load_file(run.path / "model_final.safetensors")
    last = read_checkpoint(run.path / "checkpoint-4").state
    assert last.keys() == final.keys() and all(torch.equal(last[key], tensor) for key, tensor in final.items())


def test_any_checkpoint_can_be_exported(runs, tmp_path):
    for name in ("zero2_bf16", "zero3"):
        target = tmp_path / f"{name}.safetensors"
        assert export_checkpoint(runs / name / "checkpoint-2", target) == target
        state, categories = read_checkpoint(runs / name / "checkpoint-2").state, read_categories(str(target))
        assert all(torch.equal(state[key], tensor) for key, tensor in load_file(target).items())
        assert [category.name for category in categories] == ["square", "bar", "disc"]
    with pytest.raises(CheckpointError, match=r"has no run_state\.pth; expected the checkpoint-N"):
        export_checkpoint(runs / "ddp", target)


def test_the_final_file_evaluates_as_the_run_did(runs, shared_coco, tmp_path):
    final = runs / "zero3" / "model_final.safetensors"
    assert [category.name for category in read_categories(str(final))] == ["square", "bar", "disc"]
    assert read_categories(str(runs / "zero3" / "checkpoint-4")) == read_categories(str(final))
    opts = [*shared_coco.overrides("test"), f"train.init_checkpoint={final}", f"train.output_dir={tmp_path}"]
    main(argparse.Namespace(config_file=CONFIG, opts=opts, resume=False, eval_only=True))
    found, expected = results(tmp_path), results(runs / "zero3")
    assert len(found) == len(expected) > 0
    for one, other in zip(found, expected, strict=True):
        assert one["score"] == pytest.approx(other["score"], abs=1e-5)
        assert one["bbox"] == pytest.approx(other["bbox"], abs=1e-2)


def test_the_last_checkpoint_of_a_run_can_be_evaluated(runs, shared_coco, tmp_path):
    shutil.copytree(runs / "zero2_bf16", tmp_path / "run")
    opts = [*shared_coco.overrides("test"), f"train.output_dir={tmp_path / 'run'}"]
    main(argparse.Namespace(config_file=CONFIG, opts=opts, resume=True, eval_only=True))
    assert results(tmp_path / "run")


def test_runs_with_and_without_deepspeed_are_told_apart(runs, shared_coco):
    data = [*shared_coco.overrides("train"), "data.test.annotations=null"]

    def train(name, *opts, resume):
        opts = [*data, f"train.output_dir={runs / name}", *opts]
        main(argparse.Namespace(config_file=CONFIG, opts=opts, resume=resume, eval_only=False))

    with pytest.raises(OutputFolderError, match=r"was trained under DeepSpeed\. Go on with --resume and its"):
        train("zero3", resume=True)
    with pytest.raises(OutputFolderError, match=r"was trained without DeepSpeed\. Go on with --resume and its"):
        train("ddp", "train.deepspeed.stage=2", resume=True)
    with pytest.raises(OutputFolderError, match=r"holds an earlier run \(.*checkpoint-4\). Give --resume"):
        train("zero3", "train.deepspeed.stage=3", resume=False)


@pytest.mark.parametrize(
    ("state", "words"),
    [
        ({"num_processes": 2, "stage": 3}, "is of a run with 2 processes, this one has 1"),
        ({"num_processes": 1, "stage": 2}, "is of ZeRO stage 2, this run of 3. Go on with train.deepspeed.stage=2"),
    ],
)
def test_checkpoints_that_were_divided_otherwise_are_refused(state, words, tmp_path):
    torch.save(state, tmp_path / RUN_STATE)
    engine = argparse.Namespace(zero_optimization_stage=lambda: 3)
    with pytest.raises(OutputFolderError, match=words):
        DeepSpeedCheckpointer(engine, None, str(tmp_path), CategoryTable()).load(tmp_path)


@pytest.mark.parametrize(
    ("opts", "words"),
    [
        (["train.deepspeed.stage=4"], "stage=4: expected 1, 2 or 3, or 0"),
        (["train.deepspeed.stage=2", "train.amp.enabled=True", "train.amp.precision=float16"], "expected bfloat16"),
        (["train.deepspeed.stage=2", "train.deepspeed.offload_parameters=True"], "expected train.deepspeed.stage=3"),
        (["train.deepspeed.stage=1", "train.deepspeed.config=nowhere.json"], "config=nowhere.json: no such file"),
    ],
)
def test_settings_that_cannot_be_meant(opts, words):
    with pytest.raises(ConfigError, match=words):
        deepspeed_config(load_config(CONFIG, opts), 1)


def test_cheap_recomputation_is_refused_in_stage_3():
    """ZeRO-3 adds biases in place to products that would be kept, so their gradients would be wrong."""
    cfg = load_config(CONFIG, ["train.deepspeed.stage=3", "model.backbone.bottom_up.use_act_checkpoint=cheap"])
    model = instantiate(cfg.model)
    with pytest.raises(ConfigError, match="use_act_checkpoint=cheap: expected True or False with"):
        build_engine(cfg, model, torch.optim.AdamW(model.parameters()), 1)


def test_a_file_of_settings_goes_first(tmp_path):
    (tmp_path / "more.json").write_text('{"zero_optimization": {"overlap_comm": false}, "steps_per_print": 5}')
    opts = ["train.deepspeed.stage=3", "train.deepspeed.offload_optimizer=True"]
    plain = deepspeed_config(load_config(CONFIG, opts), 4)
    merged = deepspeed_config(load_config(CONFIG, [*opts, f"train.deepspeed.config={tmp_path / 'more.json'}"]), 4)
    assert plain["zero_optimization"]["overlap_comm"] and plain["gradient_clipping"] == 1.0
    assert merged == plain | {
        "steps_per_print": 5,
        "zero_optimization": plain["zero_optimization"] | {"overlap_comm": False},
    }
    assert zero_stage(OmegaConf.create({"train": {"amp": {"enabled": False}}})) == 0  # a LazyConfig that knows nothing


def test_without_deepspeed_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    with pytest.raises(ConfigError, match=r"DeepSpeed cannot be imported .*\[deepspeed\]"):
        import_deepspeed("cpu")


def test_gradients_are_clipped_over_all_groups():
    weights = [torch.nn.Parameter(torch.zeros(size)) for size in (3, 5)]
    hook = ClipNorm(2.0)
    hook.trainer = argparse.Namespace(optimizer=torch.optim.SGD([{"params": [weight]} for weight in weights], lr=1.0))
    for weight, value in zip(weights, (3.0, 4.0), strict=True):
        weight.grad = torch.zeros_like(weight)
        weight.grad[0] = value
    hook.after_backward()  # norm 5
    assert [weight.grad[0].item() for weight in weights] == pytest.approx([1.2, 1.6], rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_killed_at_eight_points_of_a_save_a_run_goes_on_bit_by_bit(stage, shared_coco, kill_saves):
    opts = [*shared_coco.overrides("train"), "data.test.annotations=null", f"train.deepspeed.stage={stage}"]
    opts += ["train.max_iter=6", "train.checkpointer.period=2", "dataloader.train.num_workers=0"]
    kill_saves(program="detection", config=CONFIG, arguments=[*opts, "train.log_period=1"])
