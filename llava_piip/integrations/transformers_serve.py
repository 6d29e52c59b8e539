"""transformers' own OpenAI-compatible server with models of this project known to it, for those who have no vLLM.

python -m llava_piip.integrations.transformers_serve output/piip_llava --port 8000
"""

from __future__ import annotations

import sys

import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from ..configuration import PIIPLlavaConfig
from ..modeling import PIIPLlavaForConditionalGeneration

__all__ = ["main", "make_known"]


def make_known() -> None:
    """Tells transformers' server about the model class.

    The server looks models up by their names in transformers itself, and not in the Auto classes with which others
    register. Seen working with transformers 5.16 to 5.24; `test_transformers_serve.py` fails where it does not.
    """
    name = PIIPLlavaForConditionalGeneration.__name__
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES[PIIPLlavaConfig.model_type] = name
    setattr(transformers, name, PIIPLlavaForConditionalGeneration)


def main() -> None:
    """`transformers serve` with the arguments of the command line."""
    from transformers.cli.transformers import main as run

    make_known()
    sys.argv[:1] = ["transformers", "serve"]
    run()


if __name__ == "__main__":
    main()
