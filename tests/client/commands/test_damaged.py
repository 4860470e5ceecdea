"""Damaged, missing and odd files of a site: every verb ends with a result or with one sentence, never with a traceback.

The damages that once ended in a traceback are tried in the quick suite; a seeded sample of all others in the slow one.
"""

from __future__ import annotations

import itertools
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from click.testing import Result
from typer.testing import CliRunner

from client.__main__ import app
from client.config import SiteConfig
from client.protocol.join import join
from client.protocol.prepare import finish
from client.protocol.site import Site
from client.protocol.train import train
from common import messages
from common.model.parameters import create_heads, parameters
from common.privacy.noise import os_entropy
from common.tasks import open_task
from common.types import heads_digest
from common.yaml import load
from tests.federation import Authority, free_port, write_run
from tests.small_disk import run_on_small_disk
from tests.tiny import TASKS, backbone, give_backbone, offered, run_config, site_config

SITE, RUN = "{}/site.yaml", "{}/run.yaml"
VERBS = {
    "amend": ["amend", SITE, "--reason", "x"],
    "approve": ["approve", SITE, RUN],
    "approve --list": ["approve", SITE, "--list"],
    "budget": ["budget", SITE, "--run", RUN],
    "check": ["check", SITE, "--offline"],
    "evaluate": ["evaluate", SITE],
    "init": ["init", "{}", "--new-key"],
    "log": ["log", SITE],
    "plan": ["plan", SITE, RUN],
    "purge": ["purge", SITE, "--patient", "p1"],
    "recover": ["recover", SITE, "--reason", "x"],
    "release": ["release", SITE, "run-1"],
    "start": ["start", SITE, "--patience", "0"],
}


