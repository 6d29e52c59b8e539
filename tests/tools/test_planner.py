"""The planner: budgets, candidates ranked by the paper's rules, and the search for measured budgets."""

import itertools

import pytest

from piip_core import zoo
from piip_core.errors import ConfigError
from piip_tools.flops.published import published_count
from piip_tools.planner.candidates import Budget, candidates, nearest_published, parse_budget, parse_count
from piip_tools.planner.proposals import RULES, Measured, baseline_for, measure, propose, search

TOP = 6
# printed GFLOPs of the published three-branch rows: models, images, box AP printed
PUBLISHED = {
    243: ("TSB", (1120, 896, 448)),
    287: ("TSB", (1568, 896, 448)),
    453: ("TSB", (1568, 1120, 672)),
    727: ("SBL", (1120, 672, 448)),
    1002: ("SBL", (1344, 896, 448)),
    1464: ("SBL", (1568, 896, 672)),
}


@pytest.mark.parametrize(
    ("text", "budget"),
    [
        ("450G", Budget("flops", 450e9)),
        ("1.5T", Budget("flops", 1.5e12)),
        ("12GB", Budget("memory", 12e9)),
        ("800ms", Budget("latency", 0.8)),
        ("2 s", Budget("latency", 2.0)),
    ],
)
def test_budgets(text, budget):
    parsed = parse_budget(text)
    assert parsed.kind == budget.kind and parsed.limit == pytest.approx(budget.limit)


@pytest.mark.parametrize("text", ["", "450", "G", "0G", "-3G", "450g", "450X", "1e3G", "12GBps"])
def test_what_is_no_budget(text):
    with pytest.raises(ConfigError, match="expected a positive number with a unit"):
        parse_budget(text)


def test_counts():
    assert [parse_count(text) for text in ("200M", "1.2G")] == [200_000_000, 1_200_000_000]
    for text in ("200MB", "many", "0M", "5000"):
        with pytest.raises(ConfigError, match="number of parameters"):
            parse_count(text)


def test_values_with_units():
    assert Budget("flops", 450e9).text() == "450G"
    assert Budget("memory", 12e9).text(3.456e9) == "3.46GB"
    assert Budget("latency", 0.8).text() == "800ms" and Budget("latency", 12.0).text() == "12.0s"


@pytest.mark.parametrize("gflops", PUBLISHED)
def test_published_branches_are_among_the_first(gflops):
    models, _ = PUBLISHED[gflops]
    first = propose(3, flops_limit=gflops * 1e9)[:TOP]
    assert models in [p.candidate.models for p in first]
    best = next(p for p in first if p.candidate.models == models)
    assert {rule.key for rule in RULES} == set(best.met)
    for proposal in first:
        sides = proposal.candidate.image_sizes
        assert published_count(proposal.candidate.config).total.macs <= gflops * 1e9
        assert all(a > b for a, b in itertools.pairwise(sides))


@pytest.mark.parametrize("gflops", PUBLISHED)
def test_published_rows_are_counted_candidates_that_meet_all_but_the_image_rule(gflops):
    models, sides = PUBLISHED[gflops]
    (row,) = (c for c in candidates(3) if (c.models, c.image_sizes) == (models, sides))
    assert row.config == zoo.get(row.name).config
    assert row.flops == pytest.approx(gflops * 1e9, rel=0.003)
    assert sum(row.shares) < 1
    near, printed, box_ap = nearest_published(row)
    assert near.name == row.name and printed == gflops and box_ap == zoo.get(row.name).published.box_ap


def test_first_image_is_the_largest_of_its_models():
    found = propose(3, flops_limit=453e9)
    first = found[0]
    assert first.candidate.models == "TSB" and "image" in first.met
    rivals = [p for p in found if p.candidate.models == "TSB" and len(p.met) >= len(first.met) - 1]
    assert max(p.candidate.image_sizes[0] for p in rivals) == first.candidate.image_sizes[0]
    # one for each combination of models and largest image
    assert len({(p.candidate.models, p.candidate.image_sizes[0]) for p in found}) == len(found)


