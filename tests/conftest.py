"""What tests of several packages share."""

import dataclasses
import gc
import importlib.util
import io
import json
import multiprocessing.forkserver
import os
import random
import signal
import socket
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import ModuleType

import huggingface_hub
import pytest
import torch

from piip_core import (
    BranchConfig,
    ClassifierConfig,
    DensePIIP,
    InteractionConfig,
    MergingConfig,
    PIIPClassifier,
    PIIPConfig,
    ViTConfig,
    zoo,
)
from piip_core.checkpoints import our_names, released, to_published
from piip_core.files import lock_folder

ROOT = Path(__file__).parents[1]


def pytest_configure(config: pytest.Config) -> None:
    """Makes the marks of transformers' own tests known; see llava_piip/test_transformers_suite.py."""
    names = "accelerate_tests executorch_export_test flash_attn_3_test flash_attn_4_test flash_attn_test generate"
    for name in f"{names} is_training_test onnx_export_test timeout torch_compile_test torch_export_test".split():
        config.addinivalue_line("markers", name)


def pytest_collection_finish() -> None:
    """Lets the garbage collector pass over all that was imported, which takes half a second each time."""
    gc.collect()
    gc.freeze()


def _load(name: str, folder: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"piip_{folder}_{name}", ROOT / folder / f"{name}.py")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(ROOT / folder))  # as for a script that is started
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.pop(0)
    return module


@pytest.fixture(scope="session")
def load_tool():
    """Imports tools/NAME.py, a script outside any package, as a module; `folder` names another folder."""
    return partial(_load, folder="tools")


@pytest.fixture(scope="session")
def load_script():
    """Imports datasets/NAME.py, a script outside any package, as a module."""
    return partial(_load, folder="datasets")


