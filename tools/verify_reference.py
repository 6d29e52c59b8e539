"""Compares this implementation with golden cases recorded from the public one.

Examples:
    python tools/verify_reference.py tests/data/goldens
    python tools/verify_reference.py det3_deit_oddsize.json head_mask_rcnn_a.json

Per case it prints the largest error among outputs, intermediate features ("inter") and gradients ("grad"), relative to
the largest absolute value of the reference; for integers, labels and mask bits the share that differs. The tolerance in
its file decides whether a case passes. Inputs that the public code takes and ours refuses on purpose are told as
"refused as documented", and the rest of their case is compared. The last line counts; the exit status is 1 if any case
failed.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "goldens"))

from checkers import main

if __name__ == "__main__":
    sys.exit(main(description=__doc__))
