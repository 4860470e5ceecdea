"""At its site a run's model predicts what the site's evaluation reports, with the heads that the site uses."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import Result
from typer.testing import CliRunner

from client.app import make_app as make_site_app
from client.config import SiteConfig
from client.data.exclusions import Exclusions
from client.data.sources import open_source
from client.personal.evaluate import adapt, compare
from client.protocol.site import PERSONAL_HEADS, Site
from common.events import FEDERATED, PERSONAL, FileJournal, read_site_journal
from common.privacy.noise import os_entropy
from common.serving.folder import read_config
from common.yaml import write_yaml
from headwater.__main__ import make_app
from server.rounds.loop import run_federation
from simulations.executors.in_process import InProcessGrid
from tests.tiny import backbone, run_config, site_config


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> SiteConfig:
    """A site after a run of two sites, with personal heads of the mode `fit`."""
    folder = tmp_path_factory.mktemp("federation")
    sites = [site_config(folder, name, ledger_dir=str(folder / "ledgers")) for name in ("east", "north")]
    (folder / "run").mkdir()
    run_federation(
        InProcessGrid(make_site_app(lambda context: sites[int(context.node_config["partition-id"])]), 2),
        run_config(privacy={"unit": "example", "delta": 1e-5, "noise_multiplier": 0.5}, rounds=4),
        {"backbone": backbone()},
        run_id="run-1",
        folder=folder / "run",
        journal=FileJournal(folder / "run" / "journal.jsonl"),
        executor="in_process",
    )
    adapt(Site(sites[0].model_copy(update={"personal": "fit"}), os_entropy))
    return sites[0]


def copy_site(finished: SiteConfig, folder: Path, **changes: Any) -> SiteConfig:
    """Returns the site with its state copied."""
    state = shutil.copytree(finished.state_dir, folder / "state")
    return finished.model_copy(update={"state_dir": state, **changes})


def write_site(folder: Path, config: SiteConfig) -> Path:
    path = folder / "site.yaml"
    write_yaml(path, config)
    return path


def predict(*arguments: object) -> Result:
    return CliRunner().invoke(make_app(), ["predict", *map(str, arguments)])


def read(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def count_hits(config: SiteConfig, rows: list[dict[str, str]], task: str) -> tuple[int, int]:
    """Returns how many rows have the label that the site's own file states, and how many rows there are."""
    with np.load(config.sources["records"].settings()["path"]) as file:
        arrays = dict(file)
    truth = [*arrays[f"train_{task}"], *arrays[f"test_{task}"]]
    return sum(row[task] == truth[int(row["row"]) - 1] for row in rows), len(rows)


@pytest.mark.parametrize("personal", ["none", "prior", "fit"])
def test_held_out_records_are_predicted_as_the_sites_evaluation_reports(
    finished: SiteConfig, tmp_path: Path, personal: str
) -> None:
    config = copy_site(finished, tmp_path, personal=personal)
    site = Site(config, os_entropy)
    before, sent = site.ledger().spent(), read_site_journal(config.state_dir / "site.jsonl")
    reported = compare(site)
    path = write_site(tmp_path, config)
    kinds = {FEDERATED: ("--federated",), **({} if personal == "none" else {PERSONAL: ()})}
    for kind, options in kinds.items():
        out = tmp_path / f"{kind}.csv"
        result = predict("--site", path, "--out", out, *options)
        assert result.exit_code == 0, result.output
        rows = read(out)
        assert {row["split"] for row in rows} == {"test"} and len(rows) == reported.num_held_out
        for task in ("colour", "size"):
            hits, count = count_hits(config, rows, task)
            assert hits / count == reported.tasks[task][kind]["accuracy"].value, "to the last digit"
        heads = "federated heads" if kind == FEDERATED else f"personal heads ({personal})"
        assert f"run run-1, {heads}" in result.stderr
    assert "encoding" not in result.stderr, "the run's cached features are read"
    assert site.ledger().spent() == before
    assert read_site_journal(config.state_dir / "site.jsonl") == sent


def test_train_and_all_records_on_request(finished: SiteConfig, tmp_path: Path) -> None:
    config = copy_site(finished, tmp_path)
    path = write_site(tmp_path, config)
    found = {}
    for choice in ("train", "test", "all"):
        out = tmp_path / f"{choice}.csv"
        assert predict("--site", path, "--split", choice, "--out", out).exit_code == 0
        found[choice] = read(out)
    assert len(found["train"]) == 40 and len(found["test"]) == 20
    assert found["all"] == sorted(found["train"] + found["test"], key=lambda row: int(row["row"]))


def test_excluded_records_are_neither_predicted_nor_named(finished: SiteConfig, tmp_path: Path) -> None:
    config = copy_site(finished, tmp_path)
    path = write_site(tmp_path, config)
    with np.load(config.sources["records"].settings()["path"]) as file:
        arrays = dict(file)
    source = {"kind": "npz", "path": config.sources["records"].settings()["path"]}
    source["parts"] = {"all": {"inputs": "test_x", "labels": {}}}
    (tmp_path / "data.yaml").write_text(json.dumps(source))
    keys = [record.key for record in open_source(source, "s").open().index()]
    Exclusions.read(config.state_dir).with_ids([keys[3]]).write(config.state_dir)
    assert predict("--site", path, "--split", "all", "--out", tmp_path / "all.csv").exit_code == 0
    assert len(read(tmp_path / "all.csv")) == 59 and not (tmp_path / "all.rejected.csv").exists()
    given = ("--site", path, "--data", tmp_path / "data.yaml", "--out", tmp_path / "data.csv")
    assert predict(*given).exit_code == 0
    rows = read(tmp_path / "data.csv")
    assert [int(row["row"]) for row in rows] == [at + 1 for at in range(len(arrays["test_x"])) if at != 3]
    assert not (tmp_path / "data.rejected.csv").exists()


