"""`python -m llava_piip.train` is llava_piip/train/train.py."""

import sys

from .train import main

sys.exit(main())
