"""Training and evaluation of a LazyConfig, as `tools/lazyconfig_train_net.py` does them.

What it does beyond Detectron2's script of that name: CPU and bfloat16, the number of classes from the annotation file,
resuming that continues exactly, checkpoints that survive a crash, and early errors that say what is wrong.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from detectron2.config import instantiate
from detectron2.engine import AMPTrainer, HookBase, SimpleTrainer, create_ddp_model, default_setup, hooks
from detectron2.evaluation import inference_on_dataset, print_csv_format
from detectron2.utils import comm
from detectron2.utils.events import CommonMetricPrinter, JSONWriter, TensorboardXWriter
from detectron2.utils.logger import setup_logger
from omegaconf import DictConfig, OmegaConf
from torch import nn

from piip.checkpointer import AtomicCheckpointer, CategoryTable, find_weights, follow_published, read_categories
from piip.data import Category, DatasetError, TrainLoader
from piip.deepspeed_training import (
    DeepSpeedCheckpointer,
    DeepSpeedTrainer,
    build_engine,
    evaluation_model,
    run_folder,
    zero_stage,
)
from piip.fitting import add_adapters, build_model, freeze, in_parts, load_trained
from piip.hooks import (
    BestModel,
    ClipNorm,
    MetricWriters,
    Saves,
    StepSeed,
    TrainingEnds,
    WeightAverage,
    average_settings,
)
from piip.lazy_config import (
    check_device,
    check_folders,
    follow_annotations,
    has_test_set,
    load_config,
    skip_pretrained,
)
from piip.precision import set_precision, training_precision
from piip.report import RunReport
from piip.tracking import trackers
from piip_core.errors import ConfigError
from piip_core.files import explain_write_errors, write_atomically
from piip_core.training_checkpoints import OutputFolderError, lock_run

logger = logging.getLogger(__name__)

EVALUATION = "evaluation.json"
"""What `--eval-only` writes in the output folder: the metrics."""

_NO_TEST = "the configuration has no evaluator, or no test set (data.test.annotations, .labels or .images is null)"


def main(args: argparse.Namespace) -> None:
    """Trains or evaluates on this process, with the arguments of `tools/lazyconfig_train_net.py`.

    Raises:
        UserError: If configuration, data set, checkpoint or output folder cannot be used, or the result not be written.
    """
    cfg = load_config(args.config_file, args.opts)
    check_device(cfg.train.device)
    output_dir = cfg.train.output_dir
    with ExitStack() as stack:
        if not args.eval_only:
            stack.enter_context(lock_run(output_dir, "give another train.output_dir"))
        stack.enter_context(explain_write_errors(output_dir, full_disk_only=True))
        setup_logger(output_dir, distributed_rank=comm.get_rank(), name="piip")
        categories = follow_annotations(cfg, training=not args.eval_only)
        check_folders(cfg, training=not args.eval_only)
        default_setup(cfg, args)  # after the lines above: it prints and saves the configuration
        logger.info("Running on %s, %d process(es)", cfg.train.device, comm.get_world_size())
        if args.eval_only:
            results = evaluate_only(cfg, categories, resume=args.resume)
            if comm.is_main_process():
                with write_atomically(Path(output_dir, EVALUATION), "w") as file:
                    json.dump(results, file, indent=2)
        else:
            do_train(cfg, categories, resume=args.resume)


def build_evaluation(cfg: DictConfig) -> Callable[[nn.Module], dict[str, Any]] | None:
    """A function from a model to its metrics, or None if there is no evaluator or no test set (see `has_test_set`).

    Loader and evaluator are built now, so that a wrong path shows before training and not after an epoch.
    """
    if "evaluator" not in cfg.dataloader or not has_test_set(cfg):
        logger.info("No evaluation: %s", _NO_TEST)
        return None
    loader = instantiate(cfg.dataloader.test)
    evaluator = instantiate(cfg.dataloader.evaluator)

    def evaluate(model: nn.Module) -> dict[str, Any]:
        results = inference_on_dataset(model, loader, evaluator)
        print_csv_format(results)
        return results

    return evaluate


def evaluate_only(cfg: DictConfig, categories: Sequence[Category] = (), *, resume: bool = False) -> dict[str, Any]:
    """Evaluates `train.init_checkpoint`, or with `resume` the last checkpoint of `train.output_dir`.

    `categories` are the classes of the test set, from `follow_annotations`.

    Raises:
        ConfigError: If there is no checkpoint or nothing to evaluate on.
        CheckpointError: If the checkpoint lacks weights or has others than the model.
        DatasetError: If it was trained on classes of other names.
    """
    path = _last_checkpoint(cfg) if resume else find_weights(cfg.train.init_checkpoint)
    if not path:
        raise ConfigError(
            "--eval-only: no checkpoint: give train.init_checkpoint=PATH, or --resume for the last one of "
            f"train.output_dir={cfg.train.output_dir}"
        )
    skip_pretrained(cfg)
    follow_published(cfg, path)
    evaluate = build_evaluation(cfg)
    if evaluate is None:
        raise ConfigError(f"--eval-only: {_NO_TEST}: expected a test set")
    _check_names(path, categories)
    model = load_trained(cfg, path)
    set_precision(model, cfg)
    return evaluate(model)


def _check_names(checkpoint: str, categories: Sequence[Category]) -> None:
    """Ids may differ: they depend on how the labels are stored."""
    trained, found = ([category.name for category in table] for table in (read_categories(checkpoint), categories))
    if trained and found and trained != found:
        other = next(k for k, names in enumerate(zip_longest(trained, found)) if names[0] != names[1])
        names = [repr(table[other]) if other < len(table) else "none" for table in (trained, found)]
        raise DatasetError(
            f"{checkpoint}: was trained on {len(trained)} classes, the test set has {len(found)}: class {other} is "
            f"{names[0]} there and {names[1]} here; expected the same names in the same order"
        )


def do_train(cfg: DictConfig, categories: Sequence[Category] = (), *, resume: bool = False) -> None:
    """Trains to `train.max_iter`, with checkpoints, evaluation and writers.

    Args:
        cfg: With model, optimizer, lr_multiplier, dataloader.{train,test,evaluator}, and train: output_dir,
            init_checkpoint, max_iter, device, ddp, checkpointer, eval_period, log_period, amp.enabled;
            optionally train.amp.precision, train.seed, train.clip_norm, train.deepspeed, train.ema, train.best,
            train.micro_batch, train.freeze, train.load_pretrained, train.report, train.track and data (see
            configs/common).
        categories: Classes to keep in the checkpoints, from `follow_annotations`.
        resume: Go on from the last checkpoint of `train.output_dir`, if there is one.
    """
    seed, averaging = StepSeed(cfg.train.get("seed", -1)), average_settings(cfg)
    evaluate = build_evaluation(cfg)
    loader = instantiate(cfg.dataloader.train)  # before the model, whose weights may take minutes
    zero = zero_stage(cfg) > 0
    last = _checkpoint_to_resume(cfg, resume)
    if not last:
        cfg.train.init_checkpoint = find_weights(cfg.train.init_checkpoint)
    if cfg.train.init_checkpoint or last:
        skip_pretrained(cfg)

    model = instantiate(cfg.model).to(cfg.train.device)
    if not last:  # before parts of the model are replaced, or divided among processes
        AtomicCheckpointer(model).load(cfg.train.init_checkpoint, checkpointables=[])
    freeze(model, cfg.train.get("freeze"))
    add_adapters(model, cfg.train.get("lora"))
    logger.info("Model:\n%s", model)
    cfg.optimizer.params.model = model
    table, average = CategoryTable(categories), None
    if averaging:
        average = WeightAverage(model, cfg.train.output_dir, {"categories": table.state_dict()}, **averaging)
        set_precision(average.model, cfg)
    # With the cache, DeepSpeed's stage 3 would keep a bfloat16 copy of every weight
    set_precision(model, cfg, cache_enabled=not zero)
    run = (_DeepSpeedRun if zero else _Run)(cfg, model, loader, table, last)
    whole = (lambda: _evaluate_all(evaluate, run.whole_model(), average)) if evaluate else None
    saves = Saves(run.save)
    best, wanted = None, OmegaConf.select(cfg, "train.best.metric")
    if zero and (wanted or cfg.train.get("micro_batch")):
        raise ConfigError("train.best.metric, train.micro_batch: expected null with train.deepspeed.stage")
    if evaluate and wanted:
        kept, period = average.model if average else model, cfg.train.eval_period
        note = {"categories": table.state_dict()}
        best = BestModel(kept, cfg.train.output_dir, note, period=period, **cfg.train.best)
    run.trainer.register_hooks(_build_hooks(cfg, seed, average, saves, whole, best, loader))

    run.load()
    if average:
        average.start()
    # A checkpoint stores the iteration that it was written after
    start = run.trainer.iter + 1 if last else 0
    _seek(loader, start, seed, drawn=cfg.train.get("seed", -1) < 0)
    if start >= cfg.train.max_iter:
        logger.info("Nothing to train: %s was written at iteration %d of %d", last, start, cfg.train.max_iter)
        run.finish()
    with suppress(TrainingEnds):
        run.trainer.train(start, cfg.train.max_iter)  # and evaluates
    saves.check()  # not within the loop, which would log a traceback


def _evaluate_all(
    evaluate: Callable[[nn.Module], dict[str, Any]], model: nn.Module, average: WeightAverage | None
) -> dict[str, Any]:
    """Metrics of the model, and below "ema" those of its average."""
    results = evaluate(model)
    if average is None:
        return results
    logger.info("With averaged weights (train.ema):")
    return {**results, "ema": evaluate(average.model)}


def _last_checkpoint(cfg: DictConfig) -> str:
    """Of a run with or without DeepSpeed, or an empty string."""
    saved = AtomicCheckpointer(nn.Identity(), cfg.train.output_dir)
    if saved.has_checkpoint():
        return saved.get_checkpoint_file()
    folders = run_folder(cfg.train.output_dir).checkpoints()
    return str(folders[-1]) if folders else ""


def _checkpoint_to_resume(cfg: DictConfig, resume: bool) -> str:
    """The checkpoint to go on from, or an empty string; an error if another run in the folder would be mixed up."""
    last, zero, folder = _last_checkpoint(cfg), zero_stage(cfg) > 0, f"train.output_dir={cfg.train.output_dir}"
    if last and os.path.isdir(last) != zero:
        raise OutputFolderError(
            f"{folder}: was trained {'without' if zero else 'under'} DeepSpeed. Go on with --resume and its "
            f"train.deepspeed.stage, or start anew from its weights: train.init_checkpoint={last}, another "
            "train.output_dir and no --resume"
        )
    if last and zero and not resume:
        raise OutputFolderError(
            f"{folder}: holds an earlier run ({last}). Give --resume to go on with it, or another train.output_dir"
        )
    comm.synchronize()  # nobody deletes anything before everybody has looked
    if comm.is_main_process():
        run_folder(cfg.train.output_dir).clear_staging()
        if resume and not last:
            logger.info("--resume: no checkpoint in %s yet, starting from the beginning", cfg.train.output_dir)
        elif last and not resume:
            logger.warning(
                "%s holds an earlier run: its checkpoints will be overwritten and metrics.json continued. --resume "
                "goes on with it, another train.output_dir keeps it",
                cfg.train.output_dir,
            )
    return last if resume else ""


class _Run:
    """Trainer and saving hook under DistributedDataParallel, to go on from `last`."""

    def __init__(self, cfg: DictConfig, model: nn.Module, loader: Any, table: CategoryTable, last: str) -> None:
        optimizer = instantiate(cfg.optimizer)
        # DistributedDataParallel takes no device ids on CPU
        on_cuda = torch.device(cfg.train.device).type == "cuda"
        model = create_ddp_model(model, **cfg.train.ddp, **({} if on_cuda else {"device_ids": None}))
        trainer = AMPTrainer if training_precision(cfg) is torch.float16 else SimpleTrainer
        # Parts of a batch add to the gradients before the trainer sees a loss
        self.trainer = trainer(in_parts(model, cfg), loader, optimizer, zero_grad_before_forward=True)
        self._checkpointer = AtomicCheckpointer(model, cfg.train.output_dir, trainer=self.trainer, categories=table)
        self._model, self._last = model, last
        main = comm.is_main_process()
        self.save = hooks.PeriodicCheckpointer(self._checkpointer, **cfg.train.checkpointer) if main else HookBase()

    def load(self) -> None:
        """Loads everything to go on."""
        self._checkpointer.load(self._last)

    def whole_model(self) -> nn.Module:
        """The model to evaluate."""
        return self._model

    def finish(self) -> None:
        """Writes what a run that was killed at its very end may lack."""


class _DeepSpeedRun(_Run):
    """The same under DeepSpeed."""

    def __init__(self, cfg: DictConfig, model: nn.Module, loader: Any, table: CategoryTable, last: str) -> None:
        optimizer = instantiate(cfg.optimizer)
        batch_size = loader.batch_sampler.batch_size if isinstance(loader, TrainLoader) else 1
        engine = build_engine(cfg, model, optimizer, batch_size)
        skip_pretrained(cfg)  # for the models that are made from now on, to be filled with the weights of this one
        self.trainer = DeepSpeedTrainer(engine, loader, optimizer)
        self.save = DeepSpeedCheckpointer(engine, self.trainer, cfg.train.output_dir, table, **cfg.train.checkpointer)
        self._cfg, self._last = cfg, last

    def load(self) -> None:
        if self._last:
            self.save.load(Path(self._last))

    def whole_model(self) -> nn.Module:
        return evaluation_model(self.trainer.model, self._build_copy)

    def _build_copy(self) -> nn.Module:
        model = build_model(self._cfg)
        set_precision(model, self._cfg)
        return model

    def finish(self) -> None:
        self.save.export(Path(self._last))


def _build_hooks(
    cfg: DictConfig,
    seed: StepSeed,
    average: WeightAverage | None,
    saves: Saves,
    evaluate: Callable[[], dict[str, Any]] | None,
    best: BestModel | None,
    loader: Any,
) -> list[Any]:
    main_process = comm.is_main_process()
    output_dir, max_iter, period = cfg.train.output_dir, cfg.train.max_iter, cfg.train.log_period
    clip_norm = cfg.train.get("clip_norm", 0.0)
    writers = []
    if main_process:
        metrics = JSONWriter(os.path.join(output_dir, "metrics.json"))
        writers = [CommonMetricPrinter(max_iter), metrics, TensorboardXWriter(output_dir), *trackers(cfg)]
    return [
        seed,
        hooks.IterationTimer(),
        ClipNorm(clip_norm) if clip_norm and not zero_stage(cfg) else None,  # DeepSpeed does it itself
        hooks.LRScheduler(scheduler=instantiate(cfg.lr_multiplier)),
        average,  # before it is saved
        saves,
        hooks.EvalHook(cfg.train.eval_period, evaluate) if evaluate else None,
        best,
        MetricWriters(writers, period=period) if main_process else None,
        RunReport(cfg, loader, best) if main_process and cfg.train.get("report") else None,
    ]


def _seek(loader: Any, start: int, seed: StepSeed, *, drawn: bool) -> None:
    """Moves the data to iteration `start`."""
    if isinstance(loader, TrainLoader):
        if start:
            logger.info("Skipping the data of %d iterations", start)
        loader.batch_sampler.start = start
        if drawn:
            loader.batch_sampler.seed = seed.seed
    elif start:
        logger.warning(
            "dataloader.train is not built by piip.data.build_train_loader: data order starts over at iteration %d",
            start,
        )
