"""Features as they are: for a site that differs in its class mix alone."""

from __future__ import annotations

from typing import Any, Literal, final

import numpy as np

from client.aligners import Alignment, Array, SourceMoments, TargetRecords
from common.plugins import Plugin


@final
class NoAlignment(Plugin):
    """Settings: none."""

    kind: Literal["none"] = "none"

    @classmethod
    def example(cls) -> dict[str, Any]:
        """Returns settings for the contract suite."""
        return {"kind": "none"}

    def align(self, source: SourceMoments, target: TargetRecords, mix_C: Array) -> Alignment:
        """Returns the map that changes nothing.

        Args:
            source: the released moments, for the number of features.
            target: not read.
            mix_C: not read.
        """
        del target, mix_C
        num_features = source.means_CD.shape[1]
        return Alignment(np.ones(num_features), np.zeros(num_features))