def _randomize(module: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return module


@pytest.fixture(scope="session")
def randomize():
    """Adds noise to all parameters of a module, the zero-initialised ones too, so that every path matters."""
    return _randomize


@pytest.fixture(scope="session")
def forkserver():
    """A context of `multiprocessing` whose processes have imported nothing of ours yet, but what takes longest."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch.library", "timm", "transformers.models.llama.modeling_llama"])
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}.items():
            patch.setenv(name, value)
        multiprocessing.forkserver.ensure_running()
    return context


_FRESH = """
import os, sys
os.environ |= environment
sys.argv[1:] = arguments
for number, path in enumerate(outputs, 1):
    os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
if "HF_ENDPOINT" in environment:  # the server has imported the hub's client, which reads its variables once
    import importlib, huggingface_hub.hf_api
    importlib.reload(huggingface_hub.constants)
    huggingface_hub.hf_api.api.endpoint = environment["HF_ENDPOINT"]
"""


@pytest.fixture(scope="session")
def start_python(forkserver, tmp_path_factory):
    """Starts a process with code in it as `python -c CODE ARGUMENTS`, sooner; also returns the files of its output."""

    def start(code: str, *arguments: str, **environment: str):
        outputs = [str(tmp_path_factory.mktemp("fresh") / name) for name in ("out", "err")]
        settings = dict(arguments=arguments, environment=environment, outputs=outputs, __name__="__main__")
        process = forkserver.Process(target=exec, args=(_FRESH + code, settings))
        process.start()
        return process, *map(Path, outputs)

    return start


@pytest.fixture(scope="session")
def run_python(start_python):
    """Runs code to its end, see `start_python`."""

    def run(code: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
        process, output, errors = start_python(code, *arguments, **environment)
        process.join(timeout=300)
        process.kill()
        return subprocess.CompletedProcess(code, process.exitcode, output.read_text(), errors.read_text())

    return run


def _free_port() -> str:
    for port in random.SystemRandom().sample(range(20000, 32000), 100):
        with socket.socket() as taken:
            if taken.connect_ex(("127.0.0.1", port)):
                return str(port)
    raise AssertionError("no free port")


@pytest.fixture(scope="session")
def free_port():
    """Finds a port below those that the system itself hands out, which others may get before the launcher binds it."""
    return _free_port


SIMPLE = MergingConfig()


def tiny_branch(embed_dim: int, image_size: int, depth: int = 2, **options) -> BranchConfig:
    network = ViTConfig(embed_dim=embed_dim, depth=depth, num_heads=embed_dim // 8, pos_grid=4)
    return BranchConfig(network=network, image_size=image_size, **options)


def tiny_config(dims=(32, 24, 16), sizes=(64, 96, 128), interaction=None, merging=SIMPLE, **options) -> PIIPConfig:
    interaction = interaction or InteractionConfig(num_interactions=2, num_heads=4)
    branches = tuple(tiny_branch(dim, size, **options) for dim, size in zip(dims, sizes, strict=True))
    return PIIPConfig(branches=branches, interaction=interaction, merging=merging)


@pytest.fixture(name="tiny_config", scope="session")
def tiny_config_fixture():
    """Builds a small PIIPConfig; see `tiny_config`."""
    return tiny_config


@pytest.fixture(name="tiny_branch", scope="session")
def tiny_branch_fixture():
    """Builds a small BranchConfig; see `tiny_branch`."""
    return tiny_branch


@pytest.fixture
def tiny_model(randomize) -> DensePIIP:
    """A three-branch model with windows, every parameter random."""
    return randomize(DensePIIP(tiny_config(window_size=3))).eval()


@pytest.fixture
def held_folder(tmp_path):
    """A folder that another process has locked as its own, and the id of that process, which has a child."""
    folder = tmp_path / "held"
    reading, writing = os.pipe()
    holder = os.fork()
    if holder == 0:
        os.setpgid(0, 0)
        with lock_folder(folder, "wait"):
            if os.fork() != 0:  # the child is as a worker of a data loader
                os.write(writing, b"x")
            signal.pause()
    os.read(reading, 1)
    yield folder, holder
    os.killpg(holder, signal.SIGKILL)
    os.waitpid(holder, 0)


@pytest.fixture
def kill_saves(tmp_path):
    """Kills a training at eight points of a save, each time to go on with it; see killed_saves.py."""

    def run(**spec) -> None:
        (tmp_path / "spec.json").write_text(json.dumps({"folder": str(tmp_path), **spec}))
        command = [sys.executable, str(ROOT / "tests" / "killed_saves.py"), *("spec.json", "results.json")]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
        done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
        found = json.loads((tmp_path / "results.json").read_text())
        print(*found["results"], sep="\n")
        assert found["points"] >= 16 and found["tensors"] > 50 and len(found["results"]) == 8
        for result in found["results"]:
            assert (result["killed"], result["resumed"]) == (-signal.SIGKILL, 0), result
            assert result["different"] == [] and not result["staged"], result
        assert {tuple(result["left"]) for result in found["results"]} >= {("checkpoint-2",)}

    return run


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A stand-in for the Hugging Face hub (hub_standin.py), from which this process fetches released models, too."""
    with _load("hub_standin", "tests").Hub() as running:
        cache = tmp_path / "hub"
        for name in ("hf_hub_download", "snapshot_download"):
            fetch = partial(getattr(huggingface_hub, name), endpoint=running.endpoint, cache_dir=cache)
            monkeypatch.setattr(released, name, fetch)
        monkeypatch.setattr(huggingface_hub.constants, "HF_ASSETS_CACHE", str(tmp_path / "assets"))
        yield running


@pytest.fixture
def tiny_release(hub, monkeypatch, randomize):
    """`piip_tiny`, a small classifier in the table of released models and in the hub; its weights and their average."""
    pyramid = tiny_config(merging=None)
    branches = [
        dataclasses.replace(b, network=dataclasses.replace(b.network, class_token=True)) for b in pyramid.branches
    ]
    pyramid = dataclasses.replace(pyramid, branches=tuple(branches))
    config = ClassifierConfig(pyramid=pyramid, num_classes=7, pooling="first_patch")
    entry = dataclasses.replace(
        zoo.classification("piip_tsb_368_192_128"), name="piip_tiny", config=config, training_config=config
    )
    model = zoo.Released(entry=entry, repository="OpenGVLab/PIIP", file="classification/tiny.pth")
    monkeypatch.setitem(zoo._RELEASED_BY_NAME, entry.name, model)
    monkeypatch.setitem(zoo._CLASSIFIERS_BY_NAME, entry.name, entry)
    monkeypatch.setattr(zoo, "_RELEASED", (*zoo._RELEASED, model))
    models = {key: randomize(PIIPClassifier(config), seed).eval() for seed, key in enumerate(("model", "model_ema"))}
    content, file = {"epoch": 19}, io.BytesIO()
    for key, made in models.items():
        state = made.state_dict()
        content[key], report = to_published(state, our_names(config, list(state)))
        report.check()
    torch.save(content, file)
    hub.release(entry.name, content=file.getvalue())
    return models
