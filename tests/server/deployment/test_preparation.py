"""What a run needs torch for is made once, before it starts; the run's own process reads it and loads no torch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from common.model.backbones import Backbone, open_backbones
from common.model.parameters import parameters
from common.model.trunks import create_modules
from common.offers import list_digests
from common.plugins import plugin_class
from common.run import RunConfig
from common.tasks import open_task
from common.types import BadInput, heads_digest
from server.deployment import preparation
from server.deployment.federation import Federation
from server.deployment.preparation import load_backbones, prepare_again, prepare_run, write_prepared
from server.rounds.checkpoint import load_checkpoint
from tests.server.deployment.federations import new_federation
from tests.tiny import run_config

ROOT = Path(__file__).resolve().parents[3]
TASKS = {
    "finding": {"kind": "classification", "labels": ["no", "yes"], "head": {"hidden": 5}},
    "who": {"kind": "embedding", "labels": ["ann", "bob"], "start": "features", "head": {"bias": False}},
}


@pytest.fixture
def federation(tmp_path: Path) -> Federation:
    return new_federation(tmp_path / "fed")


def trained_run(folder: Path, **changes: object) -> RunConfig:
    """A run whose heads and adapters are drawn at random, on a transformer in a folder."""
    folder.mkdir(exist_ok=True)
    example = plugin_class("common.backbones", "transformers").example(folder)
    return run_config(
        backbone=dict(example.settings),
        tasks=TASKS,
        trainable={"backbone": {"from": "encoder.layer.1", "lora": {"rank": 2, "alpha": 4, "targets": ["query"]}}},
        solver={
            **{"kind": "dp_sgd", "sampling_rate": 1.0, "steps": 2, "clip_norm": 1.0, "learning_rate": 1.0},
            "trunk": {"learning_rate": 0.1},
        },
        aggregation={"kind": "fedadam", "learning_rate": 0.1},
        **changes,
    )


def shut(federation: Federation, monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on, whatever has to be prepared anew fails."""

    def refuse(*arguments: object) -> None:
        raise AssertionError("prepared again")

    monkeypatch.setattr(preparation, "run_apart", refuse)


def test_heads_and_trunks_are_bit_for_bit_those_that_torch_draws(federation: Federation, tmp_path: Path) -> None:
    run = trained_run(tmp_path / "model")
    opened = open_backbones(run)
    tasks = {name: open_task(spec, name) for name, spec in run.tasks.items()}
    drawn = {name: parameters(module) for name, module in create_modules(run, tasks, opened).items()}
    assert any(array.any() for array in drawn["backbone.trunk"].values())
    prepared = prepare_run(federation, run)
    folder = federation.runs / "tiny-1"
    folder.mkdir()
    write_prepared(folder, prepared)
    start = load_checkpoint(folder / "checkpoint.safetensors")
    assert heads_digest(start.heads) == heads_digest(drawn)
    assert (start.run_id, start.rounds_done) == ("tiny-1", 0)
    assert list_digests(prepared.backbones) == list_digests(opened)
    assert prepared.backbones["backbone"].public_spec() == opened["backbone"].public_spec()


def test_a_backbone_is_sent_as_the_open_one_would_be(federation: Federation) -> None:
    run = run_config()
    (stored,), (opened,) = (each.values() for each in (prepare_run(federation, run).backbones, open_backbones(run)))
    assert isinstance(opened, Backbone)
    sent, expected = stored.blob(), opened.blob()
    assert (sent.spec, sent.weights[:], sent.digest) == (expected.spec, expected.weights, expected.digest)


