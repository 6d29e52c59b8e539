"""PIIP in transformers: `import piip_core.integrations.transformers` registers it with the Auto classes.

`PIIPTransformersConfig.from_zoo(NAME)` makes the configuration of a published model. State dicts have the names of
`piip_core.PIIPClassifier` and `piip_core.DensePIIP`, so that converted and trained files load into the models here. A
backbone in a folder is loaded by `PIIPBackbone.from_pretrained`: `AutoBackbone`'s knows repositories of the hub only.
"""

import importlib.util
import sys

from transformers import (
    AutoBackbone,
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageClassification,
    BitImageProcessor,
    BitImageProcessorPil,
)
from transformers.utils import is_datasets_available

from .configuration import PIIPTransformersConfig, make_image_processor
from .modeling import PIIPBackbone, PIIPForImageClassification, PIIPModel, PIIPPreTrainedModel

__all__ = [
    "PIIPBackbone",
    "PIIPForImageClassification",
    "PIIPModel",
    "PIIPPreTrainedModel",
    "PIIPTransformersConfig",
    "make_image_processor",
]


def _hide_datasets_folder() -> None:
    """Hides a folder `datasets/` of the working directory, such as a checkout's, that no package of that name hides.

    transformers' Trainer takes it for Hugging Face's package, and keeps its answer in a cache, which is not documented.
    Seen working with transformers 5.16 to 5.24.
    """
    spec = importlib.util.find_spec("datasets") if is_datasets_available() else None
    if spec is not None and spec.origin is None:
        sys.modules["datasets"] = None  # type: ignore[assignment]  # as documented: nobody can import it
        is_datasets_available.cache_clear()


_hide_datasets_folder()
AutoConfig.register(PIIPTransformersConfig.model_type, PIIPTransformersConfig)
AutoModel.register(PIIPTransformersConfig, PIIPModel)
AutoModelForImageClassification.register(PIIPTransformersConfig, PIIPForImageClassification)
AutoBackbone.register(PIIPTransformersConfig, PIIPBackbone)
AutoImageProcessor.register(
    PIIPTransformersConfig,
    image_processor_classes={"torchvision": BitImageProcessor, "pil": BitImageProcessorPil},
)
