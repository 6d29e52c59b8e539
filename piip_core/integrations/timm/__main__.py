"""Runs a script, such as timm's train.py, with the models of this project registered.

python -m piip_core.integrations.timm SCRIPT [ARGUMENTS ...]
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

from . import model_names


def main() -> None:
    """Runs the script named by the first argument as if Python had been called with it."""
    if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help"):
        print(__doc__, "\nModels:", ", ".join(model_names()))
        raise SystemExit(len(sys.argv) < 2)
    script = Path(sys.argv[1])
    if not script.is_file():
        raise SystemExit(f"{script}: no such file; expected a script, for example timm's train.py")
    sys.argv = sys.argv[1:]
    sys.path.insert(0, str(script.resolve().parent))
    runpy.run_path(str(script), run_name="__main__")


if __name__ == "__main__":
    main()