def write_half(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def write_noise(path: Path) -> None:
    path.write_bytes(random.Random(1).randbytes(200))


def write_nested(path: Path) -> None:
    path.write_bytes(b"[" * 100_000)


def write_object(path: Path) -> None:
    path.write_text('{"a": null}\n')


def make_empty(path: Path) -> None:
    path.write_bytes(b"")


def remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink()


def make_folder(path: Path) -> None:
    remove(path)
    path.mkdir()


def make_dangling(path: Path) -> None:
    remove(path)
    path.symlink_to(path.with_name("not-there"))


def make_loop(path: Path) -> None:
    remove(path)
    path.symlink_to(path)


DAMAGES = [
    write_half,
    write_noise,
    write_nested,
    write_object,
    make_empty,
    remove,
    make_folder,
    make_dangling,
    make_loop,
]
Damage = Callable[[Path], None]


def make_site(folder: Path) -> Path:
    """A site's folder after a run of two rounds that it finished: ledger, replies, features, approval, final heads."""
    assert call("init", str(folder), "--name", "s").exit_code == 0
    values = site_config(folder / "data", "s").model_dump(mode="json")
    values["sources"]["records"]["path"] = "./data/s.npz"
    coordinator = {"address": f"127.0.0.1:{free_port()}", "ca": "./ca.crt", "key": "./keys/s"}
    values |= {"ledger_dir": "./state/ledgers", "state_dir": "./state", "coordinator": coordinator}
    (folder / "site.yaml").write_text(yaml.safe_dump(values))
    Authority.new("test authority").write(folder / "ca.crt")
    write_run(folder / "run.yaml")
    site = Site(load(SiteConfig, folder / "site.yaml"), os_entropy)
    frozen = backbone()
    join(site, offered("run-1", run_config(), frozen))
    give_backbone(site, "run-1", frozen)
    tasks = {name: open_task(TASKS[name], name) for name in TASKS}
    modules = create_heads(tasks, dict.fromkeys(tasks, frozen.feature_dim), 0)
    heads = {name: parameters(module) for name, module in modules.items()}
    for round_ in (1, 2):
        train(site, messages.TrainRequest("run-1", round_, heads))
    finish(site, messages.FinishRequest("run-1", heads, heads_digest(heads)))
    assert call("approve", str(folder / "site.yaml"), str(folder / "run.yaml")).exit_code == 0
    (folder / "state" / "node_id").write_text("7")
    return folder


def call(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


def check_verb(folder: Path, verb: str) -> str:
    """What a verb says of a folder; fails where it is anything but a result or one sentence."""
    done = call(*(part.format(folder) for part in VERBS[verb]))
    assert done.exception is None or isinstance(done.exception, SystemExit), (verb, folder, done.exc_info)
    assert done.exit_code in (0, 1, 2), (verb, done.output)
    if done.exit_code == 2:
        assert done.output.strip().splitlines()[-1].startswith("error: "), (verb, done.output)
    return done.output


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_site(tmp_path_factory.mktemp("made") / "site")


def damage(made: Path, copy: Path, name: str, how: Damage) -> Path:
    shutil.copytree(made, copy, symlinks=True)
    (path,) = copy.glob(name)
    how(path)
    return copy


@pytest.mark.parametrize(
    ("name", "how", "verb", "says"),
    [
        ("ca.crt", make_loop, "check", "a link that leads to itself"),
        ("data/s.npz", make_loop, "approve", "a link that leads to itself"),
        ("state/ledgers/s-registry/anchor.json", write_nested, "budget", "its anchor cannot be read"),
        ("state/ledgers/s-registry/ledger.jsonl", write_nested, "recover", "the population counts as having spent"),
        ("state/ledgers/s-registry", make_dangling, "recover", "if its disk is not mounted, mount it"),
        ("state/backbones/*/spec.json", write_noise, "evaluate", "the backbone is received again"),
        ("state/runs/run-1/offer.json", write_half, "evaluate", "expected a run's offer as JSON"),
        ("state/runs/run-1/prepared.json", write_nested, "evaluate", "the last run: the run's data are not prepared"),
        ("state/runs/run-1/final_heads.bin", write_noise, "evaluate", "expected the final heads of a run"),
        ("state/runs/run-1/final_heads.bin", make_folder, "evaluate", "but it is a folder"),
        ("state/site.jsonl", write_half, "log", "releases: 2"),
        ("state/site.jsonl", make_folder, "log", "it is a folder and no file"),
    ],
)
def test_a_damaged_file_is_one_sentence(
    made: Path, tmp_path: Path, name: str, how: Damage, verb: str, says: str
) -> None:
    assert says in " ".join(check_verb(damage(made, tmp_path / "site", name, how), verb).split())


@pytest.mark.slow
def test_no_damage_of_any_file_ends_in_a_traceback(made: Path, tmp_path: Path) -> None:
    names = [str(path.relative_to(made)) for path in made.rglob("*") if "lock" not in path.name]
    cases = list(itertools.product(sorted(names), DAMAGES, VERBS))
    seed = random.SystemRandom().randrange(2**32)
    for number, (name, how, verb) in enumerate(random.Random(seed).sample(cases, 60)):
        folder = tmp_path / str(number)
        shutil.copytree(made, folder, symlinks=True)
        if (folder / name).is_dir() and how not in (remove, make_dangling, make_loop):
            continue
        how(folder / name)
        try:
            check_verb(folder, verb)
        except AssertionError as error:
            raise AssertionError(f"seed {seed}: {how.__name__} of {name}") from error
        shutil.rmtree(folder, ignore_errors=True)


def check_read_only(disk: Path) -> None:
    folder = make_site(disk / "site")
    assert os.system(f"mount -o remount,ro '{disk}'") == 0
    for verb in VERBS:
        said = check_verb(folder, verb)
        assert "Traceback" not in said
    assert "the file system is read-only" in check_verb(folder, "start")


@pytest.mark.slow
def test_no_verb_ends_in_a_traceback_where_nothing_can_be_written(tmp_path: Path) -> None:
    run_on_small_disk(check_read_only, tmp_path / "disk", size="1500m")
