"""PIIP-LLaVA: multimodal language models with a PIIP vision tower, in transformers' manner.

Importing this package registers the models with transformers' Auto classes.
"""

import logging
import warnings

from piip_core.doctor import untested

# First of all: a library that is too old may not even be imported
for _line in untested():
    warnings.warn(f"{_line}; python -m piip_core.doctor says more", stacklevel=2)

# peft, which transformers' Trainer imports, imports bitsandbytes wherever it is installed, and that warns of kernels
# for 4 bits that nobody asked for; `loading.quantization_config`, where they are asked for, lets it speak
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
)

from .configuration import PIIPLlavaConfig, PIIPVisionConfig
from .image_processing import PIIPImageProcessor
from .modeling import PIIPLlavaForConditionalGeneration, PIIPLlavaModel, PIIPVisionModel
from .processing import PIIPLlavaProcessor

__all__ = [
    "PIIPImageProcessor",
    "PIIPLlavaConfig",
    "PIIPLlavaForConditionalGeneration",
    "PIIPLlavaModel",
    "PIIPLlavaProcessor",
    "PIIPVisionConfig",
    "PIIPVisionModel",
]

AutoConfig.register("piip_vision", PIIPVisionConfig)
AutoConfig.register("piip_llava", PIIPLlavaConfig)
AutoModel.register(PIIPVisionConfig, PIIPVisionModel)
AutoModel.register(PIIPLlavaConfig, PIIPLlavaModel)
AutoModelForCausalLM.register(PIIPLlavaConfig, PIIPLlavaForConditionalGeneration)
AutoModelForImageTextToText.register(PIIPLlavaConfig, PIIPLlavaForConditionalGeneration)
# One backend for both of transformers' choices: Pillow, whose resizing the published models were trained with
AutoImageProcessor.register(
    PIIPLlavaConfig, image_processor_classes={"pil": PIIPImageProcessor, "torchvision": PIIPImageProcessor}
)
AutoProcessor.register(PIIPLlavaConfig, PIIPLlavaProcessor)
