"""The settings of the paper's ablations and figures: prints what each costs, draws the figures, trains any of them.

Examples:
    python tools/sweep.py                        # all settings: our counts beside the printed numbers
    python tools/sweep.py --table XVI
    python tools/sweep.py --figure 7 --plot figure_7.png    # points of a figure, with the scores that are printed
    python tools/sweep.py --train interactions_6_regular --num-gpus 8
    python tools/sweep.py --train out_b_s train.output_dir=output/run data.train.annotations=A.json ...
    python tools/sweep.py --write interactions_6_regular sweep.yaml
    python tools/sweep.py --train chat_interactions_0/stage1 --annotations A.json --image_root IMAGES
    python tools/sweep.py --claim                # trains the main comparisons on tiny networks (hours on a CPU)

A setting is trained on the data and with the schedule of the published Mask R-CNN 1x models. What follows the name goes
to lazyconfig_train_net.py: its options (--num-gpus, --resume, --eval-only) and overrides of the configuration. --write
writes the configuration as a file for that tool, or for Detectron2's script of the same name.

The settings of PIIP-LLaVA (Table XIII) have two stages, NAME/stage1 and NAME/stage2, which `deepspeed` starts on all
GPUs; what follows goes to llava_piip/train/train.py.

--claim keeps every finished run below --output; another call trains what is missing and prints the table again.

Units: millions of parameters and GMACs. "ours" follows the rule behind the printed numbers, which mostly leaves out
merging and window padding; "with merging" has them.
"""

from __future__ import annotations

import argparse
import difflib
import os
import shlex
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

from piip_core import zoo
from piip_core.errors import UserError
from piip_core.files import atomic_path, explain_write_errors, write_atomically
from piip_core.zoo.ablations import ABLATIONS, CHAT_ABLATIONS, FIGURE_SETTINGS, FIGURES, TABLES
from piip_tools.flops.tables import ablation_table, analyze_multimodal, multimodal_table

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = ROOT / "projects/PIIP/configs"
TRAIN = ROOT / "tools/lazyconfig_train_net.py"
CHAT_TRAIN = ROOT / "llava_piip/train/train.py"
SETTINGS = ABLATIONS | FIGURE_SETTINGS
STAGES = [f"{name}/{stage}" for name in CHAT_ABLATIONS for stage in ("stage1", "stage2")]


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    action = parser.add_mutually_exclusive_group()
    action.add_argument("--table", choices=list(TABLES), help="print the settings of one table of the paper only")
    action.add_argument("--figure", choices=list(FIGURES), help="print the points of a figure of the paper")
    action.add_argument("--train", metavar="NAME", type=_known([*SETTINGS, *STAGES]), help="train a setting")
    action.add_argument("--claim", action="store_true", help="train the comparisons on tiny networks, print the table")
    action.add_argument("--write", nargs=2, metavar=("NAME", "FILE.yaml"), help="write the LazyConfig of a setting")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw the figure too")
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="of --claim (default output/claim)")
    args, args.rest = parser.parse_known_args(argv)
    if args.rest and not args.train:
        parser.error(f"{' '.join(args.rest)}: further arguments go with --train only")
    if args.plot and not args.figure:
        parser.error(f"--plot {args.plot}: goes with --figure only")
    if args.plot and args.plot.suffix != ".png":
        parser.error(f"--plot {args.plot}: expected a file name that ends in .png")
    if args.output and not args.claim:
        parser.error(f"--output {args.output}: goes with --claim only")
    if args.write and args.write[0] not in SETTINGS:
        chat = " (those of PIIP-LLaVA have no LazyConfig)" if args.write[0].startswith("chat_") else ""
        parser.error(f"--write {args.write[0]}: expected one of {', '.join(SETTINGS)}{chat}")
    if args.write and Path(args.write[1]).suffix not in (".yaml", ".yml"):
        parser.error(f"--write {args.write[1]}: expected a file name that ends in .yaml")
    return args


def _known(names: list[str]) -> Callable[[str], str]:
    def check(name: str) -> str:
        if name in names:
            return name
        close = difflib.get_close_matches(name, names, n=3) or ["what --table and --figure print"]
        raise argparse.ArgumentTypeError(f"no setting is named {name!r}; expected {' or '.join(close)}")

    return check


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


def chat_command(stage: str, rest: list[str]) -> list[str]:
    """What trains a stage of a setting of PIIP-LLaVA; `rest` may name other folders."""
    run = Path("output/ablations") / stage
    first = [] if run.name == "stage1" else ["--projector", str(run.with_name("stage1"))]
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner"]  # of this Python, whatever PATH says
    return [*launcher, str(CHAT_TRAIN), stage, "--output_dir", str(run), *first, *rest]


def print_table(number: str) -> None:
    chat = [setting for setting in CHAT_ABLATIONS.values() if setting.table == number]
    settings = [setting for setting in ABLATIONS.values() if setting.table == number]
    table = multimodal_table(analyze_multimodal(chat)) if chat else ablation_table(settings)
    print(f"Table {number}: {TABLES[number]}\n\n{table}\n")


def print_figure(number: str, plot: Path | None) -> None:
    for panel, curves in FIGURES[number].items():
        points = dict.fromkeys(point for curve in curves.values() for point in curve)
        print(f"Figure {number}, {panel}\n\n{ablation_table(points)}\n")
    print("Scores are those of the paper's tables: its figures are images. The others have image sizes of Table I.")
    if plot:
        try:
            from piip_tools.flops.drawing import draw_figure
        except ImportError as error:
            sys.exit(f"sweep: --plot needs matplotlib ({error}); see README.md")
        try:
            with explain_write_errors(plot), write_atomically(plot) as file:
                draw_figure(f"Figure {number} of the paper", FIGURES[number]).savefig(file, format="png")
        except UserError as error:
            sys.exit(f"sweep: {error}")
        print(f"{plot}: written")


def run_claim(output: Path) -> None:
    """Trains what is not finished, and prints the table after it."""
    try:
        from piip_tools import claim
    except ImportError as error:
        sys.exit(f"sweep: training needs Detectron2 ({error}); see README.md")
    try:
        claim.run_claim(output)
    except UserError as error:
        sys.exit(f"sweep: {error}")
    print(claim.claim_table(claim.finished_runs(output)))


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    if args.write:
        name, path = args.write
        write_config(SETTINGS[name], path, f"output/ablations/{name}")
        print(f"{path}: written")
    elif args.train in STAGES:
        if find_spec("deepspeed") is None:
            sys.exit("sweep: training PIIP-LLaVA needs DeepSpeed: pip install --no-build-isolation -e '.[llava]'")
        command = chat_command(args.train, args.rest)
        print(shlex.join(command), flush=True)
        os.execv(command[0], command)
    elif args.train:
        output_dir = f"output/ablations/{args.train}"
        path = f"{output_dir}.yaml"
        write_config(SETTINGS[args.train], path, output_dir)
        os.execv(sys.executable, [sys.executable, str(TRAIN), "--config-file", path, *args.rest])
    elif args.claim:
        run_claim(args.output or Path("output/claim"))
    elif args.figure:
        print_figure(args.figure, args.plot)
    else:
        for number in [args.table] if args.table else TABLES:
            print_table(number)


if __name__ == "__main__":
    main()
