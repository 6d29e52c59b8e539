"""Checkpoints: released PIIP models to our state dict and back, pretrained weights into branches."""

from .convert import from_published, model_shapes, our_names, published_names, to_published
from .convert_file import Conversion, convert_file, read_config, recognise
from .load import build_trained, find_pyramid, load_part, load_pyramid, pyramid_prefix
from .names import PublishedNames
from .pretrained import convert_pretrained, load_branch, load_pretrained
from .public_config import PublishedModel, classifier_from_public, config_from_public
from .read import read_checkpoint
from .report import ConversionReport
from .single import CheckpointFile
from .writing import write_checkpoint

__all__ = [
    "CheckpointFile",
    "Conversion",
    "ConversionReport",
    "PublishedModel",
    "PublishedNames",
    "build_trained",
    "classifier_from_public",
    "config_from_public",
    "convert_file",
    "convert_pretrained",
    "find_pyramid",
    "from_published",
    "load_branch",
    "load_part",
    "load_pretrained",
    "load_pyramid",
    "model_shapes",
    "our_names",
    "published_names",
    "pyramid_prefix",
    "read_checkpoint",
    "read_config",
    "recognise",
    "to_published",
    "write_checkpoint",
]
