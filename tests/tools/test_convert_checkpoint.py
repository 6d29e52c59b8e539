import json

import pytest
import torch
from safetensors.torch import load_file

from piip_core import BranchConfig, DensePIIP, InteractionConfig, PIIPConfig, ViTConfig, zoo
from piip_core.checkpoints import PublishedNames, read_checkpoint, to_published, write_checkpoint

SMALL_SHARDS = dict(write_checkpoint.__kwdefaults__ or {}) | {"max_shard_bytes": 20_000}


@pytest.fixture(scope="session")
def tool(load_tool):
    return load_tool("convert_checkpoint")


@pytest.fixture
def model():
    """Three tiny branches, every parameter random."""
    branches = tuple(
        BranchConfig(network=ViTConfig(embed_dim=dim, depth=2, num_heads=2, pos_grid=4), image_size=size)
        for dim, size in ((32, 64), (24, 96), (16, 128))
    )
    config = PIIPConfig(branches=branches, interaction=InteractionConfig(num_interactions=2, num_heads=4))
    model = DensePIIP(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    return model


@pytest.fixture
def files(model, tmp_path):
    """A released file of the tiny model, and its configuration."""
    config = model.pyramid.config
    state, _ = to_published(model.state_dict(), PublishedNames(config, ("deit",) * 3))
    state = {f"backbone.{key}": value for key, value in state.items()}
    torch.save({"state_dict": state, "meta": {"epoch": 12}}, tmp_path / "released.pth")
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    return tmp_path


def test_there_and_back(tool, files, model, capsys):
    released, ours, back = (str(files / name) for name in ("released.pth", "ours.pth", "back.safetensors"))
    assert tool.main([released, ours, "--config", str(files / "config.json")]) == 0
    out = capsys.readouterr().out
    assert "0 unexplained" in out and "not part of the weights (meta)" in out
    converted = torch.load(ours, weights_only=True)["model"]
    prefix = "backbone.bottom_up.features."
    assert converted.keys() == {prefix + name for name in model.state_dict()}
    assert all(torch.equal(converted[prefix + name], tensor) for name, tensor in model.state_dict().items())

    assert tool.main([ours, back, "--to-public"]) == 0
    original = read_checkpoint(released).state
    returned = load_file(back)
    assert returned.keys() == original.keys()
    assert all(torch.equal(returned[key], tensor) for key, tensor in original.items())


def test_what_a_file_lacks_is_an_error_and_nothing_is_written(tool, files, capsys):
    state = torch.load(files / "released.pth")["state_dict"]
    del state["backbone.w3"]
    torch.save(state, files / "released.pth")
    arguments = [str(files / "released.pth"), str(files / "ours.pth"), "--config", str(files / "config.json")]
    assert tool.main(arguments) == 1
    assert "merging.final.weights" in capsys.readouterr().err
    assert not (files / "ours.pth").exists()
    assert tool.main([*arguments, "--allow-incomplete"]) == 0
    assert "merging.final.weights" in capsys.readouterr().out


def _as_shards(files, state):
    """The released file as an index and shards."""
    return write_checkpoint(files / "released.safetensors", state, max_shard_bytes=20_000)


def _as_deepspeed(files, state):
    """The released file as a run of ZeRO stage 2 in bf16 on one process."""
    step = files / "run" / "global_step1"
    step.mkdir(parents=True)
    (files / "run" / "latest").write_text(step.name)
    model = {
        "module": {k: v.bfloat16() for k, v in state.items()},
        "param_shapes": [{k: v.shape for k, v in state.items()}],
    }
    torch.save(model, step / "mp_rank_00_model_states.pt")
    flat = torch.cat([tensor.flatten() for tensor in state.values()])
    partition = {"partition_count": [1], "single_partition_of_fp32_groups": [flat]}
    torch.save({"optimizer_state_dict": partition}, step / "zero_pp_rank_0_mp_rank_00_optim_states.pt")
    return files / "run"


@pytest.mark.parametrize(
    ("layout", "options", "dtype"),
    [
        (_as_shards, [], torch.float32),
        (_as_deepspeed, [], torch.bfloat16),
        (_as_deepspeed, ["--master-weights"], torch.float32),
        (_as_deepspeed, ["--dtype", "float32"], torch.bfloat16),
    ],
)
def test_shards_and_deepspeed_folders_are_sources(layout, options, dtype, tool, files, model):
    source = layout(files, torch.load(files / "released.pth")["state_dict"])
    target = files / "ours.safetensors"
    assert (
        tool.main([str(source), str(target), "--config", str(files / "config.json"), "--backbone-only", *options]) == 0
    )
    converted = load_file(target)
    assert converted.keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(converted[name].float(), tensor.to(dtype).float())
        assert converted[name].dtype == (torch.float32 if options else dtype)


def test_types_are_kept_or_cast_on_request(tool, files, capsys):
    released = torch.load(files / "released.pth")
    name = "backbone.branch1.blocks.0.attn.proj.bias"
    released["state_dict"][name] = released["state_dict"][name].half()
    torch.save(released, files / "released.pth")
    arguments = [str(files / "released.pth"), str(files / "ours.pth"), "--config", str(files / "config.json")]
    assert tool.main(arguments) == 0
    kept = torch.load(files / "ours.pth")["model"]
    assert {name for name, tensor in kept.items() if tensor.dtype == torch.float16} == {
        "backbone.bottom_up.features.pyramid.branches.0.model.blocks.0.attn.proj.bias"
    }
    assert tool.main([*arguments, "--dtype", "bfloat16"]) == 0
    out = capsys.readouterr().out
    assert "1 tensors cast from torch.float16 to torch.bfloat16" in out
    cast = torch.load(files / "ours.pth")["model"]
    assert all(torch.equal(cast[name], tensor.bfloat16()) for name, tensor in kept.items())

    before = (files / "ours.pth").read_bytes()
    released["state_dict"]["backbone.w1"] = released["state_dict"]["backbone.w1"] * 1e30
    torch.save(released, files / "released.pth")
    assert tool.main([*arguments, "--dtype", "float16"]) == 1
    assert "merging.final.weights: has values beyond the range of torch.float16" in capsys.readouterr().err
    assert (files / "ours.pth").read_bytes() == before


def test_a_large_result_is_written_in_shards(tool, files, model, monkeypatch, capsys):
    monkeypatch.setattr("piip_core.checkpoints.writing.write_checkpoint.__kwdefaults__", SMALL_SHARDS)
    arguments = ["--config", str(files / "config.json"), "--backbone-only"]
    assert tool.main([str(files / "released.pth"), str(files / "ours.safetensors"), *arguments]) == 0
    index = files / "ours.safetensors.index.json"
    assert f"written to {index}" in capsys.readouterr().out
    assert len(list(files.glob("ours-*.safetensors"))) > 2
    state = read_checkpoint(index).state
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
    assert tool.main([str(index), str(files / "back.pth"), "--to-public"]) == 0  # the description is in the index


def test_unrecognised_files_ask_for_the_configuration(tool, files, capsys):
    assert tool.main([str(files / "released.pth"), str(files / "ours.pth")]) == 1
    assert "--config" in capsys.readouterr().err
    torch.save({"model": {"a": torch.zeros(1)}}, files / "trained.pth")
    assert tool.main([str(files / "trained.pth"), str(files / "public.pth"), "--to-public"]) == 1
    assert "--config" in capsys.readouterr().err


def test_unknown_names_and_files_are_errors_in_one_line(tool, files, capsys):
    assert tool.main([str(files / "released.pth"), str(files / "x.pth"), "--config", "piip_tsb"]) == 1
    assert zoo.names()[1] in capsys.readouterr().err
    assert tool.main([str(files / "nothing.pth"), str(files / "x.pth")]) == 1
    error = capsys.readouterr().err
    assert "nothing.pth" in error and "Traceback" not in error
