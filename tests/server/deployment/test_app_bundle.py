"""What is in the app bundle: a list that a person can read, and nothing that lies about."""

from __future__ import annotations

import io
import tomllib
import zipfile
from pathlib import Path

from common.bundle import ROOMS, compute_bundle_digest, compute_code_digest
from server.deployment.app_bundle import MAX_BYTES, collect_bundle_files, make_bundle

ROOT = Path(__file__).resolve().parents[3]


def names(content: bytes) -> set[str]:
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        return set(archive.namelist())


def test_the_bundle_is_the_code_of_three_rooms_its_settings_and_flowers_list() -> None:
    expected = {
        path.relative_to(ROOT).as_posix()
        for room in ("client", "common", "server")
        for path in (ROOT / room).rglob("*.py")
    }
    bundle = make_bundle()
    assert names(bundle.content) == expected | {"pyproject.toml", ".info/CONTENT"}
    assert len(bundle.content) < MAX_BYTES == 10_000_000


def test_nothing_that_lies_beside_the_code_gets_in(tmp_path: Path) -> None:
    for room in ROOMS:
        (tmp_path / room).mkdir()
        (tmp_path / room / "code.py").write_text("")
        for stray in ("records.csv", "ledger.jsonl", "site.yaml", "ca.key", "notes.md", "facts.json", ".env"):
            (tmp_path / room / stray).write_text("secret")
    for stray in ("runs/patients.py", "site.yaml", "simulations/x.py", "tests/x.py", "federation/tls/ca.key"):
        path = tmp_path / stray
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("secret")
    found = names(make_bundle(tmp_path).content)
    assert found == {f"{room}/code.py" for room in ROOMS} | {"pyproject.toml", ".info/CONTENT"}


def test_our_own_list_keeps_strays_out_before_flowers_filter_does(tmp_path: Path) -> None:
    for room in ROOMS:
        (tmp_path / room).mkdir()
        for name in ("code.py", "records.csv", "ca.key"):
            (tmp_path / room / name).write_text("")
    assert set(collect_bundle_files(tmp_path)) == {f"{room}/code.py" for room in ROOMS} | {"pyproject.toml"}


def test_flowers_filter_takes_the_code_of_three_rooms_alone() -> None:
    settings = tomllib.loads(collect_bundle_files()["pyproject.toml"].decode())
    assert set(settings["tool"]["flwr"]["app"]["fab-include"]) == {"client/**/*.py", "common/**/*.py", "server/**/*.py"}


def test_a_site_with_the_same_installation_finds_its_own_code_in_it() -> None:
    assert compute_bundle_digest(make_bundle().content) == compute_code_digest()


def test_the_same_installation_makes_the_same_bundle() -> None:
    assert make_bundle().hash_str == make_bundle().hash_str


def test_the_settings_carry_one_path_and_no_dependency_to_install() -> None:
    text = collect_bundle_files()["pyproject.toml"].decode()
    assert 'run-folder = ""' in text
    assert "dependencies = []" in text
    assert "federations" not in text
