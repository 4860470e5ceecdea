"""A bundle is accepted exactly if it is this installation's code; nothing of it is unpacked to find that out."""

from __future__ import annotations

import io
import json
import stat
import warnings
import zipfile
import zlib
from collections.abc import Iterable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from client.__main__ import app
from common.bundle import MAX_BUNDLE_BYTES, compute_bundle_digest, compute_code_digest, find_installation, hash_files
from common.flower import build_bundle_from_folder
from common.types import BadInput
from server.reports.results import write_environment

SETTINGS = b'[tool.flwr.app.components]\nserverapp = "server.app:app"\nclientapp = "client.app:app"\n'
REVIEWED = {"client/app.py": b"app = 1\n", "common/__init__.py": b""}
CODE = {**REVIEWED, "server/app.py": b"app = 2\n"}


def zipped(files: Iterable[tuple[str | zipfile.ZipInfo, bytes]]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive, warnings.catch_warnings(action="ignore"):
        for name, content in files:
            archive.writestr(name, content)
    return buffer.getvalue()


def bundle(**changes: bytes) -> bytes:
    return zipped([("pyproject.toml", SETTINGS), *{**CODE, **changes}.items()])


@pytest.mark.filterwarnings("ignore:GitWildMatchPattern:DeprecationWarning")  # Flower's own build
def test_flowers_own_bundle_of_this_tree_has_the_installations_digest() -> None:
    assert compute_bundle_digest(build_bundle_from_folder(find_installation())) == compute_code_digest()


def test_the_digest_ignores_the_order_of_files_and_how_they_are_packed() -> None:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in reversed([*CODE.items(), ("pyproject.toml", SETTINGS)]):
            archive.writestr(name, content)
    assert compute_bundle_digest(buffer.getvalue()) == compute_bundle_digest(bundle()) == hash_files(REVIEWED)


def test_moving_a_byte_from_one_file_to_the_next_changes_the_digest() -> None:
    assert hash_files({"a.py": b"x", "b.py": b""}) != hash_files({"a.py": b"", "b.py": b"x"})
    assert hash_files({"a.py": b"xb.py"}) != hash_files({"a.pyx": b"b.py"})


@pytest.mark.parametrize(
    "change",
    [{"client/app.py": b"app = 1\n\n"}, {"client/more.py": b""}, {"common/__init__.py": b"app = 3\n"}],
    ids=["a byte more", "a file more", "common code"],
)
def test_changed_code_has_another_digest(change: dict[str, bytes]) -> None:
    assert compute_bundle_digest(bundle(**change)) != hash_files(REVIEWED)


@pytest.mark.parametrize(
    "change",
    [{"server/app.py": b"app = 2  # a comment\n"}, {"server/more.py": b""}],
    ids=["a comment", "a file more"],
)
def test_a_change_of_the_coordinators_own_code_asks_no_site_for_a_new_review(change: dict[str, bytes]) -> None:
    assert compute_bundle_digest(bundle(**change)) == hash_files(REVIEWED)


def test_environments_and_the_command_line_show_the_digest_that_bundles_are_compared_by(tmp_path: Path) -> None:
    write_environment(tmp_path / "environment.json", {})
    assert json.loads((tmp_path / "environment.json").read_text())["code_digest"] == compute_code_digest()
    assert CliRunner().invoke(app, ["digest"]).output == f"{compute_code_digest()}\n"


@pytest.mark.parametrize(
    "name",
    [
        "torch.py",  # a top-level module that shadows a package
        "client/../torch.py",
        "/client/app2.py",
        "client\\app2.py",
        "client/data.so",
        "client/app.pyc",
        "client/.hidden.py",
        "clientx/app.py",
        "client/sub dir/x.py",
        "sitecustomize.py",
        "client/",
        ".info/app.py",
    ],
)
def test_a_file_that_is_not_the_rooms_code_is_refused(name: str) -> None:
    with pytest.raises(BadInput, match="expected pyproject"):
        compute_bundle_digest(zipped([("pyproject.toml", SETTINGS), *CODE.items(), (name, b"")]))


def test_a_name_that_stands_twice_is_refused() -> None:
    with pytest.raises(BadInput, match="twice"):
        compute_bundle_digest(zipped([("pyproject.toml", SETTINGS), *CODE.items(), ("client/app.py", b"other")]))


def test_a_symbolic_link_is_refused() -> None:
    link = zipfile.ZipInfo("client/link.py")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    with pytest.raises(BadInput, match="plain files"):
        compute_bundle_digest(zipped([("pyproject.toml", SETTINGS), (link, b"/etc/passwd")]))


@pytest.mark.parametrize(
    "settings",
    [
        SETTINGS.replace(b"client.app:app", b"client.audit.audit:app"),
        SETTINGS + b'agentapp = "client.app:app"\n',
        b"[tool.flwr.app]\n",
        b"components = [",
        b"\xff",
    ],
    ids=["elsewhere", "one more", "none", "no TOML", "no text"],
)
def test_components_that_point_elsewhere_are_refused(settings: bytes) -> None:
    with pytest.raises(BadInput, match="components"):
        compute_bundle_digest(zipped([("pyproject.toml", settings), *CODE.items()]))


def test_a_bundle_without_settings_is_refused() -> None:
    with pytest.raises(BadInput, match="got none"):
        compute_bundle_digest(zipped(CODE.items()))


def test_a_zip_that_inflates_beyond_the_bound_is_refused() -> None:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("pyproject.toml", SETTINGS)
        for number in range(3):
            archive.writestr(f"client/x{number}.py", bytes(MAX_BUNDLE_BYTES // 2))
    assert len(buffer.getvalue()) < 1 << 20
    with pytest.raises(BadInput, match="when unpacked"):
        compute_bundle_digest(buffer.getvalue())


@pytest.mark.parametrize("content", [b"", b"no zip", zlib.compress(b"x"), bytes(MAX_BUNDLE_BYTES + 1)])
def test_what_is_no_zip_or_too_large_is_refused(content: bytes) -> None:
    with pytest.raises(BadInput, match="app bundle"):
        compute_bundle_digest(content)


def test_a_cut_zip_is_refused() -> None:
    whole = bundle()
    for end in range(0, len(whole), 37):
        with pytest.raises(BadInput, match="app bundle"):
            compute_bundle_digest(whole[:end])


def test_the_digest_covers_the_code_that_a_site_runs_and_nothing_else(tmp_path: Path) -> None:
    for room in ("client", "common", "server", "simulations"):
        (tmp_path / room).mkdir()
        (tmp_path / room / "app.py").write_text("1")
    first = compute_code_digest(tmp_path)
    (tmp_path / "simulations" / "app.py").write_text("2")
    (tmp_path / "server" / "app.py").write_text("2")
    (tmp_path / "client" / "notes.txt").write_text("not code")
    assert compute_code_digest(tmp_path) == first
    for room in ("client", "common"):
        (tmp_path / room / "app.py").write_text("2")
        changed = compute_code_digest(tmp_path)
        assert changed != first
        first = changed
