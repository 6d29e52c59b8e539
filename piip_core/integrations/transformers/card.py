"""Model cards that say what the configuration of a model says, for repositories of the hub."""

from __future__ import annotations

import copy
from typing import Any

import torch
from huggingface_hub import ModelCard, ModelCardData, create_repo, file_exists, upload_file
from tabulate import tabulate
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

from ... import zoo
from ...config import PIIPConfig
from ...errors import ConfigError
from ...meta import on_meta

_TASKS = {
    "PIIPForImageClassification": "image-classification",
    "PIIPLlavaForConditionalGeneration": "image-text-to-text",
}
_TEXT = """
# {name}

A {kind} that sees through a [Parameter-Inverted Image Pyramid](https://arxiv.org/abs/2501.07783):
small networks read the large image, large ones the small image, and {interactions} interactions ({attention} attention)
join them.

{pyramid}

{cost}

## Data and accuracy

{data}

## Use

```bash
pip install "piip[{extra}]"
```

```python
from {module} import {kind}

model = {kind}.from_pretrained("{repository}")
```
"""


class PushWithCard(PreTrainedModel):
    """Models of transformers whose `push_to_hub` describes them."""

    # Whatever else transformers takes is passed through
    def push_to_hub(self, repo_id: str, **options: Any) -> str:  # type: ignore[override]
        """As transformers', with a card made from the configuration where the repository has none.

        Args:
            repo_id: Repository; made if it does not exist.
            **options: Those of transformers.
        """
        token = options.get("token")
        repo_id = create_repo(repo_id, private=options.get("private"), token=token, exist_ok=True).repo_id
        if not file_exists(repo_id, "README.md", token=token):
            card = str(make_model_card(self, repo_id)).encode()
            upload_file(path_or_fileobj=card, path_in_repo="README.md", repo_id=repo_id, token=token)
        return super().push_to_hub(repo_id, **options)  # type: ignore[arg-type]  # its decorator hides the first one


def make_model_card(model: PreTrainedModel, repository: str) -> ModelCard:
    """What the configuration says of a model: its pyramid, parameters and FLOPs, where it started, and how to load it.

    Args:
        model: One of transformers' models with a PIIP inside.
        repository: Where it will be.
    """
    kind, module = type(model).__name__, type(model).__module__.partition(".")[0]
    tower: Any = model.get_submodule("model.vision_tower") if hasattr(model, "model") else model
    pyramid = tower.pyramid.config
    started = _released(model.config.name_or_path or "")
    text = _TEXT.format(
        name=repository.rpartition("/")[2],
        kind=kind,
        interactions=pyramid.num_interactions,
        attention=pyramid.interaction.attention,
        pyramid=_pyramid_table(pyramid, tower),
        cost=_cost(model, tower, pyramid),
        data=_data(started),
        extra="llava" if module == "llava_piip" else "transformers",
        module="llava_piip" if module == "llava_piip" else "piip_core.integrations.transformers",
        repository=repository,
    )
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag=_TASKS.get(kind, "image-feature-extraction"),
        tags=["piip"],
        base_model=started.repository if started else None,
    )
    return ModelCard(f"---\n{data.to_yaml()}\n---\n{text}")


def _pyramid_table(pyramid: PIIPConfig, tower: Any) -> str:
    rows = []
    for number, (config, branch) in enumerate(zip(pyramid.branches, tower.pyramid.branches, strict=True), 1):
        windows = {"none" if size is None else str(size) for size in config.window_sizes}
        kind = getattr(config.network, "name", type(config.network).__name__.removesuffix("Config"))
        size = _millions(branch)
        rows.append((number, kind, config.network.dims[-1], config.network.depth, config.image_size, windows, size))
    rows = [(*row[:5], ", ".join(sorted(row[5])), row[6]) for row in reversed(rows)]
    head = ("branch", "network", "width", "blocks", "image size", "windows", "parameters")
    return tabulate(rows, head, tablefmt="github", disable_numparse=True)


def _cost(model: PreTrainedModel, tower: Any, pyramid: PIIPConfig) -> str:
    side = max(branch.image_size for branch in pyramid.branches)
    with on_meta():
        twin = type(tower)(copy.deepcopy(tower.config)).eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        twin(torch.empty(1, 3, side, side, device="meta"))
    gflops = counter.get_total_flops() / 2e9
    part = "" if tower is model else f", those of the vision tower {_millions(tower)}"
    return (
        f"Parameters: {_millions(model)}{part}. One image of {side} x {side} pixels takes {gflops:.1f} GFLOPs "
        f"(multiply-accumulates of products, convolutions and attention){' in the vision tower' if part else ''}."
    )


def _data(started: zoo.Released | None) -> str:
    if started is None:
        return "The configuration does not say what these weights were trained on, nor how good they are."
    metrics = ", ".join(f"{name} {value}" for name, value in started.metrics.items())
    return (
        f"The weights come from the released [{started.name}]({started.url}), trained on {started.data}; published for "
        f"it: {metrics}. What they learned since, and their own numbers, the configuration does not say."
    )


def _released(name: str) -> zoo.Released | None:
    try:
        return zoo.released(name)
    except ConfigError:
        return None


def _millions(module: nn.Module) -> str:
    return f"{sum(parameter.numel() for parameter in module.parameters()) / 1e6:.1f}M"
