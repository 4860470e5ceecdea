"""A new site's folder: keys that stay, a file that explains itself, and a kit that is read as a stranger's."""

from __future__ import annotations

import io
import json
import stat
import zipfile
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_ssh_public_key
from pydantic import BaseModel
from typer.testing import CliRunner

from client.__main__ import app
from client.config import Coordinator, SiteConfig, SiteTask
from client.connection.folder import SITE_FILE, add_coordinator, make_folder, take_kit
from client.connection.keys import read_key, write_key_pair
from client.connection.kit import MAX_KIT_BYTES, read_kit
from client.data.records import check_values
from client.protocol.site import Site
from common.offers import encode_offer, make_offer
from common.privacy.noise import os_entropy
from common.tasks import open_task
from common.types import BadInput
from common.yaml import FILL_IN, find_marks, load, write_yaml
from tests.federation import Authority
from tests.tiny import backbone, run_config, site_config


def offer(**changes: Any) -> bytes:
    frozen = backbone()
    return encode_offer(make_offer(run_config(**changes), {"backbone": frozen}), {"backbone": frozen.digest})


def kit(folder: Path, **files: bytes) -> Path:
    """A kit as a coordinator writes it; `files` replace its own by name."""
    settings = b"federation: north\nsite: hospital-a\naddress: federation.example.org:9092\n"
    ca = Authority.new("north").write(folder / "north.crt").read_bytes()
    content = {"kit.yaml": settings, "ca.crt": ca, "offers/tiny.json": offer(), **files}
    path = folder / "kit.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in content.items():
            archive.writestr(name, data)
    return path


# --- keys ------------------------------------------------------------------------------------------------------------


def test_the_private_key_is_its_owners_alone_and_the_public_file_is_its_public_key(tmp_path: Path) -> None:
    public = write_key_pair(tmp_path / "key", "hospital-a")
    assert stat.S_IMODE((tmp_path / "key").stat().st_mode) == 0o600
    key = read_key(tmp_path / "key")
    assert isinstance(key.curve, ec.SECP384R1)
    shown = load_ssh_public_key(public.read_bytes()).public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)
    assert shown == key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)
    assert b"PRIVATE" not in public.read_bytes()


def test_a_key_is_never_overwritten(tmp_path: Path) -> None:
    write_key_pair(tmp_path / "key", "a")
    before = (tmp_path / "key").read_bytes()
    with pytest.raises(BadInput, match="never overwritten"):
        write_key_pair(tmp_path / "key", "a")
    assert (tmp_path / "key").read_bytes() == before


def test_a_key_that_others_can_read_is_refused(tmp_path: Path) -> None:
    write_key_pair(tmp_path / "key", "a")
    (tmp_path / "key").chmod(0o640)
    with pytest.raises(BadInput, match="chmod 600"):
        read_key(tmp_path / "key")


def test_a_file_that_is_no_such_key_is_refused(tmp_path: Path) -> None:
    (tmp_path / "key").write_text("-----BEGIN OPENSSH PRIVATE KEY-----\n")
    (tmp_path / "key").chmod(0o600)
    with pytest.raises(BadInput, match="OpenSSH private key"):
        read_key(tmp_path / "key")
    with pytest.raises(BadInput, match="site init"):
        read_key(tmp_path / "none")


# --- the site file ---------------------------------------------------------------------------------------------------


def filled(text: str) -> dict[str, Any]:
    """A new site file with every mark replaced."""
    values: dict[str, Any] = yaml.safe_load(text)
    values["budget"]["epsilon"] = 8.0
    values["sources"]["records"]["path"] = "./records.csv"
    for task in values["tasks"].values():
        task |= {"label": "label", "public_size": 100}
    if values["coordinator"]["address"] == FILL_IN:
        values["coordinator"]["address"] = "federation.example.org:9092"
    return values


