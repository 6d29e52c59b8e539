"""What is used of other libraries and documented by none: each test names it, and fails when it is gone or changed."""

import gc
import inspect
import weakref

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from piip_core.branches.timm_model import embed_image
from piip_core.integrations.timm.piip import remember_argument
from piip_core.ops.reference import _grid_sample_backward
from piip_core.recompute import run_checkpointed
from piip_tools.memory.dry_run import AliveStorages, _fake_tensors


def test_torch_fake_tensors():
    """torch._subclasses.fake_tensor.FakeTensorMode, in tools/piip_tools/memory/dry_run.py."""
    with _fake_tensors(), torch.autocast("cpu", torch.bfloat16):
        product = torch.empty(1 << 20, 1 << 20) @ torch.ones(1 << 20, 3)  # 4 TB, if it had data
    assert product.shape == (1 << 20, 3) and product.dtype == torch.bfloat16 and product.device.type == "cpu"


def test_torch_dispatch_mode_and_storages_as_objects():
    """torch.utils._python_dispatch.TorchDispatchMode, and that a storage is one object while a tensor has it."""
    tensor = torch.zeros(3)
    gone = weakref.ref(tensor.untyped_storage())
    gc.collect()
    assert gone() is tensor[1:].untyped_storage(), "torch makes another object of a storage at each request"
    del tensor
    assert gone() is None, "the object of a storage outlives the storage"
    with AliveStorages(nn.Identity()) as tracker:
        first = torch.ones(1000)
        del first
        kept = torch.ones(10) + torch.ones(10)
    assert (tracker.alive, tracker.peak) == (kept.nbytes, 4000)


def test_torch_grid_sampler_2d_backward():
    """torch.ops.aten.grid_sampler_2d_backward, in piip_core/ops/reference.py."""
    image, grid = torch.randn(2, 3, 5, 4, requires_grad=True), (torch.rand(2, 6, 7, 2) * 2.4 - 1.2).requires_grad_()
    sampled = F.grid_sample(image, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    grad = torch.randn_like(sampled)
    expected = torch.autograd.grad(sampled, (image, grid), grad)
    for found, want in zip(_grid_sample_backward(grad, image, grid), expected, strict=True):
        torch.testing.assert_close(found, want)


@pytest.mark.parametrize(("mode", "runs"), [(False, 1), ("cheap", 1), (True, 2)])
def test_torch_attention_kernels(mode, runs):
    """torch.ops.aten._scaled_dot_product_flash_attention_for_cpu and its like, in piip_core/recompute.py."""
    kernel, called = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default, []

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            called.append(function)
            return function(*args, **(kwargs or {}))

    query = torch.randn(1, 2, 16, 8, requires_grad=True)
    with Count():
        run_checkpointed(mode, lambda x: F.scaled_dot_product_attention(x, x, x), query).sum().backward()
    assert called.count(kernel) == runs


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "vit_small_patch16_dinov3", "eva02_tiny_patch14_224"])
@torch.no_grad()
def test_timm_pos_embed(name):
    """timm's VisionTransformer._pos_embed and Eva._pos_embed, in piip_core/branches/timm_model.py."""
    model = timm.create_model(name, num_classes=0, dynamic_img_size=True, depth=1).eval()
    image = torch.randn(1, 3, 112, 112)
    seen = {}
    hook = model.blocks[0].register_forward_pre_hook(
        lambda _, args, kwargs: seen.update(kwargs, args=args), with_kwargs=True
    )
    model.forward_features(image)
    hook.remove()
    sequence, _, rotary = embed_image(model, image)
    assert torch.equal(sequence, seen["args"][0])
    assert (rotary is None) == (seen.get("rope") is None)
    assert rotary is None or torch.equal(rotary, seen["rope"])


def test_timm_model_args(tmp_path):
    """`_model_args` of a timm model, in piip_core/integrations/timm/piip.py."""
    import json

    from timm.models import save_for_hf

    model = timm.create_model("test_vit", num_classes=3)
    remember_argument(model, "published", True)
    save_for_hf(model, tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())
    assert stored["model_args"]["published"] is True, "timm does not store model._model_args"


def test_transformers_initialised_flag():
    """`_is_hf_initialized` of a tensor, in piip_core/integrations/transformers/modeling.py."""
    pytest.importorskip("transformers")
    from transformers import initialization

    from piip_core.integrations.transformers.modeling import is_loaded

    tensor = torch.zeros(2)
    assert not is_loaded(tensor)
    tensor._is_hf_initialized = True
    assert is_loaded(tensor)
    initialization.copy_(tensor, torch.ones(2))
    assert not tensor.any(), "transformers.initialization does not heed the flag any more"


def test_transformers_datasets_cache():
    """is_datasets_available.cache_clear, in piip_core/integrations/transformers/__init__.py."""
    utils = pytest.importorskip("transformers.utils")
    assert hasattr(utils.is_datasets_available, "cache_clear"), "is_datasets_available keeps no answer any more"


def test_deepspeed_init_context():
    """deepspeed.runtime.zero.partition_parameters, in piip_core/integrations/transformers/modeling.py."""
    pytest.importorskip("deepspeed")
    from deepspeed.runtime.zero import partition_parameters

    assert partition_parameters.top_level_context is None
    partition_parameters.shutdown_init_context()
    partition_parameters.restore_init_context()


def test_deepspeed_compatible_operators():
    """deepspeed.ops.__compatible_ops__, in piip_core/deepspeed_start.py."""
    deepspeed = pytest.importorskip("deepspeed")
    assert "deepspeed_shm_comm" in deepspeed.ops.__compatible_ops__


def test_deepspeed_writes_checkpoints_where_save_engine_expects_it():
    """DeepSpeedEngine.checkpoint_engine and ._copy_recovery_script, in piip_core/deepspeed_start.py."""
    engine = pytest.importorskip("deepspeed").DeepSpeedEngine
    assert callable(getattr(engine, "_copy_recovery_script", None)), "DeepSpeedEngine._copy_recovery_script is gone"
    assert {"tag", "save_latest"} <= inspect.signature(engine.save_checkpoint).parameters.keys()
    source = inspect.getsource(engine)
    assert "self.checkpoint_engine.save(" in source, "DeepSpeedEngine.checkpoint_engine does not write any more"
