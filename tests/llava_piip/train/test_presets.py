"""Presets and the command line: the paper's numbers, overriding, and mistakes."""

import json
from pathlib import Path

import pytest
import torch
from transformers import TrainingArguments

from llava_piip.train.arguments import deepspeed_config
from llava_piip.train.presets import list_presets, load_preset, parse_arguments
from piip_core import zoo
from piip_core.errors import ConfigError
from piip_core.zoo.ablations import CHAT_ABLATIONS

ROWS = [*(entry.name for entry in zoo.multimodal_entries()), *CHAT_ABLATIONS]
GIVEN = ("--annotations", "a.json", "--image_root", "images", "--output_dir", "out")
CPU = ("--use_cpu", "true", "--tf32", "false", "--bf16", "false", "--deepspeed", "none", "--report_to", "none")
# The settings of the published models: what the stages share, and what differs
BOTH = {
    "weight_decay": 0.0,
    "adam_beta1": 0.9,
    "adam_beta2": 0.999,
    "adam_epsilon": 1e-8,
    "lr_scheduler_type": "cosine",
    "num_train_epochs": 1,
    "max_length": 2048,
    "bf16": True,
    "activation_checkpointing": True,
    "max_grad_norm": 0.0,
    "loss_average": "micro_batch",
    "warmup_steps": 0.03,
    "seed": 42,
}
STAGES = {
    "stage1": {
        "learning_rate": 1e-3,
        "total_batch_size": 256,
        "per_device_train_batch_size": 32,
        "deepspeed": "zero2",
        "chat_template": "plain",
        "pad_to_square": False,
        "images_as_viewed": False,
        "group_by_modality": False,
    },
    "stage2": {
        "learning_rate": 2e-5,
        "total_batch_size": 128,
        "per_device_train_batch_size": 4,
        "deepspeed": "zero3",
        "chat_template": "vicuna_v1",
        "pad_to_square": True,
        "images_as_viewed": False,
        "group_by_modality": True,
    },
}
# In the first stage, Table XIII
UNFROZEN = {"chat_first_stage_interactions": ["interactions"], "chat_first_stage_all": ["vision_tower"]}
EVERYTHING, WITHOUT_VISION = ["projector", "language_model", "vision_tower"], ["projector", "language_model"]


@pytest.fixture(autouse=True)
def given_files(tmp_path, monkeypatch):
    """Makes the files and folders that the command lines name."""
    monkeypatch.chdir(tmp_path)
    for file in ("a.json", "one.json", "x.json", "y.json", "x", "y", "z"):
        Path(file).touch()
    for folder in ("images", "i", "j"):
        Path(folder).mkdir()


def parse(*arguments):
    return parse_arguments([*arguments, *GIVEN, *CPU])


def test_every_row_of_the_zoo_has_both_stages_and_no_other_row_has_any():
    found = {name for name in list_presets() if "/" in name}
    more = {entry.name for entry in zoo.chat_models()}
    assert {name for name in found if name.partition("/")[0] not in more} == {f"{r}/{s}" for r in ROWS for s in STAGES}
    assert {name.partition("/")[0] for name in found} == {*ROWS, *more}


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("stage", STAGES)
def test_presets_have_the_papers_numbers(row, stage):
    preset = load_preset(f"{row}/{stage}")
    expected = BOTH | STAGES[stage] | {"model": row}
    assert {key: preset.get(key) for key in expected} == expected
    if stage == "stage2":
        assert preset["train_parts"] == (WITHOUT_VISION if row.startswith("llava") else EVERYTHING)
    else:
        assert preset["train_parts"] == ["projector", *UNFROZEN.get(row, [])]


