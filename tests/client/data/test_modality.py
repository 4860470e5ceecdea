"""What a backbone reads is told from made-up records alone."""

from __future__ import annotations

from pathlib import Path

import pytest

from client.data.encoding.batches import draw_inputs, find_modality
from common.model.backbones import open_pretrained
from common.plugins import plugin_class


@pytest.mark.parametrize(
    ("kind", "modality"),
    [("cifar_resnet", "picture"), ("transformers", "text"), ("log_mel", "sound"), ("identity", None)],
)
def test_a_backbone_is_told_by_the_first_records_that_it_reads(kind: str, modality: str | None, tmp_path: Path) -> None:
    backbone = open_pretrained(plugin_class("common.backbones", kind).example(tmp_path).settings, "backbone")
    assert find_modality(backbone.preprocess) == modality
    drawn = draw_inputs(backbone.preprocess, 7)
    assert drawn is None if modality is None else drawn is not None and len(drawn) == 7
