"""Several replicas of the server on this machine, behind one address, by Ray Serve.

    pip install --no-build-isolation -e ".[serve-ray]"
    python -m llava_piip.serve.replicas --model output/piip_llava --replicas 2

Each replica is a process of its own, on a GPU of its own where there are some. One that dies is replaced. Options and
requests are those of python -m llava_piip.serve.server. On many machines Ray's own commands start the same:

    serve run llava_piip.serve.deployment:build model=/shared/piip_llava replicas=16
"""

from __future__ import annotations

import argparse
import math
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from piip_core.errors import ConfigError, UserError

from .arguments import exit_status
from .generation import model_folder
from .replica_arguments import add_replica_arguments, gpus_per_replica
from .server import KEEP_ALIVE

__all__ = ["RAY_ENVIRONMENT", "main"]

_NAME = "piip"
_PROXY_SECONDS = 15.0  # beyond a request's own time, for what waits at the proxy
_OBJECT_BYTES = 200_000_000  # of shared memory, which requests hardly use
RAY_ENVIRONMENT = {  # where not set otherwise; read when ray is imported
    "RAY_USAGE_STATS_ENABLED": "0",  # nothing is sent to Ray's makers
    "RAY_AUTH_MODE": "token",  # Ray's processes talk to nobody else
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # they listen at 127.0.0.1, as Ray's do on desktops
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the replicas until SIGTERM or SIGINT; see `--help`."""
    parser = argparse.ArgumentParser(
        prog="python -m llava_piip.serve.replicas",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_replica_arguments(parser)
    options = parser.parse_args(arguments)
    return exit_status(lambda: _run(options))


def _run(options: argparse.Namespace) -> int:
    for name, value in RAY_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    try:
        import ray
        from ray import serve

        from .deployment import application
    except ModuleNotFoundError as error:
        if error.name != "ray":
            raise
        hint = "pip install --no-build-isolation -e '.[serve-ray]'"
        raise ConfigError(f"several replicas need ray[serve]: {hint}") from error
    gpus, there = gpus_per_replica(options) * options.replicas, torch.cuda.device_count()
    if gpus > there:
        raise UserError(f"--replicas {options.replicas}: they need {gpus:g} GPUs, this machine has {there}")
    model_folder(Path(options.model))
    deployed = application(options)
    _check_address(options.host, options.port)
    ray.init(
        address="local",
        num_cpus=max(os.cpu_count() or 1, math.ceil(options.replicas * options.cpus_per_replica)),
        object_store_memory=_OBJECT_BYTES,
        include_dashboard=False,
    )
    try:
        serve.start(
            proxy_location="HeadOnly",
            http_options={
                "host": options.host,
                "port": options.port,
                "request_timeout_s": options.timeout + _PROXY_SECONDS,
                "keep_alive_timeout_s": KEEP_ALIVE,
            },
        )
        try:
            try:
                serve.run(deployed, name=_NAME)
            except RuntimeError as error:
                raise UserError(f"the replicas do not start, the reason is above ({error})") from error
            ending = _ended_by_signal()
            address = f"[{options.host}]" if ":" in options.host else options.host
            print(f"replicas: {options.replicas}, at http://{address}:{options.port}", file=sys.stderr, flush=True)
            ending.wait()
            serve.delete(_NAME, _blocking=False)  # would wait for a minute at most
            while _NAME in serve.status().applications:  # running answers are finished before the proxy goes
                time.sleep(0.2)
        finally:
            serve.shutdown()
    finally:
        ray.shutdown()
    return 0


def _check_address(host: str, port: int) -> None:
    """Raises if nothing can listen there; Ray would say so in many words, and late."""
    try:
        socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET).close()
    except (OSError, OverflowError) as error:
        raise ConfigError(f"--host {host} --port {port}: cannot listen there ({error}); give another") from error


def _ended_by_signal() -> threading.Event:
    """Is set by SIGTERM or SIGINT; a second one of them ends at once."""
    ending = threading.Event()

    def end(*_: object) -> None:
        ending.set()
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.default_int_handler)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, end)
    return ending


if __name__ == "__main__":
    sys.exit(main())
