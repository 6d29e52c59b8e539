"""Trains PIIP-LLaVA; in one process, `python -m llava_piip.train` is the same.

deepspeed llava_piip/train/train.py piip_llava_clip_bl_512_256_7b/stage1 \
    --annotations blip_laion_cc_sbu_558k.json --image_root LLaVA-Pretrain/images --output_dir runs/stage1
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

if not __package__:
    # Run as a script: this folder, whose names would hide packages such as deepspeed, gives way to that of the package
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch
import transformers

from llava_piip.chat_templates import resolve_chat_template
from llava_piip.data import Collator, ConversationDataset, read_records
from llava_piip.train.arguments import DataArguments, ModelArguments, PIIPTrainingArguments
from llava_piip.train.building import build_for_training
from llava_piip.train.checkpointing import prepare_output
from llava_piip.train.presets import parse_arguments
from llava_piip.train.trainer import PIIPTrainer
from piip_core.deepspeed_start import import_deepspeed
from piip_core.errors import SaveError, UserError
from piip_core.files import explain_write_errors
from piip_core.training_checkpoints import lock_run


@contextmanager
def locked(training: PIIPTrainingArguments) -> Iterator[None]:
    """Keeps other trainings out of the output folder, and says in one line why something cannot be written."""
    # Before there is a model: ZeRO-3 cuts it up as it is made, and has to know for how many processes
    if training.deepspeed is not None:
        import_deepspeed().init_distributed()
    _ = training.device  # makes the group of processes where DeepSpeed has not
    where = training.output_dir
    with lock_run(where, "give another --output_dir"), explain_write_errors(where, full_disk_only=True):
        yield


def prepare(
    model: ModelArguments, data: DataArguments, training: PIIPTrainingArguments
) -> tuple[PIIPTrainer, Path | None]:
    """The trainer of a run with its model and data, and the checkpoint to go on from."""
    checkpoint = prepare_output(training)
    # a mistake there is found before gigabytes are loaded
    records = read_records(data.annotations, on_error=data.on_error)
    transformers.set_seed(training.seed)
    network, processor, source = build_for_training(model, training)
    # in the processor, so that what is saved goes on as it was trained
    processor.image_processor.pad_to_square = data.pad_to_square
    processor.chat_template = resolve_chat_template(data.chat_template)
    dataset = ConversationDataset(
        records,
        processor,
        data.roots(),
        max_length=data.max_length,
        on_error=data.on_error,
        follow_links=data.follow_links,
        as_viewed=data.images_as_viewed,
    )
    trainer = PIIPTrainer(
        model=network,
        args=training,
        train_dataset=dataset,
        data_collator=Collator(processor.tokenizer.pad_token_id),
        processing_class=processor,
        source=source,
        group_by_modality=data.group_by_modality,
    )
    return trainer, checkpoint


def run(trainer: PIIPTrainer, checkpoint: Path | None) -> None:
    """Trains and saves the result."""
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    trainer.failed_saves.report()
    trainer.save_final()
    _report_data(trainer)


def _report_data(trainer: PIIPTrainer) -> None:
    """Says what the data set left out, over all processes."""
    dataset, device = trainer.train_dataset, trainer.args.device
    own = torch.tensor([sum(dataset.skipped.values()), dataset.conversations_cut], device=device)
    skipped, cut = trainer.accelerator.reduce(own).tolist()
    if trainer.is_world_process_zero():
        print(
            f"data: {dataset.records.malformed} malformed entries left out, {skipped} samples skipped; "
            f"{cut} conversations cut to max_length"
        )


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; see `--help`. Mistakes in what was given end in one line and status 2."""
    started = False
    try:
        model, data, training = parse_arguments(sys.argv[1:] if arguments is None else arguments)
        with locked(training):
            trainer, checkpoint = prepare(model, data, training)
            started = True
            run(trainer, checkpoint)
    except UserError as error:
        # All processes fail alike before the training and at saves, and one of each machine speaks; else the one that
        # failed
        if int(os.environ.get("LOCAL_RANK", 0)) == 0 or (started and not isinstance(error, SaveError)):
            # One from a worker of the data loader has a traceback in front
            print(f"error: {str(error).strip().splitlines()[-1]}", file=sys.stderr, flush=True)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
