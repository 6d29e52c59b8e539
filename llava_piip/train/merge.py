"""Makes a whole model of trained parts or adapters.

python -m llava_piip.train.merge runs/lora merged
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from peft import PeftModel

from piip_core.errors import CheckpointError, UserError

from .building import load_trained
from .checkpointing import publish, staging

__all__ = ["main", "merge"]


def merge(folder: str | Path, output: str | Path) -> None:
    """Writes the whole model of a save of trained parts or adapters, for use without what it was trained from.

    Args:
        folder: The save, or the folder of its run.
        output: A new or empty folder.

    Raises:
        CheckpointError: If `output` is no empty folder, or the save cannot be loaded.
        SaveError: If the model cannot be written.
    """
    output = Path(output)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise CheckpointError(f"{output}: is not empty; expected a new folder for the merged model")
    model, processor = load_trained(folder)
    if isinstance(model, PeftModel):
        model = model.merge_and_unload()
    parent = output.resolve().parent
    parent.mkdir(parents=True, exist_ok=True)
    with staging(parent, output.name) as aside:
        model.save_pretrained(aside)
        processor.save_pretrained(aside)
    publish(parent, output.name)


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; see `--help`."""
    parser = argparse.ArgumentParser(
        prog="python -m llava_piip.train.merge",
        description="Makes a whole model, which from_pretrained loads, of trained parts or adapters.",
        epilog="example: python -m llava_piip.train.merge runs/lora merged",
    )
    parser.add_argument("folder", help="what a run saved, or the folder of the run")
    parser.add_argument("output", help="new folder for the model")
    given = parser.parse_args(arguments)
    try:
        merge(given.folder, given.output)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
