"""Writes what is made from the code: the pages of docs/reference, the table of benchmarks and the JSON Schemas.

These files are committed, so that they can be read without building anything; a test compares them with the code.
`python docs/generate.py` writes them.
"""

from __future__ import annotations

import ast
import inspect
import re
import sys
import textwrap
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any, get_args, get_origin

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))

import click
import typer
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from client.aligners import Aligner
from client.config import SiteConfig
from client.data.sources import Source, SourceKind
from client.solvers import Solver
from common.backbones import Divisible, Kind, ResolvedKind, WeightedKind, WeightsElsewhere
from common.backbones.parts.hub.packs import Pack, list_packs, read_pack
from common.events import Summary, summary_schema
from common.exports import Format
from common.messages import format_privacy_table
from common.plugins import Spec, kinds, plugin_class
from common.run import RunConfig
from common.scorers import Scorer
from common.tasks import LabelCodec, Task
from common.types import BadInput
from common.yaml import format_yaml
from headwater.__main__ import make_app
from headwater.commands.schema import FIELDS, PLUGIN_FOLDERS, File, make_schema
from server.reports.trackers import Tracker
from server.rounds.aggregators import Aggregator
from simulations.config import SimulationConfig

HEADINGS = {
    "backbone": "Backbones",
    "task": "Tasks",
    "source": "Sources",
    "solver": "Solvers",
    "scorer": "Scorers",
    "aligner": "Aligners",
    "aggregator": "Aggregators",
}
NOTE = "<!-- Written by docs/generate.py from the code; do not edit. -->\n"


def make_files() -> dict[str, str]:
    """Returns the text of every generated file by its path in the project."""
    pages = {f"docs/{name}": page for name, page in _make_pages().items()}
    schemas = {f"headwater/schema/{file}.json": make_schema(file) for file in File}
    return {**pages, **schemas, "docs/summary.schema.json": summary_schema()}


def _make_pages() -> dict[str, str]:
    return {
        "reference/run-file.md": _settings_page(
            RunConfig, "Run file", "The coordinator's file: what it asks of the sites. `configs/runs/demo.yaml` is one."
        ),
        "reference/site-file.md": _settings_page(
            SiteConfig, "Site file", "A hospital's own file: what it decides. `configs/sites/example.yaml` is one."
        ),
        "reference/simulation-file.md": _settings_page(
            SimulationConfig,
            "Simulation file",
            "A run, a partition of data sets into sites, and an executor, for experiments on one machine. "
            "`configs/simulations/` holds some.",
        ),
        "reference/kinds.md": _kinds_page(),
        "reference/packs.md": _packs_page(),
        "reference/commands.md": _commands_page(),
        "reference/summary.md": _summary_page(),
        "reference/messages.md": _messages_page(),
        "benchmarks.md": _fill_in(
            "benchmarks.md", (ROOT / "benchmarks" / "results" / "latest.md").read_text(encoding="utf-8").strip()
        ),
        "extending.md": _fill_in("extending.md", _format_protocols()),
    }


def _fill_in(page: str, text: str) -> str:
    """Returns a page whose part between `<!-- generated -->` and `<!-- end -->` is the text."""
    before, _, rest = (ROOT / "docs" / page).read_text(encoding="utf-8").partition("<!-- generated -->")
    return f"{before}<!-- generated -->\n\n{text}\n\n<!-- end -->{rest.partition('<!-- end -->')[2]}"


