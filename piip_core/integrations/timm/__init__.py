"""The classifiers as timm's models: importing this package registers them.

    import timm
    import piip_core.integrations.timm

    model = timm.create_model("piip_tsb_368_192_128", pretrained_branches=True, num_classes=10)

timm's own scripts see them if they are run through this package:

    python -m piip_core.integrations.timm train.py --model piip_tsb_368_192_128 ...
"""

from .piip import create_classifier, model_names, register_classifier

__all__ = ["create_classifier", "model_names", "register_classifier"]
