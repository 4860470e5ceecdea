"""The rooms' import rules, read from the source: who may import whom, and through which doors heavy packages come."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("common", "client", "server", "simulations", "headwater")
MAY_IMPORT = {
    "common": {"common"},
    "client": {"client", "common"},
    "server": {"server", "common"},
    "simulations": {"simulations", "server", "client", "common"},
    "headwater": {"headwater", "simulations", "server", "client", "common"},
}
DOORS = {
    "flwr": (
        "common/flower.py",
        "common/messages.py",
        "client/app.py",
        "client/connection/worker.py",
        "client/protocol/train.py",
        "server/",
        "simulations/executors/in_process.py",
        "simulations/executors/flower.py",
        "simulations/federate.py",
    ),
    "ray": ("simulations/executors/flower.py",),
    "opacus": ("client/solvers/", "common/privacy/"),
    "grpc": ("common/process/health.py",),
    "yaml": ("common/yaml.py",),
    "sklearn": ("client/data/sources/", "simulations/"),
}


def sources() -> list[Path]:
    return sorted(path for room in ROOMS for path in (ROOT / room).rglob("*.py"))


def imports(path: Path) -> set[str]:
    """Every module a file names in an import, wherever the import stands, and in `import_module("...")`."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
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


@pytest.mark.parametrize("path", sources(), ids=lambda path: path.relative_to(ROOT).as_posix())
def test_a_room_imports_only_the_rooms_it_may(path: Path) -> None:
    room = path.relative_to(ROOT).parts[0]
    used = {name.split(".")[0] for name in imports(path)} & set(ROOMS)
    assert used <= MAY_IMPORT[room]


@pytest.mark.parametrize("path", sources(), ids=lambda path: path.relative_to(ROOT).as_posix())
def test_heavy_packages_come_in_through_their_doors(path: Path) -> None:
    relative = path.relative_to(ROOT).as_posix()
    for package, doors in DOORS.items():
        if package in {name.split(".")[0] for name in imports(path)}:
            assert relative.startswith(doors), f"{relative} imports {package}; its doors are {doors}"


def test_only_one_module_imports_what_flower_does_not_call_public() -> None:
    """Also in tests, and in scripts that stand in strings."""
    private = re.compile(r"(?:from|import)\s+flwr\.(?!(?:app|clientapp|serverapp|simulation)\s)")
    folders = (*ROOMS, "tests", "benchmarks")
    paths = [path.relative_to(ROOT).as_posix() for room in folders for path in (ROOT / room).rglob("*.py")]
    assert [path for path in paths if private.search((ROOT / path).read_text())] == ["common/flower.py"]


def test_modules_do_not_import_each_other_in_circles() -> None:
    modules = {
        path.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".").removesuffix(".__init__"): path
        for path in sources()
    }
    graph = {}
    for name, path in modules.items():
        body = ast.parse(path.read_text(encoding="utf-8")).body
        named = [node.module for node in body if isinstance(node, ast.ImportFrom) and node.module]
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


def test_only_a_simulation_leaves_files_unflushed() -> None:
    """A deployed site's ledger must survive a power cut: its code cannot switch flushing off."""
    naming = {path.relative_to(ROOT).as_posix() for path in sources() if "without_flushing" in path.read_text()}
    assert naming == {"common/files.py", "simulations/experiment.py", "simulations/federate.py"}
    calling = {path.relative_to(ROOT).as_posix() for path in sources() if "os.fsync(" in path.read_text()}
    assert calling == {"common/files.py"}, "others flush through it"
