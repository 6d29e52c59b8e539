#!/usr/bin/env python
"""Proposes pyramids for a budget, by the guidelines of the paper: of DeiT branches, or of networks by name.

    python tools/plan.py --budget 450G --branches 3                    # FLOPs by the published count
    python tools/plan.py --budget 1T --max-params 200M --picture plan.png
    python tools/plan.py --max-params 200M --branches 2
    python tools/plan.py --budget 12GB --device cuda --dtype bfloat16  # measured: peak memory for one image
    python tools/plan.py --budget 800ms --threads 2 --runs 8           # measured: time for one image
    python tools/plan.py --budget 450G --write my_pyramid.py           # LazyConfig of the first proposal
    python tools/plan.py --branches dinov3:s,b,l --budget-gflops 450 --task segmentation --write my_pyramid.py
    python tools/lazyconfig_train_net.py --config-file my_pyramid.py --num-gpus 8

Networks are those of `piip_core.zoo.families` (dinov3, dinov3_convnext, siglip2, pe_spatial, eva02, radio) and models
of timm by name; their FLOPs are those that are executed. Weights come under the licences that are printed.

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
from piip_core.zoo import families
from piip_tools.planner.candidates import Budget, Candidate, nearest_published, parse_budget, parse_count
from piip_tools.planner.proposals import RULES, Measured, Proposal, baseline_for, measure, propose, search
from piip_tools.timing import describe_machine, device_argument


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    budget = parser.add_mutually_exclusive_group()
    budget.add_argument("--budget", metavar="B", help="450G or 1.5T (FLOPs), 12GB (memory), 800ms or 2s (latency)")
    budget.add_argument("--budget-gflops", type=float, metavar="N", help="the same as --budget NG")
    parser.add_argument("--max-params", metavar="N", help="parameters by the published count, for example 200M")
    parser.add_argument(
        "--branches", default="3", metavar="N|NETWORKS", help="2, 3 (default) or 4, or networks, smallest first"
    )
    parser.add_argument("--task", choices=("detection", "segmentation", "classification"), default="detection")
    parser.add_argument("--models", metavar="TSB", help="only these models: sizes out of TSBL, smallest first")
    parser.add_argument("--top", type=int, default=6, metavar="N", help="number of proposals (default: 6)")
    parser.add_argument("--write", type=Path, metavar="FILE.py", help="write the LazyConfig of a proposal")
    parser.add_argument("--choose", type=int, default=1, metavar="N", help="which one --write writes (default: 1)")
    parser.add_argument("--picture", type=Path, metavar="FILE.png", help="draw the published models and the proposals")
    measured = parser.add_argument_group("memory and latency budgets, measured on this machine")
    default = "cuda" if torch.cuda.is_available() else "cpu"
    measured.add_argument("--device", type=device_argument, default=default, help="cpu or cuda")
    measured.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="bfloat16: autocast")
    measured.add_argument("--threads", type=int, default=torch.get_num_threads(), metavar="N", help="CPU threads")
    measured.add_argument("--runs", type=int, default=6, metavar="N", help="candidates to measure (default: 6)")
    args = parser.parse_args(argv)
    if args.budget_gflops is not None:
        args.budget = f"{args.budget_gflops:g}G"
    if args.branches.isdecimal():
        args.branches = int(args.branches)
        if args.branches not in (2, 3, 4) or args.task == "classification":
            parser.error(f"--branches {args.branches}: expected 2, 3 or 4 for detection or segmentation, or networks")
    elif args.models:
        parser.error(f"--models {args.models}: expected with a number of --branches")
    else:
        args.models = families.parse(args.branches)
        args.branches = len(args.models)
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


def find_proposals(
    args: argparse.Namespace, budget: Budget | None, max_params: int | None
) -> tuple[list[Proposal], float | None]:
    """The best proposals, and the budget in FLOPs if there is one."""
    limits = {"params_limit": max_params, "models": args.models}
    if budget is None or budget.kind == "flops":
        flops_limit = budget and budget.limit
        return propose(args.branches, flops_limit=flops_limit, task=args.task, **limits)[: args.top], flops_limit
    if args.task == "classification":
        raise ConfigError(f"--budget {args.budget}: expected FLOPs for classifiers")
    with tqdm(total=args.runs, unit="run", desc="measuring", disable=None) as progress:

        def run(candidate: Candidate) -> Measured | None:
            progress.set_postfix_str(candidate.title)
            result = measure(candidate, device=args.device, dtype=args.dtype, threads=args.threads)
            progress.update()
            return result

        proposals, flops_limit = search(args.branches, budget, run, runs=args.runs, **limits)
    return proposals[: args.top], flops_limit


def as_text(title: str, proposals: list[Proposal], flops_limit: float | None) -> str:
    baseline, measured = baseline_for(flops_limit), proposals[0].measured is not None
    header = ["", "models", "images", "#Param", "#FLOPs", "% per branch"]
    header += ["latency", "peak memory"] if measured else []
    header += [rule.key for rule in RULES] + ["nearest published", "its box AP"]
    table = tabulate(list(map(cells, range(1, 1 + len(proposals)), proposals)), header, "github", disable_numparse=True)
    rules = [f"- {rule.key}: {rule.text}. {rule.source[0].upper()}{rule.source[1:]}." for rule in RULES]
    return "\n".join([f"{title}, baseline {baseline.title} {baseline.resolution}", "", table, "", *rules])


def cells(number: int, proposal: Proposal) -> list[str]:
    candidate, near = proposal.candidate, nearest_published(proposal.candidate)
    row = [str(number), candidate.label, "/".join(map(str, candidate.image_sizes))]
    row += [f"{candidate.params / 1e6:.0f}M", f"{candidate.flops / 1e9:.0f}G"]
    row.append("/".join(f"{share:.0%}".rstrip("%") for share in candidate.shares))
    if found := proposal.measured:
        row += [Budget("latency", found.seconds).text(), Budget("memory", found.peak_bytes).text()]
    row += ["yes" if rule.key in proposal.met else "-" for rule in RULES]
    return row + (["-", "-"] if near is None else [f"{near[0].resolution}, {near[1]:.0f}G", f"{near[2]:.1f}"])


# Lengths and rates of the published trainings; with layer_decay=0.8 as EVA-02 of that size for other networks
_RECIPES = {
    "detection": """detector(
    {entry},
    scale=({side}, {short}),
    batch_size=16,
    lr=1e-4,
    layer_decay={decay},
    epochs=12,
    lr_drops=(8, 11),
)""",
    "segmentation": """segmentor(
    {entry},
    crop={side},
    batch_size=16,
    lr=4e-5,
    layer_decay=0.95,
    max_iter=160_000,
)""",
    "classification": """classifier(
    {entry},
    batch_size=1024,
    lr=3e-5,
    interaction_lr_ratio=10.0,
    weight_decay=0.1,
    epochs=20,
    warmup_epochs=5,
    ema_decay=0.99996,
    output_dir="output/{name}",
)""",
}
_TRAININGS = {
    "detection": "Mask R-CNN 1x on COCO",
    "segmentation": "UperNet 160k on ADE20K",
    "classification": "fine-tuned on ImageNet-1K",
}


def config_text(proposal: Proposal, title: str, task: str = "detection") -> str:
    """A LazyConfig that trains a proposal like the published models, wherever the file lies."""
    c = proposal.candidate
    head = ['head="upernet"', 'schedule="160k"'] if task == "segmentation" else ['head="mask_rcnn"']
    if isinstance(c.models, str):
        config = f'config=zoo.deit_pyramid("{c.models}", {c.image_sizes}, window_size={c.window_size})'
        fields = "".join(f"        {field},\n" for field in (f'name="{c.name}"', *head, config))
        entry = f"zoo.ZooEntry(\n{fields}    )"
    elif task == "classification":
        entry = f'zoo.families.classifier("{c.label}", {c.image_sizes})'
    else:
        options = ", ".join([*head, f"window_size={c.window_size}"])
        entry = f'zoo.families.entry("{c.label}", {c.image_sizes}, {options})'
    side, met = c.image_sizes[0], ", ".join(proposal.met) or "none"
    decay = 0.85 if isinstance(c.models, str) else 0.8
    recipe = _RECIPES[task].format(entry=entry, side=side, short=side * 800 // 1333, decay=decay, name=c.name)
    return f'''"""PIIP-{c.title}, {_TRAININGS[task]}: proposed by tools/plan.py for {title}.

