"""Checkpoints that DeepSpeed 0.19.8 wrote (tests/data/deepspeed.tar.xz), and built ones for what it does not write.

The archive has, for ZeRO stages 1 to 3 on 1 to 3 processes, two bf16 training steps of a model with two parameter
groups, tied, frozen and one-element parameters and an integer buffer; beside each the model's weights and what
DeepSpeed's own zero_to_fp32 makes of it.
"""

import math
import os
import shutil
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from piip_core.checkpoints import read_checkpoint
from piip_core.errors import CheckpointError

ARCHIVE = Path(__file__).parents[2] / "data" / "deepspeed.tar.xz"
STEP = "global_step2"


@pytest.fixture(scope="session")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("written")
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(folder, filter="data")
    return folder / "deepspeed"


@pytest.fixture
def run(written, tmp_path):
    """Copies a written run, to be damaged."""

    def copy(stage, ranks=2):
        return shutil.copytree(written / f"stage{stage}_ranks{ranks}", tmp_path / "run")

    return copy


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_weights_of_real_checkpoints(stage, ranks, written):
    run = written / f"stage{stage}_ranks{ranks}"
    model, official = load_file(run / "model.safetensors"), load_file(run / "zero_to_fp32.safetensors")
    plain, master = read_checkpoint(run), read_checkpoint(run, master_weights=True)
    assert set(plain.state) == set(master.state) == set(model)
    for name, expected in model.items():
        assert torch.equal(master.state[name].to(expected.dtype), expected)
        assert torch.equal(plain.state[name].to(expected.dtype), expected)
        assert plain.state[name].dtype == (expected.dtype if stage < 3 else master.state[name].dtype)
        assert plain.state.shapes()[name] == tuple(expected.shape)
    for name, expected in official.items():
        assert torch.equal(master.state[name].float(), expected)
    trained = [name for name in official if not name.startswith("frozen.") and name != "steps"]
    assert any(not torch.equal(master.state[name].bfloat16().float(), official[name]) for name in trained)
    assert all(master.state[name].dtype == torch.float32 for name in trained)
    assert master.state["steps"].dtype == torch.int64
    assert "global_steps" in plain.extras


def test_the_folder_of_one_step_and_a_file_in_it_mean_the_same(written):
    run = written / "stage1_ranks2"
    for path in (run / STEP, run / STEP / "mp_rank_00_model_states.pt"):
        assert set(read_checkpoint(path).state) == set(read_checkpoint(run).state)


class Payload:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("pattern", ["*0_optim_states.pt", "*_1_*_model_states.pt"])
def test_code_in_a_partition_is_not_run(pattern, run, tmp_path):
    file = next((run(stage=3) / STEP).glob(pattern))
    torch.save({"optimizer_state_dict": Payload(str(tmp_path / "trace"))}, file)
    with pytest.raises(CheckpointError, match=rf"{file.name}.*--unsafe-pickle"):
        read_checkpoint(tmp_path / "run")
    assert not (tmp_path / "trace").exists()


def _remove(step, name):
    (step / name).unlink()


def _truncate(step, name):
    (step / name).write_bytes((step / name).read_bytes()[:3000])


def _tensor_parallel(step, name):
    shutil.copy(step / name, step / name.replace("mp_rank_00", "mp_rank_01"))


def _stale(step, name):
    shutil.copy(step / name, step / name.removeprefix("bf16_"))


def _more_ranks(step, name):
    shutil.copy(step / name, step / name.replace("pp_rank_1", "pp_rank_2"))


OPTIM, MODEL3 = "bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt", "zero_pp_rank_1_mp_rank_00_model_states.pt"


@pytest.mark.parametrize(
    ("stage", "damage", "file", "message"),
    [
        (2, _remove, OPTIM, r"lacks zero_pp_rank_1_mp_rank_00_optim_states\.pt, of 2 ranks"),
        (3, _remove, OPTIM, r"lacks zero_pp_rank_1_mp_rank_00_optim_states\.pt, of 2 ranks"),
        (3, _remove, MODEL3, r"model states of 1 ranks, partitions of 2"),
        (2, _remove, "mp_rank_00_model_states.pt", r"holds no mp_rank_00_model_states\.pt"),
        (2, _truncate, OPTIM, rf"{OPTIM}: not a complete"),
        (3, _truncate, MODEL3, rf"{MODEL3}: not a complete"),
        (2, _tensor_parallel, "mp_rank_00_model_states.pt", r"mp_rank_01_model_states\.pt: one part of a tensor-par"),
        (2, _stale, OPTIM, r"of the same rank"),
        (2, _more_ranks, OPTIM, r"zero_pp_rank_2.*of a run with 3 ranks, but the others say 2"),
        (3, _more_ranks, OPTIM, r"zero_pp_rank_2.*of a run with 3 ranks, but the others say 2"),
    ],
)
def test_incomplete_folders_are_refused(stage, damage, file, message, run):
    folder = run(stage)
    damage(folder / STEP, file)
    with pytest.raises(CheckpointError, match=message):
        read_checkpoint(folder, master_weights=True)


def test_master_weights_are_asked_only_of_checkpoints_that_have_them(run, tmp_path):
    folder = run(stage=1)
    for file in (folder / STEP).glob("*_optim_states.pt"):
        file.unlink()
    assert len(read_checkpoint(folder).state) == 11
    with pytest.raises(CheckpointError, match="has no zero_pp_rank_"):
        read_checkpoint(folder, master_weights=True)
    torch.save({"a": torch.zeros(1)}, tmp_path / "file.pth")
    with pytest.raises(CheckpointError, match=r"file\.pth: master weights"):
        read_checkpoint(tmp_path / "file.pth", master_weights=True)


