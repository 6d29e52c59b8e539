"""A DINO on a PIIP of two small ViTs. A LazyConfig."""

from piip.lazy import lazy_dataclass
from piip_core import MergingConfig

from ....projects.PIIP.configs.common.dino import model
from .tiny_piip_mask_rcnn import data, dataloader, lr_multiplier, optimizer, train  # noqa: F401
from .tiny_piip_mask_rcnn import model as _mask_rcnn

dataloader.train.mapper.use_instance_mask = False

model.backbone = _mask_rcnn.backbone.bottom_up
model.backbone.config.merging = lazy_dataclass(MergingConfig(out_strides=(8, 16, 32)))
model.num_groups = 4
model.transformer.embed_dim = 16
model.transformer.num_heads = 2
model.transformer.ffn_dim = 32
model.transformer.num_encoder_layers = 1
model.transformer.num_decoder_layers = 2
model.transformer.num_queries = 20
model.denoising.num_denoising = 4
model.max_detections = 20
