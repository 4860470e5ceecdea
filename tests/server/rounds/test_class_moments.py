"""Moments of classes in whole runs: they reach the model of the run and of each site, and cost what round 0 costs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from client.personal.evaluate import load_final_heads
from client.protocol.prepare import finish
from client.protocol.site import Site, SiteDeclined, joined_run
from common import messages
from common.privacy.noise import os_entropy
from common.serving.folder import MODEL, read_config, read_moments
from common.types import BadInput, DigestMismatch, heads_digest
from server.rounds.checkpoint import load_checkpoint
from tests.server.rounds.test_moments import charges, run_once
from tests.tiny import TASKS, site_config

SHARES = {"means": 0.1, "counts": 0.1, "classes": 0.3, "scatter": 0.3}


def test_a_site_keeps_the_moments_of_all_sites_beside_its_heads(tmp_path: Path) -> None:
    sites = [site_config(tmp_path, name) for name in ("east", "north")]
    run_once(tmp_path, sites, moments=SHARES)
    kept = load_checkpoint(tmp_path / "run-1" / "checkpoint.safetensors").moments
    assert set(kept) == {"colour.classes", "size.classes", "backbone.scatter"}
    for config in sites:
        site = Site(config, os_entropy)
        folder = joined_run(site, "run-1").folder
        assert set(load_final_heads(folder)) == set(TASKS)
        model = read_config(folder / MODEL)
        for task in TASKS:
            own = read_moments(folder / MODEL, model, task)
            classes = len(TASKS[task]["labels"])
            np.testing.assert_array_equal(own.sums_CD.ravel(), kept[f"{task}.classes"]["sum"].astype(np.float64))
            assert own.counts_C.shape == (classes,) and own.scatter_DD is not None
            np.testing.assert_array_equal(own.scatter_DD, own.scatter_DD.T)
            assert own.sums_deviation > 0 and own.scatter_deviation > own.sums_deviation / 2
            assert own.units == sum(each.tasks[task].public_size for each in sites)
            within_DD = own.within_DD()
            assert within_DD is not None and np.linalg.eigvalsh(within_DD).min() > 0
    assert [charges(site)[0] for site in sites] == [(0, 1)] * 2, "one release, whatever is in it"


def test_a_run_without_them_has_none_and_says_so(tmp_path: Path) -> None:
    run_once(tmp_path, [site_config(tmp_path, "east")])
    folder = joined_run(Site(site_config(tmp_path, "east"), os_entropy), "run-1").folder / MODEL
    with pytest.raises(BadInput, match="expected a run that released the moments of classes"):
        read_moments(folder, read_config(folder), "size")
    assert not (folder / "moments").exists()


def test_changed_moments_are_refused(tmp_path: Path) -> None:
    run_once(tmp_path, [site_config(tmp_path, "east")], moments=SHARES)
    folder = joined_run(Site(site_config(tmp_path, "east"), os_entropy), "run-1").folder / MODEL
    file = folder / "moments" / "size.classes.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\x01")
    with pytest.raises(DigestMismatch, match="changed since the model was written"):
        read_moments(folder, read_config(folder), "size")


@pytest.mark.parametrize("what", ["another task's", "another length", "no number", "more features", "products alone"])
def test_a_site_refuses_moments_that_do_not_fit(tmp_path: Path, what: str) -> None:
    run_once(tmp_path, [site_config(tmp_path, "east")], moments=SHARES)
    site = Site(site_config(tmp_path, "east"), os_entropy)
    heads = load_final_heads(joined_run(site, "run-1").folder)
    moments = dict(load_checkpoint(tmp_path / "run-1" / "checkpoint.safetensors").moments)
    good = moments["size.classes"]
    if what == "another task's":
        moments["weight.classes"] = good
    elif what == "another length":
        moments["size.classes"] = {**good, "sum": good["sum"][:-1]}
    elif what == "more features":
        moments = {"size.classes": {**good, "sum": np.zeros(2 * 1000, np.float32)}}
    elif what == "products alone":
        moments = {"backbone.scatter": {"sum": np.zeros(1000, np.float32)}}
    else:
        moments["size.classes"] = {**good, "sum": good["sum"] * np.float32("nan")}
    with pytest.raises(SiteDeclined, match="moments"):
        finish(site, messages.FinishRequest("run-1", {**heads, **moments}, heads_digest(heads)))


def test_a_site_refuses_moments_that_nobody_released(tmp_path: Path) -> None:
    run_once(tmp_path / "with", [site_config(tmp_path / "with", "east")], moments=SHARES)
    moments = load_checkpoint(tmp_path / "with" / "run-1" / "checkpoint.safetensors").moments
    run_once(tmp_path, [site_config(tmp_path, "east")])
    site = Site(site_config(tmp_path, "east"), os_entropy)
    heads = load_final_heads(joined_run(site, "run-1").folder)
    with pytest.raises(SiteDeclined, match="the run measures no moments of classes, and some came"):
        finish(site, messages.FinishRequest("run-1", {**heads, **moments}, heads_digest(heads)))
    finish(site, messages.FinishRequest("run-1", heads, heads_digest(heads)))
