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
from piip_core.files import publish_folder

from ..loading import load_trained


def merge(folder: str | Path, output: str | Path) -> None:
    """Writes the whole model of a save of trained parts or adapters, or of its run, into a new or empty folder."""
    if not Path(folder).is_dir():
        raise CheckpointError(f"{folder}: no such folder; expected what a run saved, or the folder of the run")
    with publish_folder(output) as aside:
        model, processor = load_trained(folder)
        if isinstance(model, PeftModel):
            model = model.merge_and_unload()
        model.save_pretrained(aside)
        processor.save_pretrained(aside)


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
