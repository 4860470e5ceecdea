"""The command `headwater`: examples, schemas, the public API, and what commands that train nothing import."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from common.process.console import load_verb, read_verbs
from headwater.__main__ import find_hidden_room, make_app
from headwater.commands.example import list_examples
from headwater.commands.schema import FOLDER, File, make_schema, read_schema

ROOT = Path(__file__).resolve().parents[2]
GROUPS = {
    "site": "client.commands",
    "coordinator": "server.commands",
    "simulate": "simulations.commands",
    "": "headwater.commands",
}
VERBS = [(group, package, verb) for group, package in GROUPS.items() for verb in read_verbs(package)]
HEAVY = ("torch", "scipy", "pandas", "torchmetrics", "opacus", "transformers", "flwr", "ray", "sklearn")


def invoke(*arguments: object) -> str:
    result = CliRunner().invoke(make_app(), [str(each) for each in arguments])
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.mark.parametrize(("group", "package", "verb"), VERBS)
def test_every_verb_has_an_example_of_itself(group: str, package: str, verb: str) -> None:
    assert f"Example: {' '.join(['headwater', group, verb]).replace('  ', ' ')}" in (
        load_verb(package, verb).help or ""
    )


def test_the_help_of_a_verb_explains_its_arguments() -> None:
    assert "The federation's folder" in invoke("coordinator", "status", "--help")


@pytest.mark.parametrize("group", ["site", "coordinator", "simulate"])
def test_a_groups_help_lists_every_verb(group: str) -> None:
    text = invoke(group, "--help")
    assert all(f" {verb} " in text for verb in read_verbs(GROUPS[group]))


def test_a_verb_that_does_not_exist_is_answered_with_the_nearest() -> None:
    result = CliRunner().invoke(make_app(), ["site", "budgett"])
    assert result.exit_code == 2 and "budget" in result.stderr


@pytest.mark.parametrize("file", list(File))
def test_the_written_schema_is_up_to_date(file: File) -> None:
    assert (FOLDER / f"{file}.json").read_text(encoding="utf-8") == make_schema(file)
    assert read_schema(file) == make_schema(file)


def test_a_schema_tells_kinds_apart_and_knows_their_settings() -> None:
    definitions = json.loads(invoke("schema", "run"))["$defs"]
    assert definitions["solver"]["discriminator"]["mapping"]["dp_gd"] == "#/$defs/solver.dp_gd"
    assert "clip_norm" in definitions["solver.dp_gd"]["properties"]


@pytest.mark.parametrize("path", list_examples().values(), ids=lambda path: path.stem)
def test_every_example_names_its_schema_and_is_valid_by_it(path: Path) -> None:
    first = path.read_text(encoding="utf-8").splitlines()[0]
    target = (path.resolve().parent / re.sub(r".*\$schema=", "", first)).resolve()
    schema = json.loads(target.read_text(encoding="utf-8"))
    values = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert set(values) <= set(schema["properties"])
    assert set(schema["required"]) <= set(values)
    validator = pytest.importorskip("jsonschema").Draft202012Validator(schema)
    assert not [(list(error.absolute_path), error.message[:200]) for error in validator.iter_errors(values)]


@pytest.mark.parametrize(
    ("aggregation", "is_valid"),
    [
        ({"schedule": {"shape": "cosine"}}, True),
        ({"balance": "sites"}, True),
        ({"kind": "mean", "decay_to_start": 0.1, "tasks": {"colour": {"learning_rate": 0.5}}}, True),
        ({"learning_rate": 0.5}, False),
        ({"kind": "mean", "decay_to_strat": 0.1}, False),
        ({"kind": "maen"}, False),
    ],
)
def test_the_schema_knows_what_stands_beside_auto_and_beside_every_kind(aggregation: object, is_valid: bool) -> None:
    schema = json.loads((FOLDER / "run.json").read_text(encoding="utf-8"))
    values = yaml.safe_load((ROOT / "configs" / "runs" / "demo.yaml").read_text(encoding="utf-8"))
    values |= {"solver": {"kind": "auto"}, "aggregation": aggregation}
    validator = pytest.importorskip("jsonschema").Draft202012Validator(schema)
    assert validator.is_valid(values) is is_valid


def test_a_copied_example_is_valid_where_it_lies(tmp_path: Path) -> None:
    invoke("example", "demo", "--out", tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["demo.yaml", "simulation.schema.json"]
    assert ".." not in (tmp_path / "demo.yaml").read_text()
    assert "2 task(s)" in invoke("simulate", "check", tmp_path / "demo.yaml")
    again = CliRunner().invoke(make_app(), ["example", "demo", "--out", str(tmp_path)])
    assert again.exit_code == 2 and "expected a new file" in again.stderr


def test_another_package_of_a_rooms_name_is_named_in_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "common.py").write_text("")
    command = [
        sys.executable,
        "-c",
        "import sys; sys.path.insert(1, sys.argv[1]); from headwater.__main__ import main; main()",
    ]
    done = subprocess.run([*command, str(ROOT)], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: {tmp_path}/common.py hides Headwater's own package 'common'")
    assert find_hidden_room(ROOT, [ROOT]) is None
    (tmp_path / "client").mkdir()  # A folder of data is no package.
    assert find_hidden_room(ROOT, [tmp_path / "client", ROOT]) is None


LIGHT = [
    ["--help"],
    ["site", "--help"],
    ["coordinator", "--help"],
    ["simulate", "--help"],
    ["schema", "simulation"],
    ["example"],
    ["site", "digest"],
    ["site", "log", "configs/sites/example.yaml"],
    ["site", "budget", "configs/sites/example.yaml"],
    ["site", "approve", "configs/sites/example.yaml", "--list"],
]


def imported_by(*arguments: str) -> set[str]:
    code = (
        "import atexit, sys\n"
        "from headwater.__main__ import main\n"
        f"sys.argv = ['headwater', *{list(arguments)!r}]\n"
        f"heavy = {HEAVY!r}\n"
        "atexit.register(lambda: print('LOADED', *[name for name in heavy if name in sys.modules]))\n"
        "main()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert "Traceback" not in done.stderr, done.stderr
    return set(done.stdout.splitlines()[-1].split()[1:])


@pytest.mark.parametrize("arguments", LIGHT, ids=" ".join)
def test_a_command_that_trains_nothing_loads_no_heavy_library(arguments: list[str]) -> None:
    assert imported_by(*arguments) == set()


def test_the_status_of_a_federation_loads_nothing_heavy_but_flower(tmp_path: Path) -> None:
    invoke("coordinator", "init", tmp_path / "fed", "--name", "hearts", "--address", "localhost:9092")
    assert imported_by("coordinator", "status", str(tmp_path / "fed")) <= {"flwr"}


def test_a_check_of_a_site_without_the_network_loads_only_what_opens_its_records(tmp_path: Path) -> None:
    site = yaml.safe_load((ROOT / "configs" / "sites" / "example.yaml").read_text(encoding="utf-8"))
    path = tmp_path / "site.yaml"
    path.write_text(
        yaml.safe_dump({**site, "ledger_dir": "state/ledgers", "state_dir": "state", "device": "cpu"}), encoding="utf-8"
    )
    # scikit-learn brings the example's digits, and loads the other two.
    assert imported_by("site", "check", str(path), "--offline") <= {"sklearn", "scipy", "pandas"}


def test_the_public_api_is_imported_without_any_room() -> None:
    rooms = ("common", "client", "server", "simulations", "pydantic", "torch")
    code = f"import sys, headwater; print([name for name in sys.modules if name.split('.')[0] in {rooms}])"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.strip() == "[]"