def test_nothing_is_prepared_twice_while_its_weights_and_settings_are_the_same(
    federation: Federation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = trained_run(tmp_path / "model")
    first = prepare_run(federation, run)
    with monkeypatch.context() as patch:
        shut(federation, patch)
        again = prepare_run(federation, run.model_copy(update={"rounds": 9, "name": "other"}))
        assert again.backbones == first.backbones
        for changed in (
            run.model_copy(update={"seed": 4}),
            trained_run(tmp_path / "model", **{}).model_copy(update={"tasks": {"who": run.tasks["who"]}}),
        ):
            with pytest.raises(AssertionError, match="prepared again"):
                prepare_run(federation, changed)
    weights = tmp_path / "model" / "model.safetensors"
    os.utime(weights, ns=(1, 1))  # The same size, perhaps other bytes.
    with monkeypatch.context() as patch:
        shut(federation, patch)
        with pytest.raises(AssertionError, match="prepared again"):
            prepare_run(federation, run)


def test_damaged_weights_are_never_sent_and_are_written_again(federation: Federation, tmp_path: Path) -> None:
    run, folder = run_config(), federation.runs / "tiny-1"
    folder.mkdir()
    write_prepared(folder, prepare_run(federation, run))
    (stored,) = load_backbones(federation.state, folder).values()
    whole = stored.path.read_bytes()
    for damage in (whole[:-1], whole[:-1] + b"x", b""):
        stored.path.write_bytes(damage)
        with pytest.raises(BadInput, match=f"{stored.digest}.*headwater coordinator resume"):
            stored.blob()
        prepare_again(federation, folder, run, {})
        assert stored.path.read_bytes() == whole


def test_a_run_of_an_older_release_is_prepared_when_it_is_resumed(federation: Federation) -> None:
    """Its folder has no backbones, and a checkpoint where it has ended a round, which then stays as it is."""
    run, folder = run_config(), federation.runs / "tiny-1"
    folder.mkdir()
    with pytest.raises(BadInput, match="headwater coordinator resume"):
        load_backbones(federation.state, folder)
    prepare_again(federation, folder, run, {})
    assert load_checkpoint(folder / "checkpoint.safetensors").rounds_done == 0
    (folder / "backbones.json").unlink()
    (folder / "checkpoint.safetensors").write_bytes(b"of round 7")
    prepare_again(federation, folder, run, list_digests(open_backbones(run)))
    assert (folder / "checkpoint.safetensors").read_bytes() == b"of round 7"
    (folder / "backbones.json").unlink()
    with pytest.raises(BadInput, match="weights with which tiny-1 began"):
        prepare_again(federation, folder, run, {"backbone": "0" * 64})


def test_weights_that_no_run_and_no_preparation_needs_are_removed(
    federation: Federation, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preparation, "_MOST_PREPARED", 1)
    folder = federation.runs / "tiny-1"
    folder.mkdir()
    runs = [run_config(backbone={"kind": "identity", "dim": dim}) for dim in (3, 4, 5)]
    digests = [open_backbones(run)["backbone"].digest for run in runs]
    write_prepared(folder, prepare_run(federation, runs[0]))
    prepare_run(federation, runs[1])
    prepare_run(federation, runs[2])
    kept = {path.stem for path in (federation.state / "backbones").iterdir()}
    assert kept == {digests[0], digests[2]}
    assert len(list((federation.state / "prepared").iterdir())) == 2


def test_a_run_refused_by_the_process_that_prepares_is_refused_in_its_words(
    federation: Federation, tmp_path: Path
) -> None:
    values = run_config().model_dump(mode="json")
    values["tasks"]["colour"]["kind"] = "classificatoin"
    (tmp_path / "run.json").write_text(json.dumps(values))
    (tmp_path / "script.py").write_text("""
import json, sys
from pathlib import Path
from common.run import RunConfig
from common.types import BadInput
from common.yaml import load
from server.deployment.federation import open_federation
from server.deployment.preparation import prepare_run

if __name__ == "__main__":
    try:
        prepare_run(open_federation(Path(sys.argv[1])), load(RunConfig, Path(sys.argv[2])))
    except BadInput as error:
        print(json.dumps([str(error), "torch" in sys.modules]))
""")
    done = subprocess.run(
        [sys.executable, str(tmp_path / "script.py"), str(federation.folder), str(tmp_path / "run.json")],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=240,
    )
    message, with_torch = json.loads(done.stdout)
    assert message.startswith("tasks.colour.kind: expected one of") and "nearest: 'classification'" in message
    assert not with_torch and "Traceback" not in done.stderr


def test_the_runs_process_its_daemon_and_the_commands_load_no_torch() -> None:
    """Everything that they import, but the process that prepares."""
    modules = ["server.app", "server.superlink.daemon", "server.superlink.listeners", "server.rounds.evaluation"]
    modules += [f"server.commands.{path.stem}" for path in (ROOT / "server" / "commands").glob("[a-z]*.py")]
    tasks = [dict(plugin_class("common.tasks", kind).example().settings) for kind in ("embedding", "multilabel")]
    code = f"""
import importlib, sys
import numpy as np
for name in {modules}: importlib.import_module(name)
from common.tasks import NOISED_BUCKETS, open_task
for settings in {tasks}:
    statistic = open_task(settings, "task").statistic(NOISED_BUCKETS)
    statistic.values(np.ones(statistic.size))
print([name for name in ("torch", "scipy", "opacus", "pandas", "transformers") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr
