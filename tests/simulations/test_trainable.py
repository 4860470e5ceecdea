"""A part of a backbone trains with the heads of two tasks: whole runs, from sites through aggregation to the export."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from torch import nn

from client.personal.evaluate import compare
from client.protocol.plan import plan_run
from client.protocol.site import Site, SiteDeclined
from client.protocol.train import train
from common import messages
from common.backbones.small_cnn import SmallCnn
from common.backbones.transformers import Transformers
from common.events import FEDERATED, MetricsEvaluated, read_run_journal, select_events
from common.model.backbones import open_pretrained
from common.privacy.noise import SeededEntropy, os_entropy
from common.run import RunConfig
from common.serving.folder import read_config
from common.types import BadInput, DeclineReason
from common.yaml import load, parse
from server.rounds.checkpoint import load_checkpoint
from simulations.config import SimulationConfig
from simulations.experiment import resume, run, write_files
from simulations.partition import read_sites

TRUNK = "backbone.trunk"
PRIVATE = {"unit": "example", "delta": 1e-5, "target_epsilon": 8.0}
DP_GD = {"kind": "dp_gd", "steps": 1, "clip_norm": 1.0, "learning_rate": 1.0}
SGD = {"kind": "sgd", "sampling_rate": 1.0, "steps": 4, "learning_rate": 1.0, "trunk": {"learning_rate": 0.1}}


def simulation(folder: Path, **changes: Any) -> SimulationConfig:
    """Stripes in two directions, thin or thick, as grey pictures: a random net's features do not say which."""
    rng = np.random.default_rng(0)
    arrays = {}
    for part, count in (("train", 120), ("test", 60)):
        direction, width = rng.integers(0, 2, count), rng.integers(0, 2, count)
        at = np.arange(12)[None, :] + rng.integers(0, 6, (count, 1))
        wave = (at // (1 + 2 * width[:, None])) % 2 * 200
        pictures = np.repeat(wave[:, None, :], 12, axis=1)
        pictures = np.where(direction[:, None, None] == 1, pictures.transpose(0, 2, 1), pictures)
        arrays[f"{part}_x"] = (pictures + rng.integers(0, 40, pictures.shape)).astype(np.uint8)
        arrays[f"{part}_direction"] = np.array(["across", "down"])[direction]
        arrays[f"{part}_width"] = np.array(["thin", "thick"])[width]
    np.savez(folder / "stripes.npz", **arrays)
    parts = {
        part: {"inputs": f"{part}_x", "labels": {name: f"{part}_{name}" for name in ("direction", "width")}}
        for part in ("train", "test")
    }
    values: dict[str, Any] = {
        "run": {
            "name": "stripes",
            "seed": 1,
            "rounds": 3,
            "backbone": dict(SmallCnn.example(folder).settings),
            "trainable": {"backbone": {"from": "4"}},
            "tasks": {
                "direction": {"kind": "classification", "labels": ["across", "down"]},
                "width": {"kind": "classification", "labels": ["thin", "thick"]},
            },
            "solver": {
                "kind": "dp_sgd",
                "sampling_rate": 1.0,
                "steps": 2,
                "clip_norm": 1.0,
                "learning_rate": 1.0,
                "trunk": {"learning_rate": 1.0},
            },
            "privacy": PRIVATE,
            "aggregation": {"kind": "mean"},
        },
        "sources": {"stripes": {"kind": "npz", "path": str(folder / "stripes.npz"), "parts": parts}},
        "tasks": {
            name: {"source": "stripes", "label": name, "missing": "refuse", "public_size": 60}
            for name in ("direction", "width")
        },
        "partition": {"kind": "iid", "num_sites": 2, "split": "source"},
        "unit": "example",
        "budget": {"epsilon": 20.0, "delta": 1e-5},
        "cache_dir": str(folder / "cache"),
        "runs_dir": str(folder / "runs"),
        "device": "cpu",
    }
    for key, value in changes.items():
        if key == "run":
            values["run"] |= value
        else:
            values[key] = value
    return parse(SimulationConfig, values, base=folder)


def test_what_trains_travels_and_nothing_else_and_the_export_gives_the_reported_accuracy(tmp_path: Path) -> None:
    """The export is loaded by hand into the whole encoder, which then encodes pictures without any boundary."""
    config = simulation(tmp_path)
    summary = run(config, out=tmp_path / "out")
    assert summary.status == "completed"
    heads = load_checkpoint(tmp_path / "out" / "checkpoint.safetensors").heads
    assert set(heads) == {"direction", "width", TRUNK}
    assert set(heads[TRUNK]) == {"above.4.weight", "above.4.bias"}, "the last convolution, and no BatchNorm"
    numbers = sum(array.size for params in heads.values() for array in params.values())
    assert 4 * numbers < summary.bytes.up_per_site_round < 4 * numbers + 1000

    exported = {path.stem: load_file(path) for path in (tmp_path / "out" / "model" / "heads").iterdir()}
    assert read_config(tmp_path / "out").tasks["width"].trunk == TRUNK
    backbone = open_pretrained(config.run.backbone_specs["backbone"], "backbone")
    whole = backbone.module
    before = whole.encoder.get_submodule("4").weight.detach().clone()
    with torch.no_grad():
        for name, array in exported[TRUNK].items():
            whole.encoder.get_parameter(name.removeprefix("above.")).copy_(torch.from_numpy(array))
    assert not torch.equal(before, whole.encoder.get_submodule("4").weight)
    data = np.load(tmp_path / "stripes.npz")
    with torch.no_grad():
        features = whole(torch.stack([backbone.preprocess(picture) for picture in data["test_x"]]))
    for task, labels in (("direction", ["across", "down"]), ("width", ["thin", "thick"])):
        outputs = features.numpy() @ exported[task]["weight"].T + exported[task]["bias"]
        right = np.array(labels)[outputs.argmax(1)] == data[f"test_{task}"]
        assert summary.tasks[task].metrics["accuracy"] == pytest.approx(right.mean())


def test_a_site_evaluates_what_came_home_through_the_trunk(tmp_path: Path) -> None:
    run(simulation(tmp_path), out=tmp_path / "out")
    events = read_run_journal(tmp_path / "out" / "journal.jsonl")
    reported = {event.task: event.per_site for event in select_events(events, MetricsEvaluated)}
    for config in read_sites(tmp_path / "out" / "sites"):
        result = compare(Site(config, os_entropy))
        for task, own in result.tasks.items():
            assert own[FEDERATED]["accuracy"].value == pytest.approx(reported[task][config.name]["accuracy"])


def test_training_the_convolutions_learns_what_a_frozen_random_net_does_not_show(tmp_path: Path) -> None:
    # Steps short enough that the last bits of a processor do not decide where they end.
    solver = {**SGD, "steps": 8, "learning_rate": 0.5, "trunk": {"learning_rate": 0.05}}
    frozen = {"trainable": {}, "rounds": 12, "privacy": "non_private", "solver": solver}
    whole = {**frozen, "trainable": {"backbone": {"from": "input"}}}
    accuracy = {}
    for name, changes in (("frozen", frozen), ("whole", whole)):
        summary = run(simulation(tmp_path, run=changes), out=tmp_path / name)
        accuracy[name] = min(task.metrics["accuracy"] for task in summary.tasks.values())
    assert accuracy["whole"] > 0.95 > accuracy["frozen"] + 0.1


@pytest.mark.slow
def test_all_baselines_and_noised_evaluations_go_through_the_trunk(tmp_path: Path) -> None:
    config = simulation(
        tmp_path,
        run={"evaluation": {"every": 3}},
        baselines=["obvious", "local", "non_private", "central", "random_backbone"],
        non_private_solver=SGD,
        evaluation={"share": 0.3, "evaluations": 1},
    )
    summary = run(config, out=tmp_path / "out")
    for task in summary.tasks.values():
        assert set(task.baselines) == {"baseline_prediction", "local", "non_private", "central", "random_backbone"}
        assert task.evaluation.rounds[0].round == 3
    assert all(site.status == "completed" for site in summary.sites.values())


def test_a_resumed_run_makes_the_trunk_of_an_uninterrupted_one(tmp_path: Path) -> None:
    class Interrupted(Exception):
        pass

    def observe(phase: str, done: int, total: int) -> None:
        del total
        if phase == "rounds" and done == 2:
            raise Interrupted

    run(simulation(tmp_path), out=tmp_path / "whole" / "run", entropy=SeededEntropy(1))
    with pytest.raises(Interrupted):
        run(simulation(tmp_path), out=tmp_path / "cut" / "run", entropy=SeededEntropy(1), observe=observe)
    resume(tmp_path / "cut" / "run", entropy=SeededEntropy(1))
    first, second = (load_checkpoint(tmp_path / name / "run" / "checkpoint.safetensors") for name in ("whole", "cut"))
    for name, array in first.heads[TRUNK].items():
        assert array.tobytes() == second.heads[TRUNK][name].tobytes()


@pytest.mark.parametrize("wrong", ["missing", "shape", "frozen"])
def test_a_request_that_does_not_fit_the_trunk_is_declined_and_costs_nothing(tmp_path: Path, wrong: str) -> None:
    class Interrupted(Exception):
        pass

    def observe(phase: str, done: int, total: int) -> None:
        del total
        if phase == "rounds" and done == 2:
            raise Interrupted

    with pytest.raises(Interrupted):
        run(simulation(tmp_path), out=tmp_path / "out", observe=observe)
    heads = {
        name: dict(params) for name, params in load_checkpoint(tmp_path / "out/checkpoint.safetensors").heads.items()
    }
    if wrong == "missing":
        del heads[TRUNK]
    elif wrong == "shape":
        heads[TRUNK]["above.4.bias"] = np.zeros(9, np.float32)
    else:
        heads[TRUNK]["above.5.weight"] = np.ones(8, np.float32)  # A BatchNorm's.
    site = Site(read_sites(tmp_path / "out" / "sites")[0], os_entropy)
    before = site.ledger().spent()
    with pytest.raises(SiteDeclined) as caught:
        train(site, messages.TrainRequest("out", 3, heads))
    assert caught.value.reason is (DeclineReason.TASK_NOT_ALLOWED if wrong == "missing" else DeclineReason.BAD_REQUEST)
    assert site.ledger().spent() == before


def test_a_boundary_is_encoded_once_and_adapters_share_it(tmp_path: Path) -> None:
    """One entry of the feature store for each source and boundary."""

    def entries(trainable: dict[str, Any], name: str) -> int:
        run(simulation(tmp_path, run={"trainable": trainable, "rounds": 1}), out=tmp_path / name)
        return len([path for path in (tmp_path / "cache" / "features").iterdir() if path.is_dir()])

    first = entries({}, "a")
    second = entries({"backbone": {"from": "4"}}, "b")
    assert second == 2 * first
    assert entries({"backbone": {"from": "4"}}, "c") == second
    assert entries({"backbone": {"from": "input"}}, "d") == 3 * first


def test_adapters_on_a_text_encoder_train_and_alone_travel(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    settings = dict(Transformers.example(tmp_path / "model").settings)
    rng = np.random.default_rng(0)
    lines = []
    for number in range(120):
        finding = ["tumour", "edema"][number % 2]
        words = rng.permutation(["the", "scan", "shows", finding, "no", "an"])
        lines.append(f"{' '.join(words)}\t{finding}")
    for part, rows in (("train", lines[:80]), ("test", lines[80:])):
        (tmp_path / f"{part}.tsv").write_text("\n".join(rows) + "\n")
    source = {
        "kind": "text",
        "path": {part: str(tmp_path / f"{part}.tsv") for part in ("train", "test")},
        "header": ["report", "finding"],
        "text": "report",
    }
    lora = {"rank": 2, "alpha": 4, "targets": ["query", "value"]}
    config = simulation(
        tmp_path,
        run={
            "backbone": settings,
            "trainable": {"backbone": {"from": "encoder.layer.1", "lora": lora}},
            "tasks": {"finding": {"kind": "classification", "labels": ["tumour", "edema"]}},
        },
        sources={"reports": source},
        tasks={"finding": {"source": "reports", "label": "finding", "missing": "refuse", "public_size": 40}},
    )
    summary = run(config, out=tmp_path / "out")
    assert summary.status == "completed"
    trunk = load_checkpoint(tmp_path / "out" / "checkpoint.safetensors").heads[TRUNK]
    # Two layers with A (2 x 16) and B (16 x 2).
    assert sorted(array.shape for array in trunk.values()) == [(2, 16), (2, 16), (16, 2), (16, 2)]
    assert all(np.abs(array).max() > 0 for name, array in trunk.items() if "lora_B" in name), "B was zero at first"


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"solver": DP_GD}, "solver: expected a kind that trains a part of a backbone .* got dp_gd without"),
        ({"solver": {**DP_GD, "trunk": {"learning_rate": 0.1}}}, "dp_gd trains no part of a backbone"),
        ({"trainable": {"backbone": "4"}}, "trainable.backbone: expected {from: 4}, got '4'"),
        ({"trainable": {"backbone": {"from": "3"}}}, "trainable.backbone.from: expected input or one of 0, 4"),
        ({"trainable": {"vision": {"from": "4"}}}, "expected some of backbone, got 'vision'"),
        (
            {"trainable": {"backbone": {"from": "4", "lora": {"rank": 1, "alpha": 1, "targets": ["query"]}}}},
            "trainable.backbone.lora: expected a part with linear layers, as backbones of kind transformers",
        ),
    ],
    ids=["rates", "solver", "group", "block", "backbone", "targets"],
)
def test_what_cannot_train_is_refused_before_anything_runs(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(BadInput, match=said):
        run(simulation(tmp_path, run=changes), out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_baseline_that_trains_the_trunk_too_needs_its_rates(tmp_path: Path) -> None:
    plain = {key: value for key, value in SGD.items() if key != "trunk"}
    with pytest.raises(BadInput, match="non_private_solver.trunk: expected a learning rate of its own"):
        simulation(tmp_path, baselines=["central"], non_private_solver=plain)


def test_a_baselines_rates_are_of_tasks_that_are_there(tmp_path: Path) -> None:
    solver = {**SGD, "tasks": {"nobody": {"learning_rate": 0.1}}}
    with pytest.raises(BadInput, match=r"non_private_solver\.tasks: expected some of .*got 'nobody'"):
        simulation(tmp_path, baselines=["central"], non_private_solver=solver)


def test_a_kind_that_cannot_be_divided_says_so(simulation_file: Path, tmp_path: Path) -> None:
    overrides = ["run.trainable={backbone: {from: input}}", "run.solver.trunk={learning_rate: 0.1}"]
    with pytest.raises(BadInput, match="frozen as a whole"):
        run(simulation_file, out=tmp_path / "out", overrides=overrides)


def test_dropout_of_the_pretraining_never_acts(tmp_path: Path) -> None:
    """Noise off, equal streams: two runs make the same bits although the library's layers hold dropouts."""
    (tmp_path / "model").mkdir()
    backbone = open_pretrained(dict(Transformers.example(tmp_path / "model").settings), "backbone")
    dropouts = [part for part in backbone.module.modules() if isinstance(part, nn.Dropout) and part.p > 0]
    assert dropouts, "else this shows nothing"
    from common.model.trunks import cut
    from common.run import Trainable

    example = Transformers.example(tmp_path / "model")
    parts = cut(backbone, Trainable(**{"from": "encoder.layer.0"}), TRUNK, "trainable", seed=0)
    rows = parts.below.encode([backbone.preprocess(item) for item in example.items])
    trunk = parts.trunk.train()
    assert torch.equal(trunk(rows), trunk(rows))


def test_the_outlook_judges_heads_and_trunk_apart_and_warns_of_a_trunk_that_drowns(tmp_path: Path) -> None:
    """By the formula: noise s in P parameters and 2 steps, 60 units that agree, 2 sites and 3 rounds."""
    outlooks = {}
    for block in (None, "4", "input"):
        trainable = {} if block is None else {"backbone": {"from": block}}
        privacy = {**PRIVATE, "target_epsilon": 0.6}
        own = tmp_path / str(block)
        (config, _) = write_files(simulation(tmp_path, run={"trainable": trainable, "privacy": privacy}), own)
        outlooks[block] = plan_run(config, load(RunConfig, own / "run.yaml"), 2)
    assert outlooks[None].noise_to_signal == outlooks["4"].noise_to_signal > 0
    assert outlooks[None].trunk_parameters == {} and outlooks[None].run_trunk_noise_to_signal == 0.0
    backbone = open_pretrained(simulation(tmp_path).run.backbone_specs["backbone"], "backbone").module.encoder
    widths = {"4": backbone.get_submodule("4"), "input": backbone}
    for block, part in widths.items():
        norms = (nn.BatchNorm2d,)
        number = sum(p.numel() for own in part.modules() if not isinstance(own, norms) for p in own.parameters(False))
        found = outlooks[block]
        assert found.trunk_parameters == {"backbone": number}
        ratio = found.noise_multiplier * np.sqrt(number * 2) / (60 * 2)
        assert found.trunk_noise_to_signal == pytest.approx(ratio)
        assert found.run_trunk_noise_to_signal == pytest.approx(ratio / np.sqrt(6))
        assert ratio / np.sqrt(6) > 1 > found.run_noise_to_signal, "else nothing is shown"
        assert [warning for warning in found.warnings if f"({number:,} of backbone)" in warning]
    assert not any("trains of the backbone" in warning for warning in outlooks[None].warnings)


def test_a_trunk_whose_noise_is_small_is_not_warned_of(tmp_path: Path) -> None:
    (config, _) = write_files(
        simulation(tmp_path, run={"privacy": {**PRIVATE, "target_epsilon": 20.0}}), tmp_path / "a"
    )
    outlook = plan_run(config, load(RunConfig, tmp_path / "a" / "run.yaml"), 2)
    assert 0 < outlook.run_trunk_noise_to_signal < 1
    (warning,) = outlook.warnings  # Only that experiments advise against any trunk under privacy.
    assert "head alone was better" in warning
