"""Whether a training fits: every ZeRO stage with and without activation checkpointing, against the memory of a GPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from tabulate import tabulate

from piip_core.deepspeed_start import BUCKET_SIZE
from piip_core.errors import ConfigError

from .dry_run import Activations, DryRun, Precision, Step
from .states import STAGES, ModelStates, Offload, model_states

__all__ = ["Estimate", "MemoryReport", "Setting", "estimate_memory", "memory_table"]

GIB = 2**30
RESERVE = 0.1
"""Part of a GPU that is left for the CUDA context, NCCL, what kernels take while they run, and fragmentation. It is an
allowance, no measurement."""
_MOST_GPUS = 4096


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What a training runs on, and how: `gpus` over all machines, each with `gpu_memory` GiB and `batch_size` images.

    `input_size` is height and width of the padded images, "bf16" autocast with float32 weights, `offload` what the host
    keeps in the stages that can, `bucket_size` the elements of DeepSpeed's buckets.
    """

    batch_size: int
    input_size: tuple[int, int]
    gpus: int = 8
    gpu_memory: float = 80.0
    precision: Precision = "bf16"
    offload: Offload = "none"
    bucket_size: int = BUCKET_SIZE

    def __post_init__(self) -> None:
        for name in ("batch_size", "gpus", "gpu_memory", "bucket_size"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"{name}={getattr(self, name)}: expected a positive number")


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """Memory of a GPU in one way of training.

    For small models trained on a CPU it was between 2 % less and 11 % more than the most that PyTorch's profiler saw
    allocated: more, because gradients count in full while activations are at their peak. Without them it is not above
    (tests/tools/test_memory_estimate.py asks for that, and for at most 5 % less with them). Nothing here was compared
    with a GPU.

    Attributes:
        stage: ZeRO stage, 0 for DistributedDataParallel.
        checkpointing: Whether blocks are computed again in the backward pass instead of kept.
        states: Bytes that do not depend on the batch.
        activations: Bytes that do.
        buffers: Bytes of the model's buffers.
        total: The most bytes at any time; activations and what the optimizer's step takes are never there together.
        fits: Whether `total` leaves `RESERVE` of the GPU free.
    """

    stage: int
    checkpointing: bool
    states: ModelStates
    activations: Activations
    buffers: int
    total: int
    fits: bool

    @property
    def title(self) -> str:
        """In words, to follow "with"."""
        way = f"ZeRO-{self.stage}" if self.stage else "DistributedDataParallel (stage 0)"
        return f"{way} {'and' if self.checkpointing else 'without'} activation checkpointing"


@dataclass(frozen=True, kw_only=True)
class MemoryReport:
    """All ways of training one model: by stage, without and with checkpointing, and in a sentence whether it fits.

    `params` are trained ones; `notes` say what the activations hold and leave out.
    """

    name: str
    params: int
    setting: Setting
    estimates: tuple[Estimate, ...]
    answer: str
    notes: tuple[str, ...] = ()


def estimate_memory(name: str, run: DryRun, step: Step, setting: Setting, notes: Sequence[str] = ()) -> MemoryReport:
    """Estimates every stage with and without activation checkpointing; seconds to a minute for 7e9 parameters.

    `step` is as for `DryRun.activations`, with batches of `setting`; `notes` say what it leaves out.
    """
    params = sum(parameter.numel() for parameter in run.model.parameters() if parameter.requires_grad)
    buffers = sum(buffer.nbytes for buffer in run.model.buffers())
    kept = run.activations(step, precision=setting.precision)
    # Under DeepSpeed our training turns off autocast's cache; without checkpointing autograd keeps the copies anyway
    checkpointed = {
        cached: run.activations(step, precision=setting.precision, checkpointing=True, cache_weights=cached)
        for cached in ([True, False] if setting.precision == "bf16" else [True])
    }
    estimates = []
    for stage in STAGES:
        estimates.append(_estimate(setting, params, buffers, kept, stage, checkpointing=False))
        activations = checkpointed[stage == 0 or setting.precision == "fp32"]
        estimates.append(_estimate(setting, params, buffers, activations, stage, checkpointing=True))
    answer = _answer(params, setting, estimates)
    return MemoryReport(
        name=name, params=params, setting=setting, estimates=tuple(estimates), answer=answer, notes=tuple(notes)
    )


