"""Counts what can be counted of the code's rooms and language, and prints one row a figure.

    python -m benchmarks.language [FOLDER]

Counted over headwater, common, client, server and simulations, tests left out. The same script on an older checkout
gives the figures before a change.
"""

from __future__ import annotations

import ast
import re
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

ROOMS = ("headwater", "common", "client", "server", "simulations")
RIDDLES = re.compile(r"(What|Whether|How|Whose|Of)\b")
PARTICIPLES = {"found", "taken", "counted", "given", "kept", "sent", "made", "shown", "asked", "wanted", "spent"}
Function = ast.FunctionDef | ast.AsyncFunctionDef


def sources(root: Path) -> list[Path]:
    """Returns the rooms' source files, sorted."""
    return sorted(path for room in ROOMS for path in (root / room).rglob("*.py"))


def functions(tree: ast.AST) -> Iterator[Function]:
    """Yields every function and method below a node."""
    return (node for node in ast.walk(tree) if isinstance(node, Function))


def count_arguments(function: Function) -> int:
    """Returns the number of arguments a caller gives: neither self nor cls."""
    arguments = function.args
    names = [each.arg for each in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]
    return len(names) - (names[:1] in (["self"], ["cls"]))


def string_subscripts(tree: ast.AST) -> int:
    """Returns how often something is looked up by a constant string, writing and deleting left out."""
    return sum(
        isinstance(node, ast.Subscript)
        and isinstance(node.ctx, ast.Load)
        and isinstance(node.slice, ast.Constant)
        and isinstance(node.slice.value, str)
        for node in ast.walk(tree)
    )


def percent(part: int, whole: int) -> str:
    """Returns a share in whole percent with its two counts."""
    return f"{100 * part / max(whole, 1):.0f} % ({part} of {whole})"


def measure(root: Path) -> dict[str, str]:
    """Returns every figure by its name.

    Raises:
        SyntaxError: a file is not Python.
    """
    paths = sources(root)
    trees = {path: ast.parse(path.read_text(encoding="utf-8")) for path in paths}
    folders = Counter(path.parent for path in paths if path.name != "__init__.py")
    largest = ", ".join(f"{folder.relative_to(root)} {number}" for folder, number in folders.most_common(4))
    classes = [node.name for tree in trees.values() for node in tree.body if isinstance(node, ast.ClassDef)]
    public_classes = [name for name in classes if not name.startswith("_")]
    every = [function for tree in trees.values() for function in functions(tree)]
    documented = [text for function in every if (text := ast.get_docstring(function))]
    wide = [each for each in every if not each.name.startswith("_") and count_arguments(each) >= 3]
    one_word = [each for each in every if not each.name.startswith("__") and "_" not in each.name.strip("_")]
    named = [each for each in every if not each.name.startswith("__")]
    readme = (root / "README.md").read_text(encoding="utf-8")
    lines = {
        room: sum(path.read_text(encoding="utf-8").count("\n") for path in paths if path.is_relative_to(root / room))
        for room in ROOMS
    }
    return {
        "files per folder, the fullest": largest,
        "public classes": str(len(public_classes)),
        "class names used twice": str(len(classes) - len(set(classes))),
        "string subscripts": str(sum(string_subscripts(tree) for tree in trees.values())),
        "docstrings that begin with a riddle": percent(
            sum(bool(RIDDLES.match(text)) for text in documented), len(documented)
        ),
        "public functions of 3 arguments with Args": percent(
            sum("Args:" in (ast.get_docstring(each) or "") for each in wide), len(wide)
        ),
        "function names of one word": percent(len(one_word), len(named)),
        "function names that are a participle": percent(
            sum(each.name.strip("_").split("_")[0] in PARTICIPLES for each in named), len(named)
        ),
        "README": f"{len(readme.split())} words, {readme.count(chr(10))} lines",
        "lines": ", ".join(f"{room} {number}" for room, number in lines.items() if number)
        + f"; in all {sum(lines.values())}",
    }


if __name__ == "__main__":
    for name, figure in measure(Path(sys.argv[1]) if len(sys.argv) > 1 else Path.cwd()).items():
        print(f"{name:45s} {figure}")
