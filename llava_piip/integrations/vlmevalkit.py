"""PIIP-LLaVA as a model of VLMEvalKit, and its `run.py` with the model registered.

python -m llava_piip.integrations.vlmevalkit NAME=FOLDER VLMEvalKit/run.py --data POPE --model NAME
"""

from __future__ import annotations

import runpy
import string
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from PIL import Image

from piip_core.errors import UserError

try:
    from vlmeval.dataset import DATASET_TYPE
    from vlmeval.vlm.base import BaseModel
except ImportError as error:
    missing = f"VLMEvalKit cannot be imported ({error}): clone it and run pip install -e VLMEvalKit (docs/harnesses.md)"
    if __name__ == "__main__":
        sys.exit(f"error: {missing}")
    raise ImportError(missing) from error

from ..conversation import Messages
from ..data.images import read_image
from ..eval.benchmark import LETTER
from ..eval.running import default_dtype
from ..inference import ChatModel, Quantization

DEFAULT_NEW_TOKENS = 2048  # of VLMEvalKit's own LLaVA


class PIIPLlava(BaseModel):
    """A model that answers VLMEvalKit's messages: images and texts in their order.

    docs/harnesses.md says what the arguments are; the settings are those of `ChatModel.generate`.
    """

    INSTALL_REQ = False
    INTERLEAVE = True
    allowed_types: ClassVar[list[str]] = ["text", "image"]

    def __init__(
        self,
        model_path: str,
        device: str | None = None,
        dtype: str | None = None,
        quantization: Quantization | None = None,
        max_new_tokens: int = DEFAULT_NEW_TOKENS,
        **settings: Any,
    ) -> None:
        super().__init__()
        target = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.settings = {"max_new_tokens": max_new_tokens, **settings}
        self.chat_model = ChatModel.load(
            model_path, device=target, dtype=dtype or default_dtype(target), quantization=quantization
        )

    def use_custom_prompt(self, dataset: str) -> bool:
        """Whether `build_prompt` asks the questions: those with choices, as LLaVA-1.5 was trained to answer them."""
        return DATASET_TYPE(dataset) == "MCQ"

    def build_prompt(self, line: Mapping[str, Any], dataset: str | None = None) -> list[dict[str, str]]:
        """A question with choices, a row of the data set's table, in LLaVA-1.5's words."""
        words = [line["question"]] if _is_empty(line, "hint") else [line["hint"], line["question"]]
        words += [f"{letter}. {line[letter]}" for letter in string.ascii_uppercase if not _is_empty(line, letter)]
        paths = self.dump_image(line, dataset)
        paths = [paths] if isinstance(paths, str) else paths
        text = "\n".join(map(str, words)) + LETTER
        return [{"type": "image", "value": path} for path in paths] + [{"type": "text", "value": text}]

    def generate_inner(self, message: Sequence[Mapping[str, str]], dataset: str | None = None) -> str:
        """Answers one message: {"type": "image" or "text", "value": path or text} in order."""
        return self.chat_inner([{"role": "user", "content": message}], dataset)

    def chat_inner(self, message: Sequence[Mapping[str, Any]], dataset: str | None = None) -> str:
        """Answers the last of several {"role": "user" or "assistant", "content": as for `generate_inner`}."""
        return self.chat_model.answer([_conversation(message)], **self.settings)[0]


def register(name: str, folder: str, **settings: Any) -> None:
    """Makes a folder's model known to VLMEvalKit's `--model`, and the class `PIIPLlava` to its JSON files.

    Raises:
        UserError: If VLMEvalKit has a model of that name.
    """
    import vlmeval.vlm
    from vlmeval.config import supported_VLM

    if name in supported_VLM:
        raise UserError(f"{name!r} is a model of VLMEvalKit: choose another name")
    supported_VLM[name] = partial(PIIPLlava, model_path=folder, **settings)
    vlmeval.vlm.PIIPLlava = PIIPLlava


def main(arguments: Sequence[str] | None = None) -> None:
    """Registers the models NAME=FOLDER, and runs the program after them with the arguments that are left."""
    left = list(sys.argv[1:] if arguments is None else arguments)
    models = []
    while left and "=" in left[0]:
        name, _, folder = left.pop(0).partition("=")
        models.append((name, folder))
    if not models or not left or not Path(left[0]).is_file():
        raise SystemExit(f"usage: python -m {__spec__.name} NAME=FOLDER ... VLMEvalKit/run.py --data ... --model NAME")
    for name, folder in models:
        register(name, folder)
    sys.argv = left
    sys.path.insert(0, str(Path(left[0]).resolve().parent))
    runpy.run_path(left[0], run_name="__main__")


def _conversation(messages: Sequence[Mapping[str, Any]]) -> tuple[Messages, list[Image.Image]]:
    images, turns = [], []
    for message in messages:
        content, parts = message["content"], []
        for part in [{"type": "text", "value": content}] if isinstance(content, str) else content:
            if part["type"] == "image":
                images.append(read_image(Path(part["value"]), f"image {part['value']!r}"))
                parts.append({"type": "image"})
            else:  # the template refuses other types than text
                parts.append({"type": part["type"], "text": part["value"]})
        turns.append({"role": message["role"], "content": parts})
    return turns, images


def _is_empty(line: Mapping[str, Any], column: str) -> bool:
    """Whether a row has nothing there; pandas writes a missing value as a number that is unequal to itself."""
    value = line.get(column)
    return value is None or value != value or value == ""


if __name__ == "__main__":
    main()
