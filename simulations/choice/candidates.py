"""The candidates of `choose`, opened, and what is known of each without any private record."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from client.data.encoding.batches import draw_inputs
from common.model.backbones import Backbone, open_pretrained
from common.run import Name
from common.yaml import load
from server.choice.candidates import CandidateFile
from server.choice.outcome import CandidateFacts

_TIMED = 16
"""Made-up inputs on which a candidate is timed."""

_PASSES = 3
"""Passes of which the fastest counts: others slow down a busy machine."""


@dataclass(frozen=True)
class Candidate:
    """An opened candidate.

    Attributes:
        name: its name in the file.
        backbone: the backbone with its weights.
        licence: declared licence of its weights; None where none is declared.
    """

    name: Name
    backbone: Backbone
    licence: str | None = None

    def measure_facts(self) -> CandidateFacts:
        """Returns its public facts; it is timed on made-up inputs, where they can be made up."""
        size = _measure_megabytes(self.backbone)
        return CandidateFacts(self.backbone.feature_dim, time_record(self.backbone), size, self.licence)


def open_candidates(path: Path) -> tuple[CandidateFile, dict[Name, Candidate]]:
    """Returns a file of candidates, and each of them opened. Raises BadInput."""
    file = load(CandidateFile, path)
    return file, {
        name: Candidate(name, open_pretrained(spec, f"candidates.{name}"), spec.licence)
        for name, spec in file.candidates.items()
    }


def time_record(backbone: Backbone) -> float | None:
    """Returns seconds a record in a backbone on this machine; None where no inputs can be made up for it."""
    inputs = draw_inputs(backbone.preprocess, _TIMED)
    if inputs is None:
        return None
    backbone.encode(inputs)  # The first pass prepares the network.
    passes = []
    for _ in range(_PASSES):
        started = time.perf_counter()
        backbone.encode(inputs)
        passes.append(time.perf_counter() - started)
    return min(passes) / _TIMED


def _measure_megabytes(backbone: Backbone) -> float:
    sizes = [tensor.numel() * tensor.element_size() for tensor in backbone.module.state_dict().values()]
    return float(sum(sizes)) / 1e6
