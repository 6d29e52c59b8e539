import pytest

from piip_core.errors import ConfigError
from piip_tools.planner import Budget, parse_budget, parse_count


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
