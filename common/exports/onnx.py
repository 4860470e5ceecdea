"""`onnx`: the network as an ONNX file, which onnxruntime runs without torch."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal, final

from common.files import write_atomic
from common.plugins import Plugin
from common.types import BadInput

if TYPE_CHECKING:
    import torch

    from common.exports.parts.exported import Exported

_NEEDS = {"pictures": "numpy pillow", "texts": "numpy tokenizers", "table": "numpy", "arrays": "numpy"}
_ARGUMENTS = {
    "pictures": "a.png b.png",
    "bags": "a-folder-of-pictures another-one",
    "texts": "'a text' 'another text'",
    "table": "rows.csv",
    "arrays": "records.npz",
}


@final
class OnnxFormat(Plugin):
    """One `.onnx` file with all tasks as outputs, and a program that runs it."""

    kind: Literal["onnx"] = "onnx"
    packages: ClassVar[tuple[str, ...]] = ("onnx", "onnxruntime", "onnxscript")
    extra: ClassVar[str | None] = "onnx"
    one_task: ClassVar[bool] = False
    library: ClassVar[str] = "onnx"

    def write(self, exported: Exported, folder: Path) -> list[str]:
        """Writes `model.onnx` and `predict.py`; compares the file's outputs with the network's."""
        import torch

        from common.exports.parts.exported import SCRIPTS
        from common.exports.parts.program import UNTRACEABLE, check, draw_inputs, list_axes

        path = folder / "model.onnx"
        names = [tensor.name for tensor in exported.raw.tensors]
        inputs = draw_inputs(exported)
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                torch.onnx.export(
                    exported.network,
                    inputs,
                    path,
                    input_names=names,
                    output_names=list(exported.tasks),
                    dynamic_shapes=(list_axes(exported),),
                    dynamo=True,
                    external_data=False,
                    verbose=False,
                )
            except UNTRACEABLE as error:
                raise BadInput(
                    f"backbone {exported.backbone}: expected a network that ONNX can express, got one that it cannot "
                    f"({type(error).__name__}); choose --format torch"
                ) from error
        check(exported, inputs, _run(path, dict(zip(names, inputs, strict=True))))
        script = _choose_script(exported)
        argument = "bags" if script == "pictures" and exported.of_bags else script
        has_masks = script == "pictures" and any(exported.find_prediction(task) == "mask" for task in exported.tasks)
        has_boxes = script == "pictures" and exported.has_boxes
        write_atomic(folder / "predict.py", (SCRIPTS / f"{script}.py").read_bytes())
        exported.write_readers(folder)
        return [
            f"`model.onnx` maps {', '.join(names)} to {', '.join(exported.tasks)}, for any number of records.",
            f"`python predict.py {_ARGUMENTS[argument]}` prints a CSV row for each record, and needs these only: "
            f"`pip install onnxruntime {_NEEDS[script]}`."
            + (" With `--masks FOLDER` first it writes each picture's mask, as PNG of its own size." * has_masks)
            + (" With `--boxes FILE.json` first it writes the boxes of all pictures, in COCO's format." * has_boxes),
        ]


def _run(path: Path, inputs: dict[str, torch.Tensor]) -> list[torch.Tensor] | torch.Tensor:
    """Returns the outputs of an ONNX file: one tensor where it has one."""
    import onnxruntime
    import torch

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    outputs = [torch.from_numpy(each) for each in session.run(None, {key: own.numpy() for key, own in inputs.items()})]
    return outputs[0] if len(outputs) == 1 else outputs


def _choose_script(exported: Exported) -> str:
    steps = [str(step["step"]) for step in exported.raw.before]
    if exported.of_bags and "convert" not in steps:
        return "arrays"
    if "tokenize" in steps:
        return "texts"
    if "columns" in steps:
        return "table"
    return "pictures" if "convert" in steps and "processor" not in steps else "arrays"