@pytest.mark.parametrize("with_kit", [False, True])
def test_a_new_site_file_is_valid_once_its_marks_are_filled_in(tmp_path: Path, with_kit: bool) -> None:
    make_folder(tmp_path / "site", read_kit(kit(tmp_path)) if with_kit else None, None if with_kit else "hospital-a")
    text = (tmp_path / "site" / SITE_FILE).read_text()
    assert len(find_marks(text)) == (6 if with_kit else 5)
    (tmp_path / "site" / SITE_FILE).write_text(yaml.safe_dump(filled(text)))
    config = load(SiteConfig, tmp_path / "site" / SITE_FILE)
    assert config.name == "hospital-a"
    assert config.approval == "required"
    assert config.coordinator is not None
    assert read_key(config.coordinator.key)
    if with_kit:
        assert list(config.tasks) == ["colour", "size"]
        assert (config.allow.solvers, config.unit) == (["dp_sgd"], "example")
        assert config.coordinator.ca.read_bytes() == (tmp_path / "north.crt").read_bytes()


def test_a_new_site_file_has_a_column_for_each_cell_of_a_label(tmp_path: Path) -> None:
    death = {"death": {"kind": "survival", "boundaries": [30, 90]}}
    make_folder(tmp_path / "site", read_kit(kit(tmp_path, **{"offers/tiny.json": offer(tasks=death)})), None)
    text = (tmp_path / "site" / SITE_FILE).read_text()
    assert yaml.safe_load(text)["tasks"]["death"]["label"] == [FILL_IN, FILL_IN]
    assert "your columns of time and event" in text
    # The proposed values are some of one column, as a survival task needs them.
    [line] = [line.strip() for line in text.splitlines() if line.strip().startswith("# values:")]
    [values] = yaml.safe_load(line.removeprefix("# ").split("  ")[0]).values()
    own = SiteTask(source="r", label=["days", FILL_IN], values=values, missing="skip", public_size=1)
    check_values("death", open_task(death["death"], "death"), own)


def test_every_key_of_a_site_file_is_explained_in_a_new_one(tmp_path: Path) -> None:
    make_folder(tmp_path / "site", None, "a")
    text = (tmp_path / "site" / SITE_FILE).read_text()
    models: list[type[BaseModel]] = [SiteConfig, SiteTask, Coordinator]
    for field in SiteConfig.model_fields.values():
        models += [kind for kind in (field.annotation, *get_args(field.annotation)) if isinstance(kind, type)]
    names = {name for model in models if issubclass(model, BaseModel) for name in model.model_fields}
    assert {"share", "test_fraction", "non_private", "health_port"} <= names
    assert sorted(name for name in names if f"{name}:" not in text) == []


def test_a_folder_with_something_in_it_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(BadInput, match="new or empty"):
        make_folder(tmp_path, None, "a")
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize("name", ["../a", "A", "a b", "", "ä"])
def test_a_name_that_could_be_a_path_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(BadInput, match="name"):
        make_folder(tmp_path / "site", None, name)
    assert not (tmp_path / "site").exists()


def test_a_kit_that_comes_after_the_key_fills_in_an_untouched_file(tmp_path: Path) -> None:
    make_folder(tmp_path / "site", None, "hospital-a")
    key = (tmp_path / "site/keys/hospital-a").read_bytes()
    registry = read_registry(tmp_path / "site")
    take_kit(tmp_path / "site", read_kit(kit(tmp_path)))
    make_folder(tmp_path / "other", read_kit(kit(tmp_path)), None)
    other = (tmp_path / "other" / SITE_FILE).read_text().replace(read_registry(tmp_path / "other"), registry)
    assert (tmp_path / "site" / SITE_FILE).read_text() == other
    assert (tmp_path / "site/offers/tiny.json").read_bytes() == offer()
    assert (tmp_path / "site/keys/hospital-a").read_bytes() == key


def read_registry(folder: Path) -> str:
    return str(yaml.safe_load((folder / SITE_FILE).read_text())["registry"])


def test_new_sites_of_one_name_share_no_budget_by_accident_and_are_told_of_the_ledgers_there_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "home"))
    first = CliRunner().invoke(app, ["init", str(tmp_path / "first"), "--name", "hospital-a"])
    assert "registry" not in first.output
    registry = read_registry(tmp_path / "first")
    Site(site_config(tmp_path / "data", "north", registry=registry, ledger_dir=None), os_entropy).ledger()
    second = CliRunner().invoke(app, ["init", str(tmp_path / "second"), "--name", "hospital-a"])
    assert f"this machine has ledgers of {registry}" in second.output
    assert read_registry(tmp_path / "second") != registry


