"""Sharded checkpoints: reading what others wrote, and writing what others read."""

import itertools
import json
import os

import pytest
import torch
from safetensors.torch import load_file, save_file

from piip_core.checkpoints import read_checkpoint, write_checkpoint
from piip_core.errors import CheckpointError

STATE = {f"layer.{i}": torch.randn(10, 10) for i in range(6)} | {"step": torch.tensor(3)}
INDICES = {"safetensors": "model.safetensors.index.json", "bin": "pytorch_model.bin.index.json"}


def split(folder, kind, state=None):
    """Writes shards of two tensors and their index."""
    folder.mkdir(exist_ok=True)
    state = STATE if state is None else state
    places = {}
    for number in range(0, len(state), 2):
        part = dict(list(state.items())[number : number + 2])
        name = f"shard-{number // 2}.{kind}"
        (save_file if kind == "safetensors" else torch.save)(part, folder / name)
        places |= dict.fromkeys(part, name)
    write_index(folder, kind, places)
    return folder / INDICES[kind]


def write_index(folder, kind, places):
    (folder / INDICES[kind]).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": places}))


def assert_equal(state, expected):
    assert set(state) == set(expected) and len(state) == len(expected)
    for key, tensor in state.items():
        assert tensor.dtype == expected[key].dtype and torch.equal(tensor, expected[key])


@pytest.mark.parametrize("kind", list(INDICES))
def test_shards_are_read_by_index_and_by_folder(kind, tmp_path):
    index = split(tmp_path / "model", kind)
    for source in (index, tmp_path / "model"):
        assert_equal(read_checkpoint(source).state, STATE)
    wrapped = split(tmp_path / "wrapped", kind, {f"module.{key}": value for key, value in STATE.items()})
    assert_equal(read_checkpoint(wrapped).state, STATE)


def test_folders_with_one_file_are_read_and_others_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"expected model.safetensors.index.json.*none of them"):
        read_checkpoint(tmp_path)
    torch.save(STATE, tmp_path / "pytorch_model.bin")
    assert_equal(read_checkpoint(tmp_path).state, STATE)
    save_file({"preferred": torch.ones(1)}, tmp_path / "model.safetensors")
    assert list(read_checkpoint(tmp_path).state) == ["preferred"]


def test_what_transformers_writes_is_read(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
    model = transformers.ViTModel(config)
    model.save_pretrained(tmp_path, max_shard_size="50KB")
    shards = list(tmp_path.glob("*.safetensors"))
    assert len(shards) > 2
    assert_equal(read_checkpoint(tmp_path).state, {k: v for path in shards for k, v in load_file(path).items()})


def _places(index):
    return json.loads(index.read_text())["weight_map"]


@pytest.mark.parametrize("kind", list(INDICES))
def test_shards_that_are_missing_cut_off_or_not_what_the_index_says_are_named(kind, tmp_path):
    index = split(tmp_path, kind)
    places, shard = _places(index), tmp_path / f"shard-1.{kind}"
    content = shard.read_bytes()

    shard.unlink()
    with pytest.raises(CheckpointError, match=rf"{index.name}: 1 of its 4 files are missing: shard-1\.{kind}"):
        read_checkpoint(index)
    shard.write_bytes(content[:-100])
    with pytest.raises(CheckpointError, match=rf"shard-1\.{kind}: not a"):
        read_checkpoint(index)
    shard.write_bytes(content)

    write_index(tmp_path, kind, places | {"layer.9": shard.name})
    with pytest.raises(CheckpointError, match=rf"shard-1\.{kind}: lacks layer\.9, which {index.name} places there"):
        read_checkpoint(index)
    write_index(tmp_path, kind, {key: file for key, file in places.items() if key != "layer.2"})
    with pytest.raises(CheckpointError, match=rf"shard-1\.{kind}: holds layer\.2, which {index.name} does not"):
        read_checkpoint(index)
    write_index(tmp_path, kind, places)
    (save_file if kind == "safetensors" else torch.save)(
        {key: STATE[key] for key in ("layer.0", "layer.2", "layer.3")}, shard
    )
    with pytest.raises(CheckpointError, match=rf"shard-1\.{kind}: holds layer\.0, which .* does not place there"):
        read_checkpoint(index)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "cannot be read as JSON"),
        ("[]", "expected an object"),
        ('{"weight_map":' * 5000, "cannot be read as JSON"),
        ('{"weight_map": {}}', "expected names of files"),
        ('{"weight_map": {"a": 1}}', "expected names of files"),
        ('{"weight_map": {"a": "../x.safetensors"}}', "expected files of its own folder"),
    ],
)
def test_broken_indices_are_named(text, message, tmp_path):
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(CheckpointError, match=message):
        read_checkpoint(tmp_path)


class Payload:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_code_in_a_shard_is_not_run(tmp_path):
    index = split(tmp_path, "bin")
    torch.save({"layer.2": STATE["layer.2"], "layer.3": Payload(str(tmp_path / "trace"))}, tmp_path / "shard-1.bin")
    with pytest.raises(CheckpointError, match=r"shard-1\.bin.*--unsafe-pickle"):
        read_checkpoint(index)
    assert not (tmp_path / "trace").exists()


