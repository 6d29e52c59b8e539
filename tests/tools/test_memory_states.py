import pytest
import torch
from torch import nn

from piip_tools.memory import model_states

PARAMS = 1_000_003


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
