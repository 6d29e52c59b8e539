"""Chat templates of LLaVA in transformers' form: Jinja, with `{% generation %}` around exactly what is supervised."""

from __future__ import annotations

import re
from collections.abc import Mapping
from types import MappingProxyType

from piip_core.errors import ConfigError

# Text of a message: its string, or its parts in their order, each on a line of its own. A macro, which is fine for the
# text; `{% generation %}` has to stay outside, because inside of one transformers gets the positions wrong.
_TEXT_OF = """
{%- macro text_of(message) -%}
  {%- set content = message['content'] -%}
  {%- if content is string -%}
    {{- content -}}
  {%- elif content is mapping or content is number -%}
    {{- raise_exception('a message has the content ' ~ content ~ ': expected text or a list of parts') -}}
  {%- elif content -%}
    {%- set found = namespace(lines=[]) -%}
    {%- for part in content -%}
      {%- if part['type'] == 'image' -%}
        {%- set found.lines = found.lines + ['<image>'] -%}
      {%- elif part['type'] == 'text' -%}
        {%- set found.lines = found.lines + ([part['text']] if part['text'] else []) -%}
      {%- else -%}
        {{- raise_exception("a content part has type '" ~ part['type'] ~ "': expected 'image' or 'text'") -}}
      {%- endif -%}
    {%- endfor -%}
    {{- found.lines | join('\\n') -}}
  {%- endif -%}
{%- endmacro -%}
"""

_CHECK_ROLE = """
  {%- set expected = 'user' if loop.index0 % 2 == 0 else 'assistant' -%}
  {%- if message['role'] != expected -%}
    {{- raise_exception("message " ~ (messages | length - turns | length + loop.index) ~ " has role '" ~ message['role']
      ~ "', expected '" ~ expected ~ "': after at most one system message, user and assistant take turns") -}}
  {%- endif -%}
"""

_DIALOGUE = """
{%- set own_system = messages and messages[0]['role'] == 'system' -%}
{%- set turns = messages[1:] if own_system else messages -%}
{%- set system = text_of(messages[0]) if own_system else SYSTEM -%}
{%- if system -%}
  {{- system + USER_END -}}
{%- endif -%}
{%- for message in turns -%}
  CHECK_ROLE
  {%- set text = text_of(message) -%}
  {%- if message['role'] == 'user' -%}
    {{- USER_ROLE + ':' -}}
    {%- if text -%}
      {{- ' ' + text + USER_END -}}
    {%- endif -%}
  {%- else -%}
    {{- ASSISTANT_ROLE + ':' -}}
    {%- if text -%}
      {%- generation -%}
        {{- ' ' + text + ASSISTANT_END -}}
      {%- endgeneration -%}
    {%- endif -%}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
  {%- if turns | length % 2 == 0 -%}
    {{- raise_exception("add_generation_prompt needs a user message at the end") -}}
  {%- endif -%}
  {{- ASSISTANT_ROLE + ':' -}}
{%- endif -%}
"""

# Every answer follows the empty thought that Qwen3's own template puts into its prompt with `enable_thinking=False`
_QWEN3 = """
{%- set own_system = messages and messages[0]['role'] == 'system' -%}
{%- set turns = messages[1:] if own_system else messages -%}
{%- if own_system and text_of(messages[0]) -%}
  {{- '<|im_start|>system\\n' + text_of(messages[0]) + '<|im_end|>\\n' -}}
{%- endif -%}
{%- for message in turns -%}
  CHECK_ROLE
  {%- set text = text_of(message) -%}
  {%- if message['role'] == 'user' -%}
    {{- '<|im_start|>user\\n' + text + '<|im_end|>\\n' -}}
  {%- else -%}
    {{- '<|im_start|>assistant\\n<think>\\n\\n</think>\\n\\n' -}}
    {%- if text -%}
      {%- generation -%}
        {{- text + '<|im_end|>' -}}
      {%- endgeneration -%}
      {{- '\\n' -}}
    {%- endif -%}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
  {%- if turns | length % 2 == 0 -%}
    {{- raise_exception("add_generation_prompt needs a user message at the end") -}}
  {%- endif -%}
  {{- '<|im_start|>assistant\\n<think>\\n\\n</think>\\n\\n' -}}
{%- endif -%}
"""

