"""Plays a launcher: starts two processes that run the training tool, phase by phase, and kills them where it says so.

Forked from one that has imported everything, which takes longer than the runs.

    launched_training.py PHASES.json STATUSES.json PORT

A phase is a list of runs, each with the arguments of the tool and perhaps `kill_at`, a checkpoint not to be published,
and `forget`, one to be removed before.
"""

import argparse
import gc
import json
import os
import shutil
import signal
import sys
from pathlib import Path

from piip.distributed import start
from piip.train import main
from piip_core.deepspeed_start import import_deepspeed
from piip_core.training_checkpoints import RunFolder


def run(specs: list[dict]) -> None:
    """The runs of a phase, on this process."""
    publish = RunFolder.publish
    for spec in specs:

        def publish_or_die(run, name, kill_at=spec.pop("kill_at", None)):  # noqa: B008
            if name == kill_at:  # everything of it is written
                os.kill(os.getpid(), signal.SIGKILL)
            return publish(run, name)

        RunFolder.publish = publish_or_die
        start(main, argparse.Namespace(**{"resume": False, "eval_only": False} | spec))


def fork(rank: int, port: str, specs: list[dict]) -> int:
    pid = os.fork()
    if pid == 0:
        os.environ |= dict(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2")
        os.environ |= dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
        status = 1
        try:
            run(specs)
            status = 0
        except BaseException:
            sys.excepthook(*sys.exc_info())
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    return pid


if __name__ == "__main__":
    phases, statuses = json.loads(Path(sys.argv[1]).read_text()), []
    import_deepspeed("cpu")
    gc.freeze()  # what was imported is not passed over again in every process
    for number, specs in enumerate(phases):
        for forgotten in (spec.pop("forget") for spec in specs if "forget" in spec):
            shutil.rmtree(forgotten)
        running = {fork(rank, str(int(sys.argv[3]) + number), specs) for rank in (0, 1)}
        results = []
        while running:
            pid, status = os.wait()
            running.discard(pid)
            results.append(os.waitstatus_to_exitcode(status))
            for other in running if results[-1] else ():
                os.kill(other, signal.SIGKILL)
        statuses.append(results)
    Path(sys.argv[2]).write_text(json.dumps(statuses))
