#!/usr/bin/env python
"""Proposes pyramids of DeiT branches for a budget, by the guidelines of the paper.

    python tools/plan.py --budget 450G --branches 3                    # FLOPs by the published count
    python tools/plan.py --budget 1T --max-params 200M --picture plan.png
    python tools/plan.py --max-params 200M --branches 2
    python tools/plan.py --budget 12GB --device cuda --dtype bfloat16  # measured: peak memory for one image
    python tools/plan.py --budget 800ms --threads 2 --runs 8           # measured: time for one image
    python tools/plan.py --budget 450G --write my_pyramid.py           # LazyConfig of the first proposal
    python tools/lazyconfig_train_net.py --config-file my_pyramid.py --num-gpus 8

A proposal names the guidelines that it meets, its cost, and the published model nearest to it with that model's box AP.
What a proposal reaches itself is known once it is trained. Memory and latency are those of backbone and feature pyramid
on one square image of the largest branch's size, without a detector's heads and without training.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from tabulate import tabulate
from tqdm import tqdm

from piip_core.errors import ConfigError, UserError
from piip_core.files import write_atomically
from piip_tools import planner


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget", metavar="B", help="450G or 1.5T (FLOPs), 12GB (memory), 800ms or 2s (latency)")
    parser.add_argument("--max-params", metavar="N", help="parameters by the published count, for example 200M")
    parser.add_argument("--branches", type=int, choices=(2, 3, 4), default=3, help="default: 3")
    parser.add_argument("--models", metavar="TSB", help="only these models: sizes out of TSBL, smallest first")
    parser.add_argument("--top", type=int, default=6, metavar="N", help="number of proposals (default: 6)")
    parser.add_argument("--write", type=Path, metavar="FILE.py", help="write the LazyConfig of a proposal")
    parser.add_argument("--choose", type=int, default=1, metavar="N", help="which one --write writes (default: 1)")
    parser.add_argument("--picture", type=Path, metavar="FILE.png", help="draw the published models and the proposals")
    measured = parser.add_argument_group("memory and latency budgets, measured on this machine")
    measured.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    measured.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="bfloat16: autocast")
    measured.add_argument("--threads", type=int, default=torch.get_num_threads(), metavar="N", help="CPU threads")
    measured.add_argument("--runs", type=int, default=6, metavar="N", help="candidates to measure (default: 6)")
    args = parser.parse_args(argv)
    if args.budget is None and args.max_params is None:
        parser.error("give --budget, --max-params or both")
    for option in ("top", "choose", "threads", "runs"):
        if getattr(args, option) < 1:
            parser.error(f"--{option} {getattr(args, option)}: expected at least 1")
    for option, suffix in (("write", ".py"), ("picture", ".png")):
        path = getattr(args, option)
        if path and (path.suffix != suffix or not path.absolute().parent.is_dir()):
            parser.error(f"--{option} {path}: expected a file name that ends in {suffix}, in a folder that exists")
    if args.write and args.write.exists():
        parser.error(f"--write {args.write}: the file exists already")
    return args


class Plan:
    """The proposals for the command line's budget, with what was measured for them."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.budget = planner.parse_budget(args.budget) if args.budget else None
        self.max_params = planner.parse_count(args.max_params) if args.max_params else None
        self.branches = args.branches
        self.measured: dict[planner.Candidate, planner.Measured | None] = {}
        self.machine: planner.Machine | None = None
        limits = {"params_limit": self.max_params, "models": args.models}
        if self.budget is None or self.budget.kind == "flops":
            self.flops_limit = self.budget and self.budget.limit
            proposals = planner.propose(args.branches, flops_limit=self.flops_limit, **limits)
        else:
            self.machine = planner.Machine(device=args.device, dtype=args.dtype, threads=args.threads)
            with tqdm(total=args.runs, unit="run", desc="measuring", disable=None) as progress:

                def run(candidate: planner.Candidate) -> planner.Measured | None:
                    progress.set_postfix_str(candidate.title)
                    result = planner.measure(candidate, self.machine)
                    progress.update()
                    return result

                found = planner.search(args.branches, self.budget, run, runs=args.runs, **limits)
            proposals, self.measured, self.flops_limit = found.proposals, found.measured, found.flops_limit
        self.proposals = proposals[: args.top]
        self.baseline = planner.baseline_for(self.flops_limit)

    @property
    def title(self) -> str:
        """Number of branches and limits in words, for headings."""
        limits = [] if self.budget is None else [self.budget.text()]
        if self.max_params is not None:
            limits.append(f"{self.max_params / 1e6:.0f}M parameters")
        return f"{self.branches} branches within {' and '.join(limits)}"