# Question that is answered or to be answered: LLaVA throws its words away in the first stage, the images alone stay
_PLAIN = """
{%- set turns = messages -%}
{%- if messages | length > 2 -%}
  {{- raise_exception("template 'plain' takes one question and one answer, got " ~ messages | length ~ " messages") -}}
{%- endif -%}
{%- for message in turns -%}
  CHECK_ROLE
  {%- set text = text_of(message) -%}
  {%- if message['role'] == 'assistant' -%}
    {%- generation -%}
      {{- text + '\\n' -}}
    {%- endgeneration -%}
  {%- elif add_generation_prompt or not loop.last -%}
    {%- if '<image>' not in text -%}
      {{- raise_exception("message 1 has no <image>: template 'plain' is for captions of images") -}}
    {%- endif -%}
    {{- '<image>' * (text.split('<image>') | length - 1) -}}
  {%- elif text -%}
    {{- text + '\\n' -}}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt and turns | length != 1 -%}
  {{- raise_exception("add_generation_prompt needs a user message at the end") -}}
{%- endif -%}
"""


def _dialogue(person: str, *, roles: tuple[str, str], user_end: str, assistant_end: str) -> str:
    """A template of alternating roles; `assistant_end` is a Jinja expression, the others are text."""
    system = (
        f"A chat between a curious {person} and an artificial intelligence assistant. "
        f"The assistant gives helpful, detailed, and polite answers to the {person}'s questions."
    )
    values = {
        "SYSTEM": f'"{system}"',
        "USER_ROLE": f"'{roles[0]}'",
        "ASSISTANT_ROLE": f"'{roles[1]}'",
        "USER_END": f"'{user_end}'",
        "ASSISTANT_END": assistant_end,
    }
    return _template("".join(f"{{%- set {name} = {value} -%}}\n" for name, value in values.items()) + _DIALOGUE)


def _template(body: str) -> str:
    return (_TEXT_OF + body.replace("CHECK_ROLE", _CHECK_ROLE.strip())).strip()


_EOS = "(eos_token if eos_token else '</s>')"

CHAT_TEMPLATES: Mapping[str, str] = MappingProxyType(
    {
        "vicuna_v1": _dialogue("user", roles=("USER", "ASSISTANT"), user_end=" ", assistant_end=_EOS),
        "plain": _template(_PLAIN),
        "llava_v1": _dialogue("human", roles=("USER", "ASSISTANT"), user_end=" ", assistant_end=_EOS),
        "llava_v0": _dialogue("human", roles=("Human", "Assistant"), user_end="###", assistant_end="'###'"),
        "qwen3": _template(_QWEN3),
    }
)
"""Jinja templates by LLaVA's names.

`vicuna_v1` (LLaVA calls it `v1` too) is what the second stage trains with and what scores are measured with, `plain`
(images, caption, newline) what the first stage trains with. `llava_v1` says "human" for "user"; `llava_v0` separates
turns by "###". `qwen3` is Qwen3's own without thinking, by which every answer follows an empty thought; Qwen3's leaves
that out of earlier answers, so that what is trained, and what is kept between questions, would be another text each
time. It has no system message unless one is given.

Supervised is an answer with the space in front of it and the end token (`plain`: the caption with its newline).
Messages are user and assistant in turns, with at most one system message in front, which replaces the built-in one;
content is a string, or a list of parts (images and texts) which stand in their order, each on a line of its own; LLaVA
was trained with images in front of the text. An empty message leaves its role alone. `plain` takes one question and one
answer, and drops the words of the question as LLaVA does, except when it renders a question by itself.
"""


def resolve_chat_template(chat_template: str) -> str:
    """The Jinja text of a template given by its name in `CHAT_TEMPLATES`, or by itself.

    Raises:
        ConfigError: For an unknown name.
    """
    if chat_template in CHAT_TEMPLATES:
        return CHAT_TEMPLATES[chat_template]
    if "{" not in chat_template:
        known = ", ".join(CHAT_TEMPLATES)
        raise ConfigError(f"chat_template {chat_template!r} is unknown: expected one of {known}, or a Jinja template")
    return chat_template


def marks_answers(chat_template: str) -> bool:
    """Whether a Jinja template says which parts are answers."""
    return re.search(r"\{%-?\s*generation\s*-?%\}", chat_template) is not None
