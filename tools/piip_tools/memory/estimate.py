"""Whether a training fits: every ZeRO stage with and without activation checkpointing, against the memory of a GPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from piip_core.deepspeed_start import BUCKET_SIZE, LIVE_PARAMETERS
from piip_core.errors import ConfigError
from piip_core.recompute import GradCheckpointing

from .dry_run import Activations, DryRun, Precision, Step

Offload = Literal["none", "optimizer", "parameters"]

GIB = 2**30
RESERVE = 0.1
"""Part of a GPU that is left for the CUDA context, NCCL, what kernels take while they run, and fragmentation. It is an
allowance, no measurement."""
STAGES = (0, 1, 2, 3)
"""ZeRO stages; 0 is DistributedDataParallel, or a single process."""

_WAYS: dict[GradCheckpointing, str] = {False: "off", "cheap": "cheap", True: "on"}
_TITLES: dict[GradCheckpointing, str] = {False: "without", "cheap": "and cheap", True: "and"}

# What `train.deepspeed` trains with: float32 weights and gradients, autocast in bfloat16, AdamW
_FLOAT32 = 4
_MOMENTS = 2 * _FLOAT32
_REDUCE_BUCKETS = 2  # communication overlaps with the backward pass


@dataclass(frozen=True, kw_only=True)
class ModelStates:
    """Bytes on one of the GPUs, and in the memory of its host, that do not depend on the batch."""

    parameters: int
    gradients: int  # what stays of them until the optimizer's step
    optimizer: int  # AdamW's moments, and in stages 1 and 2 the copy of the weights that it updates
    communication: int  # buckets that gradients and weights travel in, and the weights that stage 3 has gathered
    step: int  # what the optimizer's step takes for itself while activations take nothing
    # The whole weights with what else is there: alone before they are divided, in stage 3 again, as a copy, while the
    # model is evaluated
    whole: int
    host: int = 0

    @property
    def total(self) -> int:
        """On the GPU during the forward and the backward pass."""
        return self.parameters + self.gradients + self.optimizer + self.communication


def model_states(
    params: int, stage: int, gpus: int, offload: Offload = "none", bucket_size: int = BUCKET_SIZE
) -> ModelStates:
    """Memory of a model on one of `gpus` GPUs.

    Args:
        params: Trained parameters.
        stage: One of `STAGES`.
        gpus: Processes, one per GPU, over all machines.
        offload: What the host keeps, as far as the stage can: the optimizer from stage 1 on, in stage 3 the parameters
            with it.
        bucket_size: Elements of the reduce and all-gather buckets.
    """
    part = -(-params // gpus)
    weights = _FLOAT32 * params
    if stage == 0:
        # DDP copies gradients into buckets of its own; AdamW's step keeps one temporary per parameter
        buckets = weights if gpus > 1 else 0
        return ModelStates(
            parameters=weights,
            gradients=weights,
            optimizer=_MOMENTS * params,
            communication=buckets,
            step=weights,
            whole=weights,
        )
    parameters = _FLOAT32 * (part if stage == 3 else params)
    gathered = _FLOAT32 * (min(LIVE_PARAMETERS, params) if stage == 3 else bucket_size)
    # Stage 3 updates the weights where they are
    optimizer = _MOMENTS * part + (0 if stage == 3 and offload == "none" else _FLOAT32 * part)
    host = 0
    if offload != "none":
        host, optimizer = optimizer, 0
    if offload == "parameters" and stage == 3:
        host, parameters = host + parameters, 0
    return ModelStates(
        parameters=parameters,
        gradients=weights if stage == 1 else _FLOAT32 * part,
        optimizer=optimizer,
        communication=_REDUCE_BUCKETS * _FLOAT32 * bucket_size + gathered,
        step=(2 if stage == 1 else 1) * _FLOAT32 * part,  # stage 1 also copies its part of the gradients
        whole=weights + parameters + optimizer if stage == 3 else weights,
        host=host,
    )


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
    """

    stage: int  # of ZeRO, 0 for DistributedDataParallel
    checkpointing: GradCheckpointing  # what is computed again in the backward pass instead of kept
    states: ModelStates
    activations: Activations
    buffers: int  # bytes of the model's buffers and frozen parameters
    total: int  # the most bytes at any time; activations and what the step takes are never there together
    fits: bool  # whether `total` leaves `RESERVE` of the GPU free

    @property
    def title(self) -> str:
        """In words, to follow "with"."""
        way = f"ZeRO-{self.stage}" if self.stage else "DistributedDataParallel (stage 0)"
        return f"{way} {_TITLES[self.checkpointing]} activation checkpointing"


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
    """Estimates every stage in every way of activation checkpointing; seconds to a minute for 7e9 parameters.

    `step` is as for `DryRun.activations`, with batches of `setting`; `notes` say what it leaves out.
    """
    params = sum(parameter.numel() for parameter in run.model.parameters() if parameter.requires_grad)
    frozen = sum(parameter.nbytes for parameter in run.model.parameters() if not parameter.requires_grad)
    own = sum(buffer.nbytes for buffer in run.model.buffers())
    # Under DeepSpeed our training turns off autocast's cache; without checkpointing autograd keeps the copies anyway
    found = {
        (way, cached): run.activations(step, precision=setting.precision, checkpointing=way, cache_weights=cached)
        for way in _WAYS
        for cached in ([True, False] if way and setting.precision == "bf16" else [True])
    }
    estimates = []
    for stage in STAGES:
        states = model_states(params, stage, setting.gpus, setting.offload, setting.bucket_size)
        buffers = own + (frozen // setting.gpus if stage == 3 else frozen)
        for way in _WAYS:
            if (stage, way) == (3, "cheap"):  # refused in training
                continue
            activations = found.get((way, stage == 0), found[way, True])
            total = max(states.total + max(activations.peak, states.step), states.whole) + buffers
            estimates.append(
                Estimate(
                    stage=stage,
                    checkpointing=way,
                    states=states,
                    activations=activations,
                    buffers=buffers,
                    total=total,
                    fits=total <= (1 - RESERVE) * setting.gpu_memory * GIB,
                )
            )
    return MemoryReport(
        name=name,
        params=params,
        setting=setting,
        estimates=tuple(estimates),
        answer=_answer(setting, estimates),
        notes=tuple(notes),
    )


def _answer(setting: Setting, estimates: Sequence[Estimate]) -> str:
    hardware = f"{setting.gpus} x {setting.gpu_memory:g} GB"
    fitting = [estimate for estimate in estimates if estimate.fits]
    if not fitting:
        least = min(estimates, key=lambda estimate: estimate.total)
        return f"does not fit on {hardware}: the least is {least.total / GIB:.0f} GiB per GPU, with {least.title}"
    # Recomputing all costs a third more compute and stage 3 the most communication, so both together come last
    best = min(fitting, key=lambda e: (e.stage == 3, [*_WAYS].index(e.checkpointing), e.stage))
    return f"fits on {hardware} with {best.title}: {best.total / GIB:.0f} of {setting.gpu_memory:g} GiB per GPU"


def memory_table(report: MemoryReport) -> str:
    """The report as a table in GiB, with its answer and notes."""
    from tabulate import tabulate  # the GPU check does without

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
            _WAYS[estimate.checkpointing],
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
    whole = report.estimates[0].states.parameters + report.estimates[0].buffers
    start = f"Every process makes the whole model on its host first: {whole / GIB:.1f} GiB each"
    notes = "".join(f"\n{note}." for note in [start, *report.notes])
    return f"{title}\n\n{table}\n\n{legend}{notes}\n{report.name} {report.answer}"


def kept_table(report: MemoryReport, rows: int = 40) -> str:
    """What is kept for the backward pass, in MB by the module that made it and by what is recomputed; largest first."""
    from tabulate import tabulate

    ways = {way: next(e for e in report.estimates if e.checkpointing == way).activations for way in _WAYS}
    names = list(dict.fromkeys(name for found in ways.values() for name in found.kept))
    sizes = {name: [found.kept.get(name, 0) for found in ways.values()] for name in names}
    lines = {name: sizes[name] for name in names[:rows]}
    if rest := names[rows:]:
        lines[f"{len(rest)} others"] = [sum(column) for column in zip(*(sizes[name] for name in rest), strict=True)]
    lines["all"] = [found.saved for found in ways.values()]
    header = ["kept, MB, by checkpointing", *_WAYS.values()]
    cells = [[name, *(f"{size / 1e6:.1f}" for size in line)] for name, line in lines.items()]
    return tabulate(cells, header, tablefmt="github", disable_numparse=True, colalign=["left", *["right"] * len(ways)])
