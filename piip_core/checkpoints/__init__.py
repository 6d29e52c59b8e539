"""Checkpoints: released PIIP models to our state dict and back, pretrained weights into branches."""

from .convert import ConversionReport, from_published, to_ours, to_published
from .convert_file import Conversion, convert_file, read_config, recognise
from .formats import CheckpointFile, LazyState, load_torch_file
from .load import build_trained, find_pyramid, load_checkpoint, load_pyramid, pyramid_prefix
from .names import PublishedNames, model_shapes, our_names, published_names
from .pretrained import convert_pretrained, load_branch, load_pretrained
from .reading import read_checkpoint
from .released import fetch_released, find_checkpoint
from .writing import write_checkpoint

__all__ = [
    "CheckpointFile",
    "Conversion",
    "ConversionReport",
    "LazyState",
    "PublishedNames",
    "build_trained",
    "convert_file",
    "convert_pretrained",
    "fetch_released",
    "find_checkpoint",
    "find_pyramid",
    "from_published",
    "load_branch",
    "load_checkpoint",
    "load_pretrained",
    "load_pyramid",
    "load_torch_file",
    "model_shapes",
    "our_names",
    "published_names",
    "pyramid_prefix",
    "read_checkpoint",
    "read_config",
    "recognise",
    "to_ours",
    "to_published",
    "write_checkpoint",
]
