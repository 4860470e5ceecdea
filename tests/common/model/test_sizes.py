"""A network that is named in a few words takes no memory before its size is known."""

from __future__ import annotations

import json
import threading
import tracemalloc
from typing import Any

import pytest
import torch
from safetensors.torch import save
from torch import nn

from common.backbones import resolve_settings, write_spec
from common.backbones.parts.graphs.sizes import bound_network, check_network
from common.backbones.parts.weights import compute_digest
from common.model.backbones import load_blob
from common.plugins import resolve
from common.types import BackboneBlob, BadInput

WIDE = {"kind": "series_cnn", "length": 96, "channels": [64] * 3, "pool": 1}
CONFIG = {"model_type": "bert", "hidden_size": 65536, "num_attention_heads": 64, "intermediate_size": 262144}
HUGE = [
    {"kind": "timm", "model": "vit_giant_patch14_224", "options": {"embed_dim": 65536, "num_heads": 64}},
    {"kind": "transformers", "modality": "text", "pooling": "mean", "files": {"config": CONFIG, "tokenizer_bytes": 9}},
]


def send(settings: dict[str, Any]) -> BackboneBlob:
    """Returns what a coordinator would send that vouches for settings without their weights."""
    spec = write_spec(resolve_settings(resolve("common.backbones", settings, "backbone")))
    assert json.loads(spec)
    return BackboneBlob(spec=spec, weights=save({}), digest=compute_digest(spec, []))


@pytest.mark.parametrize("settings", [HUGE[0], pytest.param(HUGE[1], marks=pytest.mark.slow)])
def test_a_huge_network_is_refused_before_it_takes_memory(settings: dict[str, Any]) -> None:
    blob = send(settings)
    tracemalloc.start()
    with pytest.raises(BadInput, match=r"backbone: expected a network of at most 8 GiB, got a larger one"):
        load_blob(blob)
    assert tracemalloc.get_traced_memory()[1] < 1 << 26
    tracemalloc.stop()


def test_a_site_can_set_a_lower_bound() -> None:
    kind: Any = resolve("common.backbones", WIDE, "backbone")
    size = sum(value.numel() * value.element_size() for value in kind.architecture().module.state_dict().values())
    with torch.device("meta"), bound_network(size):
        kind.architecture()
    with pytest.raises(BadInput, match="expected a network of at most"):
        check_network(kind, size - 1)


def test_only_what_this_thread_builds_counts_and_only_inside() -> None:
    def build() -> None:
        nn.Linear(100, 100)

    with bound_network(100):
        other = threading.Thread(target=build)
        other.start()
        other.join()
        with pytest.raises(BadInput):
            build()
    build()


BOMBS = {
    "labels": (
        {
            "kind": "transformers",
            "modality": "text",
            "pooling": "mean",
            "files": {"config": {"model_type": "bert", "num_labels": 10**9}, "tokenizer_bytes": 9},
        },
        "expected numbers of layers and labels of at most 131,072",
    ),
    "rates": (
        {"kind": "timm", "model": "vit_tiny_patch16_224", "options": {"depth": 10**9}},
        "expected a network that counts to at most 16,777,216, got 1,000,000,000",
    ),
    "depths": (
        {
            "kind": "transformers",
            "modality": "image",
            "pooling": "mean",
            "files": {
                "config": {"model_type": "swin", "depths": [10**9], "num_heads": [1]},
                "processor": {"image_processor_type": "ViTImageProcessor", "size": {"height": 224, "width": 224}},
            },
        },
        "expected numbers of layers and labels of at most 4,096",
    ),
}


@pytest.mark.parametrize("name", BOMBS)
def test_numbers_that_a_network_counts_to_are_bounded(name: str) -> None:
    settings, message = BOMBS[name]
    with pytest.raises(BadInput, match=message):
        load_blob(send(settings))