def test_every_command_names_all_lines_that_are_to_be_filled_in(tmp_path: Path) -> None:
    make_folder(tmp_path / "site", None, "hospital-a")
    path = tmp_path / "site" / SITE_FILE
    lines = path.read_text().splitlines()
    marked = [str(place) for place, line in enumerate(lines, start=1) if "FILL_IN" in line.split("#")[0]]
    assert len(marked) > 2
    for command in (["check"], ["budget"], ["evaluate"], ["adapt", "--model", str(tmp_path)]):
        refused = CliRunner().invoke(app, [command[0], str(path), *command[1:]])
        assert refused.exit_code == 2, refused.output
        assert f"expected every FILL_IN to be replaced, got some in lines {', '.join(marked)}" in refused.stderr


def test_a_kit_leaves_what_the_staff_wrote(tmp_path: Path) -> None:
    make_folder(tmp_path / "site", None, "hospital-a")
    path = tmp_path / "site" / SITE_FILE
    path.write_text(path.read_text().replace("epsilon: FILL_IN", "epsilon: 3.5"))
    before = path.read_text()
    take_kit(tmp_path / "site", read_kit(kit(tmp_path)))
    assert path.read_text() == before.replace("address: FILL_IN", "address: federation.example.org:9092")


def test_a_kit_of_another_authority_or_site_changes_nothing(tmp_path: Path) -> None:
    make_folder(tmp_path / "site", None, "hospital-b")
    with pytest.raises(BadInput, match="got one for hospital-a"):
        take_kit(tmp_path / "site", read_kit(kit(tmp_path)))
    assert not (tmp_path / "site/ca.crt").exists()
    make_folder(tmp_path / "own", read_kit(kit(tmp_path)), None)
    trusted = (tmp_path / "own/ca.crt").read_bytes()
    with pytest.raises(BadInput, match="another authority"):
        take_kit(tmp_path / "own", read_kit(kit(tmp_path)))
    assert (tmp_path / "own/ca.crt").read_bytes() == trusted


def test_a_kit_for_another_site_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="hospital-a"):
        make_folder(tmp_path / "site", read_kit(kit(tmp_path)), "hospital-b")


def test_check_shows_the_command_that_approves_an_offer_from_where_the_user_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_yaml(make(tmp_path / "hospital" / "site.yaml"), site_config(tmp_path / "data", "north", approval="required"))
    make(tmp_path / "hospital" / "offers" / "tiny.json").write_bytes(offer())
    monkeypatch.chdir(tmp_path)
    checked = CliRunner().invoke(app, ["check", "hospital/site.yaml", "--offline", "--json"])
    (shown,) = [item["remedy"] for item in json.loads(checked.stdout)["checks"] if item["name"] == "run tiny"]
    words = shown.split()
    assert words[:3] == ["headwater", "site", "approve"]
    assert CliRunner().invoke(app, words[2:]).exit_code == 0
    again = CliRunner().invoke(app, ["check", "hospital/site.yaml", "--offline", "--json"])
    (run,) = [item for item in json.loads(again.stdout)["checks"] if item["name"] == "run tiny"]
    assert run["outcome"] == "pass"


def make(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


# --- the kit ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "../site.yaml",
        "/etc/cron.d/x",
        "offers/../../x.json",
        "offers/sub/x.json",
        "OFFERS/x.json",
        "client/app.py",
        "keys/hospital-a",
        "offers/x.yaml",
        "offers/.json",
    ],
)
def test_a_kit_holds_the_known_names_and_no_path(tmp_path: Path, name: str) -> None:
    with pytest.raises(BadInput, match="expected kit.yaml"):
        read_kit(kit(tmp_path, **{name: b"{}"}))


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("ca.crt", b"not a certificate", "PEM certificate"),
        ("kit.yaml", b"federation: north\nsite: hospital-a\naddress: http://x:1\n", "HOST:PORT"),
        ("kit.yaml", b"federation: north\nsite: ../a\naddress: x:1\n", "site"),
        ("kit.yaml", b"federation: north\nsite: a\naddress: x:1\nscript: rm\n", "unknown key"),
        ("kit.yaml", b"- a", "keys and values"),
        ("offers/tiny.json", b"{", "JSON"),
        ("offers/tiny.json", b"[]", "offer"),
        ("offers/tiny.json", b'{"run": {"name": "x"}}', "expected a value"),
    ],
)
def test_a_kit_file_that_is_not_what_it_should_be_is_named(
    tmp_path: Path, name: str, content: bytes, words: str
) -> None:
    with pytest.raises(BadInput, match=words):
        read_kit(kit(tmp_path, **{name: content}))


