"""The rooms' rules, read from the source: who may import whom, where things stand, and the words of docstrings."""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MAY_IMPORT = {
    "common": {"common"},
    "client": {"client", "common"},
    "server": {"server", "common"},
    "simulations": {"simulations", "server", "client", "common"},
    "headwater": {"headwater", "simulations", "server", "client", "common"},
}
ROOMS = tuple(MAY_IMPORT)
FLOORS = {
    "common": [
        "",
        "events",
        "privacy",
        "secure_sum",
        "backbones",
        "tasks",
        "scorers",
        "model",
        "serving",
        "exports",
        "process",
        "report",
    ],
    "client": [
        "",
        "ledger",
        "data",
        "inspect",
        "solvers",
        "aligners",
        "audit",
        "protocol",
        "choice",
        "secure_sum",
        "personal",
        "prediction",
        "start",
        "connection",
        "monitoring",
        "commands",
    ],
    "server": ["rounds", "reports", "choice", "deployment", "superlink", "monitoring", "commands"],
}
"""Rooms of a side, lowest first: a room imports its own and lower ones. The side's top level is "" where all may."""

PLUGIN_FOLDERS = (
    "common/backbones",
    "common/tasks",
    "common/scorers",
    "common/exports",
    "client/data/sources",
    "client/solvers",
    "client/aligners",
    "server/rounds/aggregators",
    "server/reports/trackers",
    "client/commands",
    "server/commands",
    "simulations/commands",
)
MOST_MODULES = 12
DOORS = {
    "ray": ("simulations/executors/flower.py", "simulations/executors/ray_shards.py"),
    "opacus": ("client/solvers/", "common/privacy/"),
    "grpc": ("common/process/health.py",),
    "yaml": ("common/yaml.py",),
    "sklearn": ("client/data/sources/", "simulations/"),
    "transformers": ("common/backbones/", "common/exports/parts/"),
    "torchvision": ("common/backbones/", "common/tasks/parts/"),
    "timm": ("common/backbones/",),
    "open_clip": ("common/backbones/",),
    "onnxruntime": ("common/backbones/", "common/exports/"),
    "pandas": ("client/data/sources/", "client/prediction/"),
    "tensorboard": ("server/reports/trackers/",),
    "mlflow": ("server/reports/trackers/",),
    "wandb": ("server/reports/trackers/",),
    "matplotlib": ("common/report/",),
    "jinja2": ("common/report/",),
}


def sources() -> list[Path]:
    return sorted(path for room in ROOMS for path in (ROOT / room).rglob("*.py"))


def list_tests() -> list[Path]:
    return sorted((ROOT / "tests").rglob("test_*.py"))


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@cache
def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


@cache
def imports(path: Path) -> set[str]:
    """Every module a file names in an import, wherever the import stands, and in `import_module("...")`."""
    found: set[str] = set()
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide their room"
            found.add(node.module or "")
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            head = node.value.split(".")[0]
            if head in ROOMS and "." in node.value and node.value.replace(".", "").replace("_", "").isalpha():
                found.add(node.value)  # A dotted module name in a string: resolve("common.tasks", ...).
    return found


def definitions() -> Iterator[tuple[Path, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef]]:
    for path in sources():
        for node in ast.walk(parse(path)):
            if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                yield path, node


@pytest.mark.parametrize("path", sources(), ids=relative)
def test_a_side_imports_only_the_sides_it_may(path: Path) -> None:
    used = {name.split(".")[0] for name in imports(path)} & set(ROOMS)
    assert used <= MAY_IMPORT[path.relative_to(ROOT).parts[0]]


@pytest.mark.parametrize("side", FLOORS)
def test_rooms_import_downward(side: str) -> None:
    floors = FLOORS[side]
    for path in (ROOT / side).rglob("*.py"):
        parts = path.relative_to(ROOT).with_suffix("").parts
        if len(parts) > 2:
            lower = set(floors[: floors.index(parts[1]) + 1])
            # A side's entry points stand above all rooms: no room imports them.
            used = {name.split(".")[1] for name in imports(path) if name.startswith(f"{side}.") and name.count(".") > 1}
            assert used <= lower, f"{relative(path)} imports upward: {sorted(used - lower)}"


def test_modules_do_not_import_each_other_in_circles() -> None:
    modules = {relative(path)[:-3].replace("/", ".").removesuffix(".__init__"): path for path in sources()}
    graph = {}
    for name, path in modules.items():
        named = [node.module for node in parse(path).body if isinstance(node, ast.ImportFrom) and node.module]
        graph[name] = {target for target in named if target in modules and target != name}
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, " -> ".join((*trail, name))
        if name not in done:
            for target in graph[name]:
                visit(target, (*trail, name))
            done.add(name)

    for name in graph:
        visit(name, ())


def test_the_coordinator_cannot_reach_a_record() -> None:
    """The security officer's check: no file of the server or of what it imports names a data reader."""
    for path in [*(ROOT / "server").rglob("*.py"), *(ROOT / "common").rglob("*.py")]:
        assert not {name for name in imports(path) if name.startswith("client")}, path


