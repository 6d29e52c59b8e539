"""Whether a training fits: every ZeRO stage with and without activation checkpointing, against the memory of a GPU."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

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
    """What a training runs on, and how.

    Args:
        batch_size: Images per GPU.
        input_size: Height and width of the padded images.
        gpus: Over all machines.
        gpu_memory: Of one GPU, in GiB.
        precision: "bf16" is autocast with float32 weights.
        offload: What the host keeps, in the stages that can.
        bucket_size: Elements of DeepSpeed's buckets.
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

    @property
    def usable(self) -> float:
        """Bytes of a GPU that an estimate may take."""
        return (1 - RESERVE) * self.gpu_memory * GIB


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """Memory of a GPU in one way of training.

    For small models trained on a CPU it was between 2 % less and 11 % more than the most that PyTorch's profiler saw
    allocated: more, because gradients count in full while activations are at their peak. Without them it is not above
    (tests/piip_core/memory asks for that, and for at most 5 % less with them). Nothing here was compared with a GPU.

    Attributes:
        stage: ZeRO stage, 0 for DistributedDataParallel.
        checkpointing: Whether blocks are computed again in the backward pass instead of kept.
        states: Bytes that do not depend on the batch.
        activations: Bytes that do.
        buffers: Bytes of the model's buffers.
        total: The most bytes at any time; activations and what the optimizer's step takes are never there together.
        fits: Whether `total` stays below `Setting.usable`.
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
    """All ways of training one model.

    Attributes:
        name: Of the model.
        params: Parameters.
        setting: What was asked.
        estimates: By stage, without and with checkpointing.
        answer: Whether and how it fits, in a sentence.
        notes: What the activations hold and leave out.
    """

    name: str
    params: int
    setting: Setting
    estimates: tuple[Estimate, ...]
    answer: str
    notes: tuple[str, ...] = ()


def estimate_memory(name: str, run: DryRun, step: Step, setting: Setting, notes: Sequence[str] = ()) -> MemoryReport:
    """Estimates every stage with and without activation checkpointing; seconds to a minute for 7e9 parameters.

    Args:
        name: Of the model, for the report.
        run: The model.
        step: As for `DryRun.activations`, with batches of `setting`.
        setting: The training.
        notes: What `step` leaves out.
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
        states = _states(params, stage, setting.gpus, setting)
        for checkpointing in (False, True):
            cached = stage == 0 or setting.precision == "fp32"
            activations = checkpointed[cached] if checkpointing else kept
            total = _total(states, activations, buffers)
            estimates.append(
                Estimate(
                    stage=stage,
                    checkpointing=checkpointing,
                    states=states,
                    activations=activations,
                    buffers=buffers,
                    total=total,
                    fits=total <= setting.usable,
                )
            )
    return MemoryReport(
        name=name,
        params=params,
        setting=setting,
        estimates=tuple(estimates),
        answer=_answer(params, setting, estimates),
        notes=tuple(notes),
    )


def _total(states: ModelStates, activations: Activations, buffers: int) -> int:
    return max(states.total + max(activations.peak, states.step), states.whole) + buffers


def _states(params: int, stage: int, gpus: int, setting: Setting) -> ModelStates:
    """Under `setting`, but for the number of GPUs."""
    return model_states(params, stage, gpus, _possible(setting.offload, stage), setting.bucket_size)


def _possible(offload: Offload, stage: int) -> Offload:
    """The most of `offload` that a stage can do."""
    if stage == 0:
        return "none"
    return "optimizer" if offload == "parameters" and stage < 3 else offload


def _answer(params: int, setting: Setting, estimates: Sequence[Estimate]) -> str:
    hardware = f"{setting.gpus} x {setting.gpu_memory:g} GB"
    fitting = [estimate for estimate in estimates if estimate.fits]
    if fitting:
        # Recomputing costs a third more compute and stage 3 the most communication, so both together come last
        best = min(fitting, key=lambda e: (e.stage == 3, e.checkpointing, e.stage))
        return f"fits on {hardware} with {best.title}: {best.total / GIB:.0f} of {setting.gpu_memory:g} GiB per GPU"
    least = min(estimates, key=lambda estimate: estimate.total)
    text = f"does not fit on {hardware}: the least is {least.total / GIB:.0f} GiB per GPU, with {least.title}"
    gpus = setting.gpus
    while gpus < _MOST_GPUS:
        gpus *= 2
        states = _states(params, least.stage, gpus, setting)
        if _total(states, least.activations, least.buffers) <= setting.usable:
            return f"{text}; {gpus} such GPUs would do"
    return f"{text}; more GPUs alone do not help: smaller images or batches, or larger GPUs do"


def memory_table(report: MemoryReport) -> str:
    """The report as a table in GiB, with its answer and notes."""
    setting = report.setting
    header = ["ZeRO", "checkpointing", "parameters", "gradients", "optimizer", "communication"]
    header += ["activations", "optimizer's step", "total", "on the host", "fits"]
    rows = [
        [
            estimate.stage,
            "on" if estimate.checkpointing else "off",
            *(f"{n / GIB:.1f}" for n in _columns(estimate)),
            "yes" if estimate.fits else "no",
        ]
        for estimate in report.estimates
    ]
    align = ["right", "left", *["right"] * 8, "left"]
    table = tabulate(rows, header, tablefmt="github", colalign=align, disable_numparse=True)
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


def _columns(estimate: Estimate) -> tuple[int, ...]:
    states = estimate.states
    return (
        states.parameters + estimate.buffers,
        states.gradients,
        states.optimizer,
        states.communication,
        estimate.activations.peak,
        states.step,
        estimate.total,
        states.host,
    )
