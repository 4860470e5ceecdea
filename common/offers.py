"""What a coordinator offers a site: a run without any path of its own, and the digest that approvals name."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from common.backbones import Backbone
from common.config import RunConfig


def offer_of(run: RunConfig, backbone: Backbone) -> dict[str, Any]:
    """The run as a site sees it: the backbone's settings stand without any path of the coordinator."""
    offer = run.model_dump(mode="json")
    offer["backbone"] = backbone.public_spec()
    return offer


def offer_bytes(offer: Mapping[str, Any], backbone_digest: str) -> bytes:
    """One text for equal offers, whatever the order of their keys."""
    return json.dumps({"run": dict(offer), "backbone_digest": backbone_digest}, sort_keys=True).encode()


def run_digest(offer: Mapping[str, Any], backbone_digest: str) -> str:
    """64 hex digits over everything a run asks of a site: what `python -m client approve` records."""
    return hashlib.sha256(offer_bytes(offer, backbone_digest)).hexdigest()
