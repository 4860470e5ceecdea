"""Packs: settings and facts of published models that hospitals ask for, one file each in `configs/backbones`.

In a run file, `backbone: {pack: rad_dino, folder: ./rad-dino}` stands for the pack's settings with the model in that
folder; without a place it is looked for on the Hub. Whatever is written beside `pack` goes before the pack's own. What
travels is the backbone's own settings: a site never reads a pack. The digest that a pack states is compared when the
weights are opened. docs/reference/packs.md lists them all.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
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


@dataclass(frozen=True)
class StatedWeights:
    """The part of a backbone's settings that a pack says of its weights.

    Attributes:
        pack: name of the pack.
        digest: digest of the backbone with the pack's own settings; None where it is unknown, or settings are others.
        reason: why there is no digest to compare with; "" where there is one.
        part: key of the settings that are the pack's, such as `encoder`; "" where all are.
    """

    pack: str
    digest: str | None
    reason: str = ""
    part: str = ""

    def check(self, digest: str, key: str) -> None:
        """Compares the digest of the backbone that was opened with the pack's, where the pack states one.

        Args:
            digest: digest of the opened backbone.
            key: key of the backbone's settings, for the message.

        Raises:
            BadInput: they are different.
        """
        if self.digest not in (None, digest):
            raise BadInput(
                f"{key}.pack: expected the weights of pack {self.pack}, whose digest is {self.digest}, got others with "
                f"digest {digest}; download the model again, or write the pack's settings in place of `pack`"
            )


@dataclass(frozen=True)
class Replaced:
    """A run file's values without packs.

    Attributes:
        values: the values.
        stated: name of a backbone -> what its pack says of its weights.
    """

    values: Mapping[str, Any]
    stated: Mapping[str, StatedWeights]


def replace_packs(values: Mapping[str, Any]) -> Replaced:
    """Returns a run file's values with settings in place of each backbone's `pack`, and its licence among `licences`.

    Raises:
        BadInput: a pack is not known, or a kind stands beside it; names the key.
    """
    several = values.get("backbones")
    specs = several if isinstance(several, Mapping) else {"backbone": values.get("backbone")}
    opened: dict[str, Mapping[str, Any]] = {}
    licences: dict[str, str] = {}
    stated: dict[str, StatedWeights] = {}
    for name, spec in specs.items():
        if not isinstance(spec, Mapping):
            continue
        key = name if several is None else f"backbones.{name}"
        # The encoder of a bag, or of what writes texts, may be a pack too.
        encoder = spec.get("encoder")
        is_inner = isinstance(encoder, Mapping) and "pack" in encoder
        given: Mapping[str, Any] = encoder if is_inner else spec  # type: ignore[assignment]
        if "pack" not in given:
            continue
        key = f"{key}.encoder" if is_inner else key
        pack = read_pack(given["pack"], f"{key}.pack")
        settings = _open(pack, given, key)
        opened[name], licences[name] = {**spec, "encoder": settings} if is_inner else settings, pack.licence
        stated[name] = _state(pack, str(given["pack"]), settings, is_inner=is_inner)
    if not opened:
        return Replaced(values, {})
    own = opened if several is None else {"backbones": {**specs, **opened}}
    return Replaced({**values, **own, "licences": {**licences, **(values.get("licences") or {})}}, stated)


def _state(pack: Pack, name: str, settings: Mapping[str, Any], *, is_inner: bool) -> StatedWeights:
    """Returns what a pack says of the weights that settings name.

    Args:
        pack: the pack.
        name: its name.
        settings: settings of the backbone, with what stands beside the pack.
        is_inner: whether the backbone is the encoder of another.
    """
    if pack.digest == "unknown":
        return StatedWeights(name, None, f"the digest of pack {name} is unknown: whatever weights are found are taken")
    if _drop_places(settings) != _drop_places(pack.backbone):
        return StatedWeights(
            name, None, f"the settings are not those of pack {name} alone: its digest is of others and is not compared"
        )
    return StatedWeights(name, pack.digest, part="encoder" if is_inner else "")


def _drop_places(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in settings.items() if key not in _PLACES}


def _open(pack: Pack, spec: Mapping[str, Any], key: str) -> dict[str, Any]:
    if "kind" in spec:
        raise BadInput(f"{key}.kind: expected none beside `pack`, which says it")
    given = {name: value for name, value in spec.items() if name != "pack"}
    placed = any(name in given for name in _PLACES)
    own = {name: value for name, value in pack.backbone.items() if not (placed and name in _PLACES)}
    return {**own, **given}