def as_text(plan: Plan) -> str:
    header = ["", "models", "images", "#Param", "#FLOPs", "% per branch"]
    header += ["latency", "peak memory"] if plan.machine else []
    header += [rule.key for rule in planner.RULES] + ["nearest published", "its box AP"]
    rows = [cells(plan, number, proposal) for number, proposal in enumerate(plan.proposals, 1)]
    table = tabulate(rows, header, tablefmt="github", disable_numparse=True)
    lines = [f"{plan.title}, baseline {plan.baseline.title} {plan.baseline.resolution}", "", table, ""]
    lines += [f"- {rule.key}: {rule.text}. {rule.source[0].upper()}{rule.source[1:]}." for rule in planner.RULES]
    if plan.machine:
        lines += ["", f"Measured on {plan.machine.description}; backbone and feature pyramid, one image."]
        lines += [
            f"- {candidate.title}: {'out of memory' if found is None else plan.budget.text(found.of(plan.budget))}"
            for candidate, found in plan.measured.items()
        ]
    return "\n".join(lines)


def cells(plan: Plan, number: int, proposal: planner.Proposal) -> list[str]:
    candidate, near = proposal.candidate, planner.nearest_published(proposal.candidate)
    row = [str(number), candidate.models, "/".join(map(str, candidate.image_sizes))]
    row += [f"{candidate.params / 1e6:.0f}M", f"{candidate.flops / 1e9:.0f}G"]
    row.append("/".join(f"{share:.0%}".rstrip("%") for share in candidate.shares))
    if plan.machine:
        found = plan.measured[candidate]
        row += [planner.Budget("latency", found.seconds).text(), planner.Budget("memory", found.peak_bytes).text()]
    row += ["yes" if rule.key in proposal.met else "-" for rule in planner.RULES]
    return row + (["-", "-"] if near is None else [f"{near[0].resolution}, {near[1]:.0f}G", f"{near[2]:.1f}"])


def config_text(plan: Plan, proposal: planner.Proposal) -> str:
    """A LazyConfig that trains a proposal like the published Mask R-CNN 1x models, wherever the file lies."""
    c = proposal.candidate
    met = ", ".join(proposal.met) or "none"
    side = c.image_sizes[0]
    return f'''"""PIIP-{c.title}, Mask R-CNN 1x on COCO: proposed by tools/plan.py for {plan.title}.

Published count: {c.params / 1e6:.0f}M parameters, {c.flops / 1e9:.0f}G FLOPs. Guidelines met: {met}.
"""

from piip.recipes import detector
from piip_core import zoo

model, data, dataloader, optimizer, lr_multiplier, train = detector(
    zoo.ZooEntry(
        name="{c.name}",
        config=zoo.deit_pyramid("{c.models}", {c.image_sizes}, window_size={c.window_size}),
    ),
    scale=({side}, {side * 800 // 1333}),
    batch_size=16,
    lr=1e-4,
    layer_decay=0.85,
    epochs=12,
    lr_drops=(8, 11),
)
'''


def write_picture(plan: Plan, path: Path) -> None:
    try:
        from piip_tools.planner.drawing import draw_plan
    except ImportError as error:
        raise UserError(f"--picture needs matplotlib ({error}); see README.md") from None
    figure = draw_plan(plan.proposals, f"Pyramids of {plan.title}, and the published models")
    with write_atomically(path) as file:
        figure.savefig(file, format="png")


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    try:
        plan = Plan(args)
        if args.write and args.choose > len(plan.proposals):
            raise ConfigError(f"--choose {args.choose}: there are {len(plan.proposals)} proposals")
        if args.picture:
            write_picture(plan, args.picture)
        if args.write:
            with write_atomically(args.write, "w") as file:
                file.write(config_text(plan, plan.proposals[args.choose - 1]))
    except UserError as error:
        sys.exit(f"plan: {error}")
    print(as_text(plan))
    for path in filter(None, (args.picture, args.write)):
        print(f"{path}: written", file=sys.stderr)


if __name__ == "__main__":
    main()
