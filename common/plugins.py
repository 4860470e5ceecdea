"""Plug-ins are found by file name: one file in a plug-in folder is one `kind` in YAML.

A plug-in file defines exactly one final class derived from `Plugin`: a frozen pydantic model whose fields are the
settings a user writes and whose methods fulfil the folder's Protocol. Adding a kind adds one file and edits none.
Only the file that a configuration names is imported. An installed package may bring further kinds by entry points of
the group `headwater.FOLDER`, such as `headwater.backbones`: the name is the kind, the value its module. The project's
own kinds are looked for first, so that no package replaces one.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import os
import pkgutil
import sys
from collections.abc import Mapping
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, ClassVar, Protocol, TypeGuard, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    PrivateAttr,
    ValidationError,
    ValidationInfo,
    model_validator,
)

from common.errors import describe, nearest, plain
from common.types import BadInput

_GROUP = "headwater"
"""Entry points of installed packages stand in a group of this name, a dot and the folder's name."""


class Frozen(BaseModel):
    """Base of every settings model: immutable, unknown keys refused, non-finite numbers refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    former_keys: ClassVar[Mapping[str, str]] = {}
    """Key of an earlier version -> its name now: either is read, both at once are refused."""

    @model_validator(mode="before")
    @classmethod
    def _read_former_keys(cls, values: Any) -> Any:
        if not isinstance(values, Mapping):
            return values
        renamed = dict(values)
        for former, now in cls.former_keys.items():
            if former in renamed:
                if now in renamed:
                    raise ValueError(f"{former}: this key has another name now, write `{now}`")
                renamed[now] = renamed.pop(former)
        return renamed


_Members = TypeVar("_Members")
_fulfils: dict[tuple[type, type], bool] = {}


def fulfils(plugin: object, protocol: type[_Members]) -> TypeGuard[_Members]:
    """Returns what `isinstance` does for a plug-in and a Protocol, which takes Python 20 to 50 us: once for each class.

    Args:
        plugin: a plug-in; all of its class have the same members.
        protocol: a runtime-checkable Protocol.
    """
    key = type(plugin), protocol
    if key not in _fulfils:
        _fulfils[key] = isinstance(plugin, protocol)
    return _fulfils[key]


class Plugin(Frozen):
    """Base of every plug-in class. `kind` is the file's name."""

    kind: str


class Spec(BaseModel):
    """An unresolved plug-in setting: `kind` and whatever else its file declares.

    Kept raw where the reading room may not import the plug-in's room; resolved with `resolve`.
    """

    model_config = ConfigDict(frozen=True, extra="allow")
    kind: str
    _base: Path = PrivateAttr(default_factory=Path.cwd)

    @model_validator(mode="after")
    def _remember_base(self, info: ValidationInfo) -> Spec:
        if info.context and "base" in info.context:
            self._base = info.context["base"]
        return self

    def settings(self) -> dict[str, Any]:
        """Returns the settings that the kind's own file is given."""
        return self.model_dump()


def _relative_to_file(path: Path, info: ValidationInfo) -> Path:
    base = (info.context or {}).get("base") or Path.cwd()
    try:
        return (base / path.expanduser()).resolve()
    except RuntimeError as error:
        raise ValueError(f"{path}: expected a path, got a link that leads to itself") from error


LocalPath = Annotated[Path, AfterValidator(_relative_to_file)]
"""A path; a relative one is relative to the file it is written in."""


def kinds(package: str) -> list[str]:
    """Names of all plug-ins in a folder, sorted."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.submodule_search_locations is None:
        raise BadInput(f"{package} is not a plug-in folder")
    found = pkgutil.iter_modules(spec.submodule_search_locations)
    return sorted(module.name for module in found if not (module.ispkg or module.name.startswith("_")))


def refuse_unknown_kind(package: str, kind: str, key: str) -> None:
    """Refuses a kind that a folder does not have; nothing is imported.

    Args:
        package: dotted name of the plug-in folder.
        kind: name of the kind.
        key: key of the setting, for the message.

    Raises:
        BadInput: there is no such kind.
    """
    if kind in kinds(package):
        return
    known = sorted({*kinds(package), *_find_installed(package)})
    if kind not in known:
        raise BadInput(f"{key}: expected one of {', '.join(known)}, got {plain(repr(kind), 80)}{nearest(kind, known)}")


def plugin_class(package: str, kind: str, key: str = "kind", own: Path | None = None) -> type[Plugin]:
    """The class behind a kind.

    Args:
        package: dotted plug-in folder.
        kind: the file's name.
        key: where the kind stands in its file, for error messages.
        own: a folder of further kinds outside the project.

    Raises:
        BadInput: no such kind (names the nearest valid one), one of the project's name in the further folder, or a
            class that lacks what the folder's Protocol asks for (names all of it).
    """
    module = _module(package, kind, key, own) if own else _loaded(package, kind) or _module(package, kind, key, own)
    found = _classes(module)
    if len(found) != 1:
        raise BadInput(f"{package}/{kind}.py: expected exactly one Plugin class, got {len(found)}")
    missing = _list_missing(package, found[0])
    if missing:
        raise BadInput(
            f"{module.__file__}: expected all that a kind of {package} needs, got {kind!r} without {', '.join(missing)}"
        )
    return found[0]


def _loaded(package: str, kind: str) -> ModuleType | None:
    """A kind's module where it was imported before and its file is still there: folders are not listed every time."""
    module = None if kind.startswith("_") else sys.modules.get(f"{package}.{kind}")
    return module if module is not None and module.__file__ and os.path.exists(module.__file__) else None