@pytest.mark.parametrize("package", DOORS)
def test_heavy_packages_come_in_through_few_named_doors(package: str) -> None:
    for path in sources():
        if package in {name.split(".")[0] for name in imports(path)}:
            assert relative(path).startswith(DOORS[package]), f"{relative(path)} imports {package}"


def test_only_one_module_imports_what_flower_does_not_call_public() -> None:
    """Also in tests, and in scripts that stand in strings."""
    private = re.compile(r"(?:from|import)\s+flwr\.(?!(?:app|clientapp|serverapp|simulation)\s)")
    folders = (*ROOMS, "tests", "benchmarks")
    paths = [path.relative_to(ROOT).as_posix() for room in folders for path in (ROOT / room).rglob("*.py")]
    assert [path for path in paths if private.search((ROOT / path).read_text())] == ["common/flower.py"]


def test_only_a_simulation_leaves_files_unflushed() -> None:
    """A deployed site's ledger must survive a power cut: its code cannot switch flushing off."""
    naming = {relative(path) for path in sources() if "without_flushing" in path.read_text()}
    assert {name.split("/")[0] for name in naming - {"common/files.py"}} == {"simulations"}
    calling = {relative(path) for path in sources() if "os.fsync(" in path.read_text()}
    assert calling == {"common/files.py"}, "others flush through it"


def test_a_folder_that_is_no_plug_in_folder_has_at_most_twelve_modules() -> None:
    folders = Counter(path.parent for path in sources() if path.name != "__init__.py")
    full = {relative(folder): number for folder, number in folders.items() if number > MOST_MODULES}
    assert set(full) <= set(PLUGIN_FOLDERS), full


def test_no_private_module_is_imported_from_another_folder() -> None:
    for path in sources():
        for node in ast.walk(parse(path)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in ROOMS:
                *folder, module = f"{node.module}".split(".")
                assert (
                    not module.startswith("_") or module == "__main__" or Path(*folder) == path.relative_to(ROOT).parent
                ), relative(path)


def test_a_verb_is_a_module_of_its_name() -> None:
    for side in ("client", "server", "simulations"):
        for path in (ROOT / side / "commands").glob("[a-z]*.py"):
            names = {node.name.rstrip("_") for node in parse(path).body if isinstance(node, ast.FunctionDef)}
            assert path.stem.rstrip("_") in names, f"{relative(path)} defines no verb {path.stem}"


def test_class_names_are_unique() -> None:
    names = Counter(node.name for _, node in definitions() if isinstance(node, ast.ClassDef))
    assert not [name for name, number in names.items() if number > 1]


def test_each_owners_settings_stand_with_the_owner() -> None:
    homes = {
        "RunConfig": "common/run.py",
        "SiteConfig": "client/config.py",
        "SimulationConfig": "simulations/config.py",
    }
    found = {node.name: relative(path) for path, node in definitions() if node.name in homes}
    assert found == homes


@pytest.mark.parametrize("path", [path for path in list_tests() if len(path.relative_to(ROOT).parts) > 3], ids=relative)
def test_a_test_stands_in_the_folder_of_what_it_tests(path: Path) -> None:
    room = path.relative_to(ROOT / "tests").parent
    assert (ROOT / room).is_dir(), f"tests/{room} mirrors no room"
    # Imported, or run as a command.
    used = {name.split(".")[0] for name in imports(path)}
    assert room.parts[0] in used or '"-m"' in path.read_text(encoding="utf-8"), f"nothing of {room} in it"


def test_docstrings_say_what_is_returned_or_done() -> None:
    riddle = re.compile(r"(What|Whether|How|Whose|Who|Of|Where|Which)\b")
    documented = [*definitions(), *((path, parse(path)) for path in sources())]
    riddles = [
        f"{relative(path)}: {getattr(node, 'name', 'the module')}: {text.splitlines()[0]}"
        for path, node in documented
        if (text := ast.get_docstring(node)) and riddle.match(text)
    ]
    # The texts below constants too.
    riddles += [
        f"{relative(path)}: {node.value.value.splitlines()[0]}"
        for path in sources()
        for node in parse(path).body
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and riddle.match(str(node.value.value))
    ]
    assert not riddles, "\n".join(riddles)


def test_public_functions_of_three_arguments_describe_each() -> None:
    lacking = []
    for path in sources():
        if path.parent.name == "commands":
            continue  # A verb's arguments are described where typer reads it.
        outer = [parse(path), *(node for node in parse(path).body if isinstance(node, ast.ClassDef))]
        for node in (node for each in outer for node in each.body):
            if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
                arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
                count = sum(each.arg not in ("self", "cls") for each in arguments)
                if count >= 3 and "Args:" not in (ast.get_docstring(node) or ""):
                    lacking.append(f"{relative(path)}: {node.name}")
    assert not lacking, "\n".join(lacking)
