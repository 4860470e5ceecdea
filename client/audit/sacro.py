"""Results of attacks in the layout of SACRO-ML's reports, which output checkers of research environments read.

Keys and their meaning: SACRO-ML 2.0.0, docs/source/attacks/output_format.rst and metrics.rst. The numbers are computed
here. One differs: `TPR@0.1%` and the like are the largest true positive rate whose false positive rate is at most so
large, where SACRO-ML interpolates between thresholds. Arrays of single units (`individual`, curves) are never written.

# Shapes: P units, members and others.
"""

from __future__ import annotations

import math
import time
import uuid
from collections.abc import Mapping
from typing import Any

import numpy as np
from scipy.special import log_ndtr, ndtr

from client.audit.membership import Scores, compute_auc
from client.audit.statistics import Bools, Floats

LAYOUT = "2.0.0"
"""Version of SACRO-ML whose layout this is."""
SIGNIFICANCE = 0.05
_PERCENTAGES = (0.5, 0.2, 0.1, 0.01, 0.001, 0.00001)
_PARTS = {"01": 0.1, "02": 0.2, "001": 0.01}
_LEAST_LOG = -115.13
"""Logarithm of a p-value below 1e-50."""


def make_report(name: str, scores: Scores, params: Mapping[str, Any], model: Mapping[str, Any]) -> dict[str, Any]:
    """Returns one attack's report, by its name and a new id.

    Args:
        name: name of the attack.
        scores: the attack's scores.
        params: settings of the attack.
        model: what is known of the model that was attacked; its `name`, and further values.
    """
    measured, log_id = measure(scores), str(uuid.uuid4())
    deviation = math.sqrt(_compute_null_variance(len(scores.member_M), len(scores.other_N)))
    return {
        f"{name}_{log_id}": {
            "log_id": log_id,
            "log_time": time.strftime("%d/%m/%Y %H:%M:%S"),
            "metadata": {
                "sacroml_version": f"none: layout of {LAYOUT}, computed by Headwater",
                "attack_name": name,
                "attack_params": {**params, "p_thresh": SIGNIFICANCE, "report_individual": False},
                "global_metrics": {
                    "null_auc_3sd_range": f"{0.5 - 3 * deviation:.4f} -> {0.5 + 3 * deviation:.4f}",
                    "AUC_sig": _describe_significance(measured["P_HIGHER_AUC"]),
                    "PDIF_sig": _describe_significance(math.exp(-measured["PDIF01"])),
                },
                "target_model": model["name"],
                "target_model_params": {key: value for key, value in model.items() if key != "name"},
                "target_train_params": {},
            },
            "attack_experiment_logger": {"attack_instance_logger": {"instance_0": measured}},
        }
    }


def _describe_significance(p_value: float) -> str:
    return f"{'Significant' if p_value <= SIGNIFICANCE else 'Not significant'} at p={SIGNIFICANCE}"


def measure(scores: Scores) -> dict[str, float]:
    """Returns the metrics of one attack by SACRO-ML's names."""
    member_P = np.concatenate([np.ones(len(scores.member_M), bool), np.zeros(len(scores.other_N), bool)])
    score_P = np.concatenate([scores.member_M, scores.other_N])
    counts = _measure_threshold(score_P > scores.threshold, member_P)
    auc = compute_auc(scores)[0]
    deviation = math.sqrt(_compute_null_variance(len(scores.member_M), len(scores.other_N)))
    extremes: dict[str, float] = {}
    for suffix, part in _PARTS.items():
        extremes |= _measure_extremes(score_P, member_P, part, suffix)
    at_low = {f"TPR@{percent:g}%": _find_rate(scores, percent / 100.0) for percent in _PERCENTAGES}
    return {
        **counts,
        "AUC": auc,
        "P_HIGHER_AUC": float(ndtr(-(auc - 0.5) / deviation)),
        **extremes,
        "pred_prob_var": float(ndtr(score_P - scores.threshold).var()),
        **at_low,
        "n_pos_test_examples": len(scores.member_M),
        "n_neg_test_examples": len(scores.other_N),
    }


def _compute_null_variance(members: int, others: int) -> float:
    """Returns the variance of the area under the curve of scores that mean nothing."""
    return (members + others + 1) / (12.0 * members * others)


def _measure_threshold(said_P: Bools, member_P: Bools) -> dict[str, float]:
    hits, alarms = int((said_P & member_P).sum()), int((said_P & ~member_P).sum())
    misses, rejections = int((~said_P & member_P).sum()), int((~said_P & ~member_P).sum())
    recall, alarm_rate = hits / (hits + misses), alarms / (alarms + rejections)
    precision = _divide(hits, hits + alarms)
    return {
        "TPR": recall,
        "FPR": alarm_rate,
        "FAR": _divide(alarms, alarms + hits),
        "TNR": 1.0 - alarm_rate,
        "PPV": precision,
        "NPV": _divide(rejections, rejections + misses),
        "FNR": 1.0 - recall,
        "ACC": (hits + rejections) / len(said_P),
        "F1score": _divide(2.0 * precision * recall, precision + recall),
        "Advantage": abs(recall - alarm_rate),
    }


def _divide(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


def _measure_extremes(score_P: Floats, member_P: Bools, part: float, suffix: str) -> dict[str, float]:
    """Returns how frequent members are among the highest and the lowest scores, and how surprising the difference is.

    Args:
        score_P: scores.
        member_P: whether each unit is a member.
        part: part of all units that is taken from each end.
        suffix: end of the metrics' names.
    """
    count = math.ceil(len(score_P) * part)
    order = np.argsort(score_P, kind="stable")
    highest, lowest = float(member_P[order[-count:]].mean()), float(member_P[order[:count]].mean())
    overall = float(member_P.mean())
    deviation = math.sqrt(2.0 * overall * (1.0 - overall) / count)
    surprise = max(_LEAST_LOG, float(log_ndtr(-(highest - lowest) / deviation)))
    return {
        f"FMAX{suffix}": highest,
        f"FMIN{suffix}": lowest,
        f"FDIF{suffix}": highest - lowest,
        f"PDIF{suffix}": -surprise,
    }


def _find_rate(scores: Scores, false_positive_rate: float) -> float:
    allowed = math.floor(false_positive_rate * len(scores.other_N) + 1e-9)
    threshold = np.sort(scores.other_N)[::-1][allowed]
    return float((scores.member_M > threshold).mean())
