"""Saves of trained parts: what they hold, what they fit, and that they give back the model."""

import json
import shutil

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import BitsAndBytesConfig

from llava_piip import loading
from llava_piip.loading import (
    ModelSource,
    load_projector,
    load_trained,
    part_parameters,
    quantization_config,
)
from llava_piip.train.arguments import PIIPTrainingArguments
from llava_piip.train.building import add_adapters, freeze_except, language_model_linears
from llava_piip.train.checkpointing import save_trained
from llava_piip.train.merge import main, merge
from piip_core.errors import CheckpointError, ConfigError, UserError


def noise(model, seed=1):
    """Changes everything that is trained."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model.eval()


def arguments(tmp_path, **settings):
    return PIIPTrainingArguments(output_dir=str(tmp_path / "unused"), use_cpu=True, report_to="none", **settings)


@pytest.fixture
def inputs(files):
    _, processor = load_trained(files.model)
    torch.manual_seed(1)
    ids = torch.tensor([[1, *[processor.image_token_id] * processor.image_seq_length, 5, 6, 7, 8]])
    return {"input_ids": ids, "pixel_values": torch.randn(1, 3, 64, 64)}


@pytest.fixture
def stage1(files, tmp_path):
    """A save of stage 1, and the model it was made from."""
    model, processor = load_trained(files.model)
    freeze_except(model, ["projector"])
    save_trained(noise(model), tmp_path / "stage1", ModelSource(str(files.model)), processor=processor)
    return tmp_path / "stage1", model


def test_stage_1_saves_the_projector_alone_and_gives_back_the_model(stage1, inputs):
    folder, model = stage1
    saved = load_file(folder / "projector.safetensors")
    assert set(saved) == set(part_parameters(model, "projector"))
    assert not list(folder.glob("model*.safetensors"))
    loaded, processor = load_trained(folder)
    assert processor.image_seq_length == 4
    torch.testing.assert_close(loaded(**inputs).logits, model(**inputs).logits, rtol=0, atol=0)


def test_stage_2_starts_from_the_projector_of_stage_1_and_nothing_else(stage1, files):
    folder, trained = stage1
    (folder.parent / "run").mkdir()
    shutil.move(folder, folder.parent / "run" / "final")
    fresh, _ = load_trained(files.model)
    before = {name: tensor.clone() for name, tensor in fresh.state_dict().items()}
    load_projector(fresh, folder.parent / "run")  # the folder of the run finds it too
    projector = part_parameters(trained, "projector")
    for name, tensor in fresh.state_dict().items():
        torch.testing.assert_close(
            tensor, projector[name].detach() if name in projector else before[name], rtol=0, atol=0
        )


@pytest.mark.parametrize("part", ["interactions", "vision_tower"])
def test_stage_2_starts_from_what_stage_1_trained_of_the_vision_tower(files, tmp_path, part):
    model, processor = load_trained(files.model)
    freeze_except(model, ["projector", part])
    save_trained(noise(model), tmp_path, ModelSource(str(files.model)), processor=processor)
    assert {path.stem for path in tmp_path.glob("*.safetensors")} == {"projector", part}
    assert set(load_file(tmp_path / f"{part}.safetensors")) == set(part_parameters(model, part))
    fresh, _ = load_trained(files.model)
    before = fresh.state_dict()
    assert not any(torch.equal(before[name], tensor) for name, tensor in part_parameters(model, part).items())
    load_projector(fresh, tmp_path)
    torch.testing.assert_close(fresh.state_dict(), model.state_dict(), rtol=0, atol=0)
    torch.testing.assert_close(load_trained(tmp_path)[0].state_dict(), model.state_dict(), rtol=0, atol=0)


def edit(folder, *keys, value):
    config = json.loads((folder / "config.json").read_text())
    inner = config
    for key in keys[:-1]:
        inner = inner[key]
    inner[keys[-1]] = value
    (folder / "config.json").write_text(json.dumps(config))


def test_a_projector_of_another_row_or_language_model_is_refused_with_the_difference(stage1, files):
    folder, _ = stage1
    model, _ = load_trained(files.model)
    edit(folder, "vision_config", "pyramid", "branches", 1, "image_size", value=96)
    with pytest.raises(CheckpointError, match=r"vision_config\.pyramid\.branches\.1\.image_size is 96 there"):
        load_projector(model, folder)
    edit(folder, "vision_config", "pyramid", "branches", 1, "image_size", value=64)
    edit(folder, "text_config", "hidden_size", value=4096)
    with pytest.raises(CheckpointError, match="hidden_size is 4096 there and 32 in this one"):
        load_projector(model, folder)


def test_a_projector_file_with_other_tensors_is_refused(stage1, files):
    folder, _ = stage1
    model, _ = load_trained(files.model)
    state = load_file(folder / "projector.safetensors")
    name = next(name for name, tensor in state.items() if tensor.ndim == 2)
    save_file({**state, name: state[name][:-1].clone()}, folder / "projector.safetensors")
    with pytest.raises(CheckpointError, match=r"is \(31, 32\), this one has \(32, 32\)"):
        load_projector(model, folder)
    save_file({key: tensor for key, tensor in state.items() if key != name}, folder / "projector.safetensors")
    with pytest.raises(CheckpointError, match="it lacks"):
        load_projector(model, folder)


def test_folders_that_hold_something_else_are_refused(stage1, files, tmp_path):
    model, _ = load_trained(files.model)
    with pytest.raises(CheckpointError, match=r"has no trained\.json"):
        load_projector(model, files.model)
    note = json.loads((stage1[0] / "trained.json").read_text())
    (stage1[0] / "trained.json").write_text(json.dumps(note | {"format": 99}))
    with pytest.raises(CheckpointError, match="format 99"):
        load_projector(model, stage1[0])
    (stage1[0] / "trained.json").write_text("{")
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_projector(model, stage1[0])


def test_a_save_of_parts_finds_what_it_was_trained_from_elsewhere(stage1, files, inputs, tmp_path):
    folder, model = stage1
    shutil.copytree(files.model, tmp_path / "moved")
    note = json.loads((folder / "trained.json").read_text())
    note["source"]["model"] = str(tmp_path / "moved")
    loaded, _ = load_trained(folder, ModelSource(str(tmp_path / "moved")))
    torch.testing.assert_close(loaded(**inputs).logits, model(**inputs).logits, rtol=0, atol=0)


@pytest.mark.parametrize("parts", [["projector"], ["projector", "vision_tower"], []])
def test_adapters_save_load_and_merge_to_the_same_outputs(files, inputs, tmp_path, parts):
    model, processor = load_trained(files.model)
    freeze_except(model, ["projector"])
    noise(model, seed=5)  # of an earlier stage: saved even where it is not trained
    settings = arguments(tmp_path, lora=True, lora_rank=4, train_parts=parts)
    adapted = add_adapters(model, settings)
    base = adapted.get_base_model()
    for part in ("projector", "vision_tower"):
        assert all(p.requires_grad == (part in parts) for p in part_parameters(base, part).values())
    adapters = {n for n, p in part_parameters(base, "language_model").items() if p.requires_grad}
    assert adapters and all(name.split(".")[-3] in ("lora_A", "lora_B") for name in adapters)
    save_trained(noise(adapted), tmp_path / "lora", ModelSource(str(files.model)), processor=processor)
    expected = adapted(**inputs).logits

    loaded, _ = load_trained(tmp_path / "lora")
    assert isinstance(loaded, PeftModel)
    torch.testing.assert_close(loaded(**inputs).logits, expected, rtol=0, atol=0)
    assert (loaded.get_base_model()(**inputs).logits - load_trained(files.model)[0](**inputs).logits).abs().max() > 1e-3

    assert main([str(tmp_path / "lora"), str(tmp_path / "merged")]) == 0
    merged, _ = load_trained(tmp_path / "merged")
    assert not isinstance(merged, PeftModel) and not (tmp_path / "merged" / "trained.json").exists()
    torch.testing.assert_close(merged(**inputs).logits, expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(UserError, match="is not empty"):
        merge(tmp_path / "lora", tmp_path / "merged")


def test_adapters_sit_on_the_linears_of_the_language_model_alone(files):
    model, _ = load_trained(files.model)
    linears = language_model_linears(model)
    assert len(linears) == 2 * 7 and all(name.startswith("model.language_model.layers.") for name in linears)
    assert language_model_linears(model, ["q_proj"]) == [
        f"model.language_model.layers.{i}.self_attn.q_proj" for i in (0, 1)
    ]
    with pytest.raises(ConfigError, match=r"lora_target='q': expected any of .*q_proj"):
        language_model_linears(model, ["q"])


@pytest.mark.parametrize("bits", [4, 8])
def test_quantisation_leaves_vision_projector_and_head_alone(bits):
    config = quantization_config(bits)
    assert isinstance(config, BitsAndBytesConfig)
    assert (config.load_in_4bit, config.load_in_8bit) == (bits == 4, bits == 8)
    assert {"lm_head", "model.vision_tower", "model.multi_modal_projector"} == set(config.llm_int8_skip_modules)
    assert bits == 8 or (config.bnb_4bit_quant_type == "nf4" and config.bnb_4bit_compute_dtype == torch.bfloat16)
    assert quantization_config(16) is None


def test_quantisation_without_bitsandbytes_says_what_to_install(monkeypatch):
    monkeypatch.setattr(loading, "is_bitsandbytes_available", lambda: False)
    with pytest.raises(ConfigError, match=r"bits=4: needs bitsandbytes.*piip\[llava-qlora\]"):
        quantization_config(4)