def test_a_kit_without_an_authority_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "kit.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("kit.yaml", "federation: north\nsite: a\naddress: x:1\n")
    with pytest.raises(BadInput, match="expected ca.crt"):
        read_kit(path)


def test_a_kit_that_inflates_beyond_its_bound_is_refused(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("offers/x.json", bytes(MAX_KIT_BYTES + 1))
    (tmp_path / "kit.zip").write_bytes(buffer.getvalue())
    with pytest.raises(BadInput, match="at most"):
        read_kit(tmp_path / "kit.zip")


def test_what_a_kit_says_cannot_become_a_key_of_the_site_file(tmp_path: Path) -> None:
    labels = ["a\nbudget: {epsilon: 1000000}", "b: c # {x}"]
    tasks = {"colour": {"kind": "classification", "labels": labels}}
    values = read_kit(kit(tmp_path, **{"offers/tiny.json": offer(tasks=tasks)}))
    make_folder(tmp_path / "site", values, None)
    text = (tmp_path / "site" / SITE_FILE).read_text()
    assert yaml.safe_load(text)["budget"]["epsilon"] == FILL_IN
    assert list(yaml.safe_load(text)["tasks"]) == ["colour"]


def test_a_kit_does_not_read_the_environment(tmp_path: Path) -> None:
    settings = b"federation: north\nsite: a\naddress: ${HOME}:1\n"
    with pytest.raises(BadInput, match="address"):
        read_kit(kit(tmp_path, **{"kit.yaml": settings}))


def test_a_site_that_lost_its_key_gets_a_new_one_and_keeps_what_it_has_spent(tmp_path: Path) -> None:
    folder = tmp_path / "hospital-a"
    first = make_folder(folder, None, "hospital-a").read_bytes()
    (folder / "state" / "ledgers").mkdir(parents=True)
    (folder / "state" / "ledgers" / "spent").write_text("x")
    (folder / "keys" / "hospital-a").unlink()
    before = (folder / SITE_FILE).read_bytes()
    assert "--new-key" in CliRunner().invoke(app, ["init", str(folder), "--name", "hospital-a"]).stderr
    done = CliRunner().invoke(app, ["init", str(folder), "--new-key"])
    assert done.exit_code == 0, done.stderr
    read_key(folder / "keys" / "hospital-a")
    assert (folder / "keys" / "hospital-a.pub").read_bytes() != first
    assert [path.read_bytes() for path in (folder / "keys").glob("*.old")] == [first]
    assert (folder / "state" / "ledgers" / "spent").read_text() == "x" and (folder / SITE_FILE).read_bytes() == before
    assert CliRunner().invoke(app, ["init", str(tmp_path / "none"), "--new-key"]).exit_code == 2


def test_a_key_that_works_is_not_replaced_until_it_is_moved_away(tmp_path: Path) -> None:
    folder = tmp_path / "hospital-a"
    make_folder(folder, None, "hospital-a")
    key = folder / "keys" / "hospital-a"
    before = {path.name: path.read_bytes() for path in key.parent.iterdir()}
    refused = CliRunner().invoke(app, ["init", str(folder), "--new-key"])
    assert refused.exit_code == 2 and "this key works" in refused.stderr and "move the file" in refused.stderr
    assert {path.name: path.read_bytes() for path in key.parent.iterdir()} == before
    key.rename(tmp_path / "old")
    assert CliRunner().invoke(app, ["init", str(folder), "--new-key"]).exit_code == 0
    assert key.read_bytes() != before["hospital-a"]


# --- a further coordinator -------------------------------------------------------------------------------------------


def test_a_further_coordinators_kit_is_added_under_its_own_name(tmp_path: Path) -> None:
    folder = tmp_path / "site"
    make_folder(folder, read_kit(kit(tmp_path)), None)
    path = folder / SITE_FILE
    path.write_text(yaml.safe_dump({**filled(path.read_text()), "device": "cpu"}))
    before = load(SiteConfig, path)
    ca = (folder / "ca.crt").read_bytes()
    for name in ("lungs", "kidneys"):  # Another authority each time.
        done = CliRunner().invoke(app, ["init", str(folder), "--kit", str(kit(tmp_path)), "--coordinator", name])
        assert done.exit_code == 0, done.stderr
    config = load(SiteConfig, path)
    assert list(config.list_coordinators()) == ["main", "kidneys", "lungs"]
    assert config.select("main") == before
    lungs = config.coordinators["lungs"]
    assert str(lungs.address) == "federation.example.org:9092"
    assert lungs.ca.read_bytes() != ca == (folder / "ca.crt").read_bytes()
    assert read_key(lungs.key)
    assert (folder / "offers" / "lungs" / "tiny.json").read_bytes() == offer()


def test_a_further_coordinator_is_added_below_what_the_staff_wrote(tmp_path: Path) -> None:
    folder = tmp_path / "site"
    make_folder(folder, read_kit(kit(tmp_path)), None)
    path = folder / SITE_FILE
    written = path.read_text().replace("# coordinators: {}   ", "coordinators:   # ours\n#")
    path.write_text(f"{written}# the end")
    add_coordinator(folder, read_kit(kit(tmp_path)), "lungs")
    kept = path.read_text()
    assert "coordinators:   # ours\n  lungs:\n    address: federation.example.org:9092\n" in kept
    assert all(line in kept.splitlines() for line in [*written.splitlines(), "# the end"])


@pytest.mark.parametrize(
    ("name", "line", "said"),
    [
        ("main", "", "does not use yet"),
        ("lungs", "coordinators: {lungs: {address: 'a:1', ca: b, key: c}}", "does not use yet"),
        ("hearts", "coordinators: {lungs: {address: 'a:1', ca: b, key: c}}", "in a line of its own"),
        ("../lungs", "", "lower-case"),
    ],
)
def test_a_coordinator_that_cannot_be_added_changes_nothing(tmp_path: Path, name: str, line: str, said: str) -> None:
    folder = tmp_path / "site"
    make_folder(folder, read_kit(kit(tmp_path)), None)
    (folder / SITE_FILE).write_text(f"{(folder / SITE_FILE).read_text()}{line}\n")
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with pytest.raises(BadInput, match=said):
        add_coordinator(folder, read_kit(kit(tmp_path)), name)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_checks_and_approvals_are_for_each_coordinator(tmp_path: Path) -> None:
    where = {"address": "localhost:9092", "ca": "ca.crt", "key": "keys/north"}
    config = site_config(
        tmp_path / "data", "north", approval="required", coordinators={"hearts": where, "lungs": where}
    )
    write_yaml(make(tmp_path / "site" / "site.yaml"), config)
    make(tmp_path / "site" / "offers" / "hearts" / "tiny.json").write_bytes(offer())
    make(tmp_path / "site" / "offers" / "lungs" / "tiny.json").write_bytes(offer())

    def outcomes() -> dict[str, tuple[str, str]]:
        checked = CliRunner().invoke(app, ["check", str(tmp_path / "site" / "site.yaml"), "--offline", "--json"])
        return {item["name"]: (item["outcome"], item["remedy"]) for item in json.loads(checked.stdout)["checks"]}

    found = outcomes()
    assert {"hearts key", "lungs key", "hearts authority", "lungs authority"} <= set(found)
    outcome, remedy = found["run lungs tiny"]
    assert outcome == "warn" and remedy.endswith("--coordinator lungs")
    assert CliRunner().invoke(app, remedy.split()[2:]).exit_code == 0
    assert (outcomes()["run lungs tiny"][0], outcomes()["run hearts tiny"][0]) == ("pass", "warn")
    unnamed = CliRunner().invoke(app, ["approve", str(tmp_path / "site" / "site.yaml")])
    assert unnamed.exit_code == 2 and "--coordinator: expected one of hearts, lungs" in unnamed.stderr
