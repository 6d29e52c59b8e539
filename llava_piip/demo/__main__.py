"""Runs the demo: `python -m llava_piip.demo`."""

import sys

from .run import main

if __name__ == "__main__":
    sys.exit(main())
