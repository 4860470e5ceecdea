"""`monai`: a MONAI bundle, whose configuration loads the network and predicts every picture of a folder.

Layout and metadata: MONAI bundle specification and its schema of 2024-07-25. The network is a program of
`torch.export`; TorchScript, which older bundles hold, is deprecated. Loading a bundle needs MONAI, torch and Pillow.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, final

from common.files import write_atomic
from common.plugins import Plugin
from common.types import BadInput

if TYPE_CHECKING:
    from common.exports.parts.exported import Exported

_SCHEMA = "https://project-monai.github.io/schema/meta_schema_20240725.json"
_OLDEST = "1.4.0"
"""Version that the metadata names where MONAI is not installed here."""
_PICTURES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".gif", ".webp")
_UNKNOWN = "not declared"
_SCRIPTS = Path(__file__).parent / "parts" / "scripts"
_WRITERS = ("write_masks", "write_boxes")
_EXPRESSION = re.compile(r"^\s*[$%]|@|%#")


@final
class MonaiFormat(Plugin):
    """A bundle: `configs/`, `models/`, `docs/` and a licence."""

    kind: Literal["monai"] = "monai"
    packages: ClassVar[tuple[str, ...]] = ()
    extra: ClassVar[str | None] = None
    one_task: ClassVar[bool] = True
    library: ClassVar[str] = "monai"

    def write(self, exported: Exported, folder: Path) -> list[str]:
        """Writes the bundle.

        Raises:
            BadInput: the network's input is no picture that Pillow alone can prepare.
        """
        import torch

        from common.exports.parts.card import write_card
        from common.exports.parts.program import trace

        steps, (columns,) = _make_steps(exported), exported.list_columns().values()
        told = _Returned.of(exported)
        _refuse_expressions([*columns, *told.maps])
        tensor = exported.raw.tensors[0]
        # MONAI's pictures are float32; whole numbers from 0 to 255 are exact there, and the graph begins with a cast.
        floats = replace(exported, raw=replace(exported.raw, tensors=(replace(tensor, dtype="float32"),)))
        program = trace(floats)
        for part in ("configs", "models", "docs"):
            (folder / part).mkdir()
        torch.export.save(program, folder / "models" / "model.pt2")
        write_atomic(folder / "configs" / "metadata.json", _to_json(_describe(floats, columns, told)))
        write_atomic(folder / "configs" / "inference.json", _to_json(_configure(steps, columns, told)))
        if told.boxes:
            (folder / "scripts").mkdir()
            write_atomic(folder / "scripts" / "boxes.py", (_SCRIPTS / "boxes.py").read_bytes())
        write_atomic(folder / "LICENSE", _make_licence(exported).encode())
        used = [
            "`configs/inference.json`: with MONAI installed, and `fire`, `python -m monai.bundle run --config_file "
            "configs/inference.json --bundle_root . --dataset_dir PICTURES --output predictions.csv`, run in this "
            f"folder, writes a row for each picture{told.explain()}.",
            '`models/model.pt2`: `torch.export.load("models/model.pt2").module()` is the network, from float32 pixels '
            f"B x {' x '.join(map(str, tensor.shape))} ({tensor.meaning}) to the columns {', '.join(columns)}.",
        ]
        write_atomic(folder / "docs" / "README.md", write_card(exported, self.kind, used, self.library).encode())
        return used


@dataclass(frozen=True)
class _Returned:
    """The form of what the network returns of a picture.

    Attributes:
        maps: names of its maps; empty where it returns columns.
        shape: places of a map.
        summary: how a map is summed up to a column.
        is_mask: whether the largest map of a place is its label.
        boxes: the numbers by which boxes follow from the maps; empty where predictions are none.
    """

    maps: tuple[str, ...] = ()
    shape: tuple[int, ...] = ()
    summary: str = ""
    is_mask: bool = False
    boxes: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, exported: Exported) -> _Returned:
        """Returns the form of the one task that is exported."""
        from common.tasks import FindsBoxes, ServesMaps

        (name,) = exported.tasks
        task = exported.model.tasks[name]
        if not isinstance(task, ServesMaps):
            return cls()
        shape = exported.find_shape(name)[1:]
        boxes = asdict(task.box_rule) if isinstance(task, FindsBoxes) else {}
        return cls(tuple(task.name_maps()), shape, task.map_summary, exported.find_prediction(name) == "mask", boxes)

    def explain(self) -> str:
        """Returns the end of the sentence on what the inference writes."""
        if self.boxes:
            return ", and the boxes of all to the JSON file that `--boxes_file` names"
        return ", and its mask as PNG of its own size to the folder that `--masks_dir` names" if self.is_mask else ""


def _to_json(values: Mapping[str, Any]) -> bytes:
    return (json.dumps(values, indent=4) + "\n").encode()


def _refuse_expressions(columns: list[str]) -> None:
    """Raises BadInput where MONAI would take a name for a reference or a program: bundles are read by strangers."""
    for name in columns:
        if _EXPRESSION.search(name):
            raise BadInput(
                f"--format monai: expected labels that do not begin with $ or % and have no @, which MONAI interprets, "
                f"got {name!r}; export another format"
            )


# --- preprocessing, as expressions that MONAI evaluates --------------------------------------------------------------


def _make_steps(exported: Exported) -> list[str]:
    """Returns expressions, one after the other: path of a picture -> float32 pixels, channels x height x width.

    Raises:
        BadInput: a step before the network is none that Pillow takes.
    """
    tensor = exported.raw.tensors[0]
    steps, divided = ["lambda path: Image.open(path)"], ""
    for step in exported.raw.before if tensor.name == "pixels" else ({"step": "others"},):
        match dict(step):
            case {"step": "turn"}:
                steps.append("lambda image: ImageOps.exif_transpose(image)")
            case {"step": "convert", "mode": mode, "modes": modes}:
                # Others hold more than 8 bits, which Pillow would cut off without a word: a KeyError names the mode.
                steps.append(f"lambda image: image.convert({dict.fromkeys(modes, mode)!r}[image.mode])")
            case {"step": "resize", "antialias": True, "size": size, "side": side, "interpolation": interpolation}:
                target = f"({size}, {size})"
                if side == "shorter":
                    target = (
                        f"({size}, int({size} * image.height / image.width)) if image.width <= image.height "
                        f"else (int({size} * image.width / image.height), {size})"
                    )
                steps.append(f"lambda image: image.resize({target}, Image.Resampling.{interpolation.upper()})")
            case {"step": "center_crop", "size": size}:
                left, top = (f"round((image.{axis} - {size}) / 2.0)" for axis in ("width", "height"))
                steps.append(f"lambda image: image.crop(({left}, {top}, {left} + {size}, {top} + {size}))")
            case {"step": "expect_size"}:
                pass  # The program refuses pixels of another shape.
            case {"step": "divide", "by": by}:
                divided = f" / numpy.float32({by})"
            case _:
                raise BadInput(
                    "--format monai: expected a network for pictures that are resized and cropped, got backbone "
                    f"{exported.backbone}, which needs other steps; export another format, such as torch"
                )
    steps.append(f"lambda image: numpy.asarray(image, dtype=numpy.float32){divided}")
    rows = f"pixels.reshape(pixels.shape[:2] + ({tensor.shape[0]},))"
    return [*steps, f"lambda pixels: torch.from_numpy({rows}.transpose(2, 0, 1).copy())"]


def _configure(steps: list[str], columns: list[str], told: _Returned) -> dict[str, Any]:
    """Returns the configuration of an inference: pictures of a folder -> rows of a CSV file, and masks.

    Args:
        steps: expressions that read a picture, one after the other.
        columns: names of the columns.
        told: what the network returns.
    """
    predicted = "@inferer(batch['image'].to(@device), @network_def)"
    shown = predicted
    if told.maps:
        summed = "mean" if told.summary == "mean" else "amax"
        shown = f"{predicted}.flatten(2)[:, : {len(columns)}].{summed}(2)"
    masks = {
        "masks_dir": "$@bundle_root + '/masks'",
        # As for all else a turned picture has the size that it is seen in.
        "resize": "$lambda values, size: values[numpy.ix_(*((numpy.arange(wanted) * 2 + 1) * own // (2 * wanted) "
        "for own, wanted in zip(values.shape, size[::-1])))]",
        "write_mask": "$lambda file, maps: Image.fromarray(@resize(maps.argmax(0).numpy().astype(numpy.uint8), "
        "ImageOps.exif_transpose(Image.open(file)).size)).save(pathlib.Path(@masks_dir) / "
        "(pathlib.Path(file).stem + '.png'))",
        "write_masks": "$lambda: (pathlib.Path(@masks_dir).mkdir(exist_ok=True), [@write_mask(file, maps) for batch in "
        f"@dataloader for file, maps in zip(batch['file'], {predicted}.cpu())])",
    }
    stated = {"maps": list(told.maps), "columns": columns, "boxes": dict(told.boxes)}
    boxes = {
        "boxes_file": "$@bundle_root + '/boxes.json'",
        "stated": stated,
        "find_boxes": "$runpy.run_path(@bundle_root + '/scripts/boxes.py')['find_boxes']",
        # In pixels of the picture, as it is seen: left, top, right and bottom.
        "list_boxes": "$lambda file, size, found: {'image': file, 'box': [[side * size[axis % 2] for axis, side in "
        "enumerate(each[2])] for each in found], 'label': [each[0] for each in found], 'label_scores': [each[1] for "
        "each in found]}",
        "write_boxes": "$lambda: pathlib.Path(@boxes_file).write_text(json.dumps([@list_boxes(file, "
        "ImageOps.exif_transpose(Image.open(file)).size, @find_boxes(maps.numpy(), @stated)) for batch in @dataloader "
        f"for file, maps in zip(batch['file'], {predicted}.cpu())]), encoding='utf-8')",
    }
    added = {**(masks if told.is_mask else {}), **(boxes if told.boxes else {})}
    modules = [f"$import {module}" for module in ("csv", "io", "json", "pathlib", "runpy", "numpy", "torch")]
    return {
        "imports": [*modules, "$from PIL import Image", "$from PIL import ImageOps"],
        "bundle_root": ".",
        "device": "$torch.device('cpu')",
        "dataset_dir": "$@bundle_root + '/images'",
        "output": "$@bundle_root + '/predictions.csv'",
        "columns": columns,
        "network_def": "$torch.export.load(@bundle_root + '/models/model.pt2').module()",
        "inferer": {"_target_": "SimpleInferer"},
        "datalist": "$[str(path) for path in sorted(pathlib.Path(@dataset_dir).rglob('*')) "
        f"if path.suffix.lower() in {_PICTURES!r}]",
        "preprocessing": {
            "_target_": "Compose",
            "transforms": [
                {"_target_": "Lambdad", "keys": "image", "func": f"${step}", "track_meta": False} for step in steps
            ],
        },
        "dataset": {
            "_target_": "Dataset",
            "data": "$[{'image': path, 'file': path} for path in @datalist]",
            "transform": "@preprocessing",
        },
        "dataloader": {"_target_": "DataLoader", "dataset": "@dataset", "batch_size": 8, "num_workers": 0},
        "evaluator": "$lambda: [[file, *row] for batch in @dataloader for file, row in "
        f"zip(batch['file'], {shown}.tolist())]",
        "write": "$lambda rows, buffer: (csv.writer(buffer).writerows([['file', *@columns], *rows]), "
        "pathlib.Path(@output).write_text(buffer.getvalue(), encoding='utf-8'))",
        **added,
        "run": ["$@write(@evaluator(), io.StringIO())", *(f"$@{name}()" for name in added if name in _WRITERS)],
    }


# --- metadata --------------------------------------------------------------------------------------------------------


def _describe(exported: Exported, columns: list[str], told: _Returned) -> dict[str, Any]:
    """Returns the bundle's metadata.

    Args:
        exported: what is exported.
        columns: names of the columns.
        told: what the network returns.
    """
    from common.tasks import Calibratable

    config, (task,), (tensor,) = exported.model.config, exported.tasks, exported.raw.tensors
    known = {name: each.value for name, each in config.tasks[task].metrics.items() if each.value is not None}
    is_probability = isinstance(exported.model.tasks[task], Calibratable) or told.is_mask
    outputs = told.maps or tuple(columns)
    channels, *shape = tensor.shape
    # The id is the name of a folder, which MONAI is not to take for an expression.
    run = re.sub(r"[^A-Za-z0-9._-]", "_", config.run)
    return {
        "schema": _SCHEMA,
        "version": "0.1.0",
        "changelog": {"0.1.0": f"model of run {run}"},
        "monai_version": _find_version("monai") or _OLDEST,
        "pytorch_version": (_find_version("torch") or "").partition("+")[0],
        "numpy_version": _find_version("numpy") or "",
        "required_packages_version": {"pillow": _find_version("pillow") or ""},
        "name": f"run {run}: {task}",
        "task": f"{task}, for each picture",
        "description": "A head trained by federated learning on a frozen backbone. The model card, docs/README.md, says"
        " what it must not be used for. Not a medical device.",
        "authors": _UNKNOWN,
        "copyright": _UNKNOWN,
        "data_source": "records of the training sites; not public",
        "data_type": "pictures that Pillow reads, with 8 bits per value",
        "pred_classes": ", ".join(f"{number}: {name}" for number, name in enumerate(outputs)),
        "eval_metrics": known,
        "intended_use": "Research, and predictions that a qualified person checks; see docs/README.md.",
        "references": [],
        "network_data_format": {
            "inputs": {
                "image": {
                    "type": "image",
                    "format": "rgb" if channels == 3 else "magnitude",
                    "modality": "n/a",
                    "num_channels": channels,
                    "spatial_shape": shape,
                    "dtype": "float32",
                    "value_range": [0, 255] if channels == 3 else [0, 1],
                    "is_patch_data": False,
                    "channel_def": dict(enumerate(("red", "green", "blue") if channels == 3 else ("grey",))),
                }
            },
            "outputs": {
                "pred": {
                    "type": "probabilities" if is_probability else "values",
                    "format": "segmentation" if told.is_mask else "classes" if is_probability else "values",
                    "num_channels": len(outputs),
                    "spatial_shape": list(told.shape),
                    "dtype": "float32",
                    "value_range": [0, 1] if is_probability else [],
                    "is_patch_data": False,
                    "channel_def": dict(enumerate(outputs)),
                }
            },
        },
    }


def _find_version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _make_licence(exported: Exported) -> str:
    """Returns the licence file: what is declared, and what is for the publisher to choose."""
    backbone = "not known: check before you publish" if exported.origin.licence is None else exported.origin.licence
    return (
        "Licence of the trained head and of this bundle: not declared; whoever publishes it chooses one and writes it "
        f"here.\n\nLicence of the frozen backbone {exported.backbone} (digest {exported.origin.digest}), as its run's "
        f"coordinator declared it: {backbone}\n"
    )
