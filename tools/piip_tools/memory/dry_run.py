"""Activation memory of a training step, found by running the step on tensors without data.

Model and batch are fake tensors (see `_fake_tensors`): forward and backward run operator by operator, with activation
checkpointing and autocast, but only shapes are computed. A dispatch mode adds up the storages alive.
PyTorch's own `torch.distributed._tools.MemTracker` finds the same sums and also which module they belong to, at forty
times the time (150 s instead of 4 s for PIIP-TSB), so it serves the tests and not the tool.

What the sums cannot know is what kernels take for themselves while they run. See `Estimate` for the error measured.
"""

from __future__ import annotations

import re
import warnings
import weakref
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.overrides import TorchFunctionMode

# By the name under which PyTorch's notes "Extending PyTorch" document it. Seen working with torch 2.10 to 2.14
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.module_tracker import ModuleTracker

from piip_core.export import tensors_in
from piip_core.pyramid import PIIP, DensePIIP
from piip_core.recompute import GradCheckpointing

Precision = Literal["fp32", "bf16"]
Kernels = Literal["cuda", "cpu"]
Step = Callable[[nn.Module], Tensor]

# What CUDA's autocast runs in float32 and a CPU's does not, of what our models use
_FLOAT32_ON_CUDA = {F.layer_norm, F.group_norm, F.rms_norm, F.interpolate, F.softmax, F.log_softmax, torch.softmax}


@dataclass(frozen=True, kw_only=True)
class Activations:
    """What a training step takes beside the model, its gradients and the optimizer's state, in bytes.

    Gradients of parameters count while autograd computes them, until they reach the parameter.
    """

    saved: int  # at the end of the forward pass: what is kept for the backward pass, and the batch
    peak: int  # the most at any time, from the batch to the end of the backward pass
    kept: dict[str, int]  # `saved` by the module that made it, that of all blocks together, the largest first


class DryRun:
    """A model whose training steps are run without data.

    Args:
        model: On the meta device. It gets fake tensors, and every run sets the activation checkpointing of its PIIP.
    """

    def __init__(self, model: nn.Module) -> None:
        self._mode = _fake_tensors()
        with self._mode:
            self.model = model.to_empty(device="cpu").train()
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(_drop_gradient)

    def activations(
        self,
        step: Step,
        *,
        precision: Precision = "bf16",
        checkpointing: GradCheckpointing = False,
        cache_weights: bool = True,
        kernels: Kernels = "cuda",
    ) -> Activations:
        """Runs a forward and a backward pass of `step`, which makes a batch and returns the loss of the model.

        Args:
            step: As above.
            precision: "bf16" is autocast with float32 weights.
            checkpointing: Of blocks and interactions (`PIIP.set_grad_checkpointing`).
            cache_weights: Whether autocast keeps the bfloat16 copies of the weights to the end of the forward pass.
            kernels: Whose rules of autocast, and whose attention kernels.
        """
        for module in self.model.modules():
            if isinstance(module, PIIP | DensePIIP):
                module.set_grad_checkpointing(checkpointing)
        modules = ModuleTracker()
        tracker = AliveStorages(self.model, lambda: max(modules.parents, key=len))
        autocast = torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16", cache_enabled=cache_weights)
        rules = _CudaRules if kernels == "cuda" else nullcontext
        with warnings.catch_warnings(), self._mode, rules(), tracker:
            warnings.filterwarnings("ignore", message="Mismatch dtype between input and weight")
            with autocast, modules:
                loss = step(self.model)
            saved = tracker.alive
            kept = {name: size for name, size in tracker.makers.most_common() if size}
            # Under the rules too, so that blocks are recomputed as they were computed: given the loss itself, PyTorch
            # would take the rules off for the call
            torch.autograd.backward(get_gradient_edge(loss))
        return Activations(saved=saved, peak=tracker.peak, kept=kept)

    @torch.no_grad()
    def inference(self, step: Callable[[nn.Module], Any], *, precision: Precision = "fp32") -> int:
        """The most bytes at any time of a forward pass in evaluation mode; arguments as for `activations`."""
        tracker = AliveStorages(self.model)
        autocast = torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16")
        with self._mode, _CudaRules(), tracker, autocast:
            step(self.model.eval())
        self.model.train()
        return tracker.peak


def backbone_step(batch_size: int, size: tuple[int, int]) -> Step:
    """A training step of a backbone alone: images (batch_size, 3, *size), and `squares` for the losses."""
    return lambda model: squares(model(torch.empty(batch_size, 3, *size)))


def squares(outputs: Iterable[Tensor]) -> Tensor:
    """Stands for losses: keeps the outputs and has gradients everywhere, as they do."""
    return sum(output.square().sum() for output in outputs)


class AliveStorages(TorchDispatchMode):
    """Adds up the storages that operators make, as long as they live; on real tensors as on fake ones.

    Args:
        model: Its parameters and buffers do not count.
        maker: Names what makes storages at the time.

    Attributes:
        alive: Bytes now.
        peak: The most bytes so far.
        makers: Bytes now, by what made them; blocks and interactions count together.
    """

    def __init__(self, model: nn.Module, maker: Callable[[], str] = lambda: "") -> None:
        super().__init__()
        self.alive = self.peak = 0
        self.makers: Counter[str] = Counter()
        self._maker = maker
        # A storage is one object, with one id, for as long as it lives
        self._model = [tensor.untyped_storage() for tensor in (*model.parameters(), *model.buffers())]
        self._known = {id(storage) for storage in self._model}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = func(*args, **(kwargs or {}))
        for tensor in tensors_in(results):
            self._add(tensor.untyped_storage())
        self.peak = max(self.peak, self.alive)
        return results

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = id(storage), storage.nbytes()
        if key not in self._known:
            self._known.add(key)
            maker = re.sub(r"(blocks|interactions)\.\d+", r"\1.*", self._maker())
            self._count(maker, size)
            weakref.finalize(storage, self._remove, key, maker, size).atexit = False

    def _remove(self, key: int, maker: str, size: int) -> None:
        self._known.discard(key)
        self._count(maker, -size)

    def _count(self, maker: str, size: int) -> None:
        self.alive += size
        self.makers[maker] += size


class _CudaRules(TorchFunctionMode):
    """Makes fake CPU tensors follow CUDA where the two differ in what they keep for the backward pass."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _FLOAT32_ON_CUDA and torch.is_autocast_enabled("cpu"):
            args = (args[0].float(), *args[1:])
        elif func is F.scaled_dot_product_attention and kwargs.get("attn_mask") is not None:
            # CUDA's memory-efficient kernel keeps no weights beside a bias either; a CPU's keeps none without
            args, kwargs = (args[0] + 0 * kwargs["attn_mask"].sum(), *args[1:]), {}
        return func(*args, **kwargs)


def _fake_tensors() -> AbstractContextManager[Any]:
    """PyTorch's mode of fake tensors, by the name under which its notes on the compiler document it.

    The meta device has neither autocast nor kernels of a CPU. Seen working with torch 2.10 to 2.14.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    return FakeTensorMode(allow_non_fake_inputs=True)


def _drop_gradient(parameter: nn.Parameter) -> None:
    parameter.grad = None
