"""The processor: ids, padding, images and their places, bad input."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoTokenizer

from llava_piip import PIIPImageProcessor, PIIPLlavaProcessor
from llava_piip.assembly import add_image_token
from llava_piip.image_processing import ImageError
from piip_core.errors import ConfigError, UserError


def picture(value: int) -> Image.Image:
    return Image.fromarray(np.full((30, 40, 3), value, dtype=np.uint8))


@pytest.fixture
def processor(tiny_llava):
    return tiny_llava[1]


def test_number_of_places_comes_from_the_configuration(tiny_llava):
    model, processor = tiny_llava
    ids = processor(text="USER: <image>\nHi ASSISTANT:", images=picture(0))["input_ids"][0].tolist()
    assert ids.count(model.config.image_token_id) == model.config.image_seq_length == 4
    assert ids[0] == processor.tokenizer.bos_token_id


def test_batches_pad_on_the_left_and_mask_by_length(processor):
    batch = processor(text=["<unk> a", "a much longer prompt than that"])
    ids, mask = batch["input_ids"], batch["attention_mask"]
    missing = int((mask[0] == 0).sum())
    assert missing > 0 and not mask[0, :missing].any() and mask[0, missing:].all()
    assert 0 in ids[0, missing:]  # a literal <unk>, which has the id of padding, is not masked
    right = processor(text=["a", "a much longer prompt"], padding_side="right")
    assert right["attention_mask"][0, 0] == 1 and right["attention_mask"][0, -1] == 0


def test_flat_images_are_dealt_out_in_order(processor):
    pictures = [picture(value) for value in (10, 120, 240)]
    text = ["<image> and <image>", "<image>"]
    flat = processor(text=text, images=pictures)
    nested = processor(text=text, images=[pictures[:2], pictures[2:]])
    assert flat["pixel_values"].shape == (3, 3, 64, 64)
    assert torch.equal(flat["pixel_values"], nested["pixel_values"])
    centre = flat["pixel_values"][:, 0, 32, 32]
    assert centre[0] < centre[1] < centre[2]


def test_prompt_without_image_takes_the_tag_for_text(processor):
    for images in ([[]], [], None):
        ids = processor(text="what does <image> mean?", images=images)["input_ids"][0].tolist()
        assert processor.image_token_id not in ids
        assert processor.decode(ids, skip_special_tokens=True) == "what does <image> mean?"


@pytest.mark.parametrize(
    ("text", "images", "message"),
    [
        ("<image> <image>", [picture(0)], "2 <image> for 1 images"),
        ("none", [picture(0)], "0 <image> for 1 images"),
        (["<image>", "<image>"], [[picture(0)]], "1 lists of images for 2 prompts"),
        (["<image>", "none"], [[], [picture(0)]], "0 <image> for 1 images"),
        (None, [picture(0)], "expected a prompt"),
        (3, None, "text=3: expected a prompt or a list of prompts"),
        ([None], None, r"text=\[None\]: expected a prompt"),
    ],
)
def test_places_that_do_not_match_the_images_are_errors(processor, text, images, message):
    with pytest.raises(UserError, match=message):
        processor(text=text, images=images)


def test_pictures_are_read_from_files(processor, tmp_path):
    picture(5).save(tmp_path / "five.png")
    expected = processor(text="<image>", images=picture(5))
    found = processor(text="<image>", images=str(tmp_path / "five.png"))
    assert torch.equal(found["pixel_values"], expected["pixel_values"])
    with pytest.raises(ImageError, match="no image could be read"):
        processor(text="<image>", images=str(tmp_path / "six.png"))


def image_part(value):
    return {"type": "image", "image": picture(value)}


def text_part(text):
    return {"type": "text", "text": text}


@dataclass
class Message:
    role: str
    content: str


TAGGED = [
    {"role": "system", "content": "You know <image> tags."},
    {"role": "user", "content": [image_part(3), text_part("What is <image>?"), text_part("Say it.")]},
    {"role": "assistant", "content": "The tag <image> stands for an image."},
    {"role": "user", "content": [text_part("And\n<image>\nbefore"), image_part(200), text_part("or after it?")]},
]


def test_placeholders_are_the_image_parts_whatever_the_texts_say(processor):
    batch = processor.apply_chat_template(TAGGED, add_generation_prompt=True, tokenize=True, return_dict=True)
    ids = torch.as_tensor(batch["input_ids"])[0].tolist()
    assert ids.count(processor.image_token_id) == 2 * 4 and len(batch["pixel_values"]) == 2
    marked = [token for i, token in enumerate(ids) if token != processor.image_token_id or ids[i - 1] != token]
    assert (
        processor.decode(marked, skip_special_tokens=False).replace("<s>", "").split()
        == (
            "You know <image> tags. USER: <image> What is <image>? Say it. ASSISTANT: The tag <image> stands for an "
            "image.</s>USER: And <image> before <image> or after it? ASSISTANT:"
        ).split()
    )
    # Prompt and images in two steps give the same
    prompt = processor.apply_chat_template(TAGGED, add_generation_prompt=True)
    again = processor(text=prompt, images=[picture(3), picture(200)])
    assert again["input_ids"][0].tolist() == ids
    assert torch.equal(again["pixel_values"], torch.as_tensor(batch["pixel_values"]))


def test_text_parts_stay_apart_and_parts_keep_their_order(processor):
    parts = [text_part("The sign says STOP"), text_part("What colour is it")]
    prompt = processor.apply_chat_template([{"role": "user", "content": parts}], add_generation_prompt=True)
    assert prompt.endswith("USER: The sign says STOP\nWhat colour is it ASSISTANT:")
    parts = [text_part("Is"), image_part(1), text_part("like"), image_part(2), text_part("?"), text_part("")]
    prompt = processor.apply_chat_template([{"role": "user", "content": parts}])
    assert prompt.endswith("USER: Is\n<image>\nlike\n<image>\n? ")


@pytest.mark.parametrize("add_generation_prompt", [False, True])
def test_assistant_masks_are_the_answers(processor, add_generation_prompt):
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "A cat."}]
    longer = TAGGED if add_generation_prompt else TAGGED[:3]
    if add_generation_prompt:
        messages = [*messages, {"role": "user", "content": "why?"}]
    batch = processor.apply_chat_template(
        [messages, longer],
        add_generation_prompt=add_generation_prompt,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        return_assistant_tokens_mask=True,
    )
    masks = batch["assistant_masks"]
    assert masks.shape == batch["input_ids"].shape and not (masks & ~batch["attention_mask"]).any()
    for ids, mask, expected in zip(
        batch["input_ids"], masks, ("A cat.</s>", "The tag <image> stands for an image.</s>"), strict=True
    ):
        assert processor.tokenizer.decode(ids[mask.bool()]) == expected


def test_masks_come_with_a_dictionary_only(processor):
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "A cat."}]
    ids = processor.apply_chat_template(messages, tokenize=True, return_assistant_tokens_mask=True)
    batch = processor.apply_chat_template(messages, tokenize=True, return_dict=True)
    assert torch.equal(torch.as_tensor(ids), torch.as_tensor(batch["input_ids"]))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([{"type": "audio"}], "type 'audio': expected 'image' or 'text'"),
        (["a", "b"], "a content part is 'a'"),
        ([None], "a content part is None"),
        (3, "has the content 3"),
        ("ab\ud83d", "half of a character .* after .*ab"),
        ([text_part("ab\ud83d"), text_part("c")], "half of a character"),
    ],
)
def test_contents_that_are_no_text_are_told(processor, content, message):
    with pytest.raises(Exception, match=message):
        processor.apply_chat_template([{"role": "user", "content": content}], tokenize=True, return_dict=True)


def test_forms_of_openai_mean_the_same(processor):
    answer = {"role": "assistant", "content": "b"}
    messages = [{"role": "user", "content": "a"}, answer, {"role": "user", "content": "c"}]
    expected = processor.apply_chat_template(messages, add_generation_prompt=True)
    without_value = dict.fromkeys(("refusal", "annotations", "audio", "function_call", "tool_calls"))
    dumped = [messages[0], {**answer, **without_value}, messages[2]]
    assert processor.apply_chat_template(dumped, add_generation_prompt=True) == expected
    objects = [Message(**message) for message in messages]
    assert processor.apply_chat_template(objects, add_generation_prompt=True) == expected
    address = {"type": "image_url", "image_url": {"url": "a.png"}}
    prompts = [
        processor.apply_chat_template([{"role": "user", "content": [image, text_part("<image>?")]}])
        for image in (address, image_part(1))
    ]
    assert prompts[0] == prompts[1]
    with pytest.raises(UserError, match="at least one message"):
        processor.apply_chat_template([])


def test_truncation_is_refused_with_the_reason(processor):
    for options in ({"truncation": True, "max_length": 8}, {"truncation": "longest_first"}):
        with pytest.raises(UserError, match=r"truncation=True: prompts are not cut"):
            processor(text="a long prompt", **options)
    assert processor(text="a long prompt", truncation=False)["input_ids"].shape[0] == 1


def test_unknown_settings_are_refused(processor):
    with pytest.raises(TypeError, match="pad_to_squre: no such setting"):
        processor(text="<image>", images=picture(0), pad_to_squre=False)


def test_long_prompts_are_never_cut(processor):
    with pytest.raises(UserError, match=r"a prompt has \d+ tokens.*max_length is 10"):
        processor(text="a prompt of many more words than ten tokens can hold <image>", images=picture(0), max_length=10)


def test_tokenizer_without_image_token_is_refused(tokenizer_folder):
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    with pytest.raises(ConfigError, match="no special token <image>"):
        PIIPLlavaProcessor(PIIPImageProcessor(size=64), tokenizer, image_seq_length=4)
    with pytest.raises(ConfigError, match="image_seq_length=None"):
        PIIPLlavaProcessor(PIIPImageProcessor(size=64), add_image_token(tokenizer))


@pytest.mark.parametrize("legacy", [False, True])
def test_saving_keeps_the_ids(processor, tokenizer_folder, tmp_path, legacy):
    tokenizer = add_image_token(AutoTokenizer.from_pretrained(tokenizer_folder, legacy=legacy))
    made = PIIPLlavaProcessor(
        PIIPImageProcessor(size=64, pad_to_square=False), tokenizer, image_seq_length=4, chat_template="plain"
    )
    made.save_pretrained(tmp_path)
    again = PIIPLlavaProcessor.from_pretrained(tmp_path)
    prompt = "USER: <image>\nis a</s>USER: x"
    assert torch.equal(
        again(prompt_images := [picture(3)], prompt)["input_ids"], made(prompt_images, prompt)["input_ids"]
    )
    assert again.chat_template == made.chat_template and again.image_seq_length == 4
    assert again.image_processor.pad_to_square is False
