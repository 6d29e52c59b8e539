"""What a class for vLLM relies on (docs/harnesses.md): names of weights, places of images, and that the parts suffice.

vLLM's LLaVA (0.33) renames the prefixes below, and loads the language model into its own class of that architecture;
here transformers' stands in for it. None of this needs vLLM.
"""

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaForCausalLM

from llava_piip import PIIPVisionModel
from llava_piip.conversation import encode_prompt
from llava_piip.inference import ChatModel
from piip_core.merging import TokenMerging

PREFIXES = {
    "model.language_model.": "language_model.model.",
    "model.vision_tower.": "vision_tower.",
    "model.multi_modal_projector.": "multi_modal_projector.",
    "lm_head.": "language_model.lm_head.",
}


@pytest.fixture(scope="module")
def saved(chat_folder):
    """The weights of the file by vLLM's names."""

    def renamed(name):
        (old,) = [prefix for prefix in PREFIXES if name.startswith(prefix)]
        return PREFIXES[old] + name.removeprefix(old)

    return {renamed(name): value for name, value in load_file(chat_folder / "model.safetensors").items()}


@pytest.fixture(scope="module")
def whole(chat_folder):
    return ChatModel.load(chat_folder, device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def parts(saved, whole):
    """Vision tower, projector and language model, each built from the configuration alone, with the file's weights."""
    config = whole.model.config
    tower = PIIPVisionModel(config.vision_config)
    projector = TokenMerging(
        tower.pyramid.dims,
        config.text_config.hidden_size,
        norm=config.projector_norm,
        num_groups=config.projector_num_groups,
        grid=config.projector_grid,
    )
    built = {
        "vision_tower": tower,
        "multi_modal_projector": projector,
        "language_model": LlamaForCausalLM(config.text_config),
    }
    taken = 0
    for part, module in built.items():
        own = {name.removeprefix(f"{part}."): value for name, value in saved.items() if name.startswith(f"{part}.")}
        module.eval().load_state_dict(own, strict=True)
        taken += len(own)
    assert taken == len(saved)
    return built


@torch.no_grad()
def test_the_parts_compute_what_the_whole_model_does(parts, whole, pictures):
    prompt = "USER: <image>\nand <image>\nWhich? ASSISTANT:"
    inputs = whole.processor(text=[prompt], images=[pictures[:2]])
    maps = parts["vision_tower"](inputs["pixel_values"]).feature_maps
    features = parts["multi_modal_projector"](maps)
    assert features.shape == (2, whole.model.config.image_seq_length, whole.model.config.text_config.hidden_size)
    assert torch.equal(features, torch.stack(whole.model.get_image_features(inputs["pixel_values"]).pooler_output))

    is_image = inputs["input_ids"] == whole.model.config.image_token_index
    embeds = parts["language_model"].get_input_embeddings()(inputs["input_ids"].masked_fill(is_image, 0))
    embeds[is_image] = features.flatten(0, 1)
    logits = parts["language_model"](inputs_embeds=embeds).logits
    assert torch.equal(logits, whole.model(**inputs).logits)


@pytest.mark.parametrize(
    "prompt", ["USER: <image>\nWhat? ASSISTANT:", "A  <image> and\n<image>\n  <image> B", "No image"]
)
def test_prompts_with_a_token_per_image_expand_to_the_processors_ids(whole, pictures, prompt):
    """vLLM puts `image_seq_length` tokens where one image token stands; the tokenizer alone makes other ids."""
    processor, image = whole.processor, whole.model.config.image_token_index
    count = prompt.count("<image>")
    expected = processor(text=[prompt], images=[pictures[:count]])["input_ids"][0].tolist()

    def expanded(ids):
        return [token for each in ids for token in [each] * (processor.image_seq_length if each == image else 1)]

    # What a class for vLLM makes of the ids that it gets
    text = processor.tokenizer.decode(processor.tokenizer(prompt)["input_ids"], skip_special_tokens=False)
    assert expanded(encode_prompt(processor.tokenizer, text, image_token_id=image, image_seq_length=1)) == expected
    assert (expanded(processor.tokenizer(prompt)["input_ids"]) == expected) == (count == 0)


def test_the_image_token_may_have_no_row_in_the_embedding(whole):
    """vLLM must be told (`configure_mm_token_handling`), or it looks the token up."""
    assert whole.model.config.image_token_index >= whole.model.config.text_config.vocab_size
