"""The classifiers as timm's models: importing this package registers them for `timm.create_model`.

timm's own scripts see them if they are run through it: python -m piip_core.integrations.timm train.py --model ...
"""

from .piip import create_classifier, model_names, register_classifier

__all__ = ["create_classifier", "model_names", "register_classifier"]
