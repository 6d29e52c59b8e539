"""Starting the processes of the training tool, or joining those that a launcher has started."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable

import torch
from detectron2.engine import DEFAULT_TIMEOUT, launch
from detectron2.utils import comm
from torch import distributed

from piip_core.errors import ConfigError

# What torchrun and deepspeed set, and a script around srun
_ENVIRONMENT = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


def is_launched() -> bool:
    """Whether torchrun, deepspeed or another launcher has started this process and described the group."""
    return all(name in os.environ for name in _ENVIRONMENT)


def start(main: Callable[[argparse.Namespace], None], args: argparse.Namespace) -> None:
    """Calls `main` on every process: those that the environment describes, or new ones of Detectron2's launcher.

    Args:
        main: What to run.
        args: Its argument; num_gpus, num_machines, machine_rank and dist_url are for Detectron2's launcher.

    Raises:
        ConfigError: If this machine has no GPU of the process's number, or machines have different numbers of
            processes, which Detectron2 does not know.
    """
    if not is_launched():
        launch(main, args.num_gpus, args.num_machines, args.machine_rank, args.dist_url, args=(args,))
        return
    rank, local_rank, cuda = int(os.environ["RANK"]), int(os.environ["LOCAL_RANK"]), torch.cuda.is_available()
    if cuda:
        if local_rank >= torch.cuda.device_count():
            raise ConfigError(
                f"LOCAL_RANK={local_rank}: {torch.cuda.device_count()} GPUs are visible; expected one per process"
            )
        torch.cuda.set_device(local_rank)
    if not distributed.is_initialized():
        distributed.init_process_group("nccl" if cuda else "gloo", timeout=DEFAULT_TIMEOUT)
        # A machine's processes have consecutive numbers: their first one says which machine it is
        firsts = comm.all_gather(rank - local_rank)
        if len({firsts.count(first) for first in firsts}) > 1:
            raise ConfigError("the machines have different numbers of processes; expected the same on all")
        comm.create_local_process_group(firsts.count(rank - local_rank))
        comm.synchronize()
    main(args)
