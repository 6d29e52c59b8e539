"""Published PIIP-LLaVA checkpoints to our layout and back."""

from .convert import convert_folder, export_folder, fetch_released, load_published_projector
from .names import LlavaNames
from .vision_config import published_vision_config, recognise_row

__all__ = [
    "LlavaNames",
    "convert_folder",
    "export_folder",
    "fetch_released",
    "load_published_projector",
    "published_vision_config",
    "recognise_row",
]
