"""Options of several replicas, for the command and for Ray Serve's own ones."""

from __future__ import annotations

import argparse

import torch

from .server import add_server_arguments

__all__ = ["add_replica_arguments", "gpus_per_replica"]


def add_replica_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options that `application` reads."""
    add_server_arguments(parser)
    parser.add_argument("--replicas", type=int, default=1, help="processes with the model (default %(default)s)")
    parser.add_argument(
        "--gpus-per-replica",
        type=float,
        help="1, or a part of one that several share (default: 1 where this machine has one and --device is not cpu)",
    )
    parser.add_argument(
        "--cpus-per-replica", type=float, default=1.0, help="also its threads on a CPU (default %(default)s)"
    )


def gpus_per_replica(options: argparse.Namespace) -> float:
    """What `--gpus-per-replica` says or, if it is not given, what this machine suggests."""
    if options.gpus_per_replica is not None:
        return options.gpus_per_replica
    return float(options.device != "cpu" and torch.cuda.is_available())
