"""What a site says of a backbone from its settings alone: how many features, and whether its projection fits."""

from __future__ import annotations

from typing import Any

import pytest

from client.protocol.requirements import feature_dim
from common.model.backbones import open_pretrained
from common.plugins import Spec
from common.types import BadInput


@pytest.mark.parametrize(
    "projection", [None, {"normalize": True}, {"normalize": True, "kernel": {"width": 0.5, "dim": 11}}]
)
def test_settings_alone_say_how_many_features_the_opened_backbone_has(projection: dict[str, Any] | None) -> None:
    settings = {"kind": "identity", "dim": 5, "projection": projection}
    assert feature_dim(Spec.model_validate(settings)) == open_pretrained(settings, "backbone").feature_dim


def test_a_projection_that_would_fill_the_memory_is_refused_before_anything_is_allocated() -> None:
    large = {"normalize": True, "kernel": {"width": 0.5, "dim": 65536}}
    with pytest.raises(BadInput, match=r"a backbone's projection has 65536065536 values, expected at most 67108864"):
        feature_dim(Spec.model_validate({"kind": "identity", "dim": 1_000_000, "projection": large}))
