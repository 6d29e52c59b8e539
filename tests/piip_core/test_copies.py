"""What Python and PyTorch do with any module: copies, pickles, forks, compiled forms compute what the model does."""

import copy
import multiprocessing
import pickle

import pytest
import timm
import torch

import piip_core.integrations.timm  # noqa: F401
from piip_core import PIIP, DensePIIP
from piip_core.export import tensors_in
from piip_core.integrations.timm.piip import MODELS


def _transformers(kind):
    classes = pytest.importorskip("piip_core.integrations.transformers")
    config = MODELS["piip_test"].training
    options = {"merging": {}} if kind == "PIIPBackbone" else {"num_labels": 5, "pooling": "class_token"}
    pyramid = config.pyramid.to_dict() | {key: options.pop(key) for key in ("merging",) if key in options}
    return getattr(classes, kind)(classes.PIIPTransformersConfig(pyramid=pyramid, **options))


def _detectron2(tiny_config):
    pytest.importorskip("detectron2")
    from piip.modeling import PIIPBackbone

    return PIIPBackbone(tiny_config(), pad_divisor=32)


CLASSES = {
    "PIIP": lambda tiny_config: PIIP(tiny_config(merging=None)),
    "DensePIIP": lambda tiny_config: DensePIIP(tiny_config()),
    "timm": lambda _: timm.create_model("piip_test", num_classes=5),
    "timm features": lambda _: timm.create_model("piip_test", features_only=True),
    "Detectron2": _detectron2,
    "PIIPModel": lambda _: _transformers("PIIPModel"),
    "PIIPForImageClassification": lambda _: _transformers("PIIPForImageClassification"),
}


def _forked(model):
    context = multiprocessing.get_context("fork")

    def call(image):
        queue = context.SimpleQueue()
        child = context.Process(target=lambda: queue.put([x.numpy() for x in tensors_in(model(image))]))
        child.start()
        found = [torch.from_numpy(x) for x in queue.get()]
        child.join()
        return found

    return call


WAYS = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "fork": _forked,
    "compile": lambda model: torch.compile(model, backend="eager", fullgraph=True),
}


@pytest.mark.parametrize("build", CLASSES.values(), ids=CLASSES)
@torch.no_grad()
def test_copies_compute_the_same(build, tiny_config, randomize):
    model = randomize(build(tiny_config)).eval()
    image = torch.randn(1, 3, 96, 96, generator=torch.Generator().manual_seed(0))
    expected = tensors_in(model(image))
    for name, way in WAYS.items():
        found = tensors_in(way(model)(image))
        torch.testing.assert_close(found, expected, msg=lambda text, name=name: f"{name}: {text}")