{c.params / 1e6:.0f}M parameters, {c.flops / 1e9:.0f}G FLOPs. Guidelines met: {met}.{_licences(c)}
"""

from piip.recipes import {recipe.partition("(")[0]}
from piip_core import zoo

model, data, dataloader, optimizer, lr_multiplier, train = {recipe}
'''


def _licences(candidate: Candidate) -> str:
    if isinstance(candidate.models, str):
        return ""
    found = dict.fromkeys(filter(None, map(families.licence_of, candidate.models)))
    return f"\nLicences of the pretrained weights: {', '.join(found) or 'not known'}."


def write_picture(proposals: list[Proposal], title: str, path: Path) -> None:
    try:
        from piip_tools.planner.drawing import draw_plan
    except ImportError as error:
        raise UserError(f"--picture needs matplotlib ({error}); see README.md") from None
    figure = draw_plan(proposals, f"Pyramids of {title}, and the published models")
    with write_atomically(path) as file:
        figure.savefig(file, format="png")


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    try:
        budget = parse_budget(args.budget) if args.budget else None
        max_params = parse_count(args.max_params) if args.max_params else None
        limits = [budget.text()] if budget else []
        limits += [f"{max_params / 1e6:.0f}M parameters"] if max_params else []
        models = families.label(args.models) if isinstance(args.models, tuple) else f"{args.branches} branches"
        title = f"{models} within {' and '.join(limits)}"
        proposals, flops_limit = find_proposals(args, budget, max_params)
        if args.write and args.choose > len(proposals):
            raise ConfigError(f"--choose {args.choose}: there are {len(proposals)} proposals")
        if args.picture:
            write_picture(proposals, title, args.picture)
        if args.write:
            with write_atomically(args.write, "w") as file:
                file.write(config_text(proposals[args.choose - 1], title, args.task))
    except UserError as error:
        sys.exit(f"plan: {error}")
    print(as_text(title, proposals, flops_limit) + _licences(proposals[0].candidate))
    if proposals[0].measured:
        where = f"{describe_machine(args.device, args.threads)}, {args.dtype}, PyTorch {torch.__version__}"
        print(f"\nMeasured on {where}; backbone and feature pyramid, one image.")
    for path in filter(None, (args.picture, args.write)):
        print(f"{path}: written", file=sys.stderr)


if __name__ == "__main__":
    main()
