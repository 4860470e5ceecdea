"""The offer of a coordinator: a run without any path of its own, and the digest that approvals name."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from common.plugins import Spec
from common.run import AUTO, Name, RunConfig
from common.types import BackboneBlob, BadInput
from common.yaml import parse


class SentBackbone(Protocol):
    """The part of a backbone that a coordinator needs to offer and send it: it need not be open, nor torch loaded."""

    @property
    def digest(self) -> str:
        """64 hex digits over settings and weights."""

    @property
    def feature_dim(self) -> int:
        """Number of features of a record."""

    def public_spec(self) -> dict[str, Any]:
        """Returns the resolved settings as plain values; they hold no path."""

    def blob(self) -> BackboneBlob:
        """Returns the backbone as it travels."""


def list_digests(backbones: Mapping[Name, SentBackbone]) -> dict[Name, str]:
    """Returns the digest of each backbone."""
    return {name: backbone.digest for name, backbone in backbones.items()}


def make_offer(run: RunConfig, backbones: Mapping[str, SentBackbone]) -> dict[str, Any]:
    """Returns a run as a site sees it: its backbones' settings hold no path of the coordinator."""
    public = {name: Spec(**backbone.public_spec()) for name, backbone in backbones.items()}
    return run.with_backbone_specs(public).model_dump(mode="json")


def encode_offer(offer: Mapping[str, Any], backbones: Mapping[str, str]) -> bytes:
    """Returns the bytes of an offer, the same for equal offers whatever the order of their keys.

    Args:
        offer: The run as a site sees it.
        backbones: The digest of each of its backbones, by name.
    """
    return json.dumps({"run": dict(offer), "backbones": dict(backbones)}, sort_keys=True).encode()


def compute_run_digest(offer: Mapping[str, Any], backbones: Mapping[str, str]) -> str:
    """Returns 64 hex digits over everything a run asks of a site, which `headwater site approve` records."""
    return hashlib.sha256(encode_offer(offer, backbones)).hexdigest()


@dataclass(frozen=True)
class Offer:
    """A coordinator's request: a run and the digests of its backbones, as sent or as written into a startup kit.

    Attributes:
        run: the run as a site sees it, as plain values.
        backbones: name -> digest; empty in an offer of the messages' first version.
    """

    run: Mapping[str, Any] = field(repr=False)
    backbones: Mapping[str, str]

    @property
    def digest(self) -> str:
        """The digest that an approval of this offer names."""
        return compute_run_digest(self.run, self.backbones)

    def to_bytes(self) -> bytes:
        """Returns the offer as it is kept on disk, the same for equal offers."""
        return encode_offer(self.run, self.backbones)

    def run_config(self, base: Path = Path("/nonexistent")) -> RunConfig:
        """Returns the run's settings. Raises BadInput where they are no run's, or are left to each site's program.

        An offer holds no path; one that does names no file below the default base.
        """
        solver = self.run.get("solver")
        if isinstance(solver, Mapping) and solver.get("kind") == AUTO:
            # Another version may choose others: an approval is to mean the same as long as it holds.
            raise BadInput("solver.kind: expected in an offer the settings that `auto` chose, got auto itself")
        return parse(RunConfig, self.run, base=base)


def parse_offer(content: bytes, where: str) -> Offer:
    """Returns the offer that `Offer.to_bytes` wrote.

    Raises:
        BadInput: it is none; the message begins with `where`.
    """
    try:
        values: Any = json.loads(content)
        return Offer(dict(values["run"]), dict(values.get("backbones", {})))
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise BadInput(f"{where}: expected a run's offer as JSON, got something else") from error
