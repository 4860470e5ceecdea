"""Several backbones in one run: hospitals with pictures, with texts, and with both, under one budget each.

# Shapes: U units, R records, D features, K classes.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from client.__main__ import app
from client.app import make_app
from client.config import SiteConfig
from client.data.prepare import open_units
from client.data.units import Units
from client.protocol.approvals import Approvals
from client.protocol.join import join
from client.protocol.prepare import keep_part, prepare_run
from client.protocol.site import Site, SiteDeclined
from client.solvers import open_solver
from common import messages
from common.bundle import compute_code_digest
from common.events import (
    BackboneSent,
    FileJournal,
    RoundEnded,
    RunEvent,
    RunStarted,
    SiteJoined,
    SiteRejected,
    read_run_journal,
    select_events,
)
from common.offers import Offer, encode_offer
from common.privacy.noise import NoiseStream, os_entropy
from common.run import RunConfig
from common.serving.folder import read_config
from common.tasks import open_task
from common.types import BadInput, DeclineReason, Plan, Unit, heads_digest
from common.yaml import parse, write_yaml
from server.reports.results import write_results
from server.rounds.checkpoint import load_checkpoint
from server.rounds.loop import Outcome, run_federation
from simulations.config import SimulationConfig
from simulations.executors.in_process import InProcessGrid
from simulations.experiment import resume
from simulations.experiment import run as run_simulation
from tests.two_modalities import PATIENTS, TASKS, Hospitals, hospitals

CPU = torch.device("cpu")
BOTH = ("shade", "finding")
PLAIN: dict[str, Any] = {
    "privacy": "non_private",
    "solver": {"kind": "sgd", "sampling_rate": 1.0, "steps": 20, "learning_rate": 2.0},
}


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Hospitals:
    return hospitals(tmp_path_factory.mktemp("hospitals"))


def federate(own: Hospitals, sites: list[SiteConfig], run_id: str) -> tuple[Outcome, list[RunEvent]]:
    folder = own.folder / run_id
    folder.mkdir()
    answer = make_app(lambda context: sites[int(context.node_config["partition-id"])])
    journal = FileJournal(folder / "journal.jsonl")
    grid = InProcessGrid(answer, len(sites))
    outcome = run_federation(
        grid, own.run, own.backbones, run_id=run_id, folder=folder, journal=journal, executor="in_process"
    )
    return outcome, read_run_journal(journal.path)


def declined(site: Site, request: messages.JoinRequest) -> DeclineReason:
    with pytest.raises(SiteDeclined) as caught:
        join(site, request)
    return caught.value.reason


def held(config: SiteConfig) -> set[str]:
    """Digests of the backbones at a site, whole or in parts."""
    return {path.name.removesuffix(".parts") for path in (config.state_dir / "backbones").glob("*")}


# --- a federation ----------------------------------------------------------------------------------------------------


def test_hospitals_with_pictures_with_texts_and_with_both_federate_and_receive_what_their_tasks_need(
    tmp_path: Path,
) -> None:
    own = hospitals(tmp_path)
    sites = [own.site("east", ("shade",)), own.site("north", BOTH), own.site("west", ("finding",))]
    outcome, events = federate(own, sites, "run-1")
    assert outcome.updates == {"shade": 2, "finding": 2}
    pictures, texts = own.digests["pictures"], own.digests["texts"]
    assert [held(site) for site in sites] == [{pictures}, {pictures, texts}, {texts}]
    sent = {(event.site, event.backbone) for event in select_events(events, BackboneSent)}
    assert sent == {("east", "pictures"), ("north", "pictures"), ("north", "texts"), ("west", "texts")}
    rounds = select_events(events, RoundEnded)
    assert [event.num_updates for event in rounds] == [{"shade": 2, "finding": 2}] * 2
    # One price for both modalities of a patient: what has both pays as much as what has one.
    spent = {site.name: Site(site, os_entropy).ledger().compute_run_epsilon("run-1") for site in sites}
    assert spent["north"] == spent["east"] == spent["west"] > 0

    summary = write_results(tmp_path / "run-1", own.run, own.backbones, outcome.heads)
    about = {name: (entry.kind, entry.tasks) for name, entry in summary.backbones.items()}
    assert about == {"pictures": ("small_cnn", ("shade",)), "texts": ("transformers", ("finding",))}
    each = {event.site: 0 for event in select_events(events, SiteJoined)}
    for event in select_events(events, BackboneSent):
        each[event.site] += event.size_bytes
    assert summary.bytes.backbone_per_site == each["north"] > max(each["east"], each["west"])


def test_two_names_of_one_backbone_are_one_transfer(tmp_path: Path) -> None:
    both = hospitals(tmp_path).run.model_dump(mode="json")
    backbones = {**both["backbones"], "twin": both["backbones"]["pictures"]}
    tasks = {**TASKS, "again": {**TASKS["shade"], "backbone": "twin"}}
    own = hospitals(tmp_path, backbones=backbones, tasks=tasks)
    outcome, events = federate(own, [own.site("north", ("shade", "again", "finding"))], "run-1")
    assert outcome.updates == {"shade": 2, "finding": 2, "again": 2}
    assert [event.backbone for event in select_events(events, BackboneSent)] == ["pictures", "texts"]


def test_a_task_learns_in_a_mixed_run_what_it_learns_in_a_run_of_its_own(tmp_path: Path) -> None:
    """Without noise and clipping the tasks do not touch each other: an independent run is the reference."""
    allow = {"tasks": "any", "backbones": "any", "solvers": "any", "non_private": True}
    mixed = hospitals(tmp_path / "mixed", **PLAIN)
    sites = [
        mixed.site("east", ("shade",), allow=allow),
        mixed.site("north", BOTH, allow=allow),
        mixed.site("west", ("finding",), allow=allow),
    ]
    outcome, _ = federate(mixed, sites, "run-1")
    for task, holders in (("shade", ("east", "north")), ("finding", ("north", "west"))):
        settings = {key: value for key, value in TASKS[task].items() if key != "backbone"}
        name = TASKS[task]["backbone"]
        spec = mixed.run.backbone_specs[name].model_dump()
        alone = hospitals(tmp_path / task, backbones=None, backbone=spec, tasks={task: settings}, **PLAIN)
        reference, _ = federate(alone, [alone.site(holder, (task,), allow=allow) for holder in holders], "run-1")
        for parameter, values in reference.heads[task].items():
            np.testing.assert_allclose(outcome.heads[task][parameter], values, rtol=1e-5, atol=1e-6)
            assert np.abs(values).max() > 0.1  # It has moved.


def test_a_site_whose_records_have_some_of_the_labels_trains_the_whole_head(tmp_path: Path) -> None:
    own = hospitals(tmp_path)
    east, west = own.site("east", ("shade",)), own.site("west", ("shade",))
    rows = (tmp_path / "west" / "pictures.csv").read_text().splitlines()
    (tmp_path / "west" / "pictures.csv").write_text("\n".join(row for row in rows if not row.endswith("grey")) + "\n")
    north = own.site("north", ("finding",))
    outcome, events = federate(own, [east, north, west], "run-1")
    assert outcome.updates == {"shade": 2, "finding": 2}
    assert outcome.heads["shade"]["weight"].shape[0] == 3
    labels = open_units(west.state_dir / "runs" / "run-1" / "data", "train", ["shade"], CPU).tasks["shade"].labels
    assert set(labels.tolist()) == {0, 2}
    assert not select_events(events, SiteRejected)


def test_a_simulation_of_two_backbones_has_all_baselines_and_says_which_head_stands_on_which(tmp_path: Path) -> None:
    own = hospitals(tmp_path)
    sites = {"east": ("shade",), "north": BOTH, "west": ("finding",)}
    made = {name: own.site(name, tasks) for name, tasks in sites.items()}
    sources = {
        name: {task.source: site.sources[task.source].model_dump() for task in site.tasks.values()}
        for name, site in made.items()
    }
    tasks = {
        name: {**made["north"].tasks[name].model_dump(exclude={"min_units", "mix"}), "public_size": PATIENTS}
        for name in BOTH
    }
    values = {
        "run": own.run.model_dump(mode="json"),
        "tasks": tasks,
        "partition": {"kind": "natural", "sites": sources, "test_fraction": 0.3},
        "unit": "patient",
        "budget": {"epsilon": 100.0, "delta": 1e-5},
        "baselines": ["obvious", "local", "non_private", "central", "random_backbone"],
        "non_private_solver": PLAIN["solver"],
        "cache_dir": str(tmp_path / "cache"),
        "runs_dir": str(tmp_path / "runs"),
        "device": "cpu",
    }
    summary = run_simulation(parse(SimulationConfig, values, base=tmp_path), out=tmp_path / "out")
    assert summary.status == "completed"
    for task in BOTH:
        baselines = summary.tasks[task].baselines
        assert set(baselines) == {"baseline_prediction", "local", "non_private", "central", "random_backbone"}
        about = read_config(tmp_path / "out")
        name = about.tasks[task].backbone
        assert name == own.run.backbone_of(task) and about.backbones[name].digest == own.digests[name]
        assert "backbone" not in about.tasks[task].settings
    # Both nets are random as they are: others with the same architecture have other digests.
    again = read_run_journal(tmp_path / "out" / "baselines" / "random_backbone" / "journal.jsonl")
    (about,) = (event.backbones for event in select_events(again, RunStarted))
    assert {name for name, entry in about.items() if entry.digest == own.digests[name]} == set()


def test_a_mixed_run_with_a_trunk_that_was_cut_off_resumes_to_the_heads_of_a_whole_one(tmp_path: Path) -> None:
    class Cut(Exception):
        pass

    def observe(phase: str, done: int, total: int) -> None:
        del total
        if phase == "rounds" and done == 2:
            raise Cut

    solver = {"kind": "dp_sgd", "sampling_rate": 1.0, "steps": 2, "clip_norm": 1.0, "learning_rate": 1.0}
    own = hospitals(
        tmp_path,
        rounds=3,
        trainable={"pictures": {"from": "4"}},
        solver={**solver, "trunk": {"learning_rate": 0.1}},
    )
    made = {name: own.site(name, tasks) for name, tasks in {"north": BOTH, "west": ("finding",)}.items()}
    values = {
        "run": own.run.model_dump(mode="json"),
        "tasks": {
            name: {**made["north"].tasks[name].model_dump(exclude={"min_units", "mix"}), "public_size": PATIENTS}
            for name in BOTH
        },
        "partition": {
            "kind": "natural",
            "sites": {
                name: {task.source: site.sources[task.source].model_dump() for task in site.tasks.values()}
                for name, site in made.items()
            },
            "test_fraction": 0.3,
        },
        "unit": "patient",
        "budget": {"epsilon": 100.0, "delta": 1e-5},
        "noise_seed": 7,
        "cache_dir": str(tmp_path / "cache"),
        "runs_dir": str(tmp_path / "runs"),
        "device": "cpu",
    }
    config = parse(SimulationConfig, values, base=tmp_path)
    run_simulation(config, out=tmp_path / "whole" / "run")
    with pytest.raises(Cut):
        run_simulation(config, out=tmp_path / "cut" / "run", observe=observe)
    resume(tmp_path / "cut" / "run")
    whole, cut = (load_checkpoint(tmp_path / name / "run/checkpoint.safetensors").heads for name in ("whole", "cut"))
    assert set(whole) == {"shade", "finding", "pictures.trunk"}
    assert heads_digest(whole) == heads_digest(cut)


# --- one patient, two modalities -------------------------------------------------------------------------------------


class SilentStream(NoiseStream):
    """Real coins, no noise."""

    def rounded_gaussian(self, count: int, log2_deviation: int) -> np.ndarray:
        return np.zeros(count, np.int64)


def prepared(own: Hospitals, name: str, tasks: tuple[str, ...], run: RunConfig | None = None) -> Units:
    """A site's units after it joined, received what it lacks and prepared."""
    site = Site(own.site(name, tasks), os_entropy)
    run = run or own.run
    join(site, own.offer(run=run))
    specs = {}
    for backbone in {run.backbone_of(task): own.backbones[run.backbone_of(task)] for task in tasks}.values():
        blob = backbone.blob()
        keep_part(site, messages.PartRequest("run-1", blob.digest, 0, 1, blob.weights))
        specs[blob.digest] = blob.spec
    prepare_run(site, messages.PrepareRequest("run-1", specs))
    return open_units(site.config.state_dir / "runs" / "run-1" / "data", "train", list(tasks), CPU)


