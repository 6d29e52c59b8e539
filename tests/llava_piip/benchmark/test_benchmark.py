"""Measures are of what they say, and both models of a published pair are built as published."""

import json
import shutil

import pytest
import torch
from PIL import Image

from llava_piip.assembly import assemble
from piip_core import zoo
from piip_core.errors import ConfigError, UserError
from piip_tools.benchmarks import chat
from piip_tools.benchmarks.chat import LANGUAGE_MODELS, TimedModel, build_pair, load_pair, measure_chat
from piip_tools.timing import draw_rows, format_rows

NAME = "piip_llava_clip_bl_512_256_7b"
PREPARE, SEE, TOKEN = 100.0, 10.0, 0.001  # what preparing an image, seeing it and running a token take


def medians(rows, name):
    return {row["what"]: row["medians"][name] for row in rows}


class Clock:
    """Time that goes on where a model works."""

    def __init__(self, monkeypatch):
        self.time = 0.0
        monkeypatch.setattr(chat, "clock_for", lambda *_: lambda: self.time)

    def watch(self, timed):
        def spend(amount):
            self.time += amount

        def prepare(images, **options):
            spend(PREPARE)
            return timed.image_processor(images=images, **options)

        model = timed.model.model
        model.vision_tower.register_forward_hook(lambda *_: spend(SEE))
        model.language_model.register_forward_hook(
            lambda _, args, options, output: spend(TOKEN * options["inputs_embeds"].shape[1]), with_kwargs=True
        )
        return TimedModel(name=timed.name, model=timed.model, image_processor=prepare)


def test_each_measure_has_in_it_what_it_says(small_models, monkeypatch):
    clock = Clock(monkeypatch)
    rows = measure_chat([clock.watch(small_models[0])], text_tokens=20, new_tokens=6, repeats=3)
    first = medians(rows, "first")
    prompt = 20 + 4
    second = TOKEN * (prompt + 6 + 24)
    assert (first["visual tokens"], first["prompt tokens"]) == (4, prompt)
    expected = {
        "image to pixel values": 1e3 * PREPARE,
        "vision encoder": 1e3 * SEE,
        "first token": 1e3 * (PREPARE + SEE + TOKEN * prompt),
        "further tokens": 1 / TOKEN,
        "vision encoder's share of it": 100 * SEE / (PREPARE + SEE + TOKEN * prompt),
        "second question, first token, nothing kept": 1e3 * (PREPARE + SEE + second),
        "second question, first token, keys and values kept": 1e3 * (PREPARE + TOKEN * (24 + 1)),
    }
    assert {name: first[name] for name in expected} == pytest.approx(expected, rel=1e-9, abs=1e-9)
    assert json.loads(json.dumps(rows)) == rows


def test_memory_is_that_of_the_weights_and_at_least_the_cache_and_the_images_maps(small_models):
    few, many = (measure_chat(small_models, text_tokens=tokens, new_tokens=2, repeats=1) for tokens in (8, 400))
    config = small_models[0].model.config.text_config
    per_token = 2 * 4 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    working = {}
    for timed in small_models:
        one, other = (medians(rows, timed.name) for rows in (few, many))
        assert 1e6 * one["weights"] == pytest.approx(timed.model.get_memory_footprint())
        working[timed.name] = 1e6 * one["memory beside the weights"]
        assert 1e6 * other["memory beside the weights"] - working[timed.name] > 392 * per_token
    assert working["second"] > working["first"] > 4 * 32 * 64**2 / 16  # the larger image; its first map
    assert not torch.is_inference_mode_enabled()


def test_the_vision_encoder_alone(small_models):
    rows = measure_chat(small_models, repeats=1, vision_only=True)
    for timed in small_models:
        model, result = timed.model.model, medians(rows, timed.name)
        parameters = model.num_parameters() - model.language_model.num_parameters()
        assert result["vision parameters"] == pytest.approx(1e-6 * parameters)
        assert result["weights"] >= 4e-6 * parameters and result["memory beside the weights"] > 0
        assert result["vision encoder"] > 0 and "first token" not in result


