"""What a coordinator offers a site: a run without any path of its own, and the digest that approvals name."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from common.plugins import Spec
from common.run import RunConfig

if TYPE_CHECKING:
    from common.model.backbones import Backbone


def make_offer(run: RunConfig, backbones: Mapping[str, Backbone]) -> dict[str, Any]:
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
