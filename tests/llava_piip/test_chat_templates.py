"""Chat templates: recorded prompts, use through transformers, message forms, errors."""

import copy
from dataclasses import replace
from pathlib import Path

import pytest
from jinja2.exceptions import TemplateError

from checkers import find_cases
from checkers.llava.text import llama_tokenizer, verify_prompts
from llava_piip.chat_templates import CHAT_TEMPLATES, resolve_chat_template
from llava_piip.conversation import ConversationError, encode_conversation, render_conversation
from piip_core.errors import ConfigError

GOLDENS = Path(__file__).parents[1] / "data" / "goldens"
DIALOGUES = ["vicuna_v1", "llava_v1", "llava_v0"]


def user(content):
    return {"role": "user", "content": content}


def assistant(content):
    return {"role": "assistant", "content": content}


def render(template, messages, **options):
    return render_conversation(messages, chat_template=template, **options)[0]


@pytest.fixture(scope="module")
def tokenizer():
    with llama_tokenizer(GOLDENS / "llava_tokenizer_A.model", legacy=False) as loaded:
        yield loaded


def test_recorded_prompts():
    (case,) = find_cases([GOLDENS / "llava_prompt_templates.json"])
    comparisons = verify_prompts(case).comparisons
    rewriting = sum(4 if "plain_exception" in entry else 5 for entry in case.info["image_tag_rewriting"])
    assert len(comparisons) == len(case.info["templates"]) + len(case.info["prompts"]) + rewriting
    assert not [c for c in comparisons if not c.passed]


def test_wrong_prompts_are_noticed():
    (case,) = find_cases([GOLDENS / "llava_prompt_templates.json"])
    first, *others = case.info["prompts"]
    wrong = case.info | {"prompts": [first | {"prompt": first["prompt"] + " "}] + others}
    failed = [c.name for c in verify_prompts(replace(case, info=wrong)).comparisons if not c.passed]
    assert failed == ["output.prompt.v1.generation"]


@pytest.mark.parametrize("template", DIALOGUES)
def test_transformers_gives_the_same_prompt_and_mask(tokenizer, template):
    """The templates in transformers' own hands; its mask is found in another way."""
    messages = [user("Hello"), assistant("a b"), user("</s> x"), assistant(""), user("y"), assistant(" ASSISTANT: z\n")]
    text = tokenizer.apply_chat_template(messages, chat_template=CHAT_TEMPLATES[template], tokenize=False)
    assert text == render(template, messages, tokenizer=tokenizer)
    theirs = tokenizer.apply_chat_template(
        messages, chat_template=CHAT_TEMPLATES[template], return_dict=True, return_assistant_tokens_mask=True
    )
    ours = encode_conversation(tokenizer, messages, chat_template=template, image_token_id=-1, image_seq_length=1)
    assert ours.input_ids[1:] == theirs["input_ids"]
    assert [int(label >= 0) for label in ours.labels[1:]] == theirs["assistant_masks"]
    assert 0 < sum(theirs["assistant_masks"]) < len(theirs["assistant_masks"])


def test_continuing_an_answer(tokenizer):
    messages = [user("Hello"), assistant("It is a")]
    text = tokenizer.apply_chat_template(
        messages, chat_template=CHAT_TEMPLATES["vicuna_v1"], tokenize=False, continue_final_message=True
    )
    assert text.endswith("USER: Hello ASSISTANT: It is a")


def test_end_token_is_the_tokenizers(tokenizer):
    messages = [user("Q"), assistant("A")]
    text = tokenizer.apply_chat_template(
        messages, chat_template=CHAT_TEMPLATES["vicuna_v1"], tokenize=False, eos_token="<|im_end|>"
    )
    assert text.endswith("USER: Q ASSISTANT: A<|im_end|>")
    assert render("vicuna_v1", messages).endswith("USER: Q ASSISTANT: A</s>")


@pytest.mark.parametrize(("template", "end"), list(zip(DIALOGUES, [" ", " ", "###"], strict=True)))
def test_own_system_message(template, end):
    messages = [{"role": "system", "content": "Be brief."}, user("Q"), assistant("A")]
    with_own, with_none = render(template, messages), render(template, [messages[0] | {"content": ""}] + messages[1:])
    assert with_own == "Be brief." + end + with_none
    assert render(template, messages[1:]).endswith(end + with_none)
    assert "Be brief." not in render(template, messages[1:])


