"""Estimates against what PyTorch's profiler saw small models allocate on this CPU.

To repeat it for another model, change CONFIG and run `pytest -s tests/tools/test_memory_estimate.py`.
"""

import dataclasses
import json

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from piip_core import BranchConfig, InteractionConfig, PIIPConfig
from piip_core.branches import ViTConfig
from piip_core.meta import on_meta
from piip_core.pyramid import DensePIIP
from piip_tools.memory.dry_run import DryRun, squares
from piip_tools.memory.estimate import Setting, estimate_memory, model_states


def vit(embed_dim, image_size, window_size, **options):
    network = ViTConfig(embed_dim=embed_dim, depth=2, num_heads=embed_dim // 32, **options)
    return BranchConfig(network=network, image_size=image_size, window_size=window_size, drop_path_rate=0.1)


# windowed and global attention, and InternViT's norms
CONFIG = PIIPConfig(
    branches=(vit(192, 160, None, norm="rmsnorm", qk_norm=True), vit(96, 224, 7)),
    interaction=InteractionConfig(num_interactions=2, num_heads=6),
)
PARAMS = 1_000_003
LEAST, MOST = 0.95, 1.02  # of what was measured, as `piip_tools.memory.estimate.Estimate` says


def step(model):
    return squares(model(torch.zeros(2, 3, 224, 224)))


def measured(precision, checkpointing, path, config=CONFIG):
    """The most bytes alive in the life of a model that is made and trained for two steps."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        model = DensePIIP(config).train()
        model.set_grad_checkpointing(checkpointing)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], foreach=True)
        for _ in range(2):
            with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
                loss = step(model)
            optimizer.zero_grad()
            loss.backward()
            del loss
            optimizer.step()
    recorded.export_chrome_trace(str(path))
    events = [event for event in json.loads(path.read_text())["traceEvents"] if event.get("name") == "[memory]"]
    events.sort(key=lambda event: event["ts"])
    start = events[0]["args"]["Total Allocated"] - events[0]["args"]["Bytes"]
    return max(event["args"]["Total Allocated"] for event in events) - start


@pytest.fixture(scope="module")
def dry_run():
    with on_meta():
        return DryRun(DensePIIP(CONFIG))


@pytest.mark.parametrize(("precision", "checkpointing"), [("fp32", False), ("bf16", False), ("bf16", True)])
def test_total_is_what_the_profiler_measures(dry_run, precision, checkpointing, tmp_path):
    activations = dry_run.activations(step, precision=precision, checkpointing=checkpointing, kernels="cpu")
    params = sum(parameter.numel() for parameter in dry_run.model.parameters())
    states = model_states(params, stage=0, gpus=1)
    estimated = states.total + max(activations.peak, states.step)
    found = measured(precision, checkpointing, tmp_path / "trace.json")
    print(f"{precision}, checkpointing {checkpointing}: {estimated / 1e6:.1f} MB estimated, {found / 1e6:.1f} measured")
    gradients = 4 * params  # counted in full, and not all there when the activations are at their peak
    assert estimated > LEAST * found
    assert estimated - gradients < MOST * found
    assert activations.peak > states.step  # or the activations would not have been tested


def test_frozen_branches_take_their_weights_alone(dry_run, tmp_path):
    branches = [dataclasses.replace(branch, frozen=True) for branch in CONFIG.branches]
    config = dataclasses.replace(CONFIG, branches=branches)
    with on_meta():
        run = DryRun(DensePIIP(config))
    setting = Setting(batch_size=2, input_size=(224, 224), gpus=1, precision="fp32")
    frozen, trained = (estimate_memory("tiny", each, step, setting).estimates for each in (run, dry_run))
    activations = run.activations(step, precision="fp32", kernels="cpu")
    estimated = frozen[0].states.total + frozen[0].buffers + max(activations.peak, frozen[0].states.step)
    found = measured("fp32", False, tmp_path / "trace.json", config)
    gradients = frozen[0].states.gradients
    assert LEAST * found < estimated < MOST * found + gradients
    assert estimated < 0.9 * trained[0].total
    assert frozen[-1].buffers == frozen[0].buffers  # one GPU: nothing to share


def test_evaluation_takes_what_the_mem_tracker_sees(dry_run):
    from torch.distributed._tools.mem_tracker import MemTracker

    model, tracker = DensePIIP(CONFIG).eval(), MemTracker()
    held = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    tracker.track_external(model)
    with tracker, torch.no_grad():
        model(torch.zeros(2, 3, 224, 224))
        (snapshot,) = tracker.get_tracker_snapshot("peak").values()
    estimated = dry_run.inference(lambda model: model(torch.empty(2, 3, 224, 224)))
    assert estimated == pytest.approx(snapshot["Total"] - held, rel=0.01)
    assert estimated < 0.5 * dry_run.activations(step, precision="fp32").peak


def test_activations_are_those_of_the_mem_tracker(dry_run):
    """PyTorch's own tracker, on real tensors."""
    from torch.distributed._tools.mem_tracker import MemTracker

    config = PIIPConfig(
        branches=(vit(64, 32, None), vit(32, 64, None)), interaction=InteractionConfig(num_interactions=1, num_heads=4)
    )

    def small(model):
        return squares(model(torch.zeros(2, 3, 64, 64)))

    with on_meta():
        run = DryRun(DensePIIP(config))
    found = run.activations(small, precision="fp32", kernels="cpu")
    model = DensePIIP(config).train()
    held = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    tracker = MemTracker()
    tracker.track_external(model)
    with tracker:
        loss = small(model)
        (snapshot,) = tracker.get_tracker_snapshot("current").values()
    del loss
    assert found.saved == pytest.approx(snapshot["Total"] - held, rel=0.01)


def test_one_process_holds_what_adamw_makes():
    model = nn.Linear(100, 50)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.zeros(1, 100)).sum().backward()
    optimizer.step()
    states = model_states(100 * 50 + 50, stage=0, gpus=1)
    assert states.parameters == sum(p.nbytes for p in model.parameters())
    assert states.gradients == sum(p.grad.nbytes for p in model.parameters())
    moments = [state[key] for state in optimizer.state.values() for key in ("exp_avg", "exp_avg_sq")]
    assert states.optimizer == sum(moment.nbytes for moment in moments)
    assert states.communication == states.host == 0


