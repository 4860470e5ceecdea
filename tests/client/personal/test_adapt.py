"""Own offsets and the tied fit against closed forms and an independent solver."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from scipy.special import log_softmax

from client.data.units import TaskRecords, Units
from client.personal.adapt import Tie, adapt_heads, choose_tie, fit_head, fit_offsets
from client.personal.personal_heads import (
    AT_HOME,
    PersonalHeads,
    list_head_parameters,
    load_personal_heads,
    open_personal_head,
    save_personal_heads,
)
from common.model.parameters import load_parameters, parameters
from common.tasks import open_task

CLASSES = {"kind": "classification", "labels": ["a", "b", "c"], "head": {"bias": False}}
FINDINGS = {"kind": "multilabel", "labels": ["edema", "effusion"], "head": {"bias": False}}


def records_of(
    features: torch.Tensor, labels: torch.Tensor, unit_R: torch.Tensor | None = None, mask_R: torch.Tensor | None = None
) -> TaskRecords:
    unit_R = torch.arange(len(labels)) if unit_R is None else unit_R
    mask_R = torch.ones(len(labels), dtype=torch.bool) if mask_R is None else mask_R
    return TaskRecords.of(features, labels, mask_R, unit_R, int(unit_R.max()) + 1)


def draw(count: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Features of length 1 and three classes that they tell a little of."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 3, count)
    features = rng.normal(size=(count, 4))
    features[np.arange(count), labels] += 1.0
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    return torch.from_numpy(features).float(), torch.from_numpy(labels)


def test_of_a_head_that_tells_nothing_the_offsets_are_the_logarithms_of_counts_plus_a_half() -> None:
    task = open_task(CLASSES, "t")
    labels = torch.tensor([0] * 7 + [1] * 2)
    own = fit_offsets(task.head(4), task, records_of(torch.randn(9, 4), labels))
    got = own(torch.zeros(1, 4)).softmax(1)[0].tolist()
    assert got == pytest.approx([7.5 / 10.5, 2.5 / 10.5, 0.5 / 10.5], rel=1e-4)


def test_a_label_s_offset_is_the_logarithm_of_its_odds_among_the_known_ones() -> None:
    task = open_task(FINDINGS, "t")
    labels = torch.tensor([[1, 0], [1, -1], [0, -1], [1, 0]])
    own = fit_offsets(task.head(4), task, records_of(torch.randn(4, 4), labels))
    assert own(torch.zeros(1, 4))[0].tolist() == pytest.approx([np.log(3.5 / 1.5), np.log(0.5 / 2.5)], rel=1e-4)


def test_a_patient_counts_once_however_many_records_it_has() -> None:
    task = open_task(CLASSES, "t")
    labels, unit_R = torch.tensor([0, 0, 0, 0, 1]), torch.tensor([0, 0, 0, 0, 1])
    own = fit_offsets(task.head(4), task, records_of(torch.randn(5, 4), labels, unit_R))
    assert own(torch.zeros(1, 4)).softmax(1)[0].tolist() == pytest.approx([1.5 / 3.5, 1.5 / 3.5, 0.5 / 3.5], rel=1e-4)


def test_offsets_add_nothing_to_a_head_that_knows_the_frequencies_already() -> None:
    """Its bias holds them: to add them once more would count them twice."""
    task = open_task({**CLASSES, "head": {"bias": True}}, "t")
    labels = torch.tensor([0] * 700 + [1] * 200 + [2] * 100)
    head = task.head(4)
    with torch.no_grad():
        head.bias.copy_(torch.tensor([0.7, 0.2, 0.1]).log())  # type: ignore[union-attr, operator]
    own = fit_offsets(head, task, records_of(torch.zeros(1000, 4), labels))
    assert own(torch.zeros(1, 4)).softmax(1)[0].tolist() == pytest.approx([0.7, 0.2, 0.1], abs=1e-3)


def test_a_task_without_label_frequencies_gets_no_offset() -> None:
    task = open_task({"kind": "regression", "range": [0, 1]}, "t")
    head = task.head(4)
    features = torch.randn(6, 4)
    own = fit_offsets(head, task, records_of(features, torch.full((6,), 0.9)))
    assert torch.equal(own(features), head(features))


@pytest.mark.parametrize("tie", [0.001, 0.03, 1.0])
def test_the_fit_is_the_minimum_that_another_solver_finds(tie: float) -> None:
    task = open_task(CLASSES, "t")
    features, labels = draw(60)
    federated = np.random.default_rng(1).normal(size=(3, 4))
    head = task.head(4)
    with torch.no_grad():
        head.weight.copy_(torch.from_numpy(federated))  # type: ignore[union-attr, operator]
    federated = head.weight.detach().double().numpy()  # type: ignore[union-attr, operator]
    rows = features.double().numpy()

    def objective(flat: np.ndarray) -> float:
        weights = flat.reshape(3, 4)
        losses = -log_softmax(rows @ weights.T, axis=1)[np.arange(60), labels.numpy()]
        return float(losses.mean() + tie / 2 * ((weights - federated) ** 2).sum())

    best = minimize(objective, np.zeros(12), method="BFGS", options={"gtol": 1e-9, "maxiter": 2000}).x.reshape(3, 4)
    fitted = fit_head(head, task, records_of(features, labels), tie)
    assert parameters(fitted)["weight"] == pytest.approx(best, abs=2e-5)


def test_a_strong_tie_keeps_the_federated_head_and_a_weak_one_follows_the_records() -> None:
    task = open_task(CLASSES, "t")
    features, labels = draw(60)
    head, records = task.head(4), records_of(features, labels)
    torch.nn.init.normal_(head.weight)  # type: ignore[union-attr, arg-type]
    federated = parameters(head)["weight"]
    assert parameters(fit_head(head, task, records, 1e6))["weight"] == pytest.approx(federated, abs=1e-5)
    weak = fit_head(head, task, records, 1e-3)
    assert (weak(features).argmax(1) == labels).float().mean() > (head(features).argmax(1) == labels).float().mean()


def test_the_fit_is_the_same_each_time_and_the_federated_head_is_left_alone() -> None:
    task = open_task(CLASSES, "t")
    features, labels = draw(60)
    head = task.head(4)
    before = parameters(head)["weight"].copy()
    units = Units(60, {"t": records_of(features, labels)})
    first, second = (adapt_heads("fit", {"t": head}, {"t": task}, units)["t"] for _ in range(2))
    assert torch.equal(first(features), second(features))
    assert np.array_equal(parameters(head)["weight"], before)


def test_a_head_with_a_centre_and_an_offset_keeps_both(tmp_path: Path) -> None:
    """The weights between them are fitted; the file brings back the same head."""
    task = open_task({**CLASSES, "head": {"bias": False, "centre": True, "prior": True}}, "t")
    features, labels = draw(60)
    head = task.head(4)
    params = parameters(head)
    params["fixed.centre"][:] = [0.1, 0.2, 0.3, 0.4]
    params["fixed.offset"][:] = [0.5, 0.0, -0.5]
    load_parameters(head, params)
    fitted = adapt_heads("fit", {"t": head}, {"t": task}, Units(60, {"t": records_of(features, labels)}))["t"]
    kept = list_head_parameters(fitted)
    assert kept["fixed.centre"].tolist() == params["fixed.centre"].tolist()
    assert kept["fixed.offset"].tolist() == params["fixed.offset"].tolist()
    assert (fitted(features).argmax(1) == labels).float().mean() > 0.6
    save_personal_heads(tmp_path, PersonalHeads("fit", "0" * 64, False, {"t": kept}))
    again = open_personal_head(load_personal_heads(tmp_path, purpose=AT_HOME).heads["t"], task, 4)
    assert torch.equal(again(features), fitted(features))


def test_records_without_a_label_change_nothing_and_a_site_with_none_keeps_the_federated_head() -> None:
    task = open_task(CLASSES, "t")
    features, labels = draw(20)
    mask = torch.arange(20) < 12
    some = Units(20, {"t": records_of(features, labels, mask_R=mask)})
    few = Units(12, {"t": records_of(features[:12], labels[:12])})
    head = task.head(4)
    got, expected = (adapt_heads("fit", {"t": head}, {"t": task}, each)["t"](features) for each in (some, few))
    assert torch.equal(got, expected)
    none = Units(20, {"t": records_of(features, labels, mask_R=torch.zeros(20, dtype=torch.bool))})
    assert adapt_heads("fit", {"t": head}, {"t": task}, none)["t"] is head


def test_the_tie_is_weaker_where_there_are_more_units_and_scales_with_the_features_that_the_head_reads() -> None:
    task, features, zeros = open_task(CLASSES, "t"), draw(10)[0], torch.zeros(100)
    head, tie = task.head(4), Tie(1.0, 0.5)
    weight = tie.compute_weight(head, records_of(features, zeros[:10]))
    assert weight == pytest.approx(0.5 / 10)
    assert tie.compute_weight(head, records_of(features.repeat(10, 1), zeros)) == pytest.approx(weight / 10)
    assert tie.compute_weight(head, records_of(3 * features, zeros[:10])) == pytest.approx(9 * weight)
    centred = open_task({**CLASSES, "head": {"bias": False, "centre": True}}, "t").head(4)
    assert tie.compute_weight(centred, records_of(3 * features, zeros[:10])) == pytest.approx(weight)


def test_a_federated_head_of_noise_alone_is_dropped_and_a_good_one_is_kept() -> None:
    task = open_task(CLASSES, "t")
    features, labels = draw(60)
    records = records_of(features, labels)
    many = draw(3000, seed=9)
    good, noise = fit_head(task.head(4), task, records_of(*many), 1e-3), task.head(4)
    with torch.no_grad():
        noise.weight.copy_(50.0 * torch.randn(3, 4, generator=torch.Generator().manual_seed(1)))  # type: ignore[union-attr, operator]
    assert choose_tie(good, task, records).scale == 1.0
    assert choose_tie(noise, task, records).scale == 0.0


def test_a_patient_s_records_are_never_on_both_sides_of_a_trial() -> None:
    """Five patients are too few to try: however many records they have, the tie is the default."""
    task = open_task(CLASSES, "t")
    features, labels = draw(60)
    noise = task.head(4)
    torch.nn.init.normal_(noise.weight, std=50.0)  # type: ignore[union-attr, arg-type]
    few = records_of(features, labels, torch.arange(60) % 5)
    assert choose_tie(noise, task, few) == Tie(1.0, 0.5)


def test_the_fit_does_not_depend_on_the_unit_of_the_features() -> None:
    """Ten times the features with a tenth of the weights are the same head, before and after."""
    task = open_task(CLASSES, "t")
    features, labels = draw(60)
    small, large = task.head(4), task.head(4)
    torch.nn.init.normal_(large.weight)  # type: ignore[union-attr, arg-type]
    with torch.no_grad():
        small.weight.copy_(large.weight / 10)  # type: ignore[union-attr, operator]
    first = adapt_heads("fit", {"t": large}, {"t": task}, Units(60, {"t": records_of(features, labels)}))["t"]
    second = adapt_heads("fit", {"t": small}, {"t": task}, Units(60, {"t": records_of(10 * features, labels)}))["t"]
    assert torch.allclose(first(features), second(10 * features), atol=1e-3)