def _format_protocols() -> str:
    """Returns what a kind of each plug-in folder must have: a table for each Protocol."""
    parts = []
    protocols = (
        Kind,
        WeightedKind,
        ResolvedKind,
        WeightsElsewhere,
        Divisible,
        Task,
        LabelCodec,
        SourceKind,
        Source,
        Solver,
        Scorer,
        Aligner,
        Aggregator,
        Tracker,
        Format,
    )
    for protocol in protocols:
        heading = f"## {protocol.__name__}\n\n`{protocol.__module__}`\n"
        meanings = _attributes_section(protocol.__doc__ or "")
        rows = [f"| `{name}` | {_as_cell(meanings.get(name, ''))} |" for name in inspect.get_annotations(protocol)]
        for name, member in vars(protocol).items():
            if name.startswith("_") or name.startswith("model_") or name in inspect.get_annotations(protocol):
                continue
            function = member.fget if isinstance(member, property) else getattr(member, "__func__", member)
            arguments = [each for each in inspect.signature(function).parameters if each not in ("self", "cls")]
            shown = name if isinstance(member, property) else f"{name}({', '.join(arguments)})"
            rows.append(f"| `{shown}` | {_as_cell((inspect.getdoc(function) or '').split(chr(10) * 2)[0])} |")
        parts += [heading, "| member | meaning |\n|---|---|\n" + "\n".join(rows) + "\n"]
    return "\n".join(parts).strip()


# --- settings --------------------------------------------------------------------------------------------------------


def _settings_page(model: type[BaseModel], title: str, about: str) -> str:
    parts = [
        f"# {title}\n\n{NOTE}\n{about} An unknown key is an error that names the nearest valid one. "
        "Relative paths are relative to the file. A key without a default must be written.\n"
    ]
    shared = _shared_models(model)
    for each in _walk_models(model):
        if each.__name__ in shared:
            continue
        heading = "" if each is model else f"## {each.__name__}\n\n{_first_paragraph(each)}\n\n"
        parts.append(f"{heading}{_table(each, shared)}\n")
    return "\n".join(parts)


def _kinds_page() -> str:
    parts = [
        f"# Kinds and their settings\n\n{NOTE}\nEvery `kind` of the seven plug-in folders. A kind's settings stand "
        "beside its `kind`. [Extending](../extending.md) says how to add one.\n"
    ]
    shown: set[type[BaseModel]] = set()
    for role, package in PLUGIN_FOLDERS.items():
        parts.append(f"## {HEADINGS[role]}\n")
        nested: list[type[BaseModel]] = []
        for kind in kinds(package):
            cls = plugin_class(package, kind)
            module = inspect.getdoc(sys.modules[cls.__module__]) or ""
            parts.append(f"### {kind}\n\n{_as_text(module)}\n\n{_table(cls, {})}\n")
            nested += [inner for inner in _walk_models(cls) if inner is not cls]
        for inner in dict.fromkeys(nested):
            if inner not in shown:
                shown.add(inner)
                parts.append(f"### {inner.__name__}\n\n{_first_paragraph(inner)}\n\n{_table(inner, {})}\n")
    return "\n".join(parts)


def _packs_page() -> str:
    parts = [
        f"# Packs of backbones\n\n{NOTE}\nPublished models that hospitals ask for, as `configs/backbones` has them. In "
        "a run file `backbone: {pack: NAME, folder: FOLDER}` stands for the settings below with the model that was "
        "downloaded to that folder; without `folder` it is looked for on the Hub. Settings beside `pack` go before the "
        "pack's own, and its licence is among the run's `licences`. Facts marked (unchecked) were found in no source "
        "at hand: read the model's own card. No model but those with a digest was opened here: it is compared when the "
        "weights are opened. An unknown digest is not, and `headwater simulate plan` says so.\n"
    ]
    for name in list_packs():
        pack = read_pack(name, "pack")
        facts = {
            "Reads": pack.records,
            "Licence": _mark(pack, "licence"),
            "Parameters": _mark(pack, "parameters_m", " million"),
            "Features": _mark(pack, "features"),
            "Preprocessing": _mark(pack, "preprocessing"),
            "Pre-trained on": _mark(pack, "pretrained_on"),
            "Remarks": pack.remarks,
            "Digest": pack.digest,
        }
        rows = "\n".join(f"| {fact} | {text} |" for fact, text in facts.items() if text)
        settings = format_yaml(pack.backbone).strip()
        parts.append(f"## {name}\n\n{pack.name}.\n\n| | |\n|---|---|\n{rows}\n\n```yaml\n{settings}\n```\n")
    return "\n".join(parts)


