"""A site's evidence: its ledger's numbers, an attack that finds what can be found, and nothing sent or spent."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load, save
from typer.testing import CliRunner

from client.app import make_app as make_site_app
from client.config import SiteConfig
from client.data.units import TaskRecords, Units
from client.personal.evidence import collect_site_evidence, judge_attacks, state_ledger
from client.personal.membership import LIRA, LOSS_ATTACK, attack_heads, join_units, rate_units, take_units
from client.protocol.purge import purge
from client.protocol.site import Site
from common.events import FileJournal, read_site_journal
from common.exports.parts.evidence import ChargedReleases, list_leaving_files, write_evidence
from common.files import write_atomic
from common.model.backbones import open_backbones
from common.privacy.accounting import Mechanism, compute_epsilon
from common.privacy.noise import SeededEntropy, os_entropy
from common.serving.folder import ModelPrivacy
from common.tasks import open_task
from common.types import BadInput, DigestMismatch, Unit
from common.yaml import write_yaml
from headwater.__main__ import make_app
from server.rounds.loop import run_federation
from simulations.executors.in_process import InProcessGrid
from tests.client.personal.test_evaluate import federated
from tests.tiny import run_config, site_config


def ignore(phase: str, done: int, total: int) -> None:
    del phase, done, total


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> SiteConfig:
    """A site after a run."""
    return federated(tmp_path_factory.mktemp("evidence"))


def model_of(config: SiteConfig) -> Path:
    return config.locate_run("run-1") / "model"


def test_the_statement_is_the_ledgers(ended: SiteConfig) -> None:
    statement = state_ledger(ended, "run-1")
    # Four rounds of two full-batch steps with noise multiplier 0.5.
    (group,) = statement.releases
    assert (group.purpose, group.rounds, group.mechanism.noise_multiplier) == ("training", (1, 2, 3, 4), 0.5)
    assert statement.epsilon == compute_epsilon([Mechanism("gaussian", 0.5, 1.0, 8, 1.0)], 1e-5)
    assert (statement.before, statement.now, statement.budget) == (0.0, statement.epsilon, 100.0)


def test_what_was_charged_before_a_run_is_not_its_own(tmp_path: Path) -> None:
    config = federated(tmp_path)
    other = Mechanism("gaussian", 5.0, 1.0, 1, 1.0)
    ledger = Site(config, os_entropy).ledger()
    ledger.commit(ledger.reserve(other, run="run-2", round=1, request=""))
    second = state_ledger(config, "run-2")
    assert second.before == state_ledger(config, "run-1").epsilon
    assert second.epsilon == compute_epsilon([other], 1e-5)
    assert second.now is not None and second.now > second.before


def test_a_run_that_was_never_charged_is_refused(ended: SiteConfig) -> None:
    with pytest.raises(BadInput, match="expected charges of run run-9 in its ledger, found none"):
        state_ledger(ended, "run-9")


def test_evidence_sends_and_spends_nothing_and_lists_every_file(ended: SiteConfig, tmp_path: Path) -> None:
    site = Site(ended, os_entropy)
    before, journal = site.ledger().spent(), read_site_journal(ended.state_dir / "site.jsonl")
    write_evidence(collect_site_evidence(ended, model_of(ended)), tmp_path / "out")
    assert site.ledger().spent() == before
    assert read_site_journal(ended.state_dir / "site.jsonl") == journal
    sums = dict(reversed(line.split("  ")) for line in (tmp_path / "out" / "SHA256SUMS").read_text().splitlines())
    files = [path for path in model_of(ended).rglob("*") if path.is_file()]
    assert sums == {
        path.relative_to(model_of(ended)).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files
    }
    text = (tmp_path / "out" / "evidence.md").read_text()
    assert "This folder does not leave without the output checker's consent" in text
    assert all(digest in text for digest in sums.values())
    assert (tmp_path / "out").stat().st_mode & 0o077 == 0
    (ledger,) = json.loads((tmp_path / "out" / "ledger.json").read_text())
    assert (ledger["population"], ledger["budget"]) == ("east-registry", 100.0)
    assert json.loads((tmp_path / "out" / "offer.json").read_text())["run"]["name"] == "tiny"
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert sorted(name.rpartition("_")[0] for name in report) == sorted([LIRA, LOSS_ATTACK] * 2)


def test_without_an_attack_nothing_was_computed_from_records(ended: SiteConfig, tmp_path: Path) -> None:
    shutil.copytree(model_of(ended), tmp_path / "model")
    config = ended
    write_evidence(collect_site_evidence(config, tmp_path / "model", attack=False), tmp_path / "out")
    text = (tmp_path / "out" / "evidence.md").read_text()
    assert "Nothing in this folder was computed from records without noise" in text
    assert "No attack was made" in text and not (tmp_path / "out" / "report.json").exists()


def train_by_heart(folder: Path) -> SiteConfig:
    """A site after a run without noise, on more features than records and labels that nothing else tells."""
    rng = np.random.default_rng(0)
    count, dim = 60, 200
    arrays: dict[str, Any] = {}
    for part in ("train", "test"):
        arrays[f"{part}_x"] = rng.normal(size=(count, dim)).astype(np.float32)
        arrays[f"{part}_colour"] = np.array(["red", "green", "blue"])[rng.integers(0, 3, count)]
        arrays[f"{part}_size"] = np.array(["small", "large"])[rng.integers(0, 2, count)]
    np.savez(folder / "east.npz", **arrays)
    allow = {"tasks": "any", "backbones": "any", "solvers": "any", "non_private": True}
    site = site_config(folder, "east", allow=allow)
    run = run_config(
        backbone={"kind": "identity", "dim": dim},
        solver={"kind": "sgd", "sampling_rate": 1.0, "steps": 30, "learning_rate": 0.5},
        privacy="non_private",
    )
    (folder / "run-1").mkdir()
    run_federation(
        InProcessGrid(make_site_app(lambda context: site), 1),
        run,
        open_backbones(run),
        run_id="run-1",
        folder=folder / "run-1",
        journal=FileJournal(folder / "run-1" / "journal.jsonl"),
        executor="in_process",
    )
    return site


def test_an_attack_finds_the_members_of_heads_that_know_their_records_by_heart(tmp_path: Path) -> None:
    config = train_by_heart(tmp_path)
    found = collect_site_evidence(config, model_of(config), entropy=SeededEntropy(1))
    assert found.attacks is not None and len(found.attacks) == 4
    for each in found.attacks:
        assert each.auc > 0.9, each.name
        assert each.rates[0].rate > 0.5 and each.auc_bound is None and not each.contradicts
    (statement,) = found.statements
    assert math.isinf(statement.epsilon)
    # A promise that these heads do not keep is refuted by the same scores.
    promised = found.config.model_copy(update={"privacy": ModelPrivacy(unit=Unit.EXAMPLE, delta=1e-5)})
    claimed = replace(statement, epsilon=0.5, releases=state_claim())
    scores = attack_heads(Site(config, SeededEntropy(1)), "run-1", ignore)
    assert all(each.contradicts for each in judge_attacks({"east": scores}, [claimed], promised))
    write_evidence(found, tmp_path / "out")
    text = (tmp_path / "out" / "evidence.md").read_text()
    assert "**without noise**" in text and "ε = infinite" in text and "**The run was not private.**" in text


def state_claim() -> tuple[ChargedReleases, ...]:
    """Releases that would cost an epsilon of about 0.5."""
    return (ChargedReleases("training", (1, 2), Mechanism("gaussian", 12.0, 1.0, 1, 1.0)),)


def test_a_unit_is_rated_by_the_records_that_have_a_loss() -> None:
    """An anomaly head learns from normal records alone; of two units one has both kinds, one anomalous ones only."""
    task = open_task({"kind": "anomaly", "normal": "fine", "anomalous": "ill"}, "task")
    outputs = torch.tensor([[0.0], [0.5], [3.0], [0.2]])
    labels = torch.stack([task.codec.encode([cell]) for cell in ("fine", "fine", "ill", "ill")])
    records = TaskRecords.of(outputs, labels, torch.ones(4, dtype=torch.bool), torch.tensor([0, 0, 0, 1]), 2)
    rated = rate_units(task, torch.nn.Identity(), records, 2)
    loss = (0.5 + 0.5 * 0.25) / 2
    assert rated[0] == pytest.approx(-loss - math.log(1.0 - math.exp(-loss)))
    assert math.isnan(rated[1])


def test_halves_hold_the_units_that_were_chosen_with_all_their_records() -> None:
    features = torch.arange(6.0).unsqueeze(1)
    unit_R = torch.tensor([0, 0, 1, 2, 2, 1])
    records = TaskRecords.of(features, torch.zeros(6), torch.ones(6, dtype=torch.bool), unit_R, 3)
    both = join_units(Units(3, {"t": records}), Units(3, {"t": records}))
    taken = take_units(both, np.array([True, False, False, False, False, True]))
    assert (both.num_units, taken.num_units) == (6, 2)
    assert taken.tasks["t"].features_RD.squeeze(1).tolist() == [0.0, 1.0, 3.0, 4.0]
    assert taken.tasks["t"].unit_R.tolist() == [0, 0, 1, 1]
    assert taken.tasks["t"].weight_R.tolist() == [0.5] * 4


@pytest.mark.parametrize("fault", ["no charge", "another model", "changed", "personal", "not ended", "purged", "link"])
def test_each_fault_is_one_sentence(fault: str, tmp_path: Path) -> None:
    config = federated(tmp_path)
    model, run_id, error, said = model_of(config), None, BadInput, ""
    if fault == "no charge":
        shutil.rmtree(config.ledger_dir or Path())
        shutil.rmtree(config.locate_run("run-1") / "replies")
        (config.state_dir / "site.jsonl").unlink()
        said = "found none"
    elif fault == "another model":
        values = json.loads((model / "config.json").read_text())
        model = Path(shutil.copytree(model, tmp_path / "copy"))
        write_atomic(model / "config.json", json.dumps({**values, "heads": "00" * 32}).encode())
        said = "as it arrived here, got another one"
    elif fault == "changed":
        head = next((model / "heads").iterdir())
        head.write_bytes(head.read_bytes()[:-1] + b"\x7f")
        error, said = DigestMismatch, "was changed since"
    elif fault == "personal":
        (model / "heads" / "personal_heads.private").write_bytes(b"x")
        said = "never leave"
    elif fault == "not ended":
        shutil.rmtree(model)
        model, run_id, said = config.locate_run("run-1"), "run-1", "expected a model's folder"
    elif fault == "purged":
        purge(Site(config, os_entropy), [])
        said = "prepare"
    else:
        (model / "heads" / "more").symlink_to("/etc/passwd")
        said = "got a link"
    with pytest.raises(error, match=said):
        write_evidence(collect_site_evidence(config, model, run_id=run_id), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("part", ["heads", "backbones"])
def test_records_in_the_place_of_weights_are_not_attested(ended: SiteConfig, tmp_path: Path, part: str) -> None:
    """Whoever changes a file can change its digest in `config.json` too, and that of the run then does not fit."""
    folder = Path(shutil.copytree(model_of(ended), tmp_path / "model"))
    file = next((folder / part).glob("*.safetensors"))
    content = save({name: np.asarray(values + 1) for name, values in load(file.read_bytes()).items()})
    file.unlink()  # A second link of the site's own.
    file.write_bytes(content)
    values = json.loads((folder / "config.json").read_text())
    values["files"] |= {f"heads/{file.name}": hashlib.sha256(content).hexdigest()} if part == "heads" else {}
    (folder / "config.json").write_text(json.dumps(values))
    with pytest.raises(DigestMismatch, match="not those that the run ended with|are not the run's"):
        write_evidence(collect_site_evidence(ended, folder, attack=False), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_files_that_are_no_part_of_a_model_are_shown_as_such(ended: SiteConfig, tmp_path: Path) -> None:
    model = Path(shutil.copytree(model_of(ended), tmp_path / "model"))
    (model / "notes.txt").write_text("patients")
    assert "notes.txt" in [each.path for each in list_leaving_files(model)]
    write_evidence(collect_site_evidence(ended, model, attack=False), tmp_path / "out")
    assert "| `notes.txt` | **not a part of a model: look at it** |" in (tmp_path / "out" / "evidence.md").read_text()


def test_the_command_writes_the_folder_and_refuses_options_that_do_not_fit(ended: SiteConfig, tmp_path: Path) -> None:
    write_yaml(tmp_path / "site.yaml", ended)

    def export(*more: object) -> tuple[int, str]:
        result = CliRunner().invoke(make_app(), ["export", str(model_of(ended)), *map(str, more)])
        return result.exit_code, result.output

    site = ("--evidence", "--site", tmp_path / "site.yaml")
    code, output = export(tmp_path / "out", *site, "--run", "run-1", "--no-attack")
    assert code == 0 and "evidence.md" in output
    for more, said in (
        ((tmp_path / "out", *site), "expected a new or empty folder"),
        ((tmp_path / "b", "--evidence", "--format", "torch"), "without --format"),
        ((tmp_path / "b",), "or --evidence, got neither"),
        ((tmp_path / "b", "--format", "torch", "--no-attack"), "with --evidence only"),
        ((tmp_path / "b", "--evidence", "--run", "run-1"), "with --site only"),
        ((tmp_path / "b", "--evidence"), "at a site name its file with --site"),
        ((tmp_path / "b", *site, "--run", "run-9"), "run run-9"),
    ):
        code, output = export(*more)
        assert code == 2 and said in " ".join(output.split()), (more, output)
    assert not (tmp_path / "b").exists()