def test_a_run_of_an_earlier_version_gets_its_model_at_the_first_prediction(
    finished: SiteConfig, tmp_path: Path
) -> None:
    config = copy_site(finished, tmp_path)
    path, folder = write_site(tmp_path, config), config.state_dir / "runs" / "run-1"
    assert predict("--site", path, "--out", tmp_path / "before.csv").exit_code == 0
    before = read_config(folder)
    shutil.rmtree(folder / "model")
    refused = predict(folder, "--data", tmp_path / "x.npz", "--out", tmp_path / "no.csv")
    assert refused.exit_code == 2 and "a site's run of an earlier version; --site and --run open it" in refused.stderr
    assert predict("--site", path, "--run", "run-1", "--out", tmp_path / "after.csv").exit_code == 0
    assert read(tmp_path / "before.csv") == read(tmp_path / "after.csv")
    assert read_config(folder) == before


def test_the_sites_model_serves_other_data_too(finished: SiteConfig, tmp_path: Path) -> None:
    config = copy_site(finished, tmp_path, personal="fit")
    path = write_site(tmp_path, config)
    with np.load(config.sources["records"].settings()["path"]) as file:
        arrays = dict(file)
    np.savez(tmp_path / "new.npz", x=arrays["test_x"])
    assert predict("--site", path, "--data", tmp_path / "new.npz", "--out", tmp_path / "new.csv").exit_code == 0
    assert predict("--site", path, "--out", tmp_path / "own.csv").exit_code == 0
    for new, own in zip(read(tmp_path / "new.csv"), read(tmp_path / "own.csv"), strict=True):
        # Own records have the rounded features of the run; others are encoded now.
        assert np.allclose(float(new["size.large"]), float(own["size.large"]), atol=1e-4)
        assert new["size"] == own["size"]
    # A model from elsewhere takes the site's records, and no personal heads.
    elsewhere = shutil.copytree(config.state_dir / "runs" / "run-1" / "model", tmp_path / "handed on")
    assert predict(elsewhere, "--site", path, "--out", tmp_path / "m.csv").exit_code == 0
    assert predict("--site", path, "--federated", "--out", tmp_path / "f.csv").exit_code == 0
    assert read(tmp_path / "m.csv") == read(tmp_path / "f.csv")


def forget(config: SiteConfig, folder: Path) -> tuple[object, ...]:
    (config.state_dir / "runs" / "run-1" / PERSONAL_HEADS).unlink()
    return ()


def change_mode(config: SiteConfig, folder: Path) -> tuple[object, ...]:
    write_site(folder, config.model_copy(update={"personal": "prior"}))
    return ()


def take_others(config: SiteConfig, folder: Path) -> tuple[object, ...]:
    path = config.state_dir / "runs" / "run-1" / "model" / "config.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps({**values, "heads": "0" * 64}))
    return ()


def not_ended(config: SiteConfig, folder: Path) -> tuple[object, ...]:
    (config.state_dir / "runs" / "run-1" / "final_heads.bin").unlink()
    return ("--run", "run-1")


def none_ended(config: SiteConfig, folder: Path) -> tuple[object, ...]:
    (config.state_dir / "runs" / "run-1" / "final_heads.bin").unlink()
    return ()


def change_sources(config: SiteConfig, folder: Path) -> tuple[object, ...]:
    write_site(folder, config.model_copy(update={"split": config.split.model_copy(update={"salt": "other"})}))
    return ()


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (forget, "`headwater site adapt` makes them, and --federated takes the shared heads"),
        (change_mode, "expected personal heads as the site file says, prior, got fit; `headwater site adapt`"),
        (take_others, "the personal heads were made from other final heads"),
        (not_ended, "expected its final heads, but it has not ended here yet"),
        (none_ended, "this site has received no final heads yet"),
        (change_sources, "the site file was changed since the check of"),
        (lambda config, folder: ("--run", "run-9"), "--run run-9: this site did not join the run"),
        (lambda config, folder: ("--task", "shape"), "task: expected one of colour, size, got 'shape'"),
        (lambda config, folder: ("--source", "attic"), "--source: expected one of records, got 'attic'"),
        (
            lambda config, folder: (config.state_dir / "runs" / "run-1" / PERSONAL_HEADS,),
            "serve at their own site only",
        ),
        (
            lambda config, folder: ("--split", "test", "--data", folder),
            "--split: expected it beside --site and without",
        ),
    ],
)
def test_bad_input_at_a_site_is_one_sentence(finished: SiteConfig, tmp_path: Path, change: Any, sentence: str) -> None:
    config = copy_site(finished, tmp_path, personal="fit")
    path = write_site(tmp_path, config)
    result = predict(*change(config, tmp_path), "--site", path, "--out", tmp_path / "p.csv")
    assert result.exit_code == 2, result.output
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert sentence in line and "Traceback" not in result.output


def test_the_sites_own_run_is_asked_for_at_a_site_only(tmp_path: Path) -> None:
    for option in (("--run", "run-1"), ("--coordinator", "main")):
        result = predict(tmp_path, "--data", tmp_path, "--out", tmp_path / "p.csv", *option)
        assert result.exit_code == 2 and f"{option[0]}: expected it beside --site and without MODEL" in result.stderr
    result = predict(tmp_path, "--data", tmp_path, "--out", tmp_path / "p.csv", "--federated")
    assert result.exit_code == 2 and "--federated: expected it beside --site, where" in result.stderr
