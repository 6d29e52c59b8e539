"""Entry points of torch.hub: the classifiers of this project as timm makes them, and its backbones for dense tasks.

torch.hub.load(REPOSITORY, "piip_tsb_368_192_128", pretrained_branches=True, num_classes=10)
torch.hub.load(REPOSITORY, "piip_backbone", "piip_tsb_1120_896_448", pretrained=True)
"""

from __future__ import annotations

from functools import partial as _partial
from functools import update_wrapper as _update_wrapper

from piip_core import DensePIIP as _DensePIIP
from piip_core import PIIPConfig as _PIIPConfig
from piip_core import zoo as _zoo
from piip_core.checkpoints import load_checkpoint as _load_checkpoint
from piip_core.checkpoints import load_pretrained as _load_pretrained
from piip_core.errors import ConfigError as _ConfigError
from piip_core.integrations.timm import create_classifier as _create_classifier

dependencies = ["torch", "torchvision", "timm", "huggingface_hub", "safetensors", "numpy", "PIL", "tqdm"]

# One entry point per published classifier, with the arguments of `create_classifier`
for _entry in _zoo.classification_entries():
    _create = _update_wrapper(_partial(_create_classifier, _entry.name), _create_classifier)
    _create.__doc__ = f"{_entry.title} at {_entry.resolution} for ImageNet-1K.\n\n{_create_classifier.__doc__}"
    globals()[_entry.name] = _create


def piip_backbone(
    name: str, checkpoint: str | None = None, pretrained_branches: bool = False, pretrained: bool = False
) -> _DensePIIP:
    """A backbone for detection or segmentation: an image (B, 3, H, W) to one map per stride of `out_strides`.

    Args:
        name: Its name in the zoo, for example "piip_sbl_1568_1120_672".
        checkpoint: File to load: a released one converted by tools/convert_checkpoint.py, or of a training here.
        pretrained_branches: Start every branch from the weights that the configuration names for it.
        pretrained: Load the backbone of the released detector or segmentor; see `fetch_released`.

    Raises:
        ConfigError: For an unknown name; the message lists the closest ones.
        CheckpointError: If weights cannot be had or do not fit.
    """
    config = _zoo.released(name).config if pretrained else _zoo.get(name).config
    if not isinstance(config, _PIIPConfig) or config.merging is None:
        raise _ConfigError(f"{name}: is no detector or segmentor: expected one, for its backbone")
    model = _DensePIIP(config)
    if pretrained_branches:
        _load_pretrained(model.pyramid)
    if pretrained or checkpoint is not None:
        _load_checkpoint(model, checkpoint or name)
    return model