def _estimate(
    setting: Setting, params: int, buffers: int, activations: Activations, stage: int, *, checkpointing: bool
) -> Estimate:
    offload = setting.offload if stage else "none"  # as much of it as the stage can do
    if offload == "parameters" and stage < 3:
        offload = "optimizer"
    states = model_states(params, stage, setting.gpus, offload, setting.bucket_size)
    total = max(states.total + max(activations.peak, states.step), states.whole) + buffers
    return Estimate(
        stage=stage,
        checkpointing=checkpointing,
        states=states,
        activations=activations,
        buffers=buffers,
        total=total,
        fits=total <= (1 - RESERVE) * setting.gpu_memory * GIB,
    )


def _answer(params: int, setting: Setting, estimates: Sequence[Estimate]) -> str:
    hardware = f"{setting.gpus} x {setting.gpu_memory:g} GB"
    fitting = [estimate for estimate in estimates if estimate.fits]
    if fitting:
        # Recomputing costs a third more compute and stage 3 the most communication, so both together come last
        best = min(fitting, key=lambda e: (e.stage == 3, e.checkpointing, e.stage))
        return f"fits on {hardware} with {best.title}: {best.total / GIB:.0f} of {setting.gpu_memory:g} GiB per GPU"
    least = min(estimates, key=lambda estimate: estimate.total)
    text = f"does not fit on {hardware}: the least is {least.total / GIB:.0f} GiB per GPU, with {least.title}"
    while setting.gpus < _MOST_GPUS:
        setting = replace(setting, gpus=2 * setting.gpus)
        more = _estimate(
            setting, params, least.buffers, least.activations, least.stage, checkpointing=least.checkpointing
        )
        if more.fits:
            return f"{text}; {setting.gpus} such GPUs would do"
    return f"{text}; more GPUs alone do not help: smaller images or batches, or larger GPUs do"


def memory_table(report: MemoryReport) -> str:
    """The report as a table in GiB, with its answer and notes."""
    setting = report.setting
    columns: dict[str, Callable[[Estimate], int]] = {
        "parameters": lambda e: e.states.parameters + e.buffers,
        "gradients": lambda e: e.states.gradients,
        "optimizer": lambda e: e.states.optimizer,
        "communication": lambda e: e.states.communication,
        "activations": lambda e: e.activations.peak,
        "optimizer's step": lambda e: e.states.step,
        "total": lambda e: e.total,
        "on the host": lambda e: e.states.host,
    }
    lines = [
        [
            estimate.stage,
            "on" if estimate.checkpointing else "off",
            *(f"{read(estimate) / GIB:.1f}" for read in columns.values()),
            "yes" if estimate.fits else "no",
        ]
        for estimate in report.estimates
    ]
    align = ["right", "left", *["right"] * len(columns), "left"]
    header = ["ZeRO", "checkpointing", *columns, "fits"]
    table = tabulate(lines, header, tablefmt="github", colalign=align, disable_numparse=True)
    height, width = setting.input_size
    title = (
        f"{report.name}: {report.params / 1e6:.1f} M trained parameters, {setting.gpus} GPUs, per GPU "
        f"{setting.batch_size} x {height} x {width} pixels, {setting.precision}"
    )
    legend = (
        "GiB per GPU. Of activations and optimizer's step the larger one counts. It fits where the total leaves "
        f"{RESERVE:.0%} of the GPU free (CUDA context, NCCL, kernels' workspace, fragmentation: an allowance)."
    )
    start = f"Every process makes the whole model on its host first: {4 * report.params / GIB:.1f} GiB each"
    notes = "".join(f"\n{note}." for note in [start, *report.notes])
    return f"{title}\n\n{table}\n\n{legend}{notes}\n{report.name} {report.answer}"