def test_a_patients_pictures_and_report_are_one_unit(own: Hospitals) -> None:
    units = prepared(own, "units", BOTH)
    assert units.num_units == PATIENTS
    pictures, reports = units.tasks["shade"], units.tasks["finding"]
    assert pictures.features_RD.shape == (2 * (PATIENTS - 1), own.backbones["pictures"].feature_dim)
    assert reports.features_RD.shape == (PATIENTS, own.backbones["texts"].feature_dim)
    # The files list patients in one order: two pictures each and one report; the last has a report only.
    owner_of_report = reports.unit_R.tolist()
    assert pictures.unit_R.tolist() == [owner_of_report[row // 2] for row in range(2 * (PATIENTS - 1))]


@pytest.mark.parametrize("kind", ["dp_gd", "dp_sgd"])
def test_a_patient_is_clipped_once_over_both_modalities(own: Hospitals, kind: str) -> None:
    units = prepared(own, f"clipped-{kind.replace('_', '-')}", BOTH)
    tasks = {name: open_task(own.run.tasks[name], name) for name in BOTH}
    generator = torch.Generator().manual_seed(0)
    heads: dict[str, nn.Module] = {}
    for name in BOTH:
        heads[name] = tasks[name].head(own.backbones[own.run.backbone_of(name)].feature_dim)
        for parameter in heads[name].parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator)
    clip, rate, size = 0.5, 2.0, PATIENTS
    rates = {"sampling_rate": 1.0} if kind == "dp_sgd" else {}
    solver = open_solver({"kind": kind, "steps": 1, "clip_norm": clip, "learning_rate": rate, **rates}, "solver")
    delta = solver.solve(
        heads,
        tasks,
        units,
        plan=Plan(1.0, 1, clip, 1.0, Unit.PATIENT),
        public_sizes=dict.fromkeys(BOTH, size),
        stream=SilentStream(bytes(32)),
    )
    expected = loop_over_patients(units, tasks, heads, clip)
    for name in BOTH:
        for key, total in expected[name].items():
            np.testing.assert_allclose(delta.heads[name][key], -rate * total / size, rtol=2e-4, atol=1e-6)


def loop_over_patients(units: Units, tasks: Any, heads: Any, clip: float) -> dict[str, dict[str, np.ndarray]]:
    """Sum over patients of their gradient over both heads, each clipped as one vector; autograd, one at a time."""
    totals = {name: {key: np.zeros(p.shape) for key, p in head.named_parameters()} for name, head in heads.items()}
    clipped = 0
    for unit in range(units.num_units):
        gradient: dict[tuple[str, str], np.ndarray] = {}
        for name, head in heads.items():
            records = units.tasks[name]
            mine = (records.unit_R == unit).nonzero().flatten()
            if not len(mine):
                continue
            losses = tasks[name].losses(head(records.features_RD[mine]), records.labels[mine])
            found = torch.autograd.grad(losses.mean(), list(head.parameters()))
            gradient |= {(name, key): g.numpy() for (key, _), g in zip(head.named_parameters(), found, strict=True)}
        norm = float(np.sqrt(sum((values**2).sum() for values in gradient.values())))
        clipped += norm > clip
        for (name, key), values in gradient.items():
            totals[name][key] += values * min(1.0, clip / norm)
    assert clipped > units.num_units / 2  # Else this would test no clipping.
    return totals


def test_two_backbones_may_read_the_same_pictures(tmp_path: Path) -> None:
    made = hospitals(tmp_path)
    other = {**made.run.backbone_specs["pictures"].model_dump(), "projection": {"normalize": True}}
    run = made.run.model_dump(mode="json")
    run["backbones"]["normalised"] = other
    run["tasks"]["again"] = {"kind": "classification", "labels": TASKS["shade"]["labels"], "backbone": "normalised"}
    own = hospitals(tmp_path, backbones=run["backbones"], tasks=run["tasks"])
    tasks = ("shade", "again", "finding")
    units = prepared(own, "north", tasks)
    first, second = units.tasks["shade"], units.tasks["again"]
    assert units.num_units == PATIENTS
    assert first.unit_R.tolist() == second.unit_R.tolist()
    assert first.labels.tolist() == second.labels.tolist()
    expected = nn.functional.normalize(first.features_RD, dim=1)
    # Rows are kept to 16 bits of twice their norm.
    torch.testing.assert_close(second.features_RD, expected, rtol=0.0, atol=2.0**-13)
    assert not torch.allclose(first.features_RD, expected)


# --- what a hostile or careless coordinator asks ---------------------------------------------------------------------


def test_a_site_that_allows_one_of_two_digests_declines_the_run_and_one_that_needs_no_more_joins(
    tmp_path: Path,
) -> None:
    own = hospitals(tmp_path)
    allow = {"tasks": "any", "backbones": [own.digests["texts"]], "solvers": "any"}
    both = Site(own.site("north", BOTH, allow=allow), os_entropy)
    assert declined(both, own.offer()) is DeclineReason.BACKBONE_NOT_ALLOWED
    assert both.ledger().spent().reserved_epsilon == 0
    assert not (both.config.state_dir / "backbones").exists()
    texts = Site(own.site("west", ("finding",), allow=allow), os_entropy)
    assert set(join(texts, own.offer()).backbones) == {"texts"}


def test_a_backbone_of_other_settings_than_the_run_names_is_refused(tmp_path: Path) -> None:
    """Whoever approves a run reads the settings: weights of others may not come under them."""
    own = hospitals(tmp_path)
    site = Site(own.site("north", BOTH), os_entropy)
    pictures, texts = own.digests["pictures"], own.digests["texts"]
    offer = own.offer()
    join(site, messages.JoinRequest(offer.run_id, offer.run, {"pictures": texts, "texts": pictures}))
    for name in ("pictures", "texts"):
        blob = own.backbones[name].blob()
        keep_part(site, messages.PartRequest("run-1", blob.digest, 0, 1, blob.weights))
    specs = {backbone.digest: backbone.spec for backbone in own.backbones.values()}
    with pytest.raises(SiteDeclined) as caught:
        prepare_run(site, messages.PrepareRequest("run-1", specs))
    assert caught.value.reason is DeclineReason.BACKBONE_NOT_ALLOWED


@pytest.mark.parametrize("which", ["of nobody", "of another site's tasks"])
def test_a_part_of_a_backbone_that_no_task_here_stands_on_is_declined_and_not_kept(tmp_path: Path, which: str) -> None:
    own = hospitals(tmp_path)
    site = Site(own.site("west", ("finding",)), os_entropy)
    join(site, own.offer())
    digest = "0" * 64 if which == "of nobody" else own.digests["pictures"]
    with pytest.raises(SiteDeclined) as caught:
        keep_part(site, messages.PartRequest("run-1", digest, 0, 1, b"1"))
    assert caught.value.reason is DeclineReason.BACKBONE_NOT_ALLOWED
    with pytest.raises(SiteDeclined) as caught:
        prepare_run(site, messages.PrepareRequest("run-1", {digest: "{}"}))
    assert caught.value.reason is DeclineReason.BACKBONE_NOT_ALLOWED
    assert digest not in held(site.config)


def test_a_backbone_that_was_not_sent_cannot_be_prepared_with(tmp_path: Path) -> None:
    own = hospitals(tmp_path)
    site = Site(own.site("north", BOTH), os_entropy)
    join(site, own.offer())
    blob = own.backbones["texts"].blob()
    keep_part(site, messages.PartRequest("run-1", blob.digest, 0, 1, blob.weights))
    with pytest.raises(BadInput, match="not received"):
        prepare_run(site, messages.PrepareRequest("run-1", {blob.digest: blob.spec}))
    assert not (site.config.state_dir / "runs" / "run-1" / "prepared.json").exists()


def offered(own: Hospitals, change: Any) -> messages.JoinRequest:
    """The run as offered, after a change to its plain values and digests."""
    run, digests = json.loads(json.dumps(own.offer().run)), dict(own.digests)
    change(run, digests)
    return messages.JoinRequest("run-1", run, digests)


WRONG: dict[str, Any] = {
    "a task on an unknown backbone": lambda run, digests: run["tasks"]["shade"].update(backbone="sounds"),
    "a task on no backbone": lambda run, digests: run["tasks"]["shade"].update(backbone=None),
    "a backbone without a task": lambda run, digests: run["tasks"].pop("shade"),
    "a backbone without a digest": lambda run, digests: digests.pop("texts"),
    "a digest without a backbone": lambda run, digests: digests.update(sounds="1" * 64),
    "one backbone and several": lambda run, digests: run.update(backbone={"kind": "identity", "dim": 3}),
    "no backbone": lambda run, digests: run.update(backbones=None),
    "a backbone of no kind": lambda run, digests: run["backbones"]["texts"].update(kind="no_such"),
}


@pytest.mark.parametrize("change", WRONG.values(), ids=WRONG.keys())
def test_an_offer_whose_backbones_do_not_fit_together_is_declined(own: Hospitals, change: Any) -> None:
    site = Site(own.site("north", BOTH), os_entropy)
    assert declined(site, offered(own, change)) is DeclineReason.BAD_REQUEST
    assert not (site.config.state_dir / "runs").exists()


def test_an_approval_holds_for_all_digests_of_a_run(own: Hospitals) -> None:
    site = own.site("careful", BOTH, approval="required")
    offer = own.offer()
    assert declined(Site(site, os_entropy), offer) is DeclineReason.NOT_APPROVED
    asked = Offer(offer.run, offer.backbones)
    other = Offer(offer.run, {**offer.backbones, "texts": "1" * 64})
    assert asked.digest != other.digest
    Approvals(site.state_dir).approve(other)
    assert declined(Site(site, os_entropy), offer) is DeclineReason.NOT_APPROVED
    Approvals(site.state_dir).approve(asked)
    assert set(join(Site(site, os_entropy), offer).backbones) == {"pictures", "texts"}


def test_who_approves_a_run_reads_all_digests_and_no_backbones_name_stands_in_for_a_price(tmp_path: Path) -> None:
    made = hospitals(tmp_path).run.model_dump(mode="json")
    backbones = {"price": made["backbones"]["pictures"], "warning": made["backbones"]["texts"]}
    names = {"shade": "price", "finding": "warning"}
    tasks = {task: {**settings, "backbone": names[task]} for task, settings in TASKS.items()}
    own = hospitals(tmp_path, backbones=backbones, tasks=tasks)
    write_yaml(tmp_path / "site.yaml", own.site("north", BOTH, approval="required"))
    offer = own.offer()
    (tmp_path / "offer.json").write_bytes(encode_offer(offer.run, offer.backbones))
    shown = CliRunner().invoke(app, ["approve", str(tmp_path / "site.yaml"), str(tmp_path / "offer.json")])
    assert shown.exit_code == 0, shown.output
    lines = {words[0]: words[1] for line in shown.stdout.splitlines() if len(words := line.split(maxsplit=1)) == 2}
    assert lines["price"].startswith("epsilon ")
    assert "warning" not in lines
    assert lines["code_digest"] == compute_code_digest()
    assert all(digest in lines["backbones"] for digest in own.digests.values())
    # As the file has them: in order of their names.
    assert lines["tasks"] == "finding (classification, on warning), shade (classification, on price)"
