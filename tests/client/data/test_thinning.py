"""Some of a record's places are trained on, all are evaluated, and a task on the same maps reads what it did."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from client.config import SiteConfig
from client.data.feature_store import FeatureStore
from client.data.prepare import Encoding, open_units, prepare
from client.data.records import Side
from client.data.units import Units
from client.solvers.parts.closed_form import Inputs
from common.model.backbones import open_random
from common.model.trunks import create_modules
from common.run import RunConfig
from common.tasks import Task, open_task
from common.types import BadInput
from common.yaml import parse

CPU = torch.device("cpu")
BACKBONE = open_random(
    {
        "kind": "torchvision",
        "model": "mobilenet_v2",
        "preprocess": {"resize": 32, "crop": None, "mean": [0.5] * 3, "std": [0.25] * 3},
        "maps": {"layers": ["features.1"], "grid": 16},
    },
    "b",
    1,
)


def open_mask(every: int, side: int = 16) -> Task:
    labels = {"labels": ["ground", "cell"], "side": side}
    return open_task({"kind": "segmentation", **labels, **({"every": every} if every > 1 else {})}, "tasks.cell")


TASKS = {"some": open_mask(4), "all": open_mask(1)}
SIZE = open_task({"kind": "classification", "labels": ["0", "1"]}, "tasks.size")


def read(folder: Path, side: Side, tasks: dict[str, Task], **changes: Any) -> Units:
    """Eight pictures with masks, at a site of its own."""
    random = np.random.default_rng(0)
    arrays = {"x": random.integers(0, 256, (8, 32, 32, 3), np.uint8), "mask": random.integers(0, 2, (8, 32, 32))}
    np.savez(folder / "pictures.npz", **arrays, size=random.integers(0, 2, 8))
    part = {"inputs": "x", "labels": {"mask": "mask", "size": "size"}}
    values: dict[str, Any] = {
        "name": "here",
        "registry": "here",
        "unit": "example",
        "budget": {"epsilon": 1.0, "delta": 1e-5},
        "allow": {"tasks": "any", "backbones": "any", "solvers": "any"},
        "sources": {"pictures": {"kind": "npz", "path": "pictures.npz", "parts": {"all": part}}},
        "tasks": {
            name: {
                "source": "pictures",
                "label": "size" if task is SIZE else "mask",
                "missing": "refuse",
                "public_size": 6,
            }
            for name, task in tasks.items()
        },
        "split": {"test_fraction": 0.5},
        "on_bad_record": "stop",
        "evaluation": "local",
        "state_dir": "state",
        **changes,
    }
    site = parse(SiteConfig, values, base=folder)
    encoding = Encoding(FeatureStore(folder / "features"), CPU)
    prepare(site, tasks, dict.fromkeys(tasks, BACKBONE), encoding, folder / "run" / "data")
    return open_units(folder / "run" / "data", side, list(tasks), CPU)


def test_the_places_trained_on_are_every_fourth_with_their_labels(tmp_path: Path) -> None:
    train = read(tmp_path, "train", TASKS).tasks
    assert train["some"].features_RD.shape[1:] == (4, 4, 16) and train["all"].features_RD.shape[1:] == (16, 16, 16)
    chosen = torch.tensor([2, 6, 10, 14])
    assert torch.equal(train["some"].features_RD, train["all"].features_RD[:, chosen][:, :, chosen])
    assert torch.equal(train["some"].labels, train["all"].labels[:, chosen][:, :, chosen])
    # A view would keep the rest in memory.
    assert train["some"].features_RD.untyped_storage().nbytes() == train["some"].features_RD.nbytes
    outputs = torch.randn(len(train["some"].labels), 4, 4, 2, generator=torch.Generator().manual_seed(0))
    expected = torch.nn.functional.cross_entropy(outputs.movedim(-1, 1), train["some"].labels.long(), reduction="none")
    torch.testing.assert_close(TASKS["some"].losses(outputs, train["some"].labels), expected.mean(dim=(1, 2)))


def test_all_places_are_evaluated(tmp_path: Path) -> None:
    test = read(tmp_path, "test", TASKS).tasks
    assert torch.equal(test["some"].features_RD, test["all"].features_RD)
    assert torch.equal(test["some"].labels, test["all"].labels) and test["all"].labels.shape[1:] == (16, 16)


def test_a_task_on_the_same_maps_reads_the_mean_of_all_places(tmp_path: Path) -> None:
    train = read(tmp_path, "train", {**TASKS, "size": SIZE}).tasks
    torch.testing.assert_close(train["size"].features_RD, train["all"].features_RD.mean(dim=(1, 2)))


def test_masks_on_another_grid_than_the_backbone_s_are_not_thinned() -> None:
    run = RunConfig.model_validate(
        {
            "name": "r",
            "seed": 1,
            "backbone": {"kind": "torchvision", "model": "mobilenet_v2", "weights": None},
            "tasks": {"cell": {"kind": "segmentation", "labels": ["ground", "cell"], "side": 32, "every": 2}},
            "solver": {"kind": "auto"},
            "privacy": "non_private",
        }
    )
    with pytest.raises(BadInput, match=r"tasks.cell.every: expected 1 where labels of 32 x 32 places .* of 16 x 16"):
        create_modules(run, {"cell": open_mask(2, side=32)}, {"backbone": BACKBONE})


def test_features_beyond_the_site_s_limit_are_refused_before_a_record_is_encoded(tmp_path: Path) -> None:
    """Eight pictures of 16 x 16 places with 16 features and an exponent, of two bytes each."""
    needed = 8 * 16 * 16 * 17 * 2 / 2**30
    read(tmp_path, "train", TASKS, cache_limit_gib=needed)
    (tmp_path / "small").mkdir()
    with pytest.raises(BadInput, match=r"cache_limit_gib: expected at least 6.48e-05 .* got 6.4"):
        read(tmp_path / "small", "train", TASKS, cache_limit_gib=0.99 * needed)
    assert not (tmp_path / "small" / "features").exists()


@pytest.mark.parametrize("name", TASKS)
def test_a_round_sums_the_integers_of_the_store_as_if_quantised_anew(tmp_path: Path, name: str) -> None:
    records = read(tmp_path, "train", TASKS).tasks[name].labelled()
    head = TASKS[name].head(BACKBONE.feature_dim)
    known = Inputs.from_records(head, records, 4)
    anew = Inputs.from_records(head, replace(records, decoded=None), 4)
    assert records.rows is not None and torch.equal(known.rows.scale, anew.rows.scale)
    assert torch.equal(known.rows.integers, anew.rows.integers) and known.rows.integers.any()
    assert known.rows.integers.dtype == anew.rows.integers.dtype


def test_other_features_take_the_place_of_the_store_s(tmp_path: Path) -> None:
    records = read(tmp_path, "train", TASKS).tasks["all"]
    doubled = replace(records, features_RD=2.0 * records.features_RD)
    assert doubled.rows is None and doubled.labelled().rows is None
    scale = Inputs.from_records(TASKS["all"].head(BACKBONE.feature_dim), doubled, 4).rows.scale
    assert torch.equal(scale, 2.0 * Inputs.from_records(TASKS["all"].head(BACKBONE.feature_dim), records, 4).rows.scale)
