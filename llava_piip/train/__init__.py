"""Training in two stages with transformers' Trainer, under the deepspeed launcher, torchrun or on one device."""

import importlib.util
import sys

from transformers.utils import is_datasets_available

_spec = importlib.util.find_spec("datasets") if is_datasets_available() else None
if _spec is not None and _spec.origin is None:
    # The Trainer takes the folder datasets/ of a checkout, found from the working directory, for Hugging Face's package
    sys.modules["datasets"] = None
    is_datasets_available.cache_clear()
