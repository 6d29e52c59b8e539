"""What Python and PyTorch do with any module: copies, pickles, forks, compiled forms compute what the model does."""

import copy
import dataclasses
import multiprocessing
import pickle

import pytest
import torch

import piip_core as core
from piip_core.export import tensors_in

NETWORKS = [core.ViTConfig(embed_dim=dim, depth=1, num_heads=1, pos_grid=4, class_token=True) for dim in (16, 8)]
PYRAMID = core.PIIPConfig(
    branches=tuple(core.BranchConfig(network=n, image_size=s) for n, s in zip(NETWORKS, (64, 96), strict=True)),
    interaction=core.InteractionConfig(num_interactions=1, num_heads=2),
    merging=None,
)
MERGED = dataclasses.replace(PYRAMID, merging=core.MergingConfig(num_groups=4))


def detectron2():
    pytest.importorskip("detectron2")
    from piip.modeling import PIIPBackbone

    return PIIPBackbone(MERGED, pad_divisor=32)


def transformers(name, pyramid):
    classes = pytest.importorskip("piip_core.integrations.transformers")
    return getattr(classes, name)(classes.PIIPTransformersConfig(pyramid=pyramid.to_dict(), num_labels=5))


CLASSES = {
    "PIIPClassifier": lambda: core.PIIPClassifier(core.ClassifierConfig(pyramid=PYRAMID, num_classes=5)),
    "Detectron2": detectron2,
    "PIIPModel": lambda: transformers("PIIPModel", PYRAMID),
    "PIIPForImageClassification": lambda: transformers("PIIPForImageClassification", PYRAMID),
    "PIIPBackbone": lambda: transformers("PIIPBackbone", MERGED),
}


def forked(model):
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()

    def run(image):
        torch.set_num_threads(1)  # OpenMP's threads are not forked
        queue.put([x.numpy() for x in tensors_in(model(image))])

    def call(image):
        child = context.Process(target=run, args=(image,))
        child.start()
        found = [torch.from_numpy(x) for x in queue.get()]
        child.join()
        return found

    return call


WAYS = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "fork": forked,
    "compile": lambda model: torch.compile(model, backend="eager", fullgraph=True),
}


@pytest.mark.parametrize("build", CLASSES.values(), ids=CLASSES)
@torch.no_grad()
def test_copies_compute_the_same(build, randomize):
    model = randomize(build()).eval()
    image = torch.randn(1, 3, 96, 96, generator=torch.Generator().manual_seed(0))
    expected = tensors_in(model(image))
    for name, way in WAYS.items():
        found = tensors_in(way(model)(image))
        torch.testing.assert_close(found, expected, msg=lambda text, name=name: f"{name}: {text}")