def test_a_flipped_bit_in_a_partition_is_noticed_on_request(run):
    path = next((run(3) / STEP).glob("*rank_0_*optim_states.pt"))
    with zipfile.ZipFile(path) as archive:
        values = max((archive.read(entry) for entry in archive.infolist() if "/data/" in entry.filename), key=len)
    data = bytearray(path.read_bytes())
    data[data.find(values)] ^= 4
    path.write_bytes(data)
    read_checkpoint(path)
    with pytest.raises(CheckpointError, match=rf"^{path}: .*checksum"):
        read_checkpoint(path, verify=True)


def test_the_file_latest_must_name_a_folder_beside_it(run):
    folder = run(stage=1)
    for tag in ("global_step9", "../run"):
        (folder / "latest").write_text(tag)
        with pytest.raises(CheckpointError, match=f"names the checkpoint '{tag}'"):
            read_checkpoint(folder)


@pytest.mark.parametrize("name", ["layer_00-model_00-model_states.pt", "expp_rank_0_mp_rank_00_optim_states.pt"])
def test_pipelines_and_experts_are_refused(name, tmp_path):
    torch.save({}, tmp_path / name)
    with pytest.raises(CheckpointError, match=rf"{name}: of a run with pipeline or expert"):
        read_checkpoint(tmp_path)


def build(folder, state, groups, ranks, *, stage, pieces=1, alignment=0, pad=True):
    """Writes the documented layout, one file per rank: `groups` lists names, `pieces` cuts stage 3's flat tensors."""
    folder.mkdir()
    shapes = [{name: state[name].shape for name in names} for names in groups]
    model = {"module": dict(state), "param_shapes": shapes, "buffer_names": [], "shared_params": {}}
    flats = [[] for _ in range(ranks)]
    for names in groups:
        if stage == 3:
            chunks = [[] for _ in range(ranks)]
            for name in names:
                size = math.ceil(state[name].numel() / ranks)
                padded = torch.full((size * ranks,), 99.0)
                padded[: state[name].numel()] = state[name].flatten()
                for rank in range(ranks):
                    chunks[rank].append(padded[rank * size : (rank + 1) * size])
            for rank in range(ranks):
                flats[rank] += torch.cat(chunks[rank]).tensor_split(pieces)
        else:
            gap = torch.full((alignment,), 99.0)
            whole = torch.cat([part for name in names for part in (state[name].flatten(), gap)])
            size = math.ceil(len(whole) / (2 * ranks)) * 2
            padded = torch.cat((whole, torch.full((size * ranks - len(whole),), 99.0))) if pad else whole
            for rank in range(ranks):
                flats[rank].append(padded[rank * size : (rank + 1) * size].clone())
    for rank in range(ranks):
        key = "fp32_flat_groups" if stage == 3 else "single_partition_of_fp32_groups"
        states = {key: [flat.clone() for flat in flats[rank]], "zero_stage": stage, "partition_count": ranks}
        if alignment:
            states["param_alignment_paddings"] = [[alignment] * len(names) for names in groups]
        torch.save({"optimizer_state_dict": states}, folder / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")
        if stage == 3:
            torch.save(
                model | {"module": {name: torch.empty(0) for name in state}},
                folder / f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt",
            )
    if stage < 3:
        torch.save(model | {"module": {k: v.half() for k, v in state.items()}}, folder / "mp_rank_00_model_states.pt")


@pytest.mark.parametrize("ranks", [1, 2, 3, 12])
@pytest.mark.parametrize(
    "layout",
    [
        {"stage": 1},
        {"stage": 2, "pad": False},
        {"stage": 2, "alignment": 3},
        {"stage": 3},
        {"stage": 3, "pieces": 4},
    ],
)
def test_paddings_and_uneven_partitions(layout, ranks, tmp_path):
    torch.manual_seed(0)
    sizes = {"a": (3, 5), "b": (7,), "c": (), "d": (2, 3, 4), "e": (1,), "f": (0, 4), "g": (31,)}
    state = {name: torch.randn(size) for name, size in sizes.items()}
    build(tmp_path / "step", state, [["d", "a", "f"], ["g", "c", "b", "e"]], ranks, **layout)
    merged = read_checkpoint(tmp_path / "step", master_weights=True).state
    assert list(merged) == list(state)
    for name, tensor in state.items():
        assert torch.equal(merged[name], tensor) and merged[name].dtype == torch.float32


@pytest.mark.parametrize("stage", [2, 3])
def test_partitions_of_other_sizes_than_the_shapes_are_refused(stage, tmp_path):
    state = {"a": torch.randn(40)}
    build(tmp_path / "step", state, [["a"]], 2, stage=stage)
    file = tmp_path / "step" / "zero_pp_rank_1_mp_rank_00_optim_states.pt"
    content = torch.load(file)
    key = "fp32_flat_groups" if stage == 3 else "single_partition_of_fp32_groups"
    content["optimizer_state_dict"][key] = [torch.zeros(10)]
    torch.save(content, file)
    with pytest.raises(CheckpointError, match=rf"{file.name}: \d+ elements in all, \d+ expected"):
        read_checkpoint(tmp_path / "step", master_weights=True)


def test_parameters_without_data_are_named(tmp_path):
    build(tmp_path / "step", {"a": torch.ones(3), "tied": torch.ones(3)}, [["a"]], 1, stage=3)
    with pytest.raises(CheckpointError, match="the weights of tied are in no file"):
        read_checkpoint(tmp_path / "step")
