"""`huggingface`: a folder that transformers loads, with the library's own classes where one of them is the model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, final

from common.files import write_atomic
from common.plugins import Plugin

if TYPE_CHECKING:
    from common.exports.parts.exported import Exported

_SCRIPTS = Path(__file__).parent / "parts" / "scripts"
_OWN_NETS = "common.backbones.parts.nets"


@final
class HuggingfaceFormat(Plugin):
    """`config.json`, `model.safetensors`, and the processor or tokenizer; for one task."""

    kind: Literal["huggingface"] = "huggingface"
    packages: ClassVar[tuple[str, ...]] = ()
    extra: ClassVar[str | None] = None
    one_task: ClassVar[bool] = True
    library: ClassVar[str] = "transformers"

    def write(self, exported: Exported, folder: Path) -> list[str]:
        """Writes a folder of one of transformers' own classes, or of a class whose code is in it."""
        from common.backbones.parts.hub.huggingface import silence
        from common.exports.parts.transformer import describe, find_own_class, open_described

        standard = find_own_class(exported)
        if standard is not None:
            with silence():
                standard.save_pretrained(folder)
            name, trusted = type(standard).__name__, ""
        else:
            described = describe(exported)
            with silence():
                open_described(exported, described).save_pretrained(folder)
            _write_config(folder, described.auto)
            text = (_SCRIPTS / "modeling_headwater.py").read_text(encoding="utf-8")
            write_atomic(folder / "modeling_headwater.py", text.replace(_OWN_NETS, ".nets_headwater").encode())
            nets = _SCRIPTS.parents[2] / "backbones" / "parts" / "nets.py"
            write_atomic(folder / "nets_headwater.py", nets.read_bytes())
            name, trusted = described.auto, ", trust_remote_code=True"
        return [
            f"`{name}.from_pretrained(FOLDER{trusted})` is the model.",
            *_write_processor(exported, folder, trusted),
            "Needs transformers, torch, torchvision and pillow: `pip install transformers torch torchvision pillow`.",
        ]


def _write_config(folder: Path, auto: str) -> None:
    """Completes the config with the names of the classes whose code is in the folder."""
    path = folder / "config.json"
    values = json.loads(path.read_text(encoding="utf-8"))
    model = "modeling_headwater.HeadwaterModel"
    values["auto_map"] = {"AutoConfig": "modeling_headwater.HeadwaterConfig", "AutoModel": model, auto: model}
    write_atomic(path, (json.dumps(values, indent=2) + "\n").encode())


def _write_processor(exported: Exported, folder: Path, trusted: str) -> list[str]:
    """Writes the preprocessing of pictures or the tokenizer's settings; returns sentences about their use."""
    steps: dict[str, dict[str, Any]] = {str(step["step"]): dict(step) for step in exported.raw.before}
    if "tokenize" in steps:
        from tokenizers import Tokenizer

        own = steps["tokenize"]
        padding = Tokenizer.from_buffer(exported.files[own["file"]]).id_to_token(own["pad_id"])
        values: dict[str, Any] = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": own["max_length"],
            "pad_token": padding,
            "model_input_names": [tensor.name for tensor in exported.raw.tensors],
        }
        write_atomic(folder / "tokenizer_config.json", (json.dumps(values, indent=2) + "\n").encode())
        return [
            f"`AutoTokenizer.from_pretrained(FOLDER{trusted})` makes its inputs, with `truncation=True, padding=True`."
        ]
    if "processor" in steps:
        return [f"`AutoProcessor.from_pretrained(FOLDER{trusted})` makes its inputs."]
    if "convert" not in steps:
        return []
    preprocess = exported.model.backbones[exported.backbone].public_spec().get("preprocess") or {}
    resize = steps.get("resize")
    if resize is not None and not resize["antialias"]:
        return ["Pictures are resized without antialias, which no image processor here does: see preprocessing.json."]
    values = {
        "image_processor_type": "HeadwaterImageProcessor",
        "auto_map": {"AutoImageProcessor": "processing_headwater.HeadwaterImageProcessor"},
        "mode": steps["convert"]["mode"],
        "modes": steps["convert"]["modes"],
        "size": resize["size"] if resize else steps["expect_size"]["size"],
        "resize": resize["interpolation"] if resize else None,
        "crop": steps["center_crop"]["size"] if "center_crop" in steps else None,
        "mean": preprocess.get("mean", [0.0]),
        "std": preprocess.get("std", [1.0]),
    }
    write_atomic(folder / "preprocessor_config.json", (json.dumps(values, indent=2) + "\n").encode())
    write_atomic(folder / "processing_headwater.py", (_SCRIPTS / "processing_headwater.py").read_bytes())
    return [f"`AutoImageProcessor.from_pretrained(FOLDER{trusted})` makes `pixel_values` of pictures, with Pillow."]