def _module(package: str, kind: str, key: str, own: Path | None) -> ModuleType:
    known, further = kinds(package), _further_kinds(own)
    taken = sorted(set(known) & set(further))
    if taken:
        raise BadInput(f"plugins: expected kinds of other names than the project's own, got {', '.join(taken)}")
    if kind in further:
        return _load(further[kind])
    if kind in known:
        return importlib.import_module(f"{package}.{kind}")
    installed = _find_installed(package)
    if kind not in installed:
        everything = sorted({*known, *further, *installed})
        raise BadInput(f"{key}: expected one of {', '.join(everything)}, got {kind!r}{nearest(kind, everything)}")
    return _import_installed(installed[kind], key)


def _find_installed(package: str) -> dict[str, EntryPoint]:
    """Returns the kinds that installed packages bring, by name. It reads every package's description: it takes ms."""
    points = entry_points(group=f"{_GROUP}.{package.rpartition('.')[2]}")
    return {point.name: point for point in sorted(points, reverse=True)}


def _import_installed(point: EntryPoint, key: str) -> ModuleType:
    try:
        return importlib.import_module(point.module)
    except Exception as error:
        owner = point.dist.name if point.dist is not None else "its package"
        raise BadInput(
            f"{key}: expected {owner} to bring the kind {point.name!r}, got {type(error).__name__}"
        ) from error


@cache
def _classes(module: ModuleType) -> list[type[Plugin]]:
    """A loaded module's plug-in classes; looked for once, because a site asks for its kinds in every round."""
    return [
        member
        for _, member in inspect.getmembers(module, inspect.isclass)
        if issubclass(member, Plugin) and member.__module__ == module.__name__
    ]


@cache
def _list_missing(package: str, cls: type[Plugin]) -> list[str]:
    """Returns the members that a class lacks of its folder's Protocols.

    The folder's Protocol with a `kind` is required. Those in its tuple `OPTIONAL`, where it has one, are asked for only
    of a class that has part of their members.
    """
    module = importlib.import_module(package)
    (required,) = (
        member
        for _, member in inspect.getmembers(module, inspect.isclass)
        if Protocol in member.__bases__
        and f"{member.__module__}.".startswith(f"{package}.")
        and "kind" in inspect.get_annotations(member)
    )
    # Pydantic keeps a field without a default nowhere but in `model_fields`.
    present = {*dir(cls), *cls.model_fields}
    missing = _members(required) - present
    for optional in vars(module).get("OPTIONAL", ()):
        if _members(optional) & present:
            missing |= _members(optional) - present
    return sorted(missing)


def _members(protocol: type) -> set[str]:
    return {*inspect.get_annotations(protocol), *(name for name in vars(protocol) if not name.startswith("_"))}


def _further_kinds(folder: Path | None) -> dict[str, Path]:
    if folder is None:
        return {}
    if not folder.is_dir():
        raise BadInput(f"plugins: expected a folder, found none at {folder}")
    return {path.stem: path for path in sorted(folder.glob("*.py")) if not path.name.startswith("_")}


def _load(path: Path) -> ModuleType:
    """A module from a file outside the project, once for each file."""
    name = f"own_plugin_{hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:16]}_{path.stem}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Before it runs: pydantic looks a class's annotations up in its module.
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise BadInput(f"{path}: expected a plug-in that can be imported, got {type(error).__name__}") from error
    return module


def resolve(package: str, spec: Spec | Mapping[str, Any], key: str, own: Path | None = None) -> Any:
    """The plug-in instance a setting asks for.

    Args:
        package: dotted plug-in folder, such as "common.tasks".
        spec: `kind` plus the kind's own settings.
        key: where the setting stands in its file, for error messages.
        own: a folder of further kinds outside the project.

    Raises:
        BadInput: unknown kind, unknown or wrong setting; names the key, what was expected and what was got.
    """
    base = spec._base if isinstance(spec, Spec) else Path.cwd()
    values = spec.settings() if isinstance(spec, Spec) else dict(spec)
    kind = values.get("kind")
    if not isinstance(kind, str):
        raise BadInput(f"{key}.kind: expected one of {', '.join(kinds(package))}, got {kind!r}")
    cls = plugin_class(package, kind, f"{key}.kind", own)
    try:
        return cls.model_validate(values, context={"base": base})
    except ValidationError as error:
        raise BadInput(describe(error, cls, key)) from error
