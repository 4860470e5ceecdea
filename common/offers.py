"""What a coordinator offers a site: a run without any path of its own, and the digest that approvals name."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from common.backbones import Backbone
from common.plugins import Spec
from common.run import RunConfig


def offer_of(run: RunConfig, backbones: Mapping[str, Backbone]) -> dict[str, Any]:
    """The run as a site sees it: the backbones' settings stand without any path of the coordinator."""
    public = {name: Spec(**backbone.public_spec()) for name, backbone in backbones.items()}
    return run.with_backbone_specs(public).model_dump(mode="json")


def offer_bytes(offer: Mapping[str, Any], backbones: Mapping[str, str]) -> bytes:
    """One text for equal offers, whatever the order of their keys.

    Args:
        offer: the run as a site sees it.
        backbones: digest of each of its backbones.
    """
    return json.dumps({"run": dict(offer), "backbones": dict(backbones)}, sort_keys=True).encode()


def run_digest(offer: Mapping[str, Any], backbones: Mapping[str, str]) -> str:
    """64 hex digits over everything a run asks of a site: what `python -m client approve` records."""
    return hashlib.sha256(offer_bytes(offer, backbones)).hexdigest()
