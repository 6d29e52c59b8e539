"""Times PIIP backbones against each other and against Detectron2's ViTDet."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import timm
import torch
from torch import Tensor, nn

from piip_core import zoo
from piip_core.export import tensors_in
from piip_core.interaction import DeformableCrossAttention
from piip_core.prepared import prepare_for_inference
from piip_core.pyramid import DensePIIP

from ..timing import clock_for, compare, limited_threads, peak_memory, time_in_turns

PRECISIONS = ("fp32", "bf16", "amp")
"""Float32; weights and images in bfloat16; float32 weights under bfloat16 autocast."""

# Width, depth, heads, and the blocks with global attention, of Detectron2's projects/ViTDet
_VITDET = {"vitdet_b": (768, 12, 12, (2, 5, 8, 11)), "vitdet_l": (1024, 24, 16, (5, 11, 17, 23))}
FORMS = {"ours": lambda model: model, "prepared": prepare_for_inference}
"""As it is built; after `prepare_for_inference`."""

_OFFSETS = 2.0  # pixels: how far trained offsets spread around their reference points, roughly


@dataclass(frozen=True, kw_only=True)
class TimedModel:
    """A backbone to measure."""

    name: str
    form: str  # out of `FORMS`; of a baseline its name
    build: Callable[[], nn.Module]  # with random weights, in float32
    image_size: int  # side of the square images it gets

    def load(self, precision: str, device: str, batch: int) -> tuple[nn.Module, Tensor]:
        """The model in evaluation mode, and images for it."""
        dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        torch.manual_seed(0)
        with torch.device(device):
            model = self.build().eval().to(dtype)
        image = torch.randn(batch, 3, self.image_size, self.image_size).to(device, dtype)
        return FORMS.get(self.form, lambda model: model)(model), image


def piip_models(
    names: Sequence[str], forms: Sequence[str], *, scale: float = 1.0, neck: bool = False
) -> list[TimedModel]:
    """Backbones of published models in some of the `FORMS`, with `neck` under the FPN (256 channels) of our detectors.

    Image sizes times `scale` are cut to multiples of 32.
    """

    def build(entry: zoo.ZooEntry) -> nn.Module:
        if not neck:
            return scatter_offsets(DensePIIP(entry.config))
        from piip.modeling import PIIPFPN, PIIPBackbone  # need Detectron2

        backbone = PIIPBackbone(entry.config, pad_divisor=32, pretrained=False)
        return scatter_offsets(PIIPFPN(backbone, list(backbone.output_shape()), 256))

    return [
        TimedModel(
            name=entry.name,
            form=form,
            build=lambda entry=entry: build(entry),
            image_size=int(entry.image_size * scale) // 32 * 32,
        )
        for entry in map(zoo.get, names)
        for form in forms
    ]


def vitdet(name: str, scale: float = 1.0) -> TimedModel:
    """Detectron2's "vitdet_b" or "vitdet_l" with its SimpleFeaturePyramid (256 channels), for 1024 * `scale` pixels."""
    from detectron2 import model_zoo
    from detectron2.config import instantiate

    width, depth, heads, global_blocks = _VITDET[name]
    backbone = model_zoo.get_config("common/models/mask_rcnn_vitdet.py").model.backbone
    size = backbone.square_pad = backbone.net.img_size = int(1024 * scale) // 32 * 32
    backbone.net.embed_dim, backbone.net.depth, backbone.net.num_heads = width, depth, heads
    backbone.net.window_block_indexes = [block for block in range(depth) if block not in global_blocks]
    backbone.net.drop_path_rate = 0.0
    return TimedModel(name=name, form=name, build=lambda: instantiate(backbone), image_size=size)


def timm_vitdet(name: str, scale: float = 1.0) -> TimedModel:
    """timm's encoder of SAM: the network of `vitdet`, with one map of 256 channels in place of the pyramid."""
    size = int(1024 * scale) // 32 * 32
    model = {"vitdet_b": "samvit_base_patch16", "vitdet_l": "samvit_large_patch16"}[name]
    options = dict(img_size=size, num_classes=0, global_pool="")
    return TimedModel(name=name, form=name, build=lambda: timm.create_model(model, **options), image_size=size)


@torch.no_grad()
def scatter_offsets(model: nn.Module) -> nn.Module:
    """Makes deformable attention look around as it does when trained, at other places for every query.

    Fresh offsets are the same everywhere, which caches like better.
    """
    for module in model.modules():
        if isinstance(module, DeformableCrossAttention):
            linear = module.sampling_offsets
            linear.weight.normal_(std=_OFFSETS / linear.in_features**0.5)  # its inputs are normalised
    return model


def measure_backbones(
    models: Sequence[TimedModel],
    precisions: Sequence[str],
    *,
    training: bool = False,
    device: str = "cpu",
    batch: int = 1,
    repeats: int = 5,
    threads: int = 1,
) -> list[dict[str, Any]]:
    """Times forward passes without gradients, or training steps: forward, backward from given gradients, AdamW.

    There is no loss: its time would be that of the sizes of the maps.

    The last of `models` is the baseline; `precisions` are out of `PRECISIONS`.

    Returns:
        Two rows of `compare` per precision and name, with a column per form: milliseconds, and megabytes of
        `peak_memory` (those of training hold activations and gradients).
    """
    rows = []
    with limited_threads(threads):
        for precision in precisions:
            loaded = {timed: timed.load(precision, device, batch) for timed in models}
            works = {timed: _work(*given, precision, training=training) for timed, given in loaded.items()}
            seconds = time_in_turns(works, repeats, clock_for(device, threads))
            milliseconds = {timed: [1e3 * second for second in own] for timed, own in seconds.items()}
            peaks = {timed: [1e-6 * peak_memory(works[timed], loaded[timed][0], device)] for timed in models}
            for name in dict.fromkeys(timed.name for timed in models[:-1]):
                shown = [timed for timed in models if timed.name == name] + [models[-1]]
                what = f"{name} at {shown[0].image_size}, {precision}"
                for kind, unit, values in ((what, "ms", milliseconds), (f"{what}, peak memory", "MB", peaks)):
                    rows.append(compare(kind, unit, {timed.form: values[timed] for timed in shown}, models[-1].form))
    return rows


def _work(model: nn.Module, image: Tensor, precision: str, *, training: bool) -> Callable[[], object]:
    run = _training_step(model, image) if training else torch.no_grad()(lambda: model(image))
    return torch.autocast(image.device.type, torch.bfloat16, enabled=precision == "amp")(run)


def _training_step(model: nn.Module, image: Tensor) -> Callable[[], object]:
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6)

    def step() -> None:
        outputs = tensors_in(model(image))
        torch.autograd.backward(outputs, [torch.ones_like(output) for output in outputs])
        optimizer.step()
        optimizer.zero_grad()

    return step
