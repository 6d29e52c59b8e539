import torch

from piip_core import DensePIIP
from piip_core.meta import on_meta


def described(model):
    return [(name, t.shape, t.dtype, t.requires_grad, t.is_meta) for name, t in model.named_parameters()] + [
        (name, t.shape, t.dtype, t.is_meta) for name, t in model.named_buffers()
    ]


def test_the_model_is_the_one_of_the_meta_device(tiny_config):
    with torch.device("meta"):
        expected = described(DensePIIP(tiny_config(window_size=3)))
    with on_meta():
        found = described(DensePIIP(tiny_config(window_size=3)))
        real = torch.zeros(3, device="cpu").add_(1).mul_(5)  # tensors with data are left to torch
    assert found == expected and all(meta for *_, meta in found)
    assert real.tolist() == [5, 5, 5]
