"""Cases of learning-rate schedules."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import TrainingArguments
from transformers.optimization import get_scheduler

from checkers import Check, GoldenCase
from llava_piip.train.presets import list_presets, load_preset

_DEFAULT_PRESET = "stage2"  # of cases that are named after no preset


def verify_schedule(case: GoldenCase) -> Check:
    """Learning rates of updates, by the scheduler that the Trainer makes from our presets' settings."""
    check = Check(case)
    for info in case.info["cases"]:
        name, total, base = info["case"], info["total_updates"], info["base_lr"]
        preset = load_preset(name if name in list_presets() else _DEFAULT_PRESET)
        if name in list_presets():
            check.same(f"{name}.base_lr", preset["learning_rate"], base)
        arguments = TrainingArguments(
            output_dir="unused",
            warmup_steps=preset["warmup_steps"],
            lr_scheduler_type=preset["lr_scheduler_type"],
            use_cpu=True,
        )
        warmup = arguments.get_warmup_steps(total)
        check.same(f"{name}.warmup_updates", warmup, info["warmup_updates"])
        rates = _rates(arguments.lr_scheduler_type, base, warmup, total)
        recorded = {int(update): rate for update, rate in info["lr_used_by_update"].items()}
        _same(check, f"{name}.lr_used_by_update", rates[list(recorded)], _double(list(recorded.values())), base)
        _same(check, f"{name}.sum_of_lr", rates.sum(), _double(info["sum_of_lr"]), base * total)
    return check


def _rates(kind: str, base: float, warmup: int, total: int) -> Tensor:
    """Rate that each update uses."""
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(()))], lr=base)
    schedule = get_scheduler(kind, optimizer, num_warmup_steps=warmup, num_training_steps=total)
    rates = []
    for _ in range(total):
        rates.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    return _double(rates)


def _same(check: Check, name: str, ours: Tensor, reference: Tensor, scale: float) -> None:
    """Equal but for the rounding of double precision, relative to `scale`."""
    rounding = 1e-12 * scale
    check.equal(name, torch.where((ours - reference).abs() <= rounding, reference, ours), reference)


def _double(values: float | list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)
