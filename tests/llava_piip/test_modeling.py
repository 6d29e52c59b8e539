"""The whole model: places of visual tokens, batches, generation, saving, training mode."""

import copy
import dataclasses
import logging
import pickle

import pytest
import torch
from accelerate import cpu_offload
from peft import LoraConfig, get_peft_model
from PIL import Image
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor, pipeline

from piip_core import InteractionConfig
from piip_core.errors import UserError


def picture(seed: int, size=(50, 40)) -> Image.Image:
    generator = torch.Generator().manual_seed(seed)
    return Image.fromarray(torch.randint(0, 256, (*size, 3), generator=generator, dtype=torch.uint8).numpy())


PROMPTS = (
    "USER: <image>\nWhat is it? ASSISTANT:",
    "USER: <image>\nAnd is this one here the same as <image>? ASSISTANT:",
)
IMAGES = ([picture(0)], [picture(1), picture(2)])


@torch.no_grad()
def test_forward_equals_inputs_embeds_made_by_hand(tiny_llava):
    model, processor = tiny_llava
    inputs = processor(text=PROMPTS[1], images=IMAGES[1])
    output = model(**inputs)
    features = model.get_image_features(inputs["pixel_values"]).pooler_output
    rows, ids = [], inputs["input_ids"][0].tolist()
    waiting = [row for image in features for row in image]
    for token in ids:
        rows.append(waiting.pop(0) if token == processor.image_token_id else model.get_input_embeddings().weight[token])
    assert not waiting and ids.count(processor.image_token_id) == 2 * processor.image_seq_length
    by_hand = model(inputs_embeds=torch.stack(rows)[None])
    torch.testing.assert_close(output.logits, by_hand.logits, rtol=1e-5, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("encoded", [False, True])
def test_outputs_hold_the_image_features_and_what_the_language_model_returns(tiny_llava, encoded):
    model, processor = tiny_llava
    inputs = processor(text=PROMPTS[1], images=IMAGES[1])
    features = model.get_image_features(inputs["pixel_values"])
    if encoded:
        del inputs["pixel_values"]
        inputs["mm_encoder_outputs"] = {"image": features}
    output = model(**inputs, output_hidden_states=True, output_attentions=True, use_cache=True)
    held = {name: value for name, value in output.items() if name.startswith("image_")}
    assert len(held) == 1, f"transformers' outputs of LLaVA have another field for images: {list(output)}"
    (held,) = held.values()
    held = held if isinstance(held, torch.Tensor) else torch.cat(held.pooler_output)
    torch.testing.assert_close(held, torch.cat(features.pooler_output))
    alone = model.model.language_model(inputs_embeds=output.hidden_states[0], output_hidden_states=True, use_cache=True)
    assert {*alone} <= {*output} | {"last_hidden_state"}
    torch.testing.assert_close(output.hidden_states, alone.hidden_states)


@torch.no_grad()
def test_image_features_come_as_other_models_give_them(tiny_llava):
    model, processor = tiny_llava
    pixels = processor(text=PROMPTS[1], images=IMAGES[1])["pixel_values"]
    found = model.get_image_features(pixels, output_hidden_states=True)
    # tokens of Branch 1, visual tokens, and the maps of both branches after both interactions and at the end
    assert found.last_hidden_state.shape == (2, 4, model.config.vision_config.hidden_size)
    assert [len(tokens) for tokens in found.pooler_output] == [model.config.image_seq_length] * 2
    assert [len(maps) for maps in found.hidden_states] == [2, 2, 2]
    tower = model.model.vision_tower
    assert torch.equal(found.hidden_states[-1][0].flatten(2).transpose(1, 2), found.last_hidden_state)
    assert torch.equal(tower(pixels, return_dict=False)[0][1], found.hidden_states[-1][1])
    assert model.get_image_features(pixels).hidden_states is None
    tower.config.output_hidden_states = True
    assert len(model.get_image_features(pixels, return_dict=False)) == 3


@torch.no_grad()
def test_tuples_hold_what_the_outputs_hold(tiny_llava):
    model, processor = tiny_llava
    inputs = processor(text=PROMPTS[0], images=IMAGES[0])
    for part in (model, model.model):
        whole = part(**inputs, return_dict=False)
        assert isinstance(whole, tuple) and torch.equal(whole[0], part(**inputs)[0])


@torch.no_grad()
def test_offloaded_weights_give_the_same_numbers(tiny_llava):
    model, processor = tiny_llava
    inputs = processor(text=PROMPTS[0], images=IMAGES[0])
    expected = model(**inputs).logits
    offloaded = cpu_offload(model, torch.device("cpu"))
    assert next(offloaded.parameters()).is_meta
    assert torch.equal(offloaded(**inputs).logits, expected)


@torch.no_grad()
def test_nothing_deprecated_is_used(tiny_llava, monkeypatch, recwarn):
    said = []
    monkeypatch.setattr(logging.Logger, "warning_once", lambda logger, message, *args: said.append(message))
    model, processor = tiny_llava
    inputs = processor(text=PROMPTS[0], images=IMAGES[0])
    model.generate(**inputs, max_new_tokens=3, do_sample=False)
    model.train()(**inputs, labels=inputs["input_ids"].clamp(max=10))
    said += [str(warning.message) for warning in recwarn]
    assert not [message for message in said if "deprecated" in message]


@torch.no_grad()
def test_pictures_and_every_branch_matter(tiny_llava):
    model, processor = tiny_llava
    inputs = processor(text=PROMPTS[0], images=IMAGES[0])
    base = model(**inputs).logits
    assert (
        model(**inputs | {"pixel_values": torch.zeros_like(inputs["pixel_values"])}).logits - base
    ).abs().max() > 0.1
    for number in ("1", "2"):
        projection = model.model.multi_modal_projector.projections[number].linear_2
        weight = projection.weight.clone()
        projection.weight.zero_()
        assert (model(**inputs).logits - base).abs().max() > 1e-2
        projection.weight.copy_(weight)


@torch.no_grad()
def test_left_padded_batch_equals_single_prompts(tiny_llava):
    model, processor = tiny_llava
    text = ["USER: Just words ASSISTANT:", *PROMPTS]
    batch = processor(text=text, images=[[], *IMAGES])
    assert batch["attention_mask"][0, 0] == 0
    together = model.generate(**batch, max_new_tokens=8, do_sample=False)
    logits = model(**batch).logits[:, -1]
    for i, (prompt, images) in enumerate(zip(text, [None, *IMAGES], strict=True)):
        single = processor(text=prompt, images=images)
        torch.testing.assert_close(model(**single).logits[0, -1], logits[i], rtol=1e-4, atol=1e-5)
        alone = model.generate(**single, max_new_tokens=8, do_sample=False)
        new = alone[0, single["input_ids"].shape[1] :].tolist()
        assert together[i, batch["input_ids"].shape[1] :].tolist()[: len(new)] == new


@torch.no_grad()
def test_cached_generation_equals_uncached(tiny_llava):
    model, processor = tiny_llava
    inputs = processor(text=PROMPTS[1], images=IMAGES[1])
    options = dict(max_new_tokens=10, do_sample=False)
    cached = model.generate(**inputs, **options)
    assert torch.equal(cached, model.generate(**inputs, **options, use_cache=False))


@torch.no_grad()
def test_every_way_to_generate_sees_the_images(make_llava):
    """An assistant that sees what the model sees drafts nothing in vain; prompts in pieces, kept keys, embeddings."""
    model, processor = make_llava(sharp=True)
    inputs = processor(text=PROMPTS[1], images=IMAGES[1])
    options = dict(max_new_tokens=8, min_new_tokens=8, do_sample=False)
    expected = model.generate(**inputs, **options)
    black = {"pixel_values": torch.zeros_like(inputs["pixel_values"])}
    assert not torch.equal(model.generate(**inputs | black, **options), expected)
    assert torch.equal(model.generate(**inputs, **options, prefill_chunk_size=3), expected)

    lengths = []
    assistant = copy.deepcopy(model)
    drafts = dict(num_assistant_tokens=4, num_assistant_tokens_schedule="constant", assistant_confidence_threshold=0)
    assistant.generation_config.update(**drafts)
    counting = model.register_forward_pre_hook(
        lambda _, args, given: lengths.append(given["input_ids"].shape[1]), with_kwargs=True
    )
    assert torch.equal(model.generate(**inputs, **options, assistant_model=assistant), expected)
    counting.remove()
    assert lengths == [inputs["input_ids"].shape[1] + 4, 3]

    shown = dict(return_dict_in_generate=True, output_hidden_states=True)
    half = model.generate(**inputs, **options | dict(max_new_tokens=4, min_new_tokens=4), **shown)
    assert [states[-1].shape[1] for states in half.hidden_states] == [inputs["input_ids"].shape[1], 1, 1, 1]
    name = next(name for name in ("cache", "past_key_values") if name in half)  # renamed in transformers 5.24
    asked = dict(inputs, input_ids=half.sequences, attention_mask=torch.ones_like(half.sequences))
    rest = model.generate(**asked, **options | dict(max_new_tokens=4, min_new_tokens=4), **{name: half[name]})
    assert torch.equal(rest, expected)

    text = processor(text="USER: Hello ASSISTANT:")
    embeds = model.get_input_embeddings()(text["input_ids"])
    answer = model.generate(inputs_embeds=embeds, attention_mask=text["attention_mask"], **options)
    assert torch.equal(model.generate(**text, **options)[:, text["input_ids"].shape[1] :], answer)
    with pytest.raises(UserError, match="inputs_embeds together with images"):
        model.generate(**text, inputs_embeds=embeds, pixel_values=inputs["pixel_values"], **options)


@torch.no_grad()
def test_beams_and_several_answers_repeat_the_picture(tiny_llava):
    model, processor = tiny_llava
    inputs = processor(text=list(PROMPTS), images=list(IMAGES))
    output = model.generate(**inputs, max_new_tokens=5, num_beams=3, num_return_sequences=2, do_sample=False)
    assert output.shape[0] == 4


@torch.no_grad()
def test_attention_implementations_agree(tiny_llava):
    model, processor = tiny_llava
    inputs = processor(text=PROMPTS[0], images=IMAGES[0])
    sdpa = model(**inputs).logits
    model.set_attn_implementation("eager")
    torch.testing.assert_close(model(**inputs).logits, sdpa, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_saved_model_and_processor_come_back_through_auto_classes(tiny_llava, tmp_path):
    model, processor = tiny_llava
    model.save_pretrained(tmp_path, max_shard_size="50KB")
    processor.save_pretrained(tmp_path)
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    loaded = AutoProcessor.from_pretrained(tmp_path)
    first, second = processor(text=PROMPTS[1], images=IMAGES[1]), loaded(text=PROMPTS[1], images=IMAGES[1])
    for name in first:
        assert torch.equal(first[name], second[name])
    for kind in (AutoModelForCausalLM, AutoModelForImageTextToText):
        again, info = kind.from_pretrained(tmp_path, output_loading_info=True)
        assert type(again) is type(model)
        assert not (info["missing_keys"] or info["unexpected_keys"] or info["mismatched_keys"])
        assert torch.equal(again.eval()(**second).logits, model(**first).logits)
        assert again.config.image_seq_length == model.config.image_seq_length
    answer = pipeline("image-text-to-text", model=str(tmp_path), device="cpu")
    options = dict(max_new_tokens=4, do_sample=False)
    said = answer(images=IMAGES[1], text=PROMPTS[1], return_full_text=False, generate_kwargs=options)
    new = model.generate(**first, **options)[0, first["input_ids"].shape[1] :]
    assert said[0]["generated_text"] == processor.decode(new, skip_special_tokens=True)


@torch.no_grad()
def test_copies_and_the_compiled_model_give_the_same_numbers(make_llava, tiny_entry, tiny_config):
    vision = tiny_config((32, 32), (32, 64), InteractionConfig(num_interactions=1, num_heads=2), None, depth=1)
    model, processor = make_llava(entry=dataclasses.replace(tiny_entry(), vision=vision), num_hidden_layers=1)
    inputs = processor(text=PROMPTS[0], images=IMAGES[0])
    model.get_image_features(inputs["pixel_values"], output_hidden_states=True)
    expected = model(**inputs).logits
    compiled = torch.compile(copy.deepcopy(model), backend="eager", fullgraph=True)
    for same in (compiled, pickle.loads(pickle.dumps(model))):
        assert torch.equal(same(**inputs).logits, expected)


def test_adapters_of_peft_in_the_vision_tower_learn(tiny_llava):
    model, processor = tiny_llava
    inputs = processor(text=PROMPTS[0], images=IMAGES[0])
    expected = model(**inputs).logits
    adapted = get_peft_model(model, LoraConfig(target_modules=r".*vision_tower.*\.qkv", r=2))
    assert torch.equal(adapted(**inputs).logits, expected)
    # renamed in transformers 5.23
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    adapted.train()(**inputs, labels=inputs["input_ids"].masked_fill(inputs["input_ids"] > 908, -100)).loss.backward()
    learning = [name for name, p in adapted.named_parameters() if p.grad is not None and p.grad.any()]
    assert len(learning) == 2 and all("lora_B" in name for name in learning)  # the others wait until these are not zero


def test_training_step_reaches_every_part_and_checkpointing_changes_nothing(tiny_llava):
    model, processor = tiny_llava
    inputs = processor(text=PROMPTS[0], images=IMAGES[0])
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] == processor.image_token_id, -100)
    model.train()
    for module in model.modules():  # stochastic depth off: both passes must see the same network
        if hasattr(module, "drop_prob"):
            module.drop_prob = 0.0
    gradients = []
    for enable in (False, True):
        model.zero_grad()
        if enable:
            # renamed in transformers 5.23
            getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
            assert all(branch.grad_checkpointing for branch in model.model.vision_tower.pyramid.branches)
        model(**inputs, labels=labels).loss.backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    unused = {name for name, _ in model.named_parameters() if name not in gradients[0]}
    assert not unused
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-4, atol=1e-6)


