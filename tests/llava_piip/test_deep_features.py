"""Maps after early interactions in the language model: where they are added, and that nothing else changes them."""

from dataclasses import replace

import pytest
import torch
from transformers import LlamaForCausalLM

from llava_piip.assembly import join
from llava_piip.modeling import PIIPVisionModel
from piip_core.errors import ConfigError

QUESTION = "USER: <image>\nIs it like <image>? ASSISTANT:"
OPTIONS = dict(max_new_tokens=6, min_new_tokens=6, do_sample=False)


@pytest.fixture(scope="module")
def build(make_llava, tiny_entry):
    """A model whose maps after both interactions go on to the language model, of three layers, and its processor."""

    def make(deep=(0, 1), **options):
        entry = replace(tiny_entry(), options=dict(projector_deep=deep, projector_newline=True, **options))
        return make_llava(sharp=True, entry=entry, num_hidden_layers=3)

    return make


@pytest.fixture(scope="module")
def deep(build):
    return build()


@pytest.fixture
def inputs(deep, pictures):
    return deep[1](text=QUESTION, images=pictures[:2])


@torch.no_grad()
def test_maps_are_added_to_the_states_after_the_first_layers_at_visual_positions(deep, inputs):
    model, processor = deep
    found = model.get_image_features(inputs["pixel_values"], output_hidden_states=True)
    tokens, *levels = torch.cat(found.pooler_output).split(32, dim=1)
    projector = model.model.multi_modal_projector
    for k, level in enumerate(levels):
        maps = found.hidden_states[k]
        expected = projector.deep[k](maps, found.hidden_states[-1][-1].shape[2:])
        torch.testing.assert_close(level, expected.flatten(0, 1))
    language_model, place = model.model.language_model, inputs["input_ids"] == processor.image_token_id
    states = model(**inputs, output_hidden_states=True).hidden_states
    torch.testing.assert_close(states[0][place], tokens)
    position = torch.arange(place.shape[1])[None]
    turned = language_model.rotary_emb(states[0], position)
    mask = torch.full((place.shape[1],) * 2, -torch.inf).triu(1)[None, None]
    x = states[0]
    for index, layer in enumerate(language_model.layers):
        x = layer(x, attention_mask=mask, position_embeddings=turned, position_ids=position)
        if index < 2:
            x[place] += levels[index]
    torch.testing.assert_close(model.lm_head(language_model.norm(x)), model(**inputs).logits, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_every_way_to_generate_adds_the_same(deep, inputs):
    model, _ = deep
    expected = model.generate(**inputs, **OPTIONS)
    without = [parameter.clone() for parameter in model.model.multi_modal_projector.deep.parameters()]
    assert torch.equal(model.generate(**inputs, **OPTIONS, use_cache=False), expected)
    assert torch.equal(model.generate(**inputs, **OPTIONS, prefill_chunk_size=3), expected)
    beams = model.generate(**inputs, **OPTIONS, num_beams=2)
    assert torch.equal(model.generate(**inputs, **OPTIONS, num_beams=2, use_cache=False), beams)
    for parameter in model.model.multi_modal_projector.deep.parameters():
        parameter.zero_()
    changed = model(**inputs).logits
    for parameter, value in zip(model.model.multi_modal_projector.deep.parameters(), without, strict=True):
        parameter.copy_(value)
    assert (model(**inputs).logits - changed).abs().max() > 1e-2


def test_checkpointing_changes_no_gradient(deep, inputs):
    model, processor = deep
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] == processor.image_token_id, -100)
    gradients = []
    for enable in (False, True):
        model.zero_grad()
        model.train()
        for module in model.modules():
            if hasattr(module, "drop_prob"):
                module.drop_prob = 0.0
        if enable:
            # renamed in transformers 5.23
            getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
        model(**inputs, labels=labels).loss.backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters()})
    getattr(model, "activation_checkpointing_disable", model.gradient_checkpointing_disable)()
    model.eval()
    assert all(gradients[0][name].any() for name in gradients[0] if ".deep." in name and "linear_2" in name)
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-4, atol=1e-6)


@torch.no_grad()
def test_new_ones_add_nothing_also_where_models_share_a_language_model(deep, inputs):
    model, _ = deep
    decoder = LlamaForCausalLM(model.config.text_config).eval()
    models = []
    for levels in ((0, 1), (), (1,)):
        config = type(model.config).from_dict({**model.config.to_dict(), "projector_deep": levels})
        torch.manual_seed(0)
        tower = PIIPVisionModel(config.vision_config)
        models.append(join(config, tower, decoder))
    first, second, third = models
    torch.manual_seed(0)
    first.model.multi_modal_projector.load_state_dict(second.model.multi_modal_projector.state_dict(), strict=False)
    third.model.multi_modal_projector.load_state_dict(second.model.multi_modal_projector.state_dict(), strict=False)
    expected = second(**inputs).logits
    assert torch.equal(first(**inputs).logits, expected) and torch.equal(third(**inputs).logits, expected)


def test_levels_that_cannot_be_are_refused(build):
    for deep in ((2,), (0, 0, 1)):
        with pytest.raises(ConfigError, match="interactions from 0 to 1, fewer than the 3 layers"):
            build(deep)
