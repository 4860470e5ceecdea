"""Packs: settings and facts of published models that hospitals ask for, one file each in `configs/backbones`.

In a run file, `backbone: {pack: rad_dino, folder: ./rad-dino}` stands for the pack's settings with the model in that
folder; without a place it is looked for on the Hub. Whatever is written beside `pack` goes before the pack's own. What
travels is the backbone's own settings: a site never reads a pack. docs/reference/packs.md lists them all.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from common.errors import nearest
from common.plugins import Frozen
from common.run import Digest
from common.types import BadInput
from common.yaml import load

# A link to configs/backbones.
FOLDER = Path(__file__).resolve().parents[2] / "packs"
_PLACES = ("model", "folder", "package", "weights")

Fact = Literal["licence", "parameters_m", "features", "preprocessing", "pretrained_on"]


class Pack(Frozen):
    """A published model.

    Attributes:
        name: its name, as its owners write it.
        records: what it reads.
        licence: licence of its weights.
        parameters_m: number of its parameters, in millions.
        features: number of features of a record.
        preprocessing: how a record becomes an input.
        pretrained_on: what it was pre-trained on.
        remarks: what else to know; empty for nothing.
        digest: digest of the backbone with the pack's settings; `unknown` where nobody here has opened it.
        unchecked: the facts that were written from memory and found in no source.
        backbone: settings of the backbone, its `kind` and its place on the Hub among them.
    """

    name: str
    records: str
    licence: Annotated[str, Field(min_length=1, max_length=200)]
    parameters_m: Annotated[int, Field(ge=1)]
    features: Annotated[int, Field(ge=1)]
    preprocessing: str
    pretrained_on: str
    remarks: str = ""
    digest: Digest | Literal["unknown"]
    unchecked: list[Fact]
    backbone: dict[str, Any]


def list_packs() -> list[str]:
    """Returns the names of all packs, sorted."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def read_pack(name: object, key: str) -> Pack:
    """Returns a pack.

    Args:
        name: its name.
        key: key of the setting, for messages.

    Raises:
        BadInput: there is none of that name.
    """
    known = list_packs()
    if name not in known:
        close = nearest(name, known) if isinstance(name, str) else ""
        raise BadInput(f"{key}: expected one of {', '.join(known)}, got {str(name)[:80]!r}{close}")
    return load(Pack, FOLDER / f"{name}.yaml")


def replace_packs(values: Mapping[str, Any]) -> Mapping[str, Any]:
    """Returns a run file's values with settings in place of each backbone's `pack`, and its licence among `licences`.

    Raises:
        BadInput: a pack is not known, or a kind stands beside it; names the key.
    """
    several = values.get("backbones")
    specs = several if isinstance(several, Mapping) else {"backbone": values.get("backbone")}
    opened, licences = {}, {}
    for name, spec in specs.items():
        key = name if several is None else f"backbones.{name}"
        # The encoder of a bag, or of what writes texts, may be a pack too.
        encoder = spec.get("encoder") if isinstance(spec, Mapping) else None
        inner = isinstance(encoder, Mapping) and "pack" in encoder
        given, key = (encoder, f"{key}.encoder") if inner else (spec, key)
        if isinstance(given, Mapping) and "pack" in given:
            pack = read_pack(given["pack"], f"{key}.pack")
            settings = _open(pack, given, key)
            opened[name], licences[name] = {**spec, "encoder": settings} if inner else settings, pack.licence
    if not opened:
        return values
    own = opened if several is None else {"backbones": {**specs, **opened}}
    return {**values, **own, "licences": {**licences, **(values.get("licences") or {})}}


def _open(pack: Pack, spec: Mapping[str, Any], key: str) -> dict[str, Any]:
    if "kind" in spec:
        raise BadInput(f"{key}.kind: expected none beside `pack`, which says it")
    given = {name: value for name, value in spec.items() if name != "pack"}
    placed = any(name in given for name in _PLACES)
    own = {name: value for name, value in pack.backbone.items() if not (placed and name in _PLACES)}
    return {**own, **given}