def test_table_and_chart(small_models, tmp_path):
    rows = measure_chat(small_models, text_tokens=8, new_tokens=3, repeats=1)
    lines = {line.split("|")[1].strip(): line.split("|")[2:-1] for line in format_rows(rows).splitlines()}
    assert [cell.strip() for cell in lines["visual tokens, number"]] == ["4 (0.444)", "9"]
    assert "second question, first token, keys and values kept, ms" in lines
    draw_rows(rows, "here").savefig(tmp_path / "chat.png", dpi=120)
    with Image.open(tmp_path / "chat.png") as chart:
        assert chart.width > 800 and len(chart.convert("RGB").getcolors(10**7)) > 20


def test_impossible_workloads_are_named(small_models):
    for settings, message in (
        (dict(new_tokens=1), "new_tokens=1: expected 2"),
        (dict(text_tokens=500), "context of first is 512"),
    ):
        with pytest.raises(UserError, match=message):
            measure_chat(small_models, **settings)


def count(module):
    return sum(parameter.numel() for parameter in module.parameters())


def test_both_are_the_published_models():
    ours, baseline = build_pair(NAME, device="meta")
    assert ours.model.model.language_model is baseline.model.model.language_model
    assert count(ours.model.model.language_model) + count(ours.model.lm_head) == 6_738_415_616  # Vicuna-7B
    assert ours.model.config.image_seq_length == 1024 and baseline.model.config.image_seq_length == 576
    assert baseline.image_processor.image_size == 336 and ours.image_processor.image_size == 512
    # open_clip's ViT-L-14-336 has 303.5 M without its last norm and projection
    assert count(baseline.model.model.vision_tower) == pytest.approx(303.5e6, rel=2e-3)
    assert count(ours.model.model.vision_tower.pyramid.branches[0]) == pytest.approx(303.5e6, rel=1e-2)
    assert build_pair(NAME, device="meta", projector_grid=24)[0].model.config.image_seq_length == 576


def test_narrower_models_keep_the_proportions():
    whole, narrow = (build_pair(NAME, device="meta", divide_widths=divisor) for divisor in (1, 4))
    for one, other in zip(whole, narrow, strict=True):
        assert one.model.config.image_seq_length == other.model.config.image_seq_length
        towers, languages = (
            [count(part) for part in (timed.model.model.vision_tower, timed.model.model.language_model)]
            for timed in (one, other)
        )
        assert towers[0] / languages[0] == pytest.approx(16, rel=0.06)
        assert towers[1] / languages[1] == pytest.approx(16, rel=0.01)
        for branch, small in zip(
            one.model.config.vision_config.piip.branches, other.model.config.vision_config.piip.branches, strict=True
        ):
            assert branch.network.depth == small.network.depth and branch.image_size == small.image_size
            assert (
                branch.network.embed_dim // branch.network.num_heads
                == 64
                == (small.network.embed_dim // small.network.num_heads)
            )
    convnext = build_pair("piip_llava_convnext_b_clip_l_640_224_7b", device="meta", divide_widths=2, language=False)
    assert convnext[0].model.config.vision_config.piip.branches[1].network.stage_dims == (64, 128, 256, 512)
    assert not len(convnext[0].model.model.language_model.layers)


def test_pairs_that_cannot_be_built_are_named():
    with pytest.raises(ConfigError, match=r"is a baseline: expected one of piip_llava_clip_bl_512_256_7b"):
        build_pair("llava_1_5_7b", device="meta")
    with pytest.raises(ConfigError, match=r"divide_widths=8: expected 1 or more and a divisor of 12"):
        build_pair(NAME, device="meta", divide_widths=8)
    assert {entry.language_model for entry in zoo.multimodal_entries()} == set(LANGUAGE_MODELS)


def test_trained_models_are_loaded(tiny_entry, language_model_folder, tmp_path):
    model, processor = assemble(tiny_entry(), language_model=language_model_folder, pretrained_vision=False)
    for part in (model, processor):
        part.save_pretrained(tmp_path / "ours")
    shutil.copytree(tmp_path / "ours", tmp_path / "other")
    pair = load_pair(tmp_path / "ours", tmp_path / "other", device="cpu", dtype="float32")
    results = measure_chat(pair, new_tokens=2, repeats=1)
    ours, other = (medians(results, str(tmp_path / name)) for name in ("ours", "other"))
    assert ours["second question, first token, keys and values kept"] > 0
    assert ours["memory beside the weights"] == other["memory beside the weights"]
