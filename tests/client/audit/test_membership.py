"""Membership inference: scores are judged as others judge them, and against what a promise allows."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.stats import norm
from sklearn.metrics import confusion_matrix, f1_score, roc_auc_score, roc_curve

from client.audit.membership import Promise, Scores, bound_part, compute_auc, compute_rates, is_contradicted
from client.audit.sacro import make_report, measure
from common.privacy.accounting import Mechanism, compute_epsilon
from common.types import BadInput

METRICS = {
    *("TPR", "FPR", "FAR", "TNR", "PPV", "NPV", "FNR", "ACC", "F1score", "Advantage", "AUC", "P_HIGHER_AUC"),
    *("FMAX01", "FMIN01", "FDIF01", "PDIF01", "FMAX02", "FMIN02", "FDIF02", "PDIF02"),
    *("FMAX001", "FMIN001", "FDIF001", "PDIF001", "pred_prob_var"),
    *("TPR@0.5%", "TPR@0.2%", "TPR@0.1%", "TPR@0.01%", "TPR@0.001%", "TPR@1e-05%"),
    *("n_pos_test_examples", "n_neg_test_examples"),
}
"""Keys of an instance in a report of SACRO-ML 2.0.0 (sacroml/metrics.py), without the arrays that it writes apart."""


def draw(members: int, others: int, shift: float, seed: int = 0, threshold: float = 0.0) -> Scores:
    rng = np.random.default_rng(seed)
    return Scores(rng.normal(shift, 1.0, members), rng.normal(0.0, 1.0, others), threshold)


def flatten(scores: Scores) -> tuple[np.ndarray, np.ndarray]:
    member = np.repeat([1, 0], [len(scores.member_M), len(scores.other_N)])
    return member, np.concatenate([scores.member_M, scores.other_N])


@pytest.mark.parametrize("shift", [0.0, 0.7, 3.0])
def test_metrics_are_those_of_scikit_learn(shift: float) -> None:
    scores = draw(300, 210, shift, threshold=0.4)
    member, score = flatten(scores)
    found = measure(scores)
    tn, fp, fn, tp = confusion_matrix(member, score > 0.4).ravel()
    expected = {
        "TPR": tp / (tp + fn),
        "FPR": fp / (fp + tn),
        "FAR": fp / (fp + tp),
        "TNR": tn / (tn + fp),
        "PPV": tp / (tp + fp),
        "NPV": tn / (tn + fn),
        "FNR": fn / (tp + fn),
        "ACC": (tp + tn) / 510,
        "F1score": f1_score(member, score > 0.4),
        "Advantage": abs(tp / (tp + fn) - fp / (fp + tn)),
        "AUC": roc_auc_score(member, score),
        "n_pos_test_examples": 300,
        "n_neg_test_examples": 210,
    }
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, abs=1e-12), name
    fpr, tpr, _ = roc_curve(member, score, drop_intermediate=False)
    for rate in compute_rates(scores, None):
        assert rate.rate == pytest.approx(tpr[fpr <= rate.wanted].max())


def test_equal_scores_are_a_coin() -> None:
    scores = Scores(np.ones(30), np.ones(20), 0.5)
    assert compute_auc(scores)[0] == 0.5
    assert all(rate.rate == 0.0 for rate in compute_rates(scores, None))
    assert all(math.isfinite(value) for value in measure(scores).values())


def test_the_interval_of_the_area_covers_the_truth() -> None:
    truth = float(norm.cdf(0.5 / math.sqrt(2.0)))
    intervals = [compute_auc(draw(120, 80, 0.5, seed))[1] for seed in range(400)]
    covered = sum(low <= truth <= high for low, high in intervals)
    # Of 400 intervals of 95 %: 5 standard deviations.
    assert covered >= 400 * 0.95 - 5 * math.sqrt(400 * 0.95 * 0.05)


def test_an_interval_of_a_part_is_that_of_clopper_and_pearson() -> None:
    # Without a hit the upper end is 1 - (alpha / 2)^(1 / n).
    assert bound_part(0, 50) == (0.0, pytest.approx(1.0 - 0.025 ** (1 / 50)))
    assert bound_part(50, 50) == (pytest.approx(0.025 ** (1 / 50)), 1.0)


def test_gaussian_releases_bound_attacks_as_one_gaussian() -> None:
    """Two tests between N(0, 1) and N(mu, 1) have exactly these rates."""
    releases = [Mechanism("gaussian", 2.0, 1.0, 3, 1.0), Mechanism("gaussian", 4.0, 1.0, 4, 0.5)]
    promise = Promise.of(releases, compute_epsilon(releases, 1e-5), 1e-5)
    mu = math.sqrt(3 / 4 + 4 / 16)
    assert promise.mu == pytest.approx(mu)
    assert promise.bound_rate(0.01) == pytest.approx(norm.sf(norm.isf(0.01) - mu))
    assert promise.auc == pytest.approx(norm.cdf(mu / math.sqrt(2)))
    loose = Promise(promise.epsilon, 1e-5)
    assert loose.bound_rate(0.01) >= promise.bound_rate(0.01) and loose.auc >= promise.auc


def test_epsilon_and_delta_bound_attacks() -> None:
    """Randomised response with epsilon = log 3 and delta 0 is right in 3 of 4 cases: it reaches the bound."""
    promise = Promise(math.log(3.0), 0.0)
    assert promise.bound_rate(0.25) == pytest.approx(0.75)
    assert promise.auc == pytest.approx(0.75, abs=1e-4)
    assert Promise(0.0, 0.0).auc == pytest.approx(0.5, abs=1e-4)
    assert Promise(0.0, 0.1).bound_rate(0.2) == pytest.approx(0.3)
    assert Promise(math.inf, 1e-5).auc == Promise(math.inf, 1e-5).bound_rate(0.0) == 1.0
    sampled = [Mechanism("gaussian", 1.0, 0.1, 10, 1.0)]
    assert Promise.of(sampled, 1.0, 1e-5).mu is None
    assert Promise.of([Mechanism("none", 0.0, 1.0, 1, None)], math.inf, 1e-5).auc == 1.0


def test_scores_within_the_promise_do_not_contradict_it_and_others_do() -> None:
    scores = draw(2000, 2000, 1.0, threshold=0.5)
    assert not is_contradicted(scores, Promise(0.0, 0.0, mu=1.0))
    assert is_contradicted(scores, Promise(0.0, 0.0, mu=0.5))
    # The area is within, the threshold is not: half of the members are beyond all others.
    far = Scores(np.r_[np.full(100, 5.0), np.full(100, -5.0)], np.linspace(-1, 1, 200), 2.0)
    assert compute_auc(far)[0] == 0.5
    assert is_contradicted(far, Promise(0.0, 0.0, mu=1.0))
    assert not is_contradicted(far, None)


@pytest.mark.parametrize(("members", "others"), [([0.0], [0.0, 1.0]), ([0.0, math.nan], [0.0, 1.0])])
def test_too_few_or_undefined_scores_are_refused(members: list[float], others: list[float]) -> None:
    with pytest.raises(BadInput, match="expected"):
        Scores(np.array(members), np.array(others), 0.0)


def test_a_report_has_the_documented_keys_and_nothing_of_a_single_unit() -> None:
    (entry,) = make_report("LiRA Attack", draw(40, 30, 0.2), {"mode": "offline"}, {"name": "heads", "run": "r"}).items()
    name, report = entry
    # docs/source/attacks/output_format.rst: general structure, and metadata of a LiRA attack.
    assert set(report) == {"log_id", "log_time", "metadata", "attack_experiment_logger"}
    assert name == f"LiRA Attack_{report['log_id']}"
    metadata = report["metadata"]
    assert {"attack_name", "attack_params", "target_model", "target_model_params", "global_metrics"} <= set(metadata)
    assert set(metadata["global_metrics"]) == {"null_auc_3sd_range", "AUC_sig", "PDIF_sig"}
    assert metadata["attack_params"]["report_individual"] is False
    (instance,) = report["attack_experiment_logger"]["attack_instance_logger"].items()
    assert instance[0] == "instance_0" and set(instance[1]) == METRICS
    assert all(isinstance(value, float | int) for value in instance[1].values())
