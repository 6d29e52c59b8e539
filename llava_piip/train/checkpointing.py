"""Folders of a run, the checkpoint to go on from, and saves that hold nothing but what was trained."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from accelerate import PartialState
from peft import PeftModel
from torch import Tensor, nn

from piip_core.checkpoints import write_checkpoint
from piip_core.errors import CheckpointError, OutputFolderError
from piip_core.files import read_json, write_atomically
from piip_core.training_checkpoints import RunFolder

from ..loading import (
    FINAL,
    FORMAT,
    NOTE,
    PREFIXES,
    ModelSource,
    base_model,
    gathered,
    part_parameters,
    part_state,
)
from .arguments import PIIPTrainingArguments


def run_folder(run: str | os.PathLike[str]) -> RunFolder:
    """The folder of a run of transformers' Trainer."""
    return RunFolder(Path(run), "trainer_state.json", fewer="--save_total_limit", resume="--resume true")


def prepare_output(training: PIIPTrainingArguments) -> Path | None:
    """Makes sure that a run can write to its folder, and finds the checkpoint to go on from, None for a new start.

    All processes call it together; what a killed run left half written is removed.
    """
    folder, resume_from = run_folder(training.output_dir), training.resume_from_checkpoint
    run = folder.path
    if run.exists() and not run.is_dir():
        raise OutputFolderError(f"output_dir {run}: is a file; expected a folder, which may not exist yet")
    content = folder.content()
    if content and not (training.resume or resume_from or training.overwrite_output_dir):
        some = ", ".join(content[:4]) + (", ..." if len(content) > 4 else "")
        raise OutputFolderError(
            f"output_dir {run}: is not empty ({some}). Give --resume true to go on with the run in it, "
            "--overwrite_output_dir true to start it anew, or another --output_dir"
        )
    if resume_from is not None and not folder.is_complete(resume_from):
        complete = ", ".join(map(str, folder.checkpoints())) or "none"
        raise OutputFolderError(
            f"resume_from_checkpoint {resume_from}: is no complete checkpoint, it has no {folder.state_file}. Complete "
            f"ones in {run}: {complete}"
        )
    writes, state = training.should_save, PartialState()
    state.wait_for_everyone()  # nobody deletes or makes anything before everybody has looked
    if writes:
        for path in [*folder.checkpoints(), run / FINAL] if training.overwrite_output_dir else []:
            folder.discard(path)
        folder.clear_staging()
    state.wait_for_everyone()
    if resume_from is not None:
        return Path(resume_from)
    return folder.checkpoints()[-1] if training.resume and folder.checkpoints() else None


def check_same_processes(checkpoint: Path, num_processes: int) -> None:
    """Refuses a checkpoint of ZeRO partitions that were cut for another number of processes."""
    file = checkpoint / "training_arguments.json"
    written = read_json(file, CheckpointError).get("num_processes", num_processes) if file.is_file() else num_processes
    RunFolder.check_same_processes(checkpoint, written, num_processes, f"--model {checkpoint}")


def save_trained(
    model: nn.Module,
    folder: str | Path,
    source: ModelSource,
    *,
    state_dict: Mapping[str, Tensor] | None = None,
    processor: Any = None,
) -> None:
    """Writes the parts that were trained, the projector in any case, and the adapters if the model has any.

    `source` says where the rest comes from. `state_dict` has the weights, gathered from all processes; None takes them
    from the model, which may be peft's.
    """
    folder, base = Path(folder), base_model(model)
    folder.mkdir(parents=True, exist_ok=True)
    state = model.state_dict() if state_dict is None else state_dict
    prefix = "base_model.model." if isinstance(model, PeftModel) else ""  # that peft puts in front of names
    found = {part: part_parameters(base, part).values() for part in PREFIXES}
    # Not a language model with adapters
    trained = [part for part, parameters in found.items() if parameters and all(p.requires_grad for p in parameters)]
    parts = list(dict.fromkeys(["projector", *trained]))
    if "vision_tower" in parts and "interactions" in parts:
        parts.remove("interactions")  # the file of the tower has them
    for part in parts:
        write_checkpoint(
            folder / f"{part}.safetensors", {name: state[prefix + name] for name in part_state(base, part)}
        )
    base.config.save_pretrained(folder)
    if isinstance(model, PeftModel):
        model.save_pretrained(folder, state_dict=state_dict, save_embedding_layers=False)
    if processor is not None:
        processor.save_pretrained(folder)
    with write_atomically(folder / NOTE, "w") as file:
        json.dump({"format": FORMAT, "parts": parts, "source": asdict(source)}, file, indent=2)


def gathered_state(model: nn.Module, *, keep: bool) -> dict[str, Tensor]:
    """What `save_trained` needs of a model that ZeRO-3 has partitioned; all processes must call it.

    A process gets nothing unless `keep` says so.
    """
    # a frozen projector may have come from an earlier stage, so it is saved too
    projector = {id(parameter) for parameter in part_parameters(base_model(model), "projector").values()}
    state = {}
    for prefix, module in model.named_modules():  # one by one: the whole may not fit into the memory of a device
        own = dict(module.named_parameters(prefix, recurse=False))
        own = {name: p for name, p in own.items() if p.requires_grad or id(p) in projector}
        with gathered(list(own.values())):
            if keep:
                state |= {name: parameter.detach().cpu().clone() for name, parameter in own.items()}
    if keep:  # buffers are whole everywhere
        tensors = model.state_dict(keep_vars=True)
        state |= {n: t.detach().cpu() for n, t in tensors.items() if not isinstance(t, nn.Parameter)}
    return state
