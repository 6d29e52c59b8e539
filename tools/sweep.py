"""The settings of the paper's ablations: prints what each costs and trains any of them.

Examples:
    python tools/sweep.py                        # all settings: our counts beside the printed numbers
    python tools/sweep.py --table XVI
    python tools/sweep.py --train interactions_6_regular --num-gpus 8
    python tools/sweep.py --train out_b_s train.output_dir=output/run data.train.annotations=A.json ...
    python tools/sweep.py --write interactions_6_regular sweep.yaml

A setting is trained on the data and with the schedule of the published Mask R-CNN 1x models. What follows the name goes
to lazyconfig_train_net.py: its options (--num-gpus, --resume, --eval-only) and overrides of the configuration. --write
writes the configuration as a file for that tool, or for Detectron2's script of the same name.

Units: millions of parameters and GMACs. "ours" follows the rule behind the printed numbers, which mostly leaves out
merging and window padding; "with merging" has them.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from piip_core import zoo
from piip_core.errors import UserError
from piip_core.files import atomic_path, explain_write_errors
from piip_core.zoo.ablations import ABLATIONS, TABLES
from piip_tools.flops.tables import ablation_table

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = ROOT / "projects/PIIP/configs"
TRAIN = ROOT / "tools/lazyconfig_train_net.py"


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    action = parser.add_mutually_exclusive_group()
    action.add_argument("--table", choices=list(TABLES), help="print the settings of one table of the paper only")
    action.add_argument("--train", metavar="NAME", choices=list(ABLATIONS), help="train a setting")
    action.add_argument("--write", nargs=2, metavar=("NAME", "FILE.yaml"), help="write the LazyConfig of a setting")
    args, args.rest = parser.parse_known_args(argv)
    if args.rest and not args.train:
        parser.error(f"{' '.join(args.rest)}: further arguments go with --train only")
    if args.write and args.write[0] not in ABLATIONS:
        parser.error(f"--write {args.write[0]}: expected one of {', '.join(ABLATIONS)}")
    if args.write and Path(args.write[1]).suffix not in (".yaml", ".yml"):
        parser.error(f"--write {args.write[1]}: expected a file name that ends in .yaml")
    return args


def write_config(setting: zoo.ZooEntry, path: str | os.PathLike[str], output_dir: str) -> None:
    """Writes the LazyConfig that trains a setting."""
    try:
        from detectron2.config import LazyConfig

        from piip.lazy import lazy_dataclass
        from piip.setting_types import leave_unchecked
    except ImportError as error:
        sys.exit(f"sweep: training needs Detectron2 ({error}); see README.md")
    cfg = LazyConfig.load(str(CONFIGS / setting.config_file))
    cfg.model.backbone.bottom_up.config = lazy_dataclass(setting.config)
    side = setting.image_size
    if side != zoo.get(setting.backbone).image_size:
        cfg.data.train.scales = [(side, side * 800 // 1333)]  # the published rule
    cfg.train.output_dir = output_dir
    # What leads only to branches that are not merged gets no gradient
    cfg.train.ddp.find_unused_parameters = setting.config.merging.branches is not None
    leave_unchecked()  # saving looks at every value
    try:
        with explain_write_errors(path):
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            with atomic_path(path) as aside:
                LazyConfig.save(cfg, str(aside))
    except UserError as error:
        sys.exit(f"sweep: {error}")


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    if args.write:
        name, path = args.write
        write_config(ABLATIONS[name], path, f"output/ablations/{name}")
        print(f"{path}: written")
    elif args.train:
        output_dir = f"output/ablations/{args.train}"
        path = f"{output_dir}.yaml"
        write_config(ABLATIONS[args.train], path, output_dir)
        os.execv(sys.executable, [sys.executable, str(TRAIN), "--config-file", path, *args.rest])
    else:
        for number in [args.table] if args.table else TABLES:
            settings = [setting for setting in ABLATIONS.values() if setting.table == number]
            print(f"Table {number}: {TABLES[number]}\n\n{ablation_table(settings)}\n")


if __name__ == "__main__":
    main()