def test_text_batch_in_training_gives_zero_gradients_to_the_tower(tiny_llava):
    model, processor = tiny_llava
    inputs = processor(text="USER: Hello ASSISTANT: hi")
    model.train()
    loss = model(**inputs, labels=inputs["input_ids"]).loss
    loss.backward()
    assert all(p.grad is not None and not p.grad.any() for p in model.model.vision_tower.parameters())
    assert all(p.grad is not None and not p.grad.any() for p in model.model.multi_modal_projector.parameters())
    assert all(p.grad.any() for p in model.lm_head.parameters())
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(**inputs, labels=inputs["input_ids"]).loss, loss)


def test_mismatches_are_errors(tiny_llava):
    model, processor = tiny_llava
    inputs = processor(text=PROMPTS[1], images=IMAGES[1])
    with pytest.raises(UserError, match="8 placeholders for visual tokens, the given images need 4"):
        model(**inputs | {"pixel_values": inputs["pixel_values"][:1]})
    with pytest.raises(UserError, match="8 placeholders"):
        model(input_ids=inputs["input_ids"])
    with pytest.raises(UserError, match=r"expected \(number of images, 3, 64, 64\)"):
        model(**inputs | {"pixel_values": inputs["pixel_values"][..., :32]})
    with pytest.raises(UserError, match="inputs_embeds together with images"):
        model(inputs_embeds=torch.zeros(1, 4, 32), pixel_values=inputs["pixel_values"])


@torch.no_grad()
def test_bfloat16_stays_near(tiny_llava):
    model, processor = tiny_llava
    inputs = processor(text=PROMPTS[0], images=IMAGES[0])
    expected = model(**inputs).logits
    found = model.to(torch.bfloat16)(**inputs).logits.float()
    assert (found - expected).abs().max() < 0.05 * expected.abs().max()
