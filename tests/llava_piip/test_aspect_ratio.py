"""Images at their own aspect ratio: sizes, numbers of tokens, batches of several shapes, caches, training data."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from llava_piip import PIIPVisionConfig
from llava_piip.data import Collator, ConversationDataset, read_records
from llava_piip.image_processing import PIIPImageProcessor, fitted_size
from llava_piip.inference import ChatModel
from llava_piip.modeling import PIIPVisionModel
from piip_core.errors import ConfigError, UserError
from piip_core.pyramid import resize_for_branch

SIZES = ((64, 128), (192, 64), (64, 64))  # heights and widths
QUESTION = "USER: <image>\nWhat is it? ASSISTANT:"


@pytest.fixture(scope="module")
def images():
    generator = np.random.default_rng(0)
    blocks = [(generator.integers(0, 2, (h // 16, w // 16, 3)) * 255).astype(np.uint8) for h, w in SIZES]
    return [
        Image.fromarray(block).resize((width, height), Image.Resampling.NEAREST)
        for block, (height, width) in zip(blocks, SIZES, strict=True)
    ]


@pytest.fixture(scope="module")
def wide(make_llava, tiny_entry):
    """A model of 2 x 2 cells to a token and a token at the end of rows: 1 x (1 + 1) tokens at 64 x 64 pixels."""
    options = dict(projector_merge=2, projector_newline=True)
    return make_llava(
        sharp=True, entry=replace(tiny_entry(), projector_norm="layer", max_pixels=192 * 64, options=options)
    )


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((100, 60), (96, 64)),  # within the budget: as it is, in whole multiples
        ((1280, 960), (448, 320)),
        ((9, 7), (32, 32)),
        ((50000, 40), (4608, 32)),
        ((40, 50000), (32, 4608)),
        ((393, 393), (384, 384)),  # both sides would be rounded beyond the budget
    ],
)
def test_sizes(size, expected):
    found = fitted_size(size, 384 * 384, 32)
    assert found == expected and found[0] * found[1] <= 384 * 384


def test_every_branch_gets_whole_cells(tiny_config):
    """Also where the ratio of image sizes has no exact number: 7 / 11."""
    config = tiny_config((32, 32), (112, 176), merging=None)
    vision = PIIPVisionConfig(pyramid=config.to_dict(), max_pixels=10**6)
    assert vision.size_multiple == 176
    tower = PIIPVisionModel(vision)
    for sides in range(1, 40):
        image = torch.empty(1, 3, 176 * sides, 176, device="meta")
        shrunk = [resize_for_branch(image, factor).shape[2:] for factor in tower.pyramid.factors]
        assert shrunk == [(112 * sides, 112), (176 * sides, 176)]


@torch.no_grad()
def test_a_batch_of_several_shapes_equals_its_images_alone(wide, images):
    model, processor = wide
    together = processor(text=[QUESTION] * 3, images=images)
    assert together["image_sizes"].tolist() == [list(size) for size in SIZES]
    assert together["pixel_values"].shape == (3, 3, 192, 128)
    tokens = model.get_image_features(together["pixel_values"], together["image_sizes"])
    assert [len(row) for row in tokens.pooler_output] == [1 * 3, 3 * 2, 1 * 2]
    logits = model(**together).logits
    answers = model.generate(**together, max_new_tokens=6, do_sample=False)
    for i, image in enumerate(images):
        alone = processor(text=QUESTION, images=image)
        found = model.get_image_features(alone["pixel_values"])  # not padded: no sizes are needed
        torch.testing.assert_close(found.pooler_output[0], tokens.pooler_output[i], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(found.last_hidden_state[0], tokens.last_hidden_state[i], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(model(**alone).logits[0, -1], logits[i, -1], rtol=1e-4, atol=1e-5)
        new = model.generate(**alone, max_new_tokens=6, do_sample=False)[0, alone["input_ids"].shape[1] :].tolist()
        assert answers[i, together["input_ids"].shape[1] :].tolist()[: len(new)] == new
    beams = model.generate(**together, max_new_tokens=4, num_beams=2, num_return_sequences=2, do_sample=False)
    assert len(beams) == 6


@torch.no_grad()
def test_the_aspect_ratio_is_seen(wide, images, monkeypatch):
    """The largest image goes in as it is, and the other branch sees it shrunk, not squeezed."""
    model, processor = wide
    seen = []
    for branch in model.model.vision_tower.pyramid.branches:
        monkeypatch.setattr(
            branch, "embed", lambda image, embed=branch.embed: (seen.append(image.shape[2:]), embed(image))[1]
        )
    model.get_image_features(processor.image_processor(images[1], return_tensors="pt")["pixel_values"])
    assert seen == [(96, 32), (192, 64)]


@torch.no_grad()
def test_a_conversation_that_goes_on_keeps_what_it_computed(wide, images):
    chat = ChatModel(wide[0], wide[1])
    part = [{"type": "image"}]
    messages = [{"role": "user", "content": [*part, {"type": "text", "text": "What is it?"}]}]
    first = "".join(chat.stream(messages, images[:1], max_new_tokens=5))
    messages += [
        {"role": "assistant", "content": first.strip()},
        {"role": "user", "content": [*part, {"type": "text", "text": "And this?"}]},
    ]
    second = "".join(chat.stream(messages, images[:2], max_new_tokens=5))
    assert chat.cache.reused_tokens > 10  # the first image has other padding now
    inputs = chat.encode(messages, images[:2], max_new_tokens=5)
    assert [second.strip()] == chat.generate(inputs, max_new_tokens=5)


def test_training_data(wide, images, tmp_path):
    model, processor = wide
    for number, image in enumerate(images):
        image.save(tmp_path / f"{number}.png")
    asked = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "This."}]
    entries = [
        {"id": "a", "image": "0.png", "conversations": asked},
        {"id": "b", "conversations": [{"from": "human", "value": "Hello"}, {"from": "gpt", "value": "Hi"}]},
    ]
    two = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "This."}] * 2
    entries.append({"id": "c", "image": ["1.png", "2.png"], "conversations": two})
    (tmp_path / "data.json").write_text(json.dumps(entries))
    dataset = ConversationDataset(read_records(tmp_path / "data.json"), processor, tmp_path)
    batch = Collator(processor.tokenizer.pad_token_id)([dataset[i] for i in range(3)])
    assert batch["image_sizes"].tolist() == [list(size) for size in SIZES]
    assert (batch["input_ids"] == processor.image_token_id).sum(1).tolist() == [3, 0, 6 + 2]
    loss = model.train()(**batch).loss
    model.eval()
    loss.backward()
    assert model.model.multi_modal_projector.newline.grad.any()
    short = len(dataset[2]["input_ids"]) - 1
    cut = ConversationDataset(read_records(tmp_path / "data.json"), processor, tmp_path, max_length=short)[2]
    assert cut["image_sizes"].tolist() == [list(SIZES[1])] and len(cut["pixel_values"]) == 1


def test_what_cannot_be_is_refused(wide, tiny_llava, images):
    model, _ = wide
    pixels = torch.zeros(2, 3, 64, 128)
    for sizes in ([[64, 128]], [[64, 128], [64, 192]], [[64, 128], [32, 64]], [[64, 128], [0, 64]]):
        with pytest.raises(UserError, match="multiples of 64, as the model's processor makes them"):
            model.get_image_features(pixels, torch.tensor(sizes))
    with pytest.raises(UserError, match="and no image_sizes"):
        tiny_llava[0].get_image_features(torch.zeros(1, 3, 64, 64), torch.tensor([[64, 64]]))
    with pytest.raises(ConfigError, match="max_pixels=100: expected None, or 1024 or more"):
        PIIPImageProcessor(max_pixels=100, size_multiple=32)
    with pytest.raises(ConfigError, match="max_pixels=100: expected None, or 1024 or more for this pyramid"):
        PIIPVisionConfig(max_pixels=100)
