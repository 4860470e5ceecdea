"""Metrics in Prometheus' text format, written when they are asked for."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from common.process.pages import Page


@dataclass(frozen=True)
class Measure:
    """One metric and its values.

    Attributes:
        name: its name without the prefix `headwater_`; a counter's gets the ending `_total`.
        help: what it says, in one sentence, with its unit.
        values: tuple of the labels' values -> value; a metric without labels has the one key ().
        labels: names of the labels.
        kind: a counter only grows.
    """

    name: str
    help: str
    values: Mapping[Any, float]
    labels: tuple[str, ...] = ()
    kind: Literal["gauge", "counter"] = "gauge"


def write_metrics(measures: Iterable[Measure]) -> Page:
    """Returns metrics as a page that Prometheus reads."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Collected([_make_family(each) for each in measures]))
    return Page(CONTENT_TYPE_LATEST, generate_latest(registry))


def _make_family(measure: Measure) -> Metric:
    family = (GaugeMetricFamily if measure.kind == "gauge" else CounterMetricFamily)(
        f"headwater_{measure.name}", measure.help, labels=measure.labels
    )
    for labels, value in sorted(measure.values.items()):
        family.add_metric(labels, value)
    return family


class _Collected(Collector):
    """The metrics of one answer, as a registry takes them."""

    def __init__(self, families: list[Metric]) -> None:
        self._families = families

    def collect(self) -> list[Metric]:
        """Returns all families."""
        return self._families
