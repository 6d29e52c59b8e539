#!/usr/bin/env python
"""Trains or evaluates a detector, segmentor or classifier described by a LazyConfig.

One machine, all GPUs or one CPU process:
    python tools/lazyconfig_train_net.py --config-file CONFIG.py --num-gpus 8 train.output_dir=output/run
Two machines:
    ... --num-gpus 8 --num-machines 2 --machine-rank 0 --dist-url tcp://HOST:PORT      (rank 1 on the other)
    torchrun, deepspeed --hostfile and other launchers that describe the processes in the environment work as well
Models that outgrow one GPU (weights, gradients and optimizer states divided among the processes):
    ... --num-gpus 8 train.deepspeed.stage=3
Go on after an interruption, evaluate:
    ... --resume
    ... --eval-only train.init_checkpoint=output/run/model_final.pth
A released model by its name (python -m piip_core.zoo lists them), fetched at the first call:
    ... --eval-only train.init_checkpoint=mask_rcnn_piip_tsb_1568_1120_672
Own data in COCO format; the number of classes follows the annotation file:
    ... data.train.annotations=A.json data.train.images=DIR data.test.annotations=B.json data.test.images=DIR
Own images with one sub-folder per class; classes and the length of the training follow the folder:
    ... data.train.images=DIR data.test.images=DIR
"""

import argparse
import os
import sys

import torch

from piip.distributed import is_launched, start
from piip.train import main
from piip_core.errors import UserError


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config-file", required=True, metavar="FILE", help="LazyConfig (.py or .yaml)")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint of train.output_dir")
    parser.add_argument("--eval-only", action="store_true", help="evaluate train.init_checkpoint and stop")
    parser.add_argument("--num-gpus", type=int, default=1, help="processes per machine, one per GPU (or on CPU)")
    parser.add_argument("--num-machines", type=int, default=1)
    parser.add_argument("--machine-rank", type=int, default=0, help="number of this machine, from 0")
    parser.add_argument("--dist-url", default="auto", help="tcp://HOST:PORT of machine 0; 'auto' on one machine")
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)  # of launchers
    parser.add_argument("opts", nargs="*", metavar="key=value", help="overrides of the configuration")
    args = parser.parse_intermixed_args()  # options may follow the overrides
    if args.local_rank is not None:
        os.environ.setdefault("LOCAL_RANK", str(args.local_rank))
    if is_launched():
        return args  # the options about machines and processes are the launcher's
    if args.num_gpus < 1:
        parser.error("--num-gpus: expected at least 1; train.device=cpu trains on the CPU")
    if torch.cuda.is_available() and args.num_gpus > torch.cuda.device_count():
        parser.error(f"--num-gpus {args.num_gpus}: {torch.cuda.device_count()} visible")
    if not 0 <= args.machine_rank < args.num_machines:
        parser.error(f"--machine-rank {args.machine_rank}: expected 0 to {args.num_machines - 1}")
    if args.num_machines > 1 and args.dist_url == "auto":
        parser.error("--dist-url: expected tcp://HOST:PORT of machine 0 with several machines")
    return args


if __name__ == "__main__":
    args = parse_args()
    try:
        start(main, args)
    except UserError as error:
        sys.exit(f"error: {error}")
