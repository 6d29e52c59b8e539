"""Cases of learning-rate schedules."""

from __future__ import annotations

import torch
from transformers import TrainingArguments
from transformers.optimization import get_scheduler

from piip_core.verification import Check, GoldenCase

__all__ = ["verify_schedule"]

WARMUP = 0.03  # of all updates, in both stages


def verify_schedule(case: GoldenCase) -> Check:
    """Learning rates of updates, by the scheduler that the Trainer makes from the settings of our presets."""
    check = Check(case)
    for info in case.info["cases"]:
        name, total = info["case"], info["total_updates"]
        arguments = TrainingArguments(
            output_dir="unused", warmup_steps=WARMUP, lr_scheduler_type="cosine", use_cpu=True
        )
        warmup = arguments.get_warmup_steps(total)
        check.equal(f"{name}.warmup_updates", torch.tensor(warmup), torch.tensor(info["warmup_updates"]))
        optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(()))], lr=info["base_lr"])
        schedule = get_scheduler("cosine", optimizer, num_warmup_steps=warmup, num_training_steps=total)
        rates = []
        for _ in range(total):
            rates.append(schedule.get_last_lr()[0])
            optimizer.step()
            schedule.step()
        recorded = {int(update): rate for update, rate in info["lr_used_by_update"].items()}
        ours = torch.tensor([rates[update] for update in recorded], dtype=torch.float64) / info["base_lr"]
        reference = torch.tensor(list(recorded.values()), dtype=torch.float64) / info["base_lr"]
        check.equal(f"{name}.lr", (ours - reference).abs() < 1e-12, torch.ones(len(ours), dtype=torch.bool))
        total_rate = torch.tensor([abs(sum(rates) / info["sum_of_lr"] - 1) < 1e-12])
        check.equal(f"{name}.sum_of_lr", total_rate, torch.tensor([True]))
    return check
