"""Heads that begin from texts: rows by hand, on any head, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common.inputs import Text
from common.model.backbones import Backbone, open_pretrained
from common.model.text_start import ROW_LENGTH
from common.plugins import plugin_class
from common.run import RunConfig
from common.tasks import open_task
from common.types import BadInput
from common.yaml import parse
from server.rounds.initial_state import create_initial_state
from tests.tiny import run_config

TEXTS = {"ill": ["an edema", "the scan shows a tumour"], "well": ["no tumour"]}


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> Backbone:
    example = plugin_class("common.backbones", "transformers").example(tmp_path_factory.mktemp("bert"))
    return open_pretrained(example.settings, "backbone")


def make_run(**task: Any) -> RunConfig:
    settings = {"kind": "classification", "labels": ["well", "ill"], "start": {"texts": TEXTS}, **task}
    values = run_config().model_dump(mode="json", exclude_none=True)
    return parse(RunConfig, {**values, "tasks": {"note": settings}}, base=Path.cwd())


@pytest.mark.parametrize("head", [{}, {"bias": False}, {"bias": False, "centre": True, "prior": True}])
def test_each_row_points_from_the_middle_of_all_texts_to_its_labels(reader: Backbone, head: dict[str, Any]) -> None:
    heads = create_initial_state(make_run(head=head), "run", {"backbone": reader}).heads["note"]
    (weight_KD,) = (values for name, values in heads.items() if name.endswith("weight"))
    means = [
        np.mean([reader.encode([reader.preprocess(Text(text))])[0].numpy() for text in TEXTS[label]], axis=0)
        for label in ("well", "ill")
    ]
    apart_D = (means[0] - means[1]) / 2
    expected_KD = np.stack([apart_D, -apart_D]) * ROW_LENGTH / np.linalg.norm(apart_D)
    np.testing.assert_allclose(weight_KD, expected_KD, rtol=1e-3, atol=1e-4)
    assert not any(np.any(values) for name, values in heads.items() if not name.endswith("weight"))


def test_a_backbone_that_reads_no_texts_is_refused(reader: Backbone) -> None:
    other = open_pretrained({"kind": "identity", "dim": 4}, "backbone")
    with pytest.raises(BadInput, match=r"^tasks\.note\.start\.texts: expected a backbone that reads these texts"):
        create_initial_state(make_run(), "run", {"backbone": other})
    alike = {"ill": ["no tumour"], "well": ["no tumour"]}
    with pytest.raises(BadInput, match=r"^tasks\.note\.start\.texts: expected texts that differ between labels"):
        create_initial_state(make_run(start={"texts": alike}), "run", {"backbone": reader})


@pytest.mark.parametrize(
    ("task", "said"),
    [
        ({"start": {"texts": {"ill": ["a"]}}}, r"start\.texts: expected a value for every label"),
        ({"start": {"texts": {**TEXTS, "odd": ["a"]}}}, r"start\.texts: expected each name to be another one"),
        ({"start": {"texts": {"ill": [], "well": ["a"]}}}, r"start\.texts\.ill"),
        ({"head": {"hidden": 3}}, r"start: expected a head without `hidden`"),
    ],
)
def test_texts_that_give_no_head_are_refused(task: dict[str, Any], said: str) -> None:
    with pytest.raises(BadInput, match=said):
        open_task(
            {"kind": "classification", "labels": ["well", "ill"], "start": {"texts": TEXTS}, **task}, "tasks.note"
        )
