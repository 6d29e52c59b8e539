import pytest

from piip_core.errors import ConfigError
from piip_tools.flops import published_count
from piip_tools.planner import Budget, Machine, Measured, candidates, measure, search


def machine_of(speed, memory=None):
    """Pretends to run candidates: `speed` multiply-accumulates per second, out of memory beyond `memory` FLOPs."""

    def run(candidate):
        run.calls.append(candidate)
        if memory is not None and candidate.flops > memory:
            return None
        work = published_count(candidate.config, rule="merging").total.macs
        return Measured(seconds=work / speed, peak_bytes=4 * candidate.params + 3000 * candidate.image_sizes[0] ** 2)

    run.calls = []
    return run


def test_search_ends_close_to_the_budget_with_few_runs():
    run = machine_of(100e9)
    found = search(3, Budget("latency", 8.0), run, runs=5, models="TSB")
    assert len(run.calls) == len(set(run.calls)) == 5
    best = found.proposals[0]
    assert 7.2 <= found.measured[best.candidate].seconds <= 8.0 and "spent" in best.met
    assert best.spent == pytest.approx(found.measured[best.candidate].seconds / 8.0)
    assert all(p.spent <= 1 for p in found.proposals)


def test_memory_budget():
    found = search(3, Budget("memory", 6e9), machine_of(100e9), runs=4)
    assert 4.8e9 <= found.measured[found.proposals[0].candidate].peak_bytes <= 6e9


def test_running_out_of_memory_makes_the_next_candidate_cheaper():
    run = machine_of(100e9, memory=300e9)
    found = search(3, Budget("latency", 60.0), run, runs=6, models="TSB")
    failed = [c for c, m in found.measured.items() if m is None]
    assert failed and all(p.candidate not in failed for p in found.proposals)
    assert min(c.flops for c in run.calls[1:]) <= 300e9


def test_nothing_fits():
    with pytest.raises(ConfigError, match=r"fits into 10ms here: the cheapest, TSB 448/336/224, takes \d+ms"):
        search(3, Budget("latency", 0.01), machine_of(100e9), models="TSB")
    with pytest.raises(ConfigError, match="the cheapest, TSB 448/336/224, runs out of memory"):
        search(3, Budget("latency", 10.0), machine_of(100e9, memory=1e9), models="TSB")


def test_real_measurement():
    small = min(candidates(2), key=lambda c: c.flops)
    measured = measure(small, Machine(device="cpu", threads=1))
    assert 0.01 < measured.seconds < 60
    # the weights, and the first branch's maps at least
    assert 4 * small.params < measured.peak_bytes < 4 * small.params + 1e9


def test_unknown_device():
    with pytest.raises(ConfigError, match="expected cpu or cuda"):
        Machine(device="meta")
