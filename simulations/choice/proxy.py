"""A public proxy: how well a linear classifier on a candidate's features tells the classes of public records apart.

It costs no budget and says nothing of the sites' own records: it finds a good generalist and misses a specialist
(docs/transfer.md).

# Shapes: N records, D features.
"""

from __future__ import annotations

import math
from collections import Counter
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import numpy as np
import torch
from pydantic import ConfigDict, Field

from client.data.exclusions import leave_out
from client.data.feature_store import FeatureStore
from client.data.records import select_rows
from client.data.sources import open_source
from common.plugins import Frozen, Spec
from common.types import BadInput
from server.choice.outcome import ProxyScore
from server.rounds.messenger import Observe
from simulations.choice.candidates import Candidate

FOLDS = 5


class ProxyFile(Frozen):
    """A declared public data set on which candidates are compared.

    Attributes:
        source: settings of the source of PUBLIC records.
        column: column of their labels.
        labels: the labels; a record with another is an error.
    """

    model_config = ConfigDict(title="proxy file")

    source: Spec
    column: str
    labels: Annotated[list[str], Field(min_length=2)]


def score_on_public_records(file: ProxyFile, path: Path, candidate: Candidate, observe: Observe) -> ProxyScore:
    """Returns a candidate's cross-validated accuracy on public records.

    Args:
        file: the public data set.
        path: its file, for messages.
        candidate: the backbone.
        observe: receives the progress in records.

    Raises:
        BadInput: the source cannot be opened, a label is another, a class has too few records, or the candidate reads
            none of them.
    """
    kind = open_source(file.source, f"{path}: source")
    source = kind.open()
    index = source.index()
    if index and file.column not in index[0].cells:
        known = ", ".join(sorted(index[0].cells))
        raise BadInput(f"{path}: column: expected one of the source's columns {known}, got {file.column!r}")
    chosen, unlisted = select_rows(kind.rows, index)
    if unlisted:
        raise BadInput(f"{path}: source.rows: row {unlisted[0].row}: {unlisted[0].reason}")
    chosen_N = np.array([position in chosen for position in range(len(index))], dtype=np.bool_)
    labels_N = np.array([record.cells[file.column] for record in index])
    others = sorted(set(labels_N[chosen_N]) - set(file.labels))
    if others:
        raise BadInput(f"{path}: labels: expected those of column {file.column!r}, which also has {str(others[0])!r}")
    _check_counts(labels_N[chosen_N], file, path)  # Before anything is encoded; again for those that were read.
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with TemporaryDirectory() as folder:
        progress = partial(observe, f"public proxy with {candidate.name}")
        if not chosen_N.all():
            source = leave_out(source, frozenset(np.flatnonzero(~chosen_N).tolist()))
        features = FeatureStore(Path(folder)).open_or_encode(
            source, candidate.backbone, device=device, progress=progress
        )
        read_N = features.valid_N & chosen_N
        features_ND, labels_N = features.features_ND[read_N], labels_N[read_N]
        if len(features_ND) == 0:
            reasons = [reason for position, reason in features.unusable.items() if chosen_N[position]]
            because = f" ({reasons[0]})" if reasons else ""
            raise BadInput(
                f"candidates.{candidate.name}: expected a backbone that reads the records of {path}, got one that can "
                f"use none of them{because}"
            )
    _check_counts(labels_N, file, path)
    accuracy = _cross_validate(features_ND.reshape(len(features_ND), -1).astype(np.float64), labels_N)
    return ProxyScore(accuracy, math.sqrt(accuracy * (1.0 - accuracy) / len(labels_N)))


def _check_counts(labels_N: np.ndarray, file: ProxyFile, path: Path) -> None:
    """Checks that there are enough records of each label for a score. Raises BadInput."""
    counts = Counter(labels_N.tolist())
    fewest = min(file.labels, key=lambda label: counts[label])
    if counts[fewest] < FOLDS:
        raise BadInput(
            f"{path}: expected at least {FOLDS} usable records of each label for a score, got {counts[fewest]} of "
            f"{fewest!r}"
        )


def _cross_validate(features_ND: np.ndarray, labels_N: np.ndarray) -> float:
    from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
    from sklearn.model_selection import StratifiedKFold, cross_val_predict

    norms_N1 = np.linalg.norm(features_ND, axis=1, keepdims=True)
    features_ND = features_ND / np.where(norms_N1 > 0.0, norms_N1, 1.0)
    folds = StratifiedKFold(FOLDS, shuffle=True, random_state=0)
    classifier = LinearDiscriminantAnalysis(solver="lsqr", shrinkage="auto")
    predicted_N = cross_val_predict(classifier, features_ND, labels_N, cv=folds)
    return float((predicted_N == labels_N).mean())