@pytest.mark.parametrize(("stage", "devices", "expected"), [("stage1", 8, 1), ("stage2", 8, 4), ("stage2", 2, 16)])
def test_the_batch_stays_that_of_the_paper_on_any_number_of_devices(stage, devices, expected, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", str(devices))
    monkeypatch.setattr(TrainingArguments, "__post_init__", lambda self: None)  # there are no such devices
    assert parse(f"{ROWS[1]}/{stage}")[2].gradient_accumulation_steps == expected


@pytest.mark.parametrize("name", ["stage1", "stage2", "stage2_lora", "stage2_qlora", f"{ROWS[1]}/stage2"])
def test_presets_parse_into_arguments_and_given_keys_override_them(name):
    model, data, training = parse(name, "--model", "mine", "--learning_rate", "3e-4", "--vision_lr", "1e-6")
    assert model.model == "mine" and data.annotations == ["a.json"] and training.output_dir == "out"
    assert training.learning_rate == 3e-4 and training.learning_rate_of("vision_tower") == 1e-6
    assert training.learning_rate_of("language_model") == 3e-4
    assert training.get_warmup_steps(2181) == 66  # rounded up
    assert training.optim == "adamw_torch" and not data.images_as_viewed


def test_a_preset_of_ones_own_builds_on_one_of_the_package(tmp_path):
    (tmp_path / "mine.yaml").write_text("base: stage2\nmodel: folder\nlearning_rate: 1e-4\nannotations: one.json\n")
    (tmp_path / "next.yaml").write_text("base: mine.yaml\nvision_lr: 2e-6\n")
    model, data, training = parse_arguments([str(tmp_path / "next.yaml"), "--output_dir", "out", *CPU])
    assert (model.model, data.annotations, training.vision_lr) == ("folder", ["one.json"], 2e-6)
    assert training.learning_rate == 1e-4 and data.chat_template == "vicuna_v1"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["stage2", "--model", "m", "--learnign_rate", "1"], "did you mean learning_rate"),
        (["stage2", "--model", "m", "--learn", "1"], "'--learn': no such argument"),  # nothing is abbreviated
        (["stage3", "--model", "m"], "did you mean stage"),
        (["stage2", "--model", "m", "--learning_rate", "high"], "invalid float value: 'high'"),
        (["stage2"], "model=None"),
        (["stage2", "--model", "m", "--deepspeed", "zero4"], "expected zero2"),
        (["stage2", "--model", "m", "--train_parts", "vision"], "expected one of 'projector'"),
        (["stage2", "--model", "m", "--bits", "4"], "16 without --lora"),
        (["stage2", "--model", "m", "--lora", "true"], "expected no 'language_model' with lora=True"),
        (["stage2", "--model", "m", "--resume", "true", "--overwrite_output_dir", "true"], "expected False together"),
        (["stage2", "--model", "m", "--total_batch_size", "9"], "a multiple of per_device_train_batch_size x devices"),
        (["stage2", "--model", "m", "--gradient_accumulation_steps", "2"], "total_batch_size=128 needs 32"),
        (["stage2", "--model", "m", "--on_error", "ignore"], "on_error='ignore'"),
    ],
)
def test_mistakes_on_the_command_line_name_what_is_wrong(arguments, message):
    with pytest.raises(ConfigError) as error:
        parse_arguments([*CPU, *arguments, *GIVEN] if "--deepspeed" in arguments else [*arguments, *GIVEN, *CPU])
    assert message.lower() in str(error.value).lower()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("learnign_rate: 1", "did you mean learning_rate"),
        ("- a", "expected 'key: value' lines"),
        ("a: [", "not a YAML file"),
        ("base: p.yaml", "builds on itself"),
        ("base: nothing", "no such preset or file"),
        ("learning_rate: [1, 2]", "expected a single value"),
    ],
)
def test_mistakes_in_a_preset_name_the_file(tmp_path, content, message):
    (tmp_path / "p.yaml").write_text(content)
    with pytest.raises(ConfigError, match=r"p\.yaml|preset") as error:
        load_preset(tmp_path / "p.yaml")
    assert message in str(error.value)


def test_several_annotation_files_have_their_image_folders():
    _, data, _ = parse("stage2", "--model", "m", "--annotations", "x.json", "y.json", "--image_root", "i", "j")
    assert data.roots() == "images"  # the last ones given count: those of GIVEN
    _, data, _ = parse_arguments(
        ["stage2", "--model", "m", "--output_dir", "o", "--annotations", "x", "y", "--image_root", "i", "j", *CPU]
    )
    assert data.roots() == {"x": "i", "y": "j"}
    with pytest.raises(ConfigError, match="one folder, or one for each of the 3"):
        parse_arguments(["stage2", "--model", "m", "--annotations", "x", "y", "z", "--image_root", "i", "j", *CPU])


@pytest.mark.parametrize(("name", "stage"), [("zero2", 2), ("zero3", 3), ("zero2_offload", 2), ("zero3_offload", 3)])
def test_deepspeed_files_leave_everything_to_the_arguments_and_never_clip(name, stage):
    config = json.loads(Path(deepspeed_config(name)).read_text())
    assert config["zero_optimization"]["stage"] == stage
    # without the key DeepSpeed would clip at 1; "auto" is filled with max_grad_norm
    assert config["gradient_clipping"] == "auto" and config["bf16"] == {"enabled": "auto"}
    assert ("offload_optimizer" in config["zero_optimization"]) == name.endswith("offload")
    assert "optimizer" not in config and "scheduler" not in config
    assert config["zero_optimization"].get("stage3_gather_16bit_weights_on_model_save", stage == 2)


def test_settings_that_transformers_refuses_end_in_our_error(tmp_path):
    given = ["stage1", "--model", "m", "--annotations", "a.json", "--output_dir", str(tmp_path)]
    cpu = ["--use_cpu", "true", "--bf16", "false", "--tf32", "false"]
    with pytest.raises(ConfigError, match="load_best_model_at_end"):
        parse_arguments([*given, *cpu, "--deepspeed", "none", "--load_best_model_at_end", "true"])


def test_what_a_machine_without_gpu_cannot_do(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    given = ["stage1", "--model", "m", "--annotations", "a.json", "--output_dir", str(tmp_path)]
    with pytest.raises(ConfigError, match=r"without a GPU: --use_cpu true --bf16 false --tf32 false"):
        parse_arguments([*given, "--deepspeed", "none"])


@pytest.mark.parametrize("missing", [("annotations", "b.json"), ("image_root", "b")])
def test_missing_files_are_named_before_what_the_machine_cannot_do(missing):
    option, path = missing
    given = ["stage1", "--model", "m", *GIVEN, "--deepspeed", "none", f"--{option}", path]
    with pytest.raises(ConfigError, match=f"{option}='{path}': expected .* that exists"):
        parse_arguments(given)


def test_deepspeed_without_a_launcher(tmp_path, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    given = ["stage1", "--model", "m", "--annotations", "a.json", "--output_dir", str(tmp_path)]
    with pytest.raises(ConfigError, match="not started by a launcher"):
        parse_arguments(given)
