"""Writes docs/reference/timm.md: which families of timm load, give features of the stated width, and divide.

Of each module of timm, a small architecture is built with random weights and put through what a run would do with it.
`python docs/timm_families.py` prints all rows, with names of modules those alone; `--page FILE` writes the page from
lines that were printed.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))

import timm
import torch

from common.backbones.timm import Timm
from common.types import BadInput

PAGE = ROOT / "docs" / "reference" / "timm.md"
_SMALL = ("test_", "atto", "femto", "pico", "nano", "xxs", "xxt", "tiny", "mini", "micro", "_s0", "_xs", "_t0", "small")


def find_small(module: str) -> str:
    """Returns an architecture of a module whose name says that it is small; else the first one."""
    names = timm.list_models(module=module)
    return next((name for mark in _SMALL for name in names if mark in name), names[0])


def survey(module: str) -> str:
    """Returns the row of a module: its smallest architecture, number of features, where it divides, or its refusal."""
    name = find_small(module)
    torch.manual_seed(0)
    try:
        settings = Timm(model=name).resolved()
        with torch.device("meta"):
            stated = settings.architecture().feature_dim
        architecture = settings.architecture()
    except BadInput as error:
        return f"| {module} | `{name}` | refused | {str(error).replace('|', '/')} |"
    except (RuntimeError, NotImplementedError) as error:
        return f"| {module} | `{name}` | refused | cannot be built without memory ({type(error).__name__}) |"
    network = architecture.module.train(False)
    assert settings.preprocess_settings is not None
    side = settings.preprocess_settings.side
    inputs_B = torch.randn(2, 3, side, side)
    with torch.no_grad():
        together_BD = network(inputs_B)
        alone_BD = torch.cat([network(inputs_B[:1]), network(inputs_B[1:])])
    if together_BD.shape != (2, stated):
        return f"| {module} | `{name}` | refused | gives {tuple(together_BD.shape)[1:]}, states {stated} |"
    if not float((together_BD - alone_BD).norm()) <= 1e-3 * float(alone_BD.norm()):
        return f"| {module} | `{name}` | refused | a picture's features depend on its batch |"
    return f"| {module} | `{name}` | {stated} | {_find_division(settings)} |"


def _find_division(settings: Timm) -> str:
    blocks = settings.blocks(settings.architecture().module.train(False))
    for block in reversed(blocks):
        try:
            settings.divide(settings.architecture().module.train(False), block)
        except BadInput:
            continue
        return f"`{block}`"
    return "no"


def write_page(lines: Sequence[str]) -> None:
    """Writes the page.

    Args:
        lines: rows as they are printed.
    """
    rows = sorted({line for line in lines if line.startswith("| ")})
    refused = [row for row in rows if "| refused |" in row]
    text = [
        "# Families of timm",
        "",
        "<!-- Written by docs/timm_families.py; do not edit. -->",
        "",
        f"What a backbone of kind `timm` does with each family of timm {timm.__version__}: a small architecture with",
        "random weights is built with and without memory, encodes two pictures together and alone, and is divided.",
        "`divides at` is the last block above which it can train.",
        "",
        "| family | tried | features | divides at |",
        "|---|---|---|---|",
        *[row for row in rows if row not in refused],
        "",
        "## Refused",
        "",
        "Where a sentence names `preprocess`, write it (`preprocess: {resize, crop, mean, std}`); for the others take",
        "another family, or export one's own with torch.export (kind `torch_export`).",
        "",
        "| family | tried | sentence |",
        "|---|---|---|",
        *[row.replace("| refused ", "", 1) for row in refused],
        "",
    ]
    left = sorted(set(timm.list_modules()) - {row.split("|")[1].strip() for row in rows})
    text += ["Not surveyed yet:", ", ".join(left) + ".", ""] if left else []
    PAGE.write_text("\n".join(text), encoding="utf-8")


def main(names: Sequence[str]) -> None:
    """Prints the rows of some modules; of all where none is named."""
    for module in names or timm.list_modules():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                row = survey(module)
            except Exception as error:  # noqa: BLE001  # Any: the others are still surveyed.
                row = f"| {module} | | refused | {type(error).__name__} {str(error).splitlines()[0][:120]} |"
        print(row, flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--page"]:
        write_page(Path(sys.argv[2]).read_text(encoding="utf-8").splitlines())
    else:
        main(sys.argv[1:])
