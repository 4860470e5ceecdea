"""A site's report shows its own held-out pictures with what is predicted; nobody else's does."""

from __future__ import annotations

import base64
import io
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from client.app import make_app as make_site_app
from client.config import SiteConfig
from client.data.exclusions import Exclusions
from client.data.sources import open_source
from client.prediction.gallery import show_home_gallery
from client.protocol.site import Site
from common.events import FileJournal, read_site_journal
from common.model.backbones import open_backbones
from common.privacy.noise import os_entropy
from common.report.page import Section
from common.yaml import write_yaml
from headwater.__main__ import make_app
from server.rounds.loop import run_federation
from simulations.executors.in_process import InProcessGrid
from tests.finished import MASKS, write_maps
from tests.tiny import run_config, site_config

SIDE = 20


def draw_record(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns a dark picture with a light rectangle, and its mask."""
    rng = np.random.default_rng(seed)
    pixels, mask = rng.integers(0, 50, (SIDE, SIDE, 3)), np.zeros((SIDE, SIDE), np.uint8)
    top, left = rng.integers(2, 8, 2)
    mask[top : top + 9, left : left + 9] = 1
    return (pixels + 180 * mask[..., None]).astype(np.uint8), mask


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> SiteConfig:
    """A site after a run of two sites that learnt masks."""
    folder = tmp_path_factory.mktemp("federation")
    sites, (parts, task) = (
        [],
        (
            {part: {"inputs": f"{part}_x", "labels": {"mask": f"{part}_y"}} for part in ("train", "test")},
            {"source": "pictures", "label": "mask", "missing": "refuse", "public_size": 12},
        ),
    )
    for number, name in enumerate(("east", "north")):
        arrays: dict[str, np.ndarray] = {}
        for part, seeds in (("train", range(12)), ("test", range(20, 29))):
            pairs = [draw_record(100 * number + seed) for seed in seeds]
            arrays[f"{part}_x"], arrays[f"{part}_y"] = (np.stack(each) for each in zip(*pairs, strict=True))
        np.savez(folder / f"{name}.npz", **arrays)  # type: ignore[arg-type]
        source = {"kind": "npz", "path": str(folder / f"{name}.npz"), "parts": parts}
        allow = {"tasks": "any", "backbones": "any", "solvers": "any", "non_private": True}
        sites.append(site_config(folder, name, sources={"pictures": source}, tasks={"cells": task}, allow=allow))
    run = run_config(
        backbone=write_maps(folder, colours=True),
        tasks={"cells": MASKS},
        privacy="non_private",
        solver={"kind": "sgd", "sampling_rate": 1.0, "steps": 10, "learning_rate": 2.0},
    )
    (folder / "run").mkdir()
    run_federation(
        InProcessGrid(make_site_app(lambda context: sites[int(context.node_config["partition-id"])]), 2),
        run,
        open_backbones(run),
        run_id="run-1",
        folder=folder / "run",
        journal=FileJournal(folder / "run" / "journal.jsonl"),
        executor="in_process",
    )
    return sites[0]


def read_pictures(section: Section) -> list[Image.Image]:
    found = [re.search(r"data:image/png;base64,([^\"]*)", figure.svg) for figure in section.figures]
    return [Image.open(io.BytesIO(base64.b64decode(each[1]))) for each in found if each is not None]


def test_a_sites_page_shows_held_out_pictures_as_labelled_and_as_predicted(
    finished: SiteConfig, tmp_path: Path
) -> None:
    before = read_site_journal(finished.state_dir / "site.jsonl")
    (section,) = show_home_gallery(Site(finished, os_entropy), None)
    pictures = read_pictures(section)
    assert len(pictures) == 6 and not section.remarks
    assert read_site_journal(finished.state_dir / "site.jsonl") == before, "nothing is sent"
    held_out = [draw_record(seed) for seed in range(20, 29)]
    agreed = []
    for shown in pictures:
        left, right = (np.asarray(shown.crop((x, 0, x + 256, 256)).resize((SIDE, SIDE), 0)) for x in (0, 260))
        near = [np.abs(left.astype(int) - pixels).mean() for pixels, _ in held_out]
        pixels, mask = held_out[int(np.argmin(near))]
        assert np.array_equal((left != pixels).any(axis=2), mask == 1), "as it is labelled"
        agreed.append(np.mean((right != pixels).any(axis=2) == (mask == 1)))
    assert len({round(float(each), 6) for each in agreed}) > 1 and np.mean(agreed) > 0.7
    write_yaml(tmp_path / "site.yaml", finished)
    asked = ["report", "--site", str(tmp_path / "site.yaml"), "--out", str(tmp_path / "own.html")]
    result = CliRunner().invoke(make_app(), asked)
    assert result.exit_code == 0, result.output
    page = (tmp_path / "own.html").read_text()
    assert page.count("data:image/png;base64,") == 6 and "This page must not leave the site" in page
    assert (tmp_path / "own.html").stat().st_mode & 0o077 == 0


def test_who_is_excluded_is_not_shown(finished: SiteConfig, tmp_path: Path) -> None:
    site = finished.model_copy(update={"state_dir": shutil.copytree(finished.state_dir, tmp_path / "state")})
    keys = [
        record.key for record in open_source(site.sources["pictures"], "s").open().index() if record.split == "test"
    ]
    Exclusions.read(site.state_dir).with_ids(keys[:7]).write(site.state_dir)
    (section,) = show_home_gallery(Site(site, os_entropy), "run-1")
    assert len(section.figures) == 2


def test_a_coordinators_page_shows_public_pictures_that_it_is_given_only(finished: SiteConfig, tmp_path: Path) -> None:
    run = finished.state_dir.parent / "run"
    shutil.copytree(finished.state_dir / "runs" / "run-1" / "model", run / "model")
    asked = ["report", str(run), "--out", str(tmp_path / "r.html")]
    assert CliRunner().invoke(make_app(), asked).exit_code == 0
    assert "data:image" not in (tmp_path / "r.html").read_text()
    (tmp_path / "public").mkdir()
    Image.fromarray(draw_record(7)[0]).save(tmp_path / "public" / "a.png")
    (tmp_path / "public" / "b.png").write_bytes(b"nothing")
    result = CliRunner().invoke(make_app(), [*asked, "--pictures", str(tmp_path / "public")])
    page = (tmp_path / "r.html").read_text()
    assert result.exit_code == 0, result.output
    assert page.count("data:image/png;base64,") == 1 and "1 picture could not be read" in page
    result = CliRunner().invoke(make_app(), [*asked, str(run), "--pictures", str(tmp_path / "public")])
    assert result.exit_code == 2 and "expected one run with it" in result.output
