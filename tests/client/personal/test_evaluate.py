"""A site compares the final heads with heads that it trains alone; nothing is sent or spent."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from client.__main__ import app
from client.app import make_app
from client.config import SiteConfig
from client.personal.evaluate import adapt, compare, load_final_heads
from client.personal.intervals import Estimates, list_values
from client.personal.personal_heads import AT_HOME, load_personal_heads, open_personal_head
from client.protocol.purge import purge
from client.protocol.site import Site
from common import messages
from common.events import ALONE, ALONE_ADAPTED, ALONE_NOT_PRIVATE, FEDERATED, PERSONAL, FileJournal, read_site_journal
from common.privacy.noise import SeededEntropy, os_entropy
from common.types import BadInput, DigestMismatch, heads_digest
from common.yaml import write_yaml
from server.rounds.loop import run_federation
from simulations.executors.in_process import InProcessGrid
from tests.tiny import backbone, run_config, site_config

HELD_OUT = {"test_fraction": 0.3}


def accuracy(estimates: Estimates) -> float:
    return float(estimates["accuracy"].value or 0.0)


def federated(folder: Path, run_id: str = "run-1", **changes: Any) -> SiteConfig:
    """A site after a run of two sites."""
    sites = [site_config(folder, name, split=HELD_OUT) for name in ("east", "north")]
    (folder / run_id).mkdir()
    run_federation(
        InProcessGrid(make_app(lambda context: sites[int(context.node_config["partition-id"])]), 2),
        run_config(privacy={"unit": "example", "delta": 1e-5, "noise_multiplier": 0.5}, rounds=4, **changes),
        {"backbone": backbone()},
        run_id=run_id,
        folder=folder / run_id,
        journal=FileJournal(folder / run_id / "journal.jsonl"),
        executor="in_process",
    )
    return sites[0]


def test_final_heads_and_heads_trained_alone_are_compared_on_held_out_units_and_nothing_is_spent(
    tmp_path: Path,
) -> None:
    config = federated(tmp_path)
    site = Site(config, os_entropy)
    before, sent = site.ledger().spent(), read_site_journal(config.state_dir / "site.jsonl")
    result = compare(site)
    assert site.ledger().spent() == before
    assert read_site_journal(config.state_dir / "site.jsonl") == sent
    assert result.run_id == "run-1"
    assert 0 < result.num_held_out < 40
    for own in result.tasks.values():
        assert list(own) == [FEDERATED, ALONE, ALONE_NOT_PRIVATE]
        for values in own.values():
            interval = values["accuracy"].interval
            assert interval is not None
            assert 0.0 <= interval[0] <= accuracy(values) <= interval[1] <= 1.0
    # The records are well separated: without noise a site learns them by itself.
    assert accuracy(result.tasks["size"][ALONE_NOT_PRIVATE]) > 0.9


def test_a_site_alone_without_privacy_trains_each_head_at_its_own_rate(tmp_path: Path) -> None:
    """One head's rate is so small that it stays as it began, in the column without privacy as in the others."""
    solver = {"kind": "dp_sgd", "sampling_rate": 1.0, "steps": 2, "clip_norm": 1.0, "learning_rate": 4.0}
    still = {"size": {"learning_rate": 1e-9}}
    result = compare(Site(federated(tmp_path, solver={**solver, "tasks": still}), SeededEntropy(0)))
    size, colour = result.tasks["size"], result.tasks["colour"]
    assert size[ALONE_NOT_PRIVATE] == size[FEDERATED] == size[ALONE], "all three are the untrained head"
    assert accuracy(colour[ALONE_NOT_PRIVATE]) > 0.9, "the other head learns"


def test_the_federated_column_is_the_accuracy_of_the_final_heads(tmp_path: Path) -> None:
    """Against a plain loop over the held-out records."""
    from client.data.prepare import open_units

    config = federated(tmp_path)
    folder = config.state_dir / "runs" / "run-1"
    records = open_units(folder / "data", "test", ["colour"], torch.device("cpu")).tasks["colour"]
    head = {name: np.asarray(value) for name, value in load_final_heads(folder)["colour"].items()}
    weight = next(value for value in head.values() if value.ndim == 2)
    bias = next((value for value in head.values() if value.ndim == 1), np.zeros(len(weight), np.float32))
    right = 0
    for features, label in zip(records.features_RD.numpy(), records.labels.tolist(), strict=True):
        right += int(np.argmax(weight @ features + bias) == label)
    shown = compare(Site(config, SeededEntropy(0))).tasks["colour"][FEDERATED]
    assert accuracy(shown) == pytest.approx(right / len(records.labels))