def test_large_states_are_written_in_shards_that_others_read(tmp_path):
    written = write_checkpoint(tmp_path / "m.safetensors", STATE, description={"a": 1}, max_shard_bytes=900)
    assert written == tmp_path / "m.safetensors.index.json"
    shards = sorted(tmp_path.glob("*.safetensors"))
    assert [path.name for path in shards] == [f"m-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    assert_equal({key: value for path in shards for key, value in load_file(path).items()}, STATE)
    assert json.loads(written.read_text())["metadata"]["total_size"] == 6 * 400 + 8
    file = read_checkpoint(written)
    assert_equal(file.state, STATE)
    assert list(file.state) == list(STATE) and file.description == {"a": 1}
    with pytest.raises(CheckpointError, match=r"There is m\.safetensors\.index\.json: give that"):
        read_checkpoint(tmp_path / "m.safetensors")


def test_transformers_reads_what_is_written(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
    model = transformers.ViTModel(config)
    config.save_pretrained(tmp_path)
    write_checkpoint(tmp_path / "model.safetensors", model.state_dict(), max_shard_bytes=50_000)
    assert_equal(transformers.ViTModel.from_pretrained(tmp_path).state_dict(), model.state_dict())


def test_a_new_number_of_shards_replaces_the_old_one(tmp_path):
    target = tmp_path / "m.safetensors"
    for limit, files in ((900, 4), (500, 7), (900, 4), (5000, 1), (900, 4)):
        state = {key: torch.full_like(value, limit) for key, value in STATE.items()}
        written = write_checkpoint(target, state, max_shard_bytes=limit)
        assert_equal(read_checkpoint(written).state, state)
        assert len(list(tmp_path.iterdir())) == files


def test_a_folder_is_no_target(tmp_path):
    with pytest.raises(CheckpointError, match="is a folder"):
        write_checkpoint(tmp_path, STATE)


def test_tied_weights_are_written_for_each_name(tmp_path):
    shared = torch.randn(4, 4)
    write_checkpoint(tmp_path / "m.safetensors", {"a": shared, "b": shared, "c": shared.T, "d": shared[1:3]})
    assert_equal(load_file(tmp_path / "m.safetensors"), {"a": shared, "b": shared, "c": shared.T, "d": shared[1:3]})


@pytest.mark.parametrize("kill_at", range(1, 9))
def test_a_kill_while_writing_leaves_the_old_checkpoint_or_the_new(kill_at, tmp_path):
    """Three shards and the index are each synced and renamed; the n-th of these steps is not reached."""
    target = tmp_path / "m.safetensors"
    old = {key: torch.zeros_like(value) for key, value in STATE.items()}
    index = write_checkpoint(target, old, max_shard_bytes=900)
    child = os.fork()
    if child == 0:
        steps = itertools.count(1)

        def dying(function):
            def call(*args):
                if next(steps) == kill_at:
                    os._exit(9)
                return function(*args)

            return call

        os.fsync, os.replace = dying(os.fsync), dying(os.replace)
        write_checkpoint(target, STATE, max_shard_bytes=900)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert_equal(read_checkpoint(index).state, old)
    assert_equal(read_checkpoint(write_checkpoint(target, STATE, max_shard_bytes=900)).state, STATE)
    assert len(list(tmp_path.iterdir())) == 4  # no leftovers


PROBE = """
import sys
from piip_core.checkpoints import read_checkpoint, write_checkpoint

def megabytes():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("RssAnon")) / 1024

for source in sys.argv[1:]:
    before = megabytes()
    state = read_checkpoint(source).state
    peak, total = 0, 0.0
    for tensor in state.values():
        total += tensor.sum().item()
        peak = max(peak, megabytes() - before)
    write_checkpoint(source + ".copy.safetensors", state, max_shard_bytes=15_000_000)
    peak = max(peak, megabytes() - before)
    print(len(state), total, peak)
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="memory is measured by Linux's /proc")
def test_reading_holds_no_tensor_in_memory(tmp_path, run_python):
    """Files of 60 MB are read, and written in shards, with little memory besides the mapped files."""
    state = {f"t{i}": torch.ones(1_250_000) for i in range(12)}
    torch.save({"model": state, "optimizer": torch.ones(5_000_000)}, tmp_path / "file.pth")
    single = write_checkpoint(tmp_path / "single.safetensors", state)
    shards = write_checkpoint(tmp_path / "shards.safetensors", state, max_shard_bytes=12_000_000)
    step = tmp_path / "step"
    step.mkdir()
    model = {"module": dict.fromkeys(state, torch.empty(0)), "param_shapes": [{k: v.shape for k, v in state.items()}]}
    for rank in range(2):
        torch.save(model, step / f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt")
        partition = {"partition_count": 2, "fp32_flat_groups": [torch.ones(7_500_000)]}
        torch.save({"optimizer_state_dict": partition}, step / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")
    sources = [str(path) for path in (tmp_path / "file.pth", single, shards, step)]
    lines = run_python(PROBE, *sources).stdout.splitlines()
    assert len(lines) == 4
    for line in lines:
        count, total, peak = map(float, line.split())
        assert (count, total) == (12, 15e6)
        assert peak < 45  # a shard or two of 15 MB and what the process needs; the whole is 60