def _mark(pack: Pack, fact: str, unit: str = "") -> str:
    return f"{getattr(pack, fact)}{unit}{' (unchecked)' if fact in pack.unchecked else ''}"


def _table(model: type[BaseModel], shared: Mapping[str, str], *, defaults: bool = True) -> str:
    """Returns a Markdown table of a model's keys; `shared` links models that another page describes."""
    meanings = read_meanings(model)
    roles = FIELDS.get(model.__name__, {})
    schema = model.model_json_schema(ref_template="{model}")
    definitions = schema.get("$defs", {})
    properties = schema.get("properties") or definitions[model.__name__]["properties"]
    columns = ["key", "type", "default", "meaning"] if defaults else ["key", "type", "meaning"]
    rows = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for name, field in model.model_fields.items():
        key = field.alias or name
        if key == "kind" and "const" in properties.get(key, {}):
            continue
        type_ = format_type(properties[key], roles.get(name), shared, definitions)
        default = f" {_format_default(field)} |" if defaults else ""
        rows.append(f"| `{key}` | {type_} |{default} {meanings.get(name, '')} |")
    return "\n".join(rows) if len(rows) > 2 else "No settings of its own."


@cache
def read_meanings(model: type[BaseModel]) -> dict[str, str]:
    """Returns what each field of a model means.

    A class's `Attributes:` section says it, or a text below the field, or pydantic's `description`.
    """
    meanings: dict[str, str] = {}
    for cls in reversed(model.__mro__):
        if not issubclass(cls, BaseModel) or cls is BaseModel or cls.__module__.startswith("pydantic"):
            continue
        meanings |= _texts_below_fields(cls) | _attributes_section(cls.__doc__ or "")
    meanings |= {name: field.description for name, field in model.model_fields.items() if field.description}
    # A docstring may call a field as a file does, or as the code does.
    meanings |= {name: meanings[key] for name, field in model.model_fields.items() if (key := field.alias) in meanings}
    return {name: _as_cell(text) for name, text in meanings.items()}


def _attributes_section(doc: str) -> dict[str, str]:
    _, _, section = inspect.cleandoc(doc).partition("Attributes:\n")
    section = re.split(r"\n(?=\S)", section)[0]
    entries = re.split(r"^    (?=\w+: )", textwrap.dedent(section) and section, flags=re.MULTILINE)
    pairs = (entry.split(": ", 1) for entry in entries if re.match(r"\w+: ", entry))
    return {name: text for name, text in pairs}


