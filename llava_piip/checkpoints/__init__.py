"""Published PIIP-LLaVA checkpoints to our layout and back."""

from .convert import Conversion, convert_folder, export_folder, load_published_projector
from .names import LlavaNames
from .public_config import published_vision_config
from .recognise import recognise_row

__all__ = [
    "Conversion",
    "LlavaNames",
    "convert_folder",
    "export_folder",
    "load_published_projector",
    "published_vision_config",
    "recognise_row",
]
