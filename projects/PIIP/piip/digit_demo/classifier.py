"""The demo without Detectron2: a small PIIP classifier of single digits, trained from scratch."""

from dataclasses import replace
from pathlib import Path

import numpy as np
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

from .drawing import Curve, draw_classified, draw_confusion, draw_curves

__all__ = ["DigitClassifier", "run_classifier"]

_SIZE = 64  # pixels of the last branch; the others see 32 and 48
_NUM_TRAIN, _NUM_VAL = 8000, 1000
_EPOCHS = 6
_GRID = 4
_BATCH = 64
_LEARNING_RATE = 2e-3
_SEED = 0


class DigitClassifier(nn.Module):
    """The demo's PIIP, merged, with a small head on the merged map.

    The head keeps where things are (a 4 x 4 grid), as the box head of a detector does: from scratch and with few
    pictures that learns much faster than an average over all positions.
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


class _Training:
    """Model, optimizer and history of a run, kept in one checkpoint after every epoch."""

    def __init__(self, checkpoint: Path, epochs: int, steps: int) -> None:
        torch.manual_seed(_SEED)
        self.checkpoint = checkpoint
        self.model = DigitClassifier()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), _LEARNING_RATE, betas=(0.9, 0.98))
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(
            self.optimizer, _LEARNING_RATE, total_steps=epochs * steps, pct_start=0.1
        )
        self.history: list[dict[str, float]] = []
        if checkpoint.is_file():
            state = torch.load(checkpoint, weights_only=True)
            for name in ("model", "optimizer", "schedule"):
                getattr(self, name).load_state_dict(state[name])
            self.history = state["history"]

    def save(self) -> None:
        state = {name: getattr(self, name).state_dict() for name in ("model", "optimizer", "schedule")}
        with atomic_path(self.checkpoint) as aside:
            torch.save({**state, "history": self.history}, aside)

    def run_epoch(self, images: Tensor, labels: Tensor, title: str) -> float:
        """One pass over the training set; returns the mean loss."""
        self.model.train()
        torch.manual_seed(_SEED + len(self.history))  # so that a resumed run equals an uninterrupted one
        total, steps = 0.0, len(images) // _BATCH
        progress = tqdm(torch.randperm(len(images)).split(_BATCH)[:steps], desc=title, unit="batch")
        for step, batch in enumerate(progress, start=1):
            # Swapped colour channels: no colour says anything about the digit.
            loss = F.cross_entropy(self.model(images[batch][:, torch.randperm(3)]), labels[batch])
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            self.schedule.step()
            total += loss.item()
            progress.set_postfix(loss=f"{total / step:.3f}")
        return total / steps

    @torch.inference_mode()
    def predict(self, images: Tensor) -> Tensor:
        """Predicted classes (N,) of images (N, 3, H, W)."""
        self.model.eval()
        return torch.cat([self.model(batch).argmax(dim=1) for batch in images.split(_BATCH)])


def run_classifier(
    output: Path, *, num_train: int = _NUM_TRAIN, num_val: int = _NUM_VAL, epochs: int = _EPOCHS
) -> list[Path]:
    """Trains the classifier, or goes on with training, and draws how well it does.

    Besides its own checkpoint it leaves `backbone.safetensors`, a start for a Detectron2 model with this backbone
    (`train.init_checkpoint`).

    Args:
        output: folder for checkpoint and pictures.
        num_train: number of training pictures per epoch, drawn anew each time.
        num_val: number of validation pictures; no digit and no photograph of theirs is in training.
        epochs: rounds of training.

    Returns:
        The pictures written.
    """
    output.mkdir(parents=True, exist_ok=True)
    val_images, val_labels = _as_tensors(digit_crops("val", num_val, _SIZE))
    training = _Training(output / "classifier.pth", epochs, num_train // _BATCH)
    for epoch in range(len(training.history) + 1, epochs + 1):
        # Other sizes, turns, colours and photographs of the training digits in every epoch
        images, labels = _as_tensors(digit_crops("train", num_train, _SIZE, seed=epoch))
        loss = training.run_epoch(images, labels, f"Epoch {epoch} of {epochs}")
        accuracy = (training.predict(val_images) == val_labels).float().mean().item() * 100
        training.history.append({"loss": loss, "accuracy": accuracy})
        training.save()
        print(f"Epoch {epoch}: loss {loss:.3f}, validation accuracy {accuracy:.1f} %", flush=True)
    _save_backbone(output / "backbone.safetensors", training.model)
    predicted = training.predict(val_images)
    accuracy = training.history[-1]["accuracy"]
    print(f"Validation accuracy {accuracy:.1f} % on {num_val} digits (chance: 10 %)")
    return _draw(output, training.history, val_images, val_labels.numpy(), predicted.numpy())


def _save_backbone(path: Path, model: DigitClassifier) -> None:
    """Writes the weights under the names they have in a Detectron2 model whose backbone is no FPN."""
    state = {HEADS["dino"].backbone + name: tensor for name, tensor in model.backbone.state_dict().items()}
    with atomic_path(path) as aside:
        save_file(state, aside)


def _as_tensors(crops: tuple[np.ndarray, np.ndarray]) -> tuple[Tensor, Tensor]:
    images, labels = crops
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(), torch.from_numpy(labels)


def _draw(
    output: Path, history: list[dict[str, float]], images: Tensor, labels: np.ndarray, predicted: np.ndarray
) -> list[Path]:
    """Writes the three pictures."""
    title = f"PIIP classifier, digits and photographs never seen in training: {history[-1]['accuracy']:.1f} % right"
    paths = [output / name for name in ("classified.png", "confusion.png", "curves.png")]
    shown = images[:40].permute(0, 2, 3, 1).numpy()
    draw_classified(paths[0], title, shown, labels[:40], predicted[:40])
    confusion = np.zeros((NUM_CLASSES, NUM_CLASSES), dtype=np.int64)
    np.add.at(confusion, (labels, predicted), 1)
    draw_confusion(paths[1], title.replace(", digits", ",\ndigits"), confusion, [str(c) for c in range(NUM_CLASSES)])
    epochs = range(1, len(history) + 1)
    loss, accuracy = (Curve(name, epochs, [entry[name] for entry in history]) for name in ("loss", "accuracy"))
    draw_curves(paths[2], "PIIP classifier", [loss], [accuracy], "validation accuracy in %", step_label="epoch")
    return paths
