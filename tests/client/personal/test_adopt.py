"""A site that took part in no run adapts the heads of a model that it holds; nothing leaves and nothing is spent."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner, Result

from client.__main__ import app
from client.config import SiteConfig
from client.personal.personal_heads import AT_HOME, NEVER_LEAVES, load_personal_heads
from client.protocol.purge import purge
from client.protocol.site import PERSONAL_HEADS, Site
from common.events import FEDERATED, PERSONAL, PERSONAL_UNIFORM
from common.privacy.noise import os_entropy
from common.serving.folder import MODEL, read_config
from common.yaml import write_yaml
from headwater.__main__ import make_app
from tests.client.personal.test_align import SHARES
from tests.server.rounds.test_moments import run_once
from tests.tiny import DIM, TASKS, site_config

LABELS = {"colour": ["red", "green", "blue"], "size": ["small", "large"]}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model of a run of two sites, with next to no noise."""
    folder = tmp_path_factory.mktemp("trained")
    sites = [site_config(folder, name, budget={"epsilon": 1000.0, "delta": 1e-5}) for name in ("east", "north")]
    privacy = {"unit": "example", "delta": 1e-5, "noise_multiplier": 0.1}
    run_once(folder, sites, moments=SHARES, privacy=privacy)
    return sites[0].state_dir / "runs" / "run-1" / MODEL


def write_shifted_records(path: Path, *, labelled: bool = True) -> None:
    """Records of a new site, whose instrument shifts and stretches everything; most of them are red and small."""
    rng = np.random.default_rng(5)
    arrays = {}
    for part, count in (("train", 300), ("test", 200)):
        colour, size = rng.choice(3, count, p=[0.7, 0.2, 0.1]), rng.choice(2, count, p=[0.8, 0.2])
        vectors = 0.3 * rng.normal(size=(count, DIM))
        vectors[np.arange(count), colour] += 1.0
        vectors[:, 3] += 2.0 * size - 1.0
        arrays[f"{part}_x"] = (vectors + np.array([-0.5, 1.0, 0.6, 1.2])).astype(np.float32)
        known = np.arange(count) < (50 if part == "train" and labelled else 0 if part == "train" else count)
        arrays[f"{part}_colour"] = np.where(known, np.array(LABELS["colour"])[colour], "")
        arrays[f"{part}_size"] = np.where(known, np.array(LABELS["size"])[size], "")
    np.savez(path, **arrays)


def new_site(folder: Path, *, labelled: bool = True, mix: Any = None, **changes: Any) -> SiteConfig:
    folder.mkdir(exist_ok=True)
    write_shifted_records(folder / "west.npz", labelled=labelled)
    tasks = {
        name: {"source": "records", "label": name, "missing": "skip", "public_size": 300, "mix": (mix or {}).get(name)}
        for name in TASKS
    }
    return site_config(folder, "west", **{"tasks": tasks, "personal": "adapt", **changes})


def invoke(verb: str, config: SiteConfig, model: Path, *options: str) -> Result:
    path = config.state_dir.parent / "site.yaml"
    write_yaml(path, config)
    return CliRunner().invoke(app, [verb, str(path), "--model", str(model), *options])


def balanced(found: Any, kind: str, task: str = "colour") -> float:
    return float(found["tasks"][task][kind]["balanced_accuracy"])


def test_a_new_site_adapts_a_model_and_is_better_for_it(trained: Path, tmp_path: Path) -> None:
    config = new_site(tmp_path)
    shown = invoke("evaluate", config, trained, "--json")
    assert shown.exit_code == 0, shown.output
    found = json.loads(shown.stdout)
    assert found["personal"] == "adapt" and found["held_out_units"] == 200
    for task in TASKS:
        own = found["tasks"][task]
        assert list(own) == [FEDERATED, PERSONAL, PERSONAL_UNIFORM]
        assert own[PERSONAL]["accuracy"] > own[FEDERATED]["accuracy"] + 0.1
    done = invoke("adapt", config, trained)
    assert done.exit_code == 0 and NEVER_LEAVES in done.stdout
    read = " ".join(invoke("evaluate", config, trained).stdout.split())
    for task in TASKS:
        taken = found["alignments"][task]
        assert f"{task} ({taken})" in done.stdout and f"this site took for {task}: {taken}" in read
    (folder,) = (config.state_dir / "models").iterdir()
    kept = load_personal_heads(folder, purpose=AT_HOME)
    assert (kept.mode, kept.final_heads) == ("adapt", read_config(trained).heads)
    assert not list(config.state_dir.rglob("*ledger*/*")), "nothing was spent"