@pytest.mark.parametrize(
    ("parts", "text"),
    [
        ([{"type": "image"}, {"type": "text", "text": "What?"}], "<image>\nWhat?"),
        ([{"type": "text", "text": "What?"}, {"type": "image"}], "What?\n<image>"),
        ([{"type": "image"}, {"type": "image"}, {"type": "text", "text": "a"}], "<image>\n<image>\na"),
        ([{"type": "text", "text": "a "}, {"type": "image"}, {"type": "text", "text": "b"}], "a \n<image>\nb"),
        ([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], "a\nb"),
        ([{"type": "image"}], "<image>"),
        ([{"type": "text", "text": "a"}], "a"),
        ([], ""),
        (None, ""),
    ],
)
@pytest.mark.parametrize("template", DIALOGUES)
def test_parts_are_lines_in_their_order(template, parts, text):
    answer = assistant([{"type": "text", "text": "A"}])
    assert render(template, [user(parts), answer]) == render(template, [user(text), assistant("A")])


def test_first_stage_keeps_images_and_caption():
    parts = [{"type": "image"}, {"type": "text", "text": "Describe."}]
    text, spans = render_conversation([user(parts), assistant("a cat")], chat_template="plain")
    assert (text, spans) == ("<image>a cat\n", [(7, 13)])
    assert render("plain", [user(parts)], add_generation_prompt=True) == "<image>"
    assert render("plain", [user("<image>\n<image>\nboth")], add_generation_prompt=True) == "<image><image>"


@pytest.mark.parametrize("template", DIALOGUES)
@pytest.mark.parametrize(
    ("messages", "options", "text"),
    [
        ([assistant("A")], {}, "message 1 has role 'assistant', expected 'user'"),
        ([user("a"), user("b")], {}, "message 2 has role 'user', expected 'assistant'"),
        ([user("a"), {"role": "system", "content": "s"}], {}, "message 2 has role 'system', expected 'assistant'"),
        ([{"role": "system", "content": "s"}, assistant("A")], {}, "message 2 has role 'assistant', expected 'user'"),
        ([user("a"), {"role": "tool", "content": "s"}], {}, "message 2 has role 'tool'"),
        ([user("a"), assistant("b")], {"add_generation_prompt": True}, "needs a user message at the end"),
        ([user([{"type": "video"}])], {}, "type 'video': expected 'image' or 'text'"),
        ([user(5)], {}, "content 5: expected text or a list of parts"),
        ([user({"type": "image"})], {}, "expected text or a list of parts"),
        (["hello"], {}, "should be dicts"),
    ],
)
def test_unusable_messages(template, messages, options, text):
    with pytest.raises(ConversationError, match=text):
        render(template, messages, **options)


@pytest.mark.parametrize(
    ("messages", "options", "text"),
    [
        ([user("no tag"), assistant("A")], {}, "message 1 has no <image>"),
        ([user("<image>"), assistant("a"), user("b"), assistant("c")], {}, "one question and one answer, got 4"),
        ([{"role": "system", "content": "s"}, user("<image>")], {}, "message 1 has role 'system', expected 'user'"),
        ([user("<image>"), assistant("a")], {"add_generation_prompt": True}, "needs a user message at the end"),
        ([], {"add_generation_prompt": True}, "needs a user message at the end"),
    ],
)
def test_unusable_captions(messages, options, text):
    with pytest.raises(ConversationError, match=text):
        render("plain", messages, **options)


def test_transformers_shows_the_error_too(tokenizer):
    with pytest.raises(TemplateError, match="message 2 has role 'user', expected 'assistant'"):
        tokenizer.apply_chat_template([user("a"), user("b")], chat_template=CHAT_TEMPLATES["vicuna_v1"])


def test_template_names():
    assert resolve_chat_template("plain") == CHAT_TEMPLATES["plain"]
    assert resolve_chat_template("{{ messages }}") == "{{ messages }}"
    with pytest.raises(ConfigError, match="'v2' is unknown: expected one of vicuna_v1, plain, llava_v1, llava_v0"):
        resolve_chat_template("v2")


def test_tokenizer_without_end_token(tokenizer):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.eos_token = None
    messages = [user("<image>"), assistant("A")]
    with pytest.raises(ConfigError, match="ends answers with eos_token, which the tokenizer lacks"):
        render("vicuna_v1", messages, tokenizer=tokenizer)
    assert render("plain", messages, tokenizer=tokenizer) == "<image>A\n"
