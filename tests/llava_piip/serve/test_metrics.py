"""Metrics of several replicas in one answer."""

import asyncio

from prometheus_client.parser import text_string_to_metric_families

from llava_piip.serve.metrics import Metrics, merge_metrics


def samples(text):
    families = text_string_to_metric_families(text)
    return [(sample.name, sample.labels, sample.value) for family in families for sample in family.samples]


def test_merged_metrics_keep_all_values_apart():
    texts, expected = {}, {}
    for number, replica in enumerate(("b", "a"), 1):
        metrics = Metrics()
        metrics.requests.labels("200").inc(number)
        metrics.requests.labels("429").inc(10 * number)
        metrics.active.set(number)
        metrics.duration.observe(number)
        texts[replica] = asyncio.run(metrics.text()).decode()
        for name, labels, value in samples(texts[replica]):
            expected[name, tuple(sorted({**labels, "replica": replica}.items()))] = value
    merged = merge_metrics(texts).decode()
    found = [((name, tuple(sorted(labels.items()))), value) for name, labels, value in samples(merged)]
    assert dict(found) == expected and len(found) == len(expected)
    assert expected["piip_requests_total", (("outcome", "429"), ("replica", "a"))] == 20
    kinds = [line for line in merged.splitlines() if line.startswith("# TYPE")]
    assert len(kinds) == len(set(kinds)) == len([line for line in texts["a"].splitlines() if line.startswith("# TYPE")])