def test_predictions_of_the_model_at_the_site_are_those_of_the_adapted_heads(trained: Path, tmp_path: Path) -> None:
    config = new_site(tmp_path)
    assert invoke("adapt", config, trained).exit_code == 0
    path, out = tmp_path / "site.yaml", tmp_path / "predictions.csv"
    told = {}
    for option in ([], ["--federated"]):
        done = CliRunner().invoke(
            make_app(), ["predict", str(trained), "--site", str(path), "--out", str(out), "--force", *option]
        )
        assert done.exit_code == 0, done.output
        told[bool(option)] = out.read_text()
        assert ("personal heads (adapt) of colour, size" in done.stderr) == (not option)
    assert told[False] != told[True]


def test_a_declared_mix_serves_a_site_without_a_label(trained: Path, tmp_path: Path) -> None:
    mix = {"colour": {"red": 0.7, "green": 0.2, "blue": 0.1}, "size": {"small": 0.8, "large": 0.2}}
    bare = new_site(tmp_path / "bare", labelled=False)
    refused = invoke("adapt", bare, trained)
    assert refused.exit_code == 2
    assert "task colour: expected labelled training records of two classes at least, got no label" in refused.stderr
    shown = invoke("evaluate", new_site(tmp_path / "told", labelled=False, mix=mix), trained, "--json")
    found = json.loads(shown.stdout)
    for task in TASKS:
        assert found["tasks"][task][PERSONAL]["accuracy"] > found["tasks"][task][FEDERATED]["accuracy"] + 0.1


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"personal": "none"}, "personal: expected adapt, prior or fit in the site file"),
        ({"personal": "tied"}, "personal: expected adapt, prior or fit in the site file"),
        ({"mix": {"size": {"tiny": 1.0}}}, "tasks.size.mix: expected labels of the task, got 'tiny'"),
        ({"aligners": [{"kind": "corel_em"}]}, "aligners.0.kind: expected one of"),
    ],
)
def test_what_does_not_suit_is_refused_in_one_sentence(
    trained: Path, tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    refused = invoke("adapt", new_site(tmp_path, **changes), trained)
    assert refused.exit_code == 2 and words in refused.stderr
    assert len(refused.stderr.strip().splitlines()) == 1


def test_a_model_without_moments_or_of_other_tasks_or_changed_is_refused(trained: Path, tmp_path: Path) -> None:
    config = new_site(tmp_path)
    run_once(tmp_path / "bare", [site_config(tmp_path / "bare", "east")])
    bare = tmp_path / "bare" / "east-state" / "runs" / "run-1" / MODEL
    cases = [(bare, "expected a run that released the moments of classes"), (tmp_path, "expected a model's folder")]
    changed = tmp_path / "changed"
    shutil.copytree(trained, changed)
    (changed / "moments" / "size.classes.safetensors").write_bytes(b"x")
    cases.append((changed, "changed since the model was written"))
    for model, words in cases:
        refused = invoke("adapt", config, model)
        assert refused.exit_code == (1 if model == changed else 2) and words in refused.stderr
        assert "Traceback" not in refused.output
    others = {"weight": {"source": "records", "label": "size", "missing": "skip", "public_size": 300}}
    refused = invoke("adapt", new_site(tmp_path, tasks=others), trained)
    assert refused.exit_code == 2 and "a model of a task of the site file, got one of colour, size" in refused.stderr
    both = invoke("adapt", config, trained, "--run", "run-1")
    assert both.exit_code == 2 and "--run: expected none beside --model" in both.stderr


def test_a_purge_removes_what_was_computed_for_a_model(trained: Path, tmp_path: Path) -> None:
    config = new_site(tmp_path)
    assert invoke("adapt", config, trained).exit_code == 0
    (folder,) = (config.state_dir / "models").iterdir()
    purge(Site(config, os_entropy), ["train_x/0"])
    assert not (folder / PERSONAL_HEADS).exists() and not (folder / "data").exists()


def test_held_out_labels_have_no_part_in_what_they_judge(trained: Path, tmp_path: Path) -> None:
    """The adapted heads are the same to the bit where every held-out label is another."""
    kept = []
    for turned in (0, 1):
        config = new_site(tmp_path / str(turned))
        path = tmp_path / str(turned) / "west.npz"
        arrays = dict(np.load(path))
        arrays["test_colour"] = np.roll(arrays["test_colour"], turned)
        arrays["test_size"] = np.array(LABELS["size"])[(arrays["test_size"] == "small").astype(int) ^ turned]
        np.savez(path, **arrays)
        assert invoke("adapt", config, trained).exit_code == 0
        (folder,) = (config.state_dir / "models").iterdir()
        heads = load_personal_heads(folder, purpose=AT_HOME).heads
        kept.append({(task, name): value.tobytes() for task, own in heads.items() for name, value in own.items()})
    assert kept[0] == kept[1] and kept[0]
