"""`schema`: prints the JSON Schema of a file, with every kind's settings, for editors that complete and check."""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import BaseModel

from common.plugins import kinds
from common.process.console import reported_errors

FOLDER = Path(__file__).resolve().parents[1] / "schema"

PLUGIN_FOLDERS = {
    "backbone": "common.backbones",
    "task": "common.tasks",
    "source": "client.data.sources",
    "solver": "client.solvers",
    "scorer": "common.scorers",
    "aligner": "client.aligners",
    "aggregator": "server.rounds.aggregators",
}

FIELDS = {
    "RunConfig": {"backbone": "backbone", "backbones": "backbone", "tasks": "task", "solver": "solver",
                  "aggregation": "aggregator"},
    "ChoiceSettings": {"scorer": "scorer"},
    "SiteConfig": {"sources": "source", "own_backbones": "backbone", "aligners": "aligner"},
    "SimulationConfig": {"sources": "source", "non_private_solver": "solver", "aligners": "aligner"},
    "Partition": {"sites": "source"},
    "Pretrain": {"sources": "source"},
}  # fmt: skip
"""The fields of the settings models that hold a plug-in's settings, and which plug-in folder's."""


class File(StrEnum):
    """The three files that a user writes."""

    RUN = "run"
    SITE = "site"
    SIMULATION = "simulation"


def schema(
    file: Annotated[File, typer.Argument(help="Which file")],
    out: Annotated[Path | None, typer.Option(help="Write it to this file instead of stdout")] = None,
) -> None:
    """Prints the JSON Schema of a run file, site file or simulation file.

    Example: headwater schema simulation --out simulation.schema.json
    """
    with reported_errors():
        text = read_schema(file)
        if out is None:
            typer.echo(text, nl=False)
        else:
            out.write_text(text, encoding="utf-8")


def read_schema(file: str) -> str:
    """Returns the schema that was written with this version; makes it anew where further kinds are installed.

    The written one answers at once: making it imports every kind, and with some of them torch.
    """
    written = (FOLDER / f"{file}.json").read_text(encoding="utf-8")
    return written if json.loads(written)["x-kinds"] == _list_kinds() else make_schema(file)


def make_schema(file: str) -> str:
    """Returns the JSON Schema of a file, made from the models and from every installed kind."""
    from client.config import SiteConfig
    from common.run import RunConfig
    from simulations.config import SimulationConfig

    models: dict[str, type[BaseModel]] = {"run": RunConfig, "site": SiteConfig, "simulation": SimulationConfig}
    values = models[file].model_json_schema()
    definitions = values.setdefault("$defs", {})
    definition_of = {models[file].__name__: values, **definitions}
    used: set[str] = set()
    for name, fields in FIELDS.items():
        for field, role in fields.items():
            if name in definition_of:
                used.add(role)
                _replace_specs(definition_of[name]["properties"][field], role)
    for role in sorted(used):
        _add_kinds(definitions, role)
    if "solver" in used:
        _add_auto(definitions, definition_of["RunConfig"])
        _add_packs(definitions)
    whole = {"$schema": "https://json-schema.org/draft/2020-12/schema", **values, "x-kinds": _list_kinds()}
    return json.dumps(whole, indent=1, sort_keys=True) + "\n"


def _add_auto(definitions: dict[str, Any], run: dict[str, Any]) -> None:
    """Adds `solver: {kind: auto}`, and what may stand in `aggregation` beside it and beside every kind."""
    from common.run import AUTO, Adjustment

    shared = definitions.pop("AggregationSpec")["properties"]
    for name in [name for name in definitions if name.startswith("aggregator.")]:
        if "kind" in definitions[name]["properties"]:
            definitions[name]["properties"] = {**shared, **definitions[name]["properties"]}
    plain = {"type": "object", "additionalProperties": False}
    kind = {"const": AUTO, "title": "Kind", "type": "string"}
    definitions["solver.auto"] = {**plain, "properties": {"kind": kind}, "required": ["kind"], "title": "Auto"}
    definitions["solver"]["oneOf"].append({"$ref": "#/$defs/solver.auto"})
    definitions["solver"]["discriminator"]["mapping"][AUTO] = "#/$defs/solver.auto"
    adjustment = {name: shared[name] for name in Adjustment.model_fields}
    definitions["aggregator.auto"] = {**plain, "properties": adjustment, "minProperties": 1, "title": "Beside auto"}
    run["properties"]["aggregation"] = {
        "anyOf": [{"$ref": "#/$defs/aggregator"}, {"$ref": "#/$defs/aggregator.auto"}, {"type": "null"}]
    }


def _add_packs(definitions: dict[str, Any]) -> None:
    """Adds `backbone: {pack: NAME}`, with any setting of the pack's kind beside it."""
    from common.backbones.parts.hub.packs import list_packs

    pack = {"enum": list_packs(), "title": "Pack", "type": "string"}
    definitions["backbone.pack"] = {
        "type": "object",
        "properties": {"pack": pack, "kind": False},
        "required": ["pack"],
        "title": "Pack",
    }
    definitions["backbone"]["oneOf"].append({"$ref": "#/$defs/backbone.pack"})


def _list_kinds() -> dict[str, list[str]]:
    return {role: kinds(package) for role, package in PLUGIN_FOLDERS.items()}


def _replace_specs(node: Any, role: str) -> None:
    """Points every reference to raw plug-in settings below a node at the union of the role's kinds, in place."""
    if isinstance(node, dict):
        if str(node.get("$ref", "")).endswith("Spec"):
            node["$ref"] = f"#/$defs/{role}"
        for inner in node.values():
            _replace_specs(inner, role)
    elif isinstance(node, list):
        for inner in node:
            _replace_specs(inner, role)


def _add_kinds(definitions: dict[str, Any], role: str) -> None:
    """Adds the union of a role's kinds, told apart by `kind`, and each kind's settings."""
    from common.plugins import plugin_class

    mapping = {}
    for kind in kinds(PLUGIN_FOLDERS[role]):
        name = f"{role}.{kind}"
        cls = plugin_class(PLUGIN_FOLDERS[role], kind)
        values = cls.model_json_schema(ref_template=f"#/$defs/{name}.{{model}}")
        for inner, definition in values.pop("$defs", {}).items():
            definitions[f"{name}.{inner}"] = definition
        values["required"] = sorted({*values.get("required", []), "kind"})
        if role == "task":  # Beside the kind's own settings: the run's backbone that the task uses.
            values["properties"]["backbone"] = {"type": "string", "title": "Backbone"}
        definitions[name] = values
        mapping[kind] = f"#/$defs/{name}"
    definitions[role] = {
        "oneOf": [{"$ref": target} for target in mapping.values()],
        "discriminator": {"propertyName": "kind", "mapping": mapping},
    }
