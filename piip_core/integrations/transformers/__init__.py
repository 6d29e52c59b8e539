"""PIIP in transformers: `import piip_core.integrations.transformers` registers it with the Auto classes.

Example, fine-tuning on 10 classes and loading the result::

    import piip_core.integrations.transformers
    from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageClassification

    model = AutoModelForImageClassification.from_pretrained(FOLDER, num_labels=10, ignore_mismatched_sizes=True)
    ...  # transformers' Trainer
    model.save_pretrained(OUTPUT)
    AutoImageProcessor.from_pretrained(FOLDER).save_pretrained(OUTPUT)

`PIIPTransformersConfig.from_zoo(NAME)` makes the configuration of a published model. State dicts have the names of
`piip_core.PIIPClassifier` and `piip_core.DensePIIP`, so that converted and trained files load into the models here. A
backbone in a folder is loaded by `PIIPBackbone.from_pretrained`: `AutoBackbone`'s knows repositories of the hub only.
"""

from transformers import (
    AutoBackbone,
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageClassification,
    BitImageProcessor,
    BitImageProcessorPil,
)

from .configuration import PIIPTransformersConfig
from .image_processing import make_image_processor
from .modeling import PIIPBackbone, PIIPForImageClassification, PIIPModel, PIIPPreTrainedModel
from .shadowing import hide_datasets_folder

__all__ = [
    "PIIPBackbone",
    "PIIPForImageClassification",
    "PIIPModel",
    "PIIPPreTrainedModel",
    "PIIPTransformersConfig",
    "make_image_processor",
]

hide_datasets_folder()
AutoConfig.register(PIIPTransformersConfig.model_type, PIIPTransformersConfig)
AutoModel.register(PIIPTransformersConfig, PIIPModel)
AutoModelForImageClassification.register(PIIPTransformersConfig, PIIPForImageClassification)
AutoBackbone.register(PIIPTransformersConfig, PIIPBackbone)
AutoImageProcessor.register(
    PIIPTransformersConfig,
    image_processor_classes={"torchvision": BitImageProcessor, "pil": BitImageProcessorPil},
)
