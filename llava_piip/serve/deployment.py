"""The server's application as a deployment of Ray Serve.

`build` is what `serve run` and the configuration file of `serve deploy` name. Every replica is a process that loads
the model and runs the same application, and clients see one server.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any, NoReturn

from fastapi import FastAPI
from ray import serve
from ray.serve.config import BackpressureConfig

from piip_core.errors import UserError

from .application import ServerSettings, create_app
from .arguments import load_model
from .engine import DEFAULT_BATCH, Engine, EngineError, EngineSettings
from .metrics import Metrics, merge_metrics
from .protocol import ApiError
from .replica_arguments import add_replica_arguments, gpus_per_replica
from .server import engine_settings, server_settings

__all__ = ["Replica", "application", "build"]

_HEALTH_SECONDS = 2.0  # between two looks at a replica
_SPARE = 64  # requests beside those that are admitted: for what tells them to wait, metrics, health
_METRICS_SECONDS = 5.0
_RETRY_SECONDS = 5.0
_START_TRIALS = 3


@serve.ingress()
class Replica:
    """One of the processes; Ray Serve calls its methods.

    Args:
        options: Those that `load_model` reads.
        settings: Of the server.
        engine: Of its engine.
    """

    def __init__(self, options: argparse.Namespace, settings: ServerSettings, engine: EngineSettings) -> None:
        self._settings = settings
        self._engine = Engine(load_model(options), engine)
        self._metrics = _AllMetrics()

    def __serve_build_asgi_app__(self) -> FastAPI:
        return create_app(self._engine, self._settings, metrics=self._metrics)

    def check_health(self) -> None:
        """Raises where the engine has stopped, so that another replica takes its place."""
        if not self._engine.alive:
            raise EngineError("the engine has stopped")

    async def own_metrics(self) -> tuple[str, str]:
        """The replica's name, and its metrics in Prometheus' format."""
        return serve.get_replica_context().replica_id.unique_id, (await self._metrics.own_text()).decode()


class _AllMetrics(Metrics):
    """Counts one replica and tells the counts of all, for whoever asks reaches any of them."""

    async def own_text(self) -> bytes:
        return await super().text()

    async def text(self) -> bytes:
        context = serve.get_replica_context()
        handle = serve.get_deployment_handle(context.deployment, context.app_name)
        try:
            found = await handle.broadcast("own_metrics").results_async(timeout_s=_METRICS_SECONDS)
        except Exception as error:
            raise ApiError(503, "a replica did not tell its metrics: ask again", code="replica_lost") from error
        return merge_metrics(dict(found))


def application(options: argparse.Namespace) -> serve.Application:
    """The deployment, ready to run.

    Args:
        options: Those of `add_replica_arguments`. `host` and `port` are those of Ray Serve's proxy, and set there.

    Raises:
        UserError: For a value that cannot work.
    """
    if options.replicas < 1:
        raise UserError(f"--replicas {options.replicas}: expected 1 or more")
    for name in ("gpus", "cpus"):
        if (getattr(options, f"{name}_per_replica") or 0) < 0:
            raise UserError(f"--{name}-per-replica {getattr(options, f'{name}_per_replica')}: expected 0 or more")
    kind, _, index = (options.device or "").partition(":")
    if index:
        raise UserError(f"--device {options.device}: a replica sees its own GPUs only, expected {kind}")
    settings, engine = server_settings(options), engine_settings(options)
    admitted = (engine.max_batch or DEFAULT_BATCH) + settings.max_waiting
    deployment = serve.deployment(
        Replica,
        num_replicas=options.replicas,
        ray_actor_options={"num_gpus": gpus_per_replica(options), "num_cpus": options.cpus_per_replica},
        # More than a replica admits: it tells the others itself to wait. The proxy does for those it cannot pass on
        max_ongoing_requests=admitted + _SPARE,
        max_queued_requests=admitted + _SPARE,
        backpressure_config=BackpressureConfig(status_code=429, retry_after_s=_RETRY_SECONDS),
        health_check_period_s=_HEALTH_SECONDS,
        graceful_shutdown_timeout_s=options.grace,
        graceful_shutdown_wait_loop_s=0.5,
        max_constructor_retry_count=_START_TRIALS,
    )
    return deployment.bind(options, settings, engine)


def build(arguments: Mapping[str, Any]) -> serve.Application:
    """The deployment out of the arguments of `serve run` or a configuration file, which are the options of
    `python -m llava_piip.serve.replicas` with underscores: `model=DIR replicas=4 allow_http=true`. The key is that of
    the environment or of `api_key_file` where this runs.

    Raises:
        UserError: For an unknown name or a value that cannot work.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.error = _refuse  # it would end the process
    add_replica_arguments(parser)
    words: list[str] = []
    for name, value in arguments.items():
        flag = "--" + name.replace("_", "-")
        if isinstance(value, list):
            words += [f"{flag}={item}" for item in value]
        elif str(value).lower() == "true":
            words.append(flag)
        elif value is not None and str(value).lower() != "false":
            words.append(f"{flag}={value}")
    return application(parser.parse_args(words))


def _refuse(message: str) -> NoReturn:
    raise UserError(f"arguments of the application: {message}")
