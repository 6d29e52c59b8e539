"""Two small models to compare."""

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from llava_piip import PIIPVisionModel
from llava_piip.assembly import assemble_config, join
from llava_piip.image_processing import PIIPImageProcessor
from piip_tools.benchmarks.chat import TimedModel


@pytest.fixture
def small_models(tiny_entry, language_model_folder):
    """A model with 4 visual tokens and one with 9, around one language model."""
    decoder = LlamaForCausalLM.from_pretrained(language_model_folder)
    text_config = LlamaConfig.from_pretrained(language_model_folder)
    models = []
    for name, size in (("first", 64), ("second", 96)):
        config = assemble_config(tiny_entry(size), text_config, image_token_id=text_config.vocab_size)
        model = join(config, PIIPVisionModel(config.vision_config), decoder)
        models.append(TimedModel(name=name, model=model, image_processor=PIIPImageProcessor(size=size)))
    return models