@pytest.mark.parametrize("gpus", [1, 8, 64])
def test_against_the_estimates_of_deepspeed(gpus):
    """DeepSpeed's are of 16-bit weights, with 16-bit gradients beside the 32-bit ones; ours of 32-bit weights."""
    pytest.importorskip("deepspeed")
    from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs
    from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs

    second, third = (model_states(PARAMS, stage, gpus) for stage in (2, 3))
    held = second.parameters + second.gradients + second.optimizer
    _, theirs = estimate_zero2_model_states_mem_needs(PARAMS, gpus, 1, cpu_offload=False)
    assert held == pytest.approx(theirs + 2 * PARAMS - 2 * PARAMS / gpus, abs=100)
    held = third.parameters + third.gradients + third.optimizer
    _, theirs, layer = estimate_zero3_model_states_mem_needs(
        PARAMS, 1000, gpus, 1, cpu_offload=False, cpu_offload_params=False, zero_init=True
    )
    assert held == pytest.approx(theirs - layer - 2 * PARAMS / gpus, abs=100)


def test_stages_divide_more_and_more():
    def held(stage, gpus, offload="none"):
        states = model_states(PARAMS, stage, gpus, offload)
        return states.parameters + states.gradients + states.optimizer

    # bytes per parameter on many GPUs: all of it; weights and gradients; weights; nothing
    assert [round(held(stage, 1000) / PARAMS) for stage in range(4)] == [16, 8, 4, 0]
    assert held(3, 8) == pytest.approx(16 * PARAMS / 8, abs=100)
    offloaded = model_states(PARAMS, 3, 8, "parameters")
    assert (offloaded.parameters, offloaded.optimizer) == (0, 0)
    assert offloaded.host == pytest.approx((4 + 12) * PARAMS / 8, abs=100)


def test_buckets():
    small, large = (model_states(PARAMS, 2, 8, bucket_size=size) for size in (1000, 2000))
    # float32; two of gradients, because communication overlaps with the backward pass, one of weights
    assert large.communication - small.communication == 4 * 3 * 1000
