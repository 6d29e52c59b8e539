"""transformers' own OpenAI-compatible server with models of this project known to it, for those who have no vLLM.

python -m llava_piip.integrations.transformers_serve output/piip_llava --port 8000
"""

from __future__ import annotations

import sys
from pathlib import Path

import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from piip_core.errors import UserError

from ..configuration import PIIPLlavaConfig
from ..inference import model_folder
from ..modeling import PIIPLlavaForConditionalGeneration


def make_known() -> None:
    """Tells transformers' server about the model class.

    The server looks models up by their names in transformers itself, and not in the Auto classes with which others
    register. Seen working with transformers 5.16 to 5.24; `test_transformers_serve.py` fails where it does not.
    """
    name = PIIPLlavaForConditionalGeneration.__name__
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES[PIIPLlavaConfig.model_type] = name
    setattr(transformers, name, PIIPLlavaForConditionalGeneration)


def main() -> None:
    """`transformers serve` with the arguments of the command line, of which the first one is a model's folder."""
    from transformers.cli.transformers import main as run

    make_known()
    if len(sys.argv) > 1 and not sys.argv[1].startswith("-"):
        try:
            sys.argv[1] = str(model_folder(Path(sys.argv[1])))
        except UserError as error:
            sys.exit(f"error: {error}")
    sys.argv[:1] = ["transformers", "serve"]
    run()


if __name__ == "__main__":
    main()
