"""Exported files against PyTorch: torch.export and onnxruntime, with the operator decomposed."""

import dataclasses

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

from piip_core import (
    PIIP,
    BranchConfig,
    ClassifierConfig,
    DensePIIP,
    InteractionConfig,
    MergingConfig,
    PIIPClassifier,
    PIIPConfig,
    TimmConfig,
)
from piip_core.export import ExportError, export_onnx, save_program


@pytest.fixture(scope="module")
def two_branches(tiny_config):
    """A pyramid as small as one gets that has everything: 1 block and 1 interaction."""
    config = tiny_config(
        dims=(16, 8),
        sizes=(48, 92),  # 48 / 92 in float32 is smaller: 92 times that is not 48
        interaction=InteractionConfig(num_interactions=1, num_heads=2, units=("1<-2",), ffn=False),
        merging=None,
    )

    def build(**network):
        branches = (
            dataclasses.replace(b, network=dataclasses.replace(b.network, depth=1, num_heads=1, **network))
            for b in config.branches
        )
        return dataclasses.replace(config, branches=tuple(branches))

    return build


def images(count: int, *size: int) -> torch.Tensor:
    return torch.randn(count, 3, *size, generator=torch.Generator().manual_seed(count))


@torch.no_grad()
def test_classifier_of_any_batch_size(two_branches, randomize, tmp_path):
    """As ONNX; that a torch.export program needs nothing of this project is tested with the tool."""
    config = ClassifierConfig(pyramid=two_branches(class_token=True), num_classes=5, pooling="first_patch")
    model = randomize(PIIPClassifier(config)).train()
    check = export_onnx(model, tmp_path / "model.onnx", (92, 92), metadata={"model": "tiny"})
    assert not model.training
    assert (
        check.files == (tmp_path / "model.onnx",) == tuple(tmp_path.iterdir())
        and check.max_error < 1e-4 * check.max_value
    )
    session = onnxruntime.InferenceSession(check.files[0])
    assert session.get_inputs()[0].shape == ["batch", 3, 92, 92]
    for count in (1, 3):
        (found,) = session.run(["logits"], {"image": images(count, 92, 92).numpy()})
        np.testing.assert_allclose(found, model(images(count, 92, 92)).numpy(), rtol=1e-4, atol=1e-5)
    file = onnx.load(check.files[0])
    assert {node.domain for node in file.graph.node} == {""} and "GridSample" in {n.op_type for n in file.graph.node}
    assert [p.value for p in file.metadata_props if p.key == "model"] == ["tiny"]


@torch.no_grad()
def test_traces_and_the_older_exporter_of_pytorch(two_branches, randomize, tmp_path):
    config = dataclasses.replace(two_branches(), merging=MergingConfig(num_groups=4))
    model, path, image = randomize(DensePIIP(config)).eval(), tmp_path / "model.onnx", images(3, 92, 92)
    traced = torch.jit.trace(model, images(2, 92, 92))
    assert "piip::deform_attn_grid" in str(traced.inlined_graph)
    torch.testing.assert_close(traced(image), model(image))
    options = {"dynamo": False, "opset_version": 18, "input_names": ["image"], "dynamic_axes": {"image": {0: "batch"}}}
    torch.onnx.export(model, (images(2, 92, 92),), path, **options)
    found = onnxruntime.InferenceSession(path).run(None, {"image": image.numpy()})
    for have, want in zip(found, model(image), strict=True):
        np.testing.assert_allclose(have, want.numpy(), rtol=1e-3, atol=1e-4)


@torch.no_grad()
def test_backbone_in_windows_on_a_side_that_does_not_divide(two_branches, randomize, tmp_path):
    config = two_branches()
    branches = tuple(dataclasses.replace(branch, window_size=3) for branch in config.branches)
    merging = MergingConfig(num_groups=4)
    model = randomize(DensePIIP(dataclasses.replace(config, branches=branches, merging=merging))).eval()
    size = (74, 90)  # Branch 1 sees 38 x 46 of 38.6 x 46.96 pixels
    check = export_onnx(model, tmp_path / "model.onnx", size, batch_size=1, opset=20, gridsample=False)
    assert {node.op_type for node in onnx.load(check.files[0]).graph.node} & {"GridSample", "Gather"} == {"Gather"}
    session = onnxruntime.InferenceSession(check.files[0])
    names = ["stride4", "stride8", "stride16", "stride32"]
    assert [output.name for output in session.get_outputs()] == names
    for found, expected in zip(
        session.run(names, {"image": images(1, *size).numpy()}), model(images(1, *size)), strict=True
    ):
        np.testing.assert_allclose(found, expected.numpy(), rtol=1e-3, atol=1e-4)


@torch.no_grad()
def test_prefix_tokens_and_rotary_positions_in_windows(randomize, tmp_path):
    """Of any batch size."""
    network = TimmConfig(name="vit_small_patch16_dinov3", options={"depth": 1, "embed_dim": 16, "num_heads": 2})
    branch = BranchConfig(network=network, image_size=112, window_size=3)
    model = randomize(PIIP(PIIPConfig(branches=(branch,), merging=None))).eval()
    (file,) = export_onnx(model, tmp_path / "model.onnx", (112, 80)).files
    session = onnxruntime.InferenceSession(file)
    for count in (1, 3):
        image = images(count, 112, 80)
        for found, expected in zip(session.run(None, {"image": image.numpy()}), model(image), strict=True):
            np.testing.assert_allclose(found, expected.numpy(), rtol=1e-3, atol=1e-4)


class Noise(nn.Module):
    """Computes something else each time."""

    def forward(self, image):
        return image + torch.rand_like(image)


def test_program_file_is_checked_before_it_appears(tmp_path):
    path = tmp_path / "model.pt2"
    check = save_program(nn.Conv2d(3, 2, 1), path, (8, 8), batch_size=2)
    assert check.max_error == 0 and check.files == (path,)
    before = path.read_bytes()
    with pytest.raises(ExportError, match=r"expected a relative difference below 0\.001. Nothing was written"):
        save_program(Noise(), path, (8, 8), batch_size=2)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_mistakes_are_named(tmp_path):
    model = nn.Conv2d(3, 2, 1)
    with pytest.raises(ExportError, match="opset=15: expected 16 or later"):
        export_onnx(model, tmp_path / "model.onnx", (8, 8), opset=15)
    with pytest.raises(ExportError, match="there is no folder"):
        save_program(model, tmp_path / "none" / "model.pt2", (8, 8))
    with pytest.raises(ExportError, match=r"weight is torch\.float16 on cpu: expected float32 on the CPU"):
        save_program(model.half(), tmp_path / "model.pt2", (8, 8))
