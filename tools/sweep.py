"""The settings of the paper's ablations: prints what each costs and trains any of them.

Examples:
    python tools/sweep.py                        # all settings: our counts beside the printed numbers
    python tools/sweep.py --table XVI --json
    python tools/sweep.py --train interactions_6_regular --num-gpus 8
    python tools/sweep.py --train out_b_s train.output_dir=output/run data.train.annotations=A.json ...
    python tools/sweep.py --write interactions_6_regular sweep.yaml

A setting is trained on the data and with the schedule of the published Mask R-CNN 1x models. What follows the name goes
to lazyconfig_train_net.py: its options (--num-gpus, --resume, --eval-only) and overrides of the configuration. --write
writes the configuration as a file for that tool, or for Detectron2's script of the same name.

Units: millions of parameters and thousand millions of multiply-accumulates, absolute numbers in --json. "ours" follows
the rule behind the printed numbers, which mostly leaves out merging and window padding; "with merging" has them.
"""

from __future__ import annotations

import argparse
import difflib
import json
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tabulate import tabulate

from piip_core import zoo
from piip_core.errors import UserError
from piip_core.files import atomic_path, explain_write_errors
from piip_core.zoo.ablations import ABLATIONS, TABLES
from piip_tools.flops import published_count

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = ROOT / "projects/PIIP/configs"
TRAIN = ROOT / "tools/lazyconfig_train_net.py"


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    action = parser.add_mutually_exclusive_group()
    action.add_argument("--table", choices=list(TABLES), help="print the settings of one table of the paper only")
    action.add_argument("--train", metavar="NAME", help="train a setting")
    action.add_argument("--write", nargs=2, metavar=("NAME", "FILE.yaml"), help="write the LazyConfig of a setting")
    parser.add_argument("--json", action="store_true", help="print JSON with absolute numbers")
    args, args.rest = parser.parse_known_args(argv)
    if args.rest and not args.train:
        parser.error(f"{' '.join(args.rest)}: further arguments go with --train only")
    name = args.train or (args.write and args.write[0])
    if name and args.json:
        parser.error("--json goes with the tables only")
    if name and name not in ABLATIONS:
        close = ", ".join(difflib.get_close_matches(name, ABLATIONS, n=3, cutoff=0.4)) or "none"
        parser.error(f"no setting is named {name!r}; close matches are {close}; without options all are listed")
    if args.write and Path(args.write[1]).suffix not in (".yaml", ".yml"):
        parser.error(f"--write {args.write[1]}: expected a file name that ends in .yaml")
    return args


def cost(setting: zoo.ZooEntry) -> dict[str, Any]:
    """What one setting costs, in absolute numbers, and what was printed for it."""
    counted = published_count(setting.config).total
    merged = published_count(setting.config, rule="merging").total
    printed = setting.paper
    return {
        "name": setting.name,
        "table": setting.table,
        "title": setting.title,
        "resolution": setting.resolution,
        "box_ap": printed.box_ap,
        "mask_ap": printed.mask_ap,
        "params_printed": absolute(printed.params_m, 1e6),
        "params_published_count": counted.params,
        "flops_printed": absolute(printed.flops_g, 1e9),
        "flops_published_count": counted.macs,
        "params_with_merging": merged.params,
        "flops_with_merging": merged.macs,
        "note": setting.note,
    }


def absolute(number: float | None, unit: float) -> int | None:
    return None if number is None else round(number * unit)


def markdown(costs: Iterable[dict[str, Any]]) -> str:
    """One table per table of the paper, with the notes below it."""
    costs = list(costs)
    return "\n\n".join(
        section(number, [row for row in costs if row["table"] == number])
        for number in TABLES
        if any(row["table"] == number for row in costs)
    )


def section(number: str, rows: list[dict[str, Any]]) -> str:
    header = ["name", "setting", "box AP", "mask AP"]
    header += ["#Param", "ours", "dev.", "#FLOPs", "ours", "dev.", "params with merging", "FLOPs with merging"]
    cells = [
        [
            row["name"],
            row["title"],
            "-" if row["box_ap"] is None else f"{row['box_ap']:.1f}",
            "-" if row["mask_ap"] is None else f"{row['mask_ap']:.1f}",
            *compared(row["params_printed"], row["params_published_count"], 1e6, "M"),
            *compared(row["flops_printed"], row["flops_published_count"], 1e9, "G"),
            f"{row['params_with_merging'] / 1e6:.1f}M",
            f"{row['flops_with_merging'] / 1e9:.1f}G",
        ]
        for row in rows
    ]
    align = ["left"] * 2 + ["right"] * (len(header) - 2)
    table = tabulate(cells, header, tablefmt="github", colalign=align, disable_numparse=True)
    notes = "".join(f"\n- {row['name']}: {row['note']}." for row in rows if row["note"])
    return f"Table {number}: {TABLES[number]}\n\n{table}" + (f"\n{notes}" if notes else "")


def compared(printed: int | None, counted: int, unit: float, suffix: str) -> tuple[str, str, str]:
    ours = f"{counted / unit:.1f}{suffix}"
    if printed is None:
        return "-", ours, "-"
    return f"{printed / unit:.0f}{suffix}", ours, f"{counted / printed - 1:+.2%}"


def write_config(setting: zoo.ZooEntry, path: str | os.PathLike[str], output_dir: str) -> None:
    """Writes the LazyConfig that trains a setting."""
    try:
        from detectron2.config import LazyConfig

        from piip.lazy import lazy_dataclass
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
        costs = [cost(setting) for setting in ABLATIONS.values() if args.table in (None, setting.table)]
        print(json.dumps(costs, indent=2) if args.json else markdown(costs))


if __name__ == "__main__":
    main()