def _texts_below_fields(cls: type) -> dict[str, str]:
    (tree,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
    assert isinstance(tree, ast.ClassDef)
    texts = {}
    for field, text in zip(tree.body, tree.body[1:], strict=False):
        if (
            isinstance(field, ast.AnnAssign)
            and isinstance(field.target, ast.Name)
            and isinstance(text, ast.Expr)
            and isinstance(text.value, ast.Constant)
            and isinstance(text.value.value, str)
        ):
            texts[field.target.id] = text.value.value
    return texts


def format_type(
    schema: Mapping[str, Any], role: str | None, shared: Mapping[str, str], definitions: Mapping[str, Any]
) -> str:
    """Returns the type of a key in words.

    Args:
        schema: JSON Schema of the key's value.
        role: the plug-in folder whose kinds the value holds; None where it holds none.
        shared: link to each model that another page describes.
        definitions: JSON Schemas that `schema` refers to, by name.
    """

    def words(node: Mapping[str, Any]) -> str:
        if "$ref" in node:
            name = str(node["$ref"])
            if "enum" in definitions.get(name, {}):
                return words(definitions[name])
            if name.endswith("Spec"):
                assert role is not None, name
                article = "an" if role[0] in "aeiou" else "a"
                return f"{article} [{role}](kinds.md#{HEADINGS[role].lower()})"
            return f"[{name}]({shared.get(name, f'#{name.lower()}')})"
        if "anyOf" in node or "oneOf" in node:
            options = [words(option) for option in node.get("anyOf") or node["oneOf"]]
            return " or ".join(dict.fromkeys(option for option in options if option != "null"))
        if "const" in node:
            return f"`{node['const']}`"
        if "enum" in node:
            return ", ".join(f"`{value}`" for value in node["enum"])
        return _words_of_plain_type(node, words)

    return words(schema)


def _words_of_plain_type(node: Mapping[str, Any], words: Any) -> str:
    match node.get("type"):
        case "object":
            patterns = [*node.get("patternProperties", {}).values(), node.get("additionalProperties")]
            return f"name → {words(patterns[0])}" if isinstance(patterns[0], dict) else "name → any value"
        case "array" if "prefixItems" in node:
            return f"[{', '.join(words(item) for item in node['prefixItems'])}]"
        case "array":
            return f"list of {words(node.get('items', {}))}"
        case "integer" | "number":
            return _with_bounds({"integer": "integer", "number": "number"}[node["type"]], node)
        case "string":
            return (
                "path"
                if node.get("format") == "path"
                else "64 hex digits"
                if "{64}" in node.get("pattern", "")
                else "text"
            )
        case "boolean":
            return "`true` or `false`"
        case "null":
            return "null"
    return "any value"


def _with_bounds(name: str, node: Mapping[str, Any]) -> str:
    signs = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    bounds = [
        f"{sign} {node[key]:,}" if name == "integer" else f"{sign} {node[key]:g}"
        for key, sign in signs.items()
        if key in node
    ]
    return ", ".join([name, *bounds])


def _format_default(field: FieldInfo) -> str:
    if field.is_required():
        return "-"
    value = field.get_default(call_default_factory=True)
    if value is None:
        return "none"
    if isinstance(value, BaseModel):
        return "its defaults"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    if isinstance(value, tuple):
        value = list(value)
    return f"`{value!r}`" if not isinstance(value, str) else f"`{value}`" if value.strip() else f"`{value!r}`"


def _walk_models(model: type[BaseModel]) -> Iterator[type[BaseModel]]:
    """Yields a model and every settings model below it, each once."""
    waiting, seen = [model], set()
    while waiting:
        each = waiting.pop(0)
        if each in seen or issubclass(each, Spec):
            continue
        seen.add(each)
        yield each
        for field in each.model_fields.values():
            waiting += [inner for inner in _walk_types(field.annotation) if issubclass(inner, BaseModel)]


def _walk_types(hint: Any) -> Iterator[type]:
    if get_origin(hint) is None and isinstance(hint, type):
        yield hint
    if hasattr(hint, "__value__"):
        yield from _walk_types(hint.__value__)
    for part in get_args(hint):
        yield from _walk_types(part)


def _shared_models(model: type[BaseModel]) -> dict[str, str]:
    """Returns links to the models that the run file's page describes, for the page of simulation files."""
    if model is not SimulationConfig:
        return {}
    inner = {each.__name__: f"run-file.md#{each.__name__.lower()}" for each in _walk_models(RunConfig)}
    return {**inner, "RunConfig": "run-file.md"}


# --- command line ----------------------------------------------------------------------------------------------------


def _commands_page() -> str:
    parts = [
        f"# Command line\n\n{NOTE}\n`headwater simulate`, `headwater coordinator` and `headwater site` are also "
        "`python -m simulations`, `python -m server` and `python -m client`. Exit codes: 0, done; 1, failed or "
        "refused; 2, bad input, with one sentence; 130, Ctrl-C. Each command shows its help with `--help`; "
        "`headwater --install-completion` installs completion for the shell.\n"
    ]
    root = typer.main.get_command(make_app())
    assert isinstance(root, click.Group)
    context = click.Context(root, info_name="headwater")
    for name in root.list_commands(context):
        command = root.get_command(context, name)
        assert command is not None
        if isinstance(command, click.Group):
            parts.append(f"## headwater {name}\n\n{_as_text(command.help or '')}\n")
            inner = click.Context(command, info_name=name, parent=context)
            for verb in command.list_commands(inner):
                found = command.get_command(inner, verb)
                assert found is not None
                parts.append(_format_command(f"headwater {name} {verb}", found, "###"))
        else:
            parts.append(_format_command(f"headwater {name}", command, "##"))
    return "\n".join(parts)


def _format_command(name: str, command: click.Command, level: str) -> str:
    context = click.Context(command, info_name=name)
    usage = " ".join(command.collect_usage_pieces(context))
    rows = []
    for parameter in command.get_params(context):
        if "--help" in parameter.opts:
            continue
        help_ = getattr(parameter, "help", None) or ""
        if isinstance(parameter, click.Argument):
            if help_:
                rows.append(f"| `{parameter.make_metavar(context)}` | {_as_cell(help_)} |")
        else:
            names = ", ".join(f"`{each}`" for each in (*parameter.opts, *parameter.secondary_opts))
            shown = parameter.get_default(context, call=False)
            default = f". Default: `{shown}`." if isinstance(shown, str | int | float | Path) and shown else ""
            rows.append(f"| {names} | {_as_cell(help_)}{default} |")
    table = "\n".join(["| argument or option | meaning |", "|---|---|", *rows]) + "\n" if rows else ""
    return f"{level} {name}\n\n{_as_text(command.help or '')}\n\n```\n{name} {usage}\n```\n\n{table}"


# --- summary and messages --------------------------------------------------------------------------------------------


def _summary_page() -> str:
    parts = [
        f"# summary.json\n\n{NOTE}\nEvery run ends with a `summary.json`. "
        "The JSON Schema is [summary.schema.json](../summary.schema.json); a reader in Python is "
        "`headwater.read_run(RUN_FOLDER).summary`.\n"
    ]
    for model in _walk_models(Summary):
        heading = "" if model is Summary else f"## {model.__name__}\n\n{_first_paragraph(model)}\n\n"
        parts.append(f"{heading}{_table(model, {}, defaults=False)}\n")
    return "\n".join(parts)


def _messages_page() -> str:
    return (
        f"# Messages and why their fields may leave a site\n\n{NOTE}\n"
        "Everything that a site sends to its coordinator, field by field. The reasons are metadata of the message "
        "models in `common/messages.py`; a field without one is an error there. What no field states does leave a "
        "site: the time an answer takes, in whole intervals of `reply_every_s`, which grows with the number of "
        "records.\n\n"
        f"{format_privacy_table()}\n"
    )


# --- texts -----------------------------------------------------------------------------------------------------------


def _first_paragraph(model: type[BaseModel]) -> str:
    return _as_text(inspect.cleandoc(model.__doc__ or "").split("\nAttributes:")[0])


def _as_text(text: str) -> str:
    """Returns a docstring's paragraphs as Markdown: lines joined, angle brackets and references to sections kept."""
    paragraphs = re.split(r"\n\s*\n", inspect.cleandoc(text).split("\nGuarantees:")[0].strip())
    joined = [" ".join(line.strip() for line in part.splitlines()) for part in paragraphs if not part.startswith("# ")]
    return "\n\n".join(_without_html(part) for part in joined)


def _as_cell(text: str) -> str:
    return _without_html(" ".join(text.split()).replace("|", "\\|"))


def _without_html(text: str) -> str:
    return re.sub(r"<(?=\w+>)", "&lt;", text)


def main() -> None:
    """Writes every file."""
    for name, text in make_files().items():
        path = ROOT / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    try:
        main()
    except BadInput as error:
        sys.exit(f"error: {error}")
