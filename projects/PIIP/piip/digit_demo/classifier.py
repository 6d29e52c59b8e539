"""The demo without Detectron2: a small PIIP classifier of single digits, trained from scratch."""

from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

from piip_core.checkpoints.head_names import HEADS
from piip_core.config import MergingConfig
from piip_core.files import atomic_path
from piip_core.pyramid import DensePIIP
from piip_digits.model import NUM_GROUPS, demo_config
from piip_digits.scenes import NUM_CLASSES, digit_crops

_SIZE = 64  # pixels of the last branch; the others see 32 and 48
_GRID = 4
_BATCH = 64
_LEARNING_RATE = 2e-3
_SEED = 0


class DigitClassifier(nn.Module):
    """The demo's PIIP, merged, with a small head on the merged map.

    The head keeps where things are (a 4 x 4 grid), as the box head of a detector does: from scratch and with few
    images that learns much faster than an average over all positions.
    """

    def __init__(self) -> None:
        super().__init__()
        merging = MergingConfig(out_strides=(8,), num_groups=NUM_GROUPS)
        self.backbone = DensePIIP(replace(demo_config(), merging=merging))
        dim = self.backbone.out_dims[0]
        self.head = nn.Sequential(
            nn.AdaptiveAvgPool2d(_GRID),
            nn.Flatten(),
            nn.Linear(dim * _GRID**2, 128),
            nn.ReLU(),
            nn.Linear(128, NUM_CLASSES),
        )

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) uint8 to logits (B, 10)."""
        (features,) = self.backbone(images.float() / 127.5 - 1.0)
        return self.head(features)


def run_classifier(output: Path, *, num_train: int = 8000, num_val: int = 1000, epochs: int = 6) -> None:
    """Trains the classifier, or goes on with training, and prints how well it does.

    Besides its own checkpoint it leaves `backbone.safetensors`, a start for a Detectron2 model with this backbone
    (`train.init_checkpoint`). The `num_train` images of an epoch are drawn anew each time; no digit and no photograph
    of the `num_val` others is among them.
    """
    output.mkdir(parents=True, exist_ok=True)
    val_images, val_labels = _make_crops("val", num_val)
    torch.manual_seed(_SEED)
    model = DigitClassifier()
    optimizer = torch.optim.AdamW(model.parameters(), _LEARNING_RATE, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, _LEARNING_RATE, total_steps=epochs * (num_train // _BATCH), pct_start=0.1
    )
    parts = {"model": model, "optimizer": optimizer, "schedule": schedule}
    checkpoint, history = output / "classifier.pth", []
    if checkpoint.is_file():
        state = torch.load(checkpoint, weights_only=True)
        history = state["history"]
        for name, part in parts.items():
            part.load_state_dict(state[name])
    for epoch in range(len(history) + 1, epochs + 1):
        # Other sizes, turns, colours and photographs of the training digits in every epoch
        images, labels = _make_crops("train", num_train, seed=epoch)
        torch.manual_seed(_SEED + epoch - 1)  # so that a resumed run equals an uninterrupted one
        loss = _train_epoch(model, optimizer, schedule, images, labels, f"Epoch {epoch} of {epochs}")
        accuracy = (_predict(model, val_images) == val_labels).float().mean().item() * 100
        history.append({"loss": loss, "accuracy": accuracy})
        with atomic_path(checkpoint) as aside:
            torch.save({name: part.state_dict() for name, part in parts.items()} | {"history": history}, aside)
        print(f"Epoch {epoch}: loss {loss:.3f}, validation accuracy {accuracy:.1f} %", flush=True)
    # Under the names they have in a Detectron2 model whose backbone is no FPN
    backbone = {HEADS["dino"].backbone + name: tensor for name, tensor in model.backbone.state_dict().items()}
    with atomic_path(output / "backbone.safetensors") as aside:
        save_file(backbone, aside)
    accuracy = history[-1]["accuracy"]
    print(f"Validation accuracy {accuracy:.1f} % on {num_val} digits (chance: 10 %)")


def _train_epoch(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
    images: Tensor,
    labels: Tensor,
    title: str,
) -> float:
    """One pass over the training set; returns the mean loss."""
    model.train()
    total, steps = 0.0, len(images) // _BATCH
    progress = tqdm(torch.randperm(len(images)).split(_BATCH)[:steps], desc=title, unit="batch")
    for step, batch in enumerate(progress, start=1):
        # Swapped colour channels: no colour says anything about the digit.
        loss = F.cross_entropy(model(images[batch][:, torch.randperm(3)]), labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        total += loss.item()
        progress.set_postfix(loss=f"{total / step:.3f}")
    return total / steps


@torch.inference_mode()
def _predict(model: nn.Module, images: Tensor) -> Tensor:
    """Predicted classes (N,) of images (N, 3, H, W)."""
    model.eval()
    return torch.cat([model(batch).argmax(dim=1) for batch in images.split(_BATCH)])


def _make_crops(split: str, count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Images (count, 3, S, S) uint8 and labels (count,)."""
    images, labels = digit_crops(split, count, _SIZE, seed)
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(), torch.from_numpy(labels)
