#!/usr/bin/env python3
"""Writes the data set of handwritten digits on photographs, in COCO's layout and with label maps; downloads nothing.

$ python datasets/prepare_digits.py                      # 2000 + 200 scenes in datasets/digits
$ python datasets/prepare_digits.py my/folder --num-train 500 --image-size 256
$ python datasets/prepare_digits.py --single             # the 1797 digits on their own, a folder per class
"""

import argparse
from pathlib import Path

from piip_core.errors import UserError
from piip_digits.data_sets import prepare_digit_images, prepare_digits
from piip_digits.scenes import SceneConfig


def main() -> None:
    """Parses the command line and writes the data set."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = SceneConfig()
    parser.add_argument("root", nargs="?", type=Path, help="folder to write (default digits or digit_images here)")
    parser.add_argument("--single", action="store_true", help="single digits without photographs, for classifiers")
    parser.add_argument("--num-train", type=int, default=2000, help="training scenes (default %(default)s)")
    parser.add_argument("--num-val", type=int, default=200, help="validation scenes (default %(default)s)")
    parser.add_argument("--image-size", type=int, default=default.image_size, help="side (default %(default)s pixels)")
    parser.add_argument("--max-digits", type=int, default=default.max_digits, help="per scene (default %(default)s)")
    parser.add_argument("--seed", type=int, default=default.seed, help="(default %(default)s)")
    args = parser.parse_args()
    root = args.root or Path(__file__).parent / ("digit_images" if args.single else "digits")
    try:
        if args.single:
            written = prepare_digit_images(root)
        else:
            config = SceneConfig(image_size=args.image_size, max_digits=args.max_digits, seed=args.seed)
            written = prepare_digits(root, num_train=args.num_train, num_val=args.num_val, config=config)
    except UserError as error:
        parser.error(str(error))
    print(f"{root}: {'written' if written else 'already there'}")


if __name__ == "__main__":
    main()