def test_heads_that_changed_on_disk_are_refused(tmp_path: Path) -> None:
    config = federated(tmp_path)
    path = config.state_dir / "runs" / "run-1" / "final_heads.bin"
    request = messages.decode(messages.from_bytes(path.read_bytes()), messages.FinishRequest)
    other = {task: {name: value + 1 for name, value in params.items()} for task, params in request.heads.items()}
    path.write_bytes(messages.to_bytes(messages.encode(messages.FinishRequest("run-1", other, request.digest))))
    with pytest.raises(DigestMismatch):
        compare(Site(config, os_entropy))


def test_a_site_without_a_run_or_without_held_out_units_gets_one_sentence(tmp_path: Path) -> None:
    site = Site(site_config(tmp_path, "west"), os_entropy)
    with pytest.raises(BadInput, match="no final heads yet"):
        compare(site)


def test_the_command_prints_a_table_and_json(tmp_path: Path) -> None:
    path = tmp_path / "site.yaml"
    write_yaml(path, federated(tmp_path))
    shown = CliRunner().invoke(app, ["evaluate", str(path)])
    assert shown.exit_code == 0, shown.output
    assert "nothing was sent or spent" in shown.stdout
    values = json.loads(CliRunner().invoke(app, ["evaluate", str(path), "--json"]).stdout)
    assert set(values["tasks"]) == {"colour", "size"}
    refused = CliRunner().invoke(app, ["evaluate", str(path), "--run", "../../etc"])
    assert refused.exit_code == 2
    unknown = CliRunner().invoke(app, ["evaluate", str(path), "--run", "run-9"])
    assert unknown.exit_code == 2
    assert "did not join" in unknown.stderr


@pytest.mark.parametrize("mode", ["prior", "fit"])
def test_personal_heads_stand_beside_the_others_are_kept_here_and_cost_nothing(tmp_path: Path, mode: str) -> None:
    config = federated(tmp_path).model_copy(update={"personal": mode})
    site = Site(config, os_entropy)
    before, sent = site.ledger().lines(), read_site_journal(config.state_dir / "site.jsonl")
    result = compare(site)
    assert site.ledger().lines() == before
    assert read_site_journal(config.state_dir / "site.jsonl") == sent
    kinds = [FEDERATED, PERSONAL, ALONE, ALONE_NOT_PRIVATE]
    assert list(result.tasks["colour"]) == (kinds if mode == "prior" else [*kinds, ALONE_ADAPTED])
    folder = config.state_dir / "runs" / "run-1"
    kept = load_personal_heads(folder, purpose=AT_HOME)
    assert (kept.mode, kept.final_heads) == (mode, heads_digest(load_final_heads(folder)))
    if mode == "fit":
        # The records are well separated, and the federated heads have much noise.
        assert accuracy(result.tasks["colour"][PERSONAL]) > 0.9
    from client.data.prepare import open_units
    from client.personal.intervals import estimate_metrics
    from client.personal.metrics import predict
    from common.tasks import open_task
    from tests.tiny import DIM, TASKS

    task = open_task(TASKS["colour"], "colour")
    head = open_personal_head(kept.heads["colour"], task, DIM)
    found = predict(task, head, "colour", open_units(folder / "data", "test", ["colour"], torch.device("cpu")))
    assert found is not None
    assert list_values(estimate_metrics(task, [found])) == list_values(result.tasks["colour"][PERSONAL])


def test_the_command_adapts_and_shows_personal_heads_with_intervals(tmp_path: Path) -> None:
    path = tmp_path / "site.yaml"
    config = federated(tmp_path)
    write_yaml(path, config)
    refused = CliRunner().invoke(app, ["adapt", str(path)])
    assert refused.exit_code == 2
    assert "personal: expected prior, fit, tied or adapt" in refused.stderr
    write_yaml(path, config.model_copy(update={"personal": "fit"}))
    done = CliRunner().invoke(app, ["adapt", str(path)])
    assert done.exit_code == 0, done.output
    assert "never leaves" in done.stdout
    shown = CliRunner().invoke(app, ["evaluate", str(path)], env={"COLUMNS": "160"})
    assert "personal (fit)" in shown.stdout and ".." in shown.stdout
    values = json.loads(CliRunner().invoke(app, ["evaluate", str(path), "--json"]).stdout)
    assert values["personal"] == "fit"
    low, high = values["intervals"]["colour"][PERSONAL]["accuracy"]
    assert low <= values["tasks"]["colour"][PERSONAL]["accuracy"] <= high


def test_heads_stay_personal_only_while_all_their_patients_do(tmp_path: Path) -> None:
    """A purge removes them with everything else that was computed from records."""
    config = federated(tmp_path).model_copy(update={"personal": "fit"})
    site = Site(config, os_entropy)
    adapt(site, "run-1")
    path = config.state_dir / "runs" / "run-1" / "personal_heads.private"
    assert path.exists()
    purge(site, ["train_x/0"])
    assert not path.exists()
