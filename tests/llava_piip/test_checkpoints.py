"""Published checkpoints: every listed key, whole folders in both directions, what does not fit."""

import csv
import gzip
import json
import shutil
from pathlib import Path

import pytest
import torch

from llava_piip import PIIPLlavaForConditionalGeneration
from llava_piip.checkpoints import (
    LlavaNames,
    convert_folder,
    export_folder,
    load_published_projector,
    published_vision_config,
    recognise_row,
)
from llava_piip.configuration import PIIPLlavaConfig, PIIPVisionConfig
from piip_core import zoo
from piip_core.checkpoints import read_checkpoint, to_ours, to_published
from piip_core.errors import CheckpointError, SaveError, UserError

DATA = Path(__file__).parents[1] / "data"
PUBLISHED = DATA / "goldens" / "llava_full_clip_bl_ckpt"
LISTINGS = sorted(path.name.removesuffix(".tsv.gz") for path in (DATA / "state_dicts").glob("piip-llava*.tsv.gz"))
NARROW = dict(intermediate_size=64, num_hidden_layers=1, num_attention_heads=8, num_key_value_heads=8, vocab_size=64)


@pytest.fixture
def clip_configs():
    return json.loads((DATA / "goldens" / "llava_full_clip_bl.json").read_text())["clip_configs"]


@pytest.fixture
def published(tmp_path):
    """A copy of the recorded checkpoint that a test may break."""
    return Path(shutil.copytree(PUBLISHED, tmp_path / "published"))


@pytest.fixture
def convert(tmp_path, clip_configs):
    def run(source, target="ours", **options):
        vision_config = source / "piip_tiny_clip_bl.py"
        return convert_folder(
            source, tmp_path / target, **dict(vision_config=vision_config, clip_configs=clip_configs) | options
        )

    return run


def listing(name):
    with gzip.open(DATA / "state_dicts" / f"{name}.tsv.gz", "rt") as file:
        return {
            row["key"]: tuple(int(n) for n in row["shape"].split("x")) if row["shape"] else ()
            for row in csv.DictReader(file, delimiter="\t")
        }


@pytest.mark.parametrize("name", LISTINGS)
def test_every_listed_key_of_a_published_row_is_accounted_for(name):
    """Tower and projectors are listed; the decoder around them is a small Llama of the same width."""
    shapes = listing(name)
    width = shapes["model.mm_projector.branch1.6.weight"][0]
    row = zoo.multimodal(name.replace("-", "_").lower())
    config = PIIPLlavaConfig(
        vision_config=PIIPVisionConfig(pyramid=row.vision.to_dict()),
        text_config=dict(model_type="llama", hidden_size=width, **NARROW),
    )
    ours = LlavaNames.of(config, ()).shapes()
    decoder = {
        key.replace("model.language_model.", "model."): tuple(shape)
        for key, shape in ours.items()
        if key.startswith(("model.language_model.", "lm_head."))
    }
    shapes |= decoder
    found = recognise_row(shapes)
    assert found.vision == row.vision and found.embed_dim == row.embed_dim

    names = LlavaNames.of_published(shapes, config)
    converted, report = to_ours({key: torch.empty(shape, device="meta") for key, shape in shapes.items()}, names)
    report.check()
    assert set(converted) == set(ours)
    assert set(report.used) | set(report.ignored) == set(shapes)
    back, report = to_published(converted, names)
    report.check()
    assert {key: tuple(tensor.shape) for key, tensor in back.items()} == shapes


def test_folder_converts_and_comes_back_bit_by_bit(convert, tmp_path):
    done = convert(PUBLISHED)
    assert done.report.complete and len(done.report.used) + len(done.report.ignored) == 239
    again = export_folder(tmp_path / "ours", tmp_path / "back")
    before, after = read_checkpoint(PUBLISHED).state, read_checkpoint(tmp_path / "back").state
    assert set(before) == set(after)
    for key, tensor in before.items():
        assert after[key].dtype == tensor.dtype
        assert torch.equal(after[key], tensor) or "post_layernorm" in key, key  # never used: not kept
    assert again.path == tmp_path / "back"


def test_converted_folder_loads_with_the_types_of_the_file(convert, tmp_path):
    convert(PUBLISHED)
    model, info = PIIPLlavaForConditionalGeneration.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not (info["missing_keys"] or info["unexpected_keys"] or info["mismatched_keys"])
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model.generation_config.do_sample and model.config.image_token_id == 909


def test_row_of_other_sizes_is_refused(convert):
    with pytest.raises(CheckpointError, match="does not fit the model"):
        convert(PUBLISHED, row="piip_llava_clip_bl_512_256_7b", vision_config=None)


def test_unknown_sizes_are_not_recognised(convert):
    with pytest.raises(CheckpointError, match=r"fit no published row.*piip_llava_clip_bl_512_256_7b"):
        convert(PUBLISHED, vision_config=None)


def test_missing_shard_and_missing_key_are_named(convert, published):
    (published / "model-00002-of-00004.safetensors").unlink()
    with pytest.raises(CheckpointError, match="model-00002-of-00004"):
        convert(published)


@pytest.mark.parametrize("exported", [False, True])
def test_a_flipped_bit_stops_both_directions(exported, convert, published, tmp_path):
    if exported:
        convert(published)
        path = tmp_path / "ours" / "model.safetensors"
    else:
        path = published / "pytorch_model.bin"
        torch.save(dict(read_checkpoint(published).state), path)
        for file in published.glob("model*.safetensors*"):
            file.unlink()
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match="checksum"):
        export_folder(tmp_path / "ours", tmp_path / "back") if exported else convert(published)
    assert not (tmp_path / ("back" if exported else "ours")).exists()


def test_folder_without_tokenizer_is_refused(convert, published, tmp_path):
    for name in ("tokenizer.model", "tokenizer_config.json", "special_tokens_map.json"):
        (published / name).unlink()
    with pytest.raises(UserError, match="tokenizer"):
        convert(published)
    assert not (tmp_path / "ours").exists()


def test_target_that_is_not_empty_stays(convert, tmp_path):
    (tmp_path / "ours").mkdir()
    (tmp_path / "ours" / "mine.txt").write_text("keep")
    with pytest.raises(UserError, match="not empty"):
        convert(PUBLISHED)
    assert [path.name for path in (tmp_path / "ours").iterdir()] == ["mine.txt"]


def test_failure_while_writing_leaves_nothing(convert, tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("llava_piip.checkpoints.write_checkpoint", full)
    with pytest.raises(SaveError, match=r"ours: could not be written .*free some space"):
        convert(PUBLISHED)
    assert not list(tmp_path.iterdir())


def test_projector_file_of_the_first_stage(tmp_path):
    path = DATA / "goldens" / "llava_full_clip_bl_stage1" / "mm_projector.bin"
    found = load_published_projector(path, num_branches=2)
    assert len(found) == 12 and "projections.2.norm.weight" in found
    with pytest.raises(CheckpointError, match="branch2"):
        load_published_projector(path, num_branches=1)


@pytest.mark.parametrize("text", ["import os", "model = open('x')", "model = dict(backbone=__import__('os'))", "x = 1"])
def test_vision_configuration_is_never_executed(tmp_path, text):
    path = tmp_path / "config.py"
    path.write_text(text)
    with pytest.raises(CheckpointError, match=r"config\.py"):
        published_vision_config(path)
