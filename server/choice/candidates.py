"""The file of candidates for a choice."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import ConfigDict, Field

from common.plugins import Frozen, Spec
from common.run import Name

MAX_CANDIDATES = 64


class CandidateSpec(Spec):
    """A backbone's settings, and beside them its licence.

    Attributes:
        licence: licence of the weights, as whoever writes the file declares it.
    """

    licence: str | None = None

    def settings(self) -> dict[str, Any]:
        """Returns the settings that the kind's own file is given."""
        return self.model_dump(exclude={"licence"})


class CandidateFile(Frozen):
    """Backbones to choose from.

    Attributes:
        candidates: name -> settings of a backbone, in the order that decides ties.
        scorer: what a site's vote minimises.
    """

    model_config = ConfigDict(title="candidate file")

    candidates: Annotated[dict[Name, CandidateSpec], Field(min_length=2, max_length=MAX_CANDIDATES)]
    scorer: Spec = Spec(kind="ridge")