def test_model_rule_follows_the_baseline():
    assert baseline_for(463e9).name == "vit_b_1024"
    assert baseline_for(464e9).name == baseline_for(None).name == baseline_for(9e12).name == "vit_l_1024"
    for limit, expected in ((450e9, False), (727e9, True)):
        large = [p for p in propose(3, flops_limit=limit) if "L" in p.candidate.models]
        assert large and all(("model" in p.met) is expected for p in large)


def test_rules_that_a_candidate_breaks():
    by_name = {p.candidate.models: p for p in reversed(propose(3, flops_limit=1464e9))}
    assert "sizes" not in by_name["TBL"].met and "sizes" not in by_name["TSL"].met
    assert "sizes" in by_name["SBL"].met
    for p in propose(2, flops_limit=1000e9):
        assert ("even" in p.met) == (max(p.candidate.shares) <= 0.5)
        assert ("spent" in p.met) == (p.candidate.flops >= 0.9 * 1000e9)
    # 560/448/336: smallest image below the published 448
    (small,) = (p for p in propose(3, flops_limit=100e9, models="TSB") if p.candidate.image_sizes[0] == 560)
    assert "range" not in small.met


def test_four_branches_near_the_published_row():
    first = propose(4, flops_limit=861e9)[0]
    near, _, box_ap = nearest_published(first.candidate)
    assert first.candidate.models == "TSBL" and near.name.startswith("piip_tsbl_") and box_ap in (47.1, 48.2)


def test_parameters_limit():
    found = propose(3, params_limit=200e6)
    assert {p.candidate.models for p in found} == {"TSB"} and found[0].spent is None
    assert all(p.candidate.params <= 200e6 for p in found)


@pytest.mark.parametrize(
    ("branches", "limits", "message"),
    [
        (5, {}, "5 branches: expected 2, 3 or 4"),
        (3, {"flops_limit": 10e9}, r"fits into 10G: the cheapest, TSB 448/336/224, costs 4\d\.\dG"),
        (3, {"params_limit": 10e6}, r"at most 10M parameters: the smallest, TSB 448/336/224, has 14\d"),
        (3, {"models": "BST"}, "models 'BST': expected 3 different ones of TSBL, smallest first"),
        (3, {"models": "TS"}, "models 'TS'"),
    ],
)
def test_nothing_fits(branches, limits, message):
    with pytest.raises(ConfigError, match=message):
        propose(branches, **limits)


def test_no_published_model_has_these_branches():
    wanted = next(c for c in candidates(3) if c.models == "TBL")
    assert nearest_published(wanted) is None


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
    proposals, _ = search(3, Budget("latency", 8.0), run, runs=5, models="TSB")
    assert len(run.calls) == len(set(run.calls)) == 5
    best = proposals[0]
    assert 7.2 <= best.measured.seconds <= 8.0 and "spent" in best.met
    assert best.spent == pytest.approx(best.measured.seconds / 8.0)
    assert all(p.spent <= 1 for p in proposals)


def test_memory_budget():
    proposals, _ = search(3, Budget("memory", 6e9), machine_of(100e9), runs=4)
    assert 4.8e9 <= proposals[0].measured.peak_bytes <= 6e9


def test_running_out_of_memory_makes_the_next_candidate_cheaper():
    run = machine_of(100e9, memory=300e9)
    proposals, _ = search(3, Budget("latency", 60.0), run, runs=6, models="TSB")
    assert max(c.flops for c in run.calls) > 300e9 >= max(p.candidate.flops for p in proposals)
    assert min(c.flops for c in run.calls[1:]) <= 300e9


def test_nothing_fits_here():
    with pytest.raises(ConfigError, match=r"fits into 10ms here: the cheapest, TSB 448/336/224, takes \d+ms"):
        search(3, Budget("latency", 0.01), machine_of(100e9), models="TSB")
    with pytest.raises(ConfigError, match="the cheapest, TSB 448/336/224, runs out of memory"):
        search(3, Budget("latency", 10.0), machine_of(100e9, memory=1e9), models="TSB")


def test_real_measurement():
    small = min(candidates(2), key=lambda c: c.flops)
    measured = measure(small)
    assert 0.01 < measured.seconds < 60
    # the weights, and the first branch's maps at least
    assert 4 * small.params < measured.peak_bytes < 4 * small.params + 1e9
