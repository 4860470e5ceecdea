"""Writes docs/reference/architectures.md: which architectures of transformers load, pool, divide and train.

Each is built as small as a rule makes it, with random weights, and put through what a run would do with it.
`python docs/architectures.py` prints all rows, with names of families those alone; `--page FILE` writes the page from
lines that were printed. A slow test compares some of the rows with what the code does.
"""

from __future__ import annotations

import contextlib
import inspect
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))

import torch
import transformers
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoModel, PretrainedConfig
from transformers.models.auto import modeling_auto
from transformers.models.auto.feature_extraction_auto import FEATURE_EXTRACTOR_MAPPING_NAMES

from client.solvers.parts.private_step import check_separable, hook_record_gradients
from common.backbones.parts.hub.huggingface import silence
from common.backbones.parts.layers import PooledModel
from common.backbones.transformers import Files, Transformers
from common.model.trunks import make_empty_trunk
from common.run import Trainable
from common.types import BadInput

PAGE = ROOT / "docs" / "reference" / "architectures.md"
MODALITIES: tuple[Literal["text", "image", "audio"], ...] = ("text", "image", "audio")
POOLINGS: tuple[Literal["mean", "cls", "last", "pooler"], ...] = ("mean", "cls", "last", "pooler")
_LARGEST = 60_000_000
_SECONDS = 1.0

# --- small configurations --------------------------------------------------------------------------------------------

_LAYERS = ("num_hidden_layers", "num_layers", "n_layer", "n_layers", "encoder_layers", "decoder_layers", "depth")
_WIDTHS = ("hidden_size", "d_model", "n_embd", "dim", "embed_dim", "d_hidden")
_HEADS = ("num_attention_heads", "encoder_attention_heads", "decoder_attention_heads", "num_heads", "n_head", "n_heads")
_INNER = ("intermediate_size", "encoder_ffn_dim", "decoder_ffn_dim", "d_ff", "ffn_dim", "hidden_dim", "mlp_dim")
_FEW = ("num_key_value_heads", "num_experts", "num_local_experts", "n_routed_experts", "num_experts_per_tok")
_CONVOLVED = ("conv_dim", "conv_channels")
_TOKENS = ("pad_token_id", "bos_token_id", "eos_token_id", "sep_token_id", "cls_token_id", "mask_token_id")
_WIDTH, _VOCABULARY = 32, 120


def shrink(cls: type[PretrainedConfig]) -> dict[str, Any]:
    """Returns settings of a small model of a configuration's class: two layers, 32 features, 120 tokens."""
    plain = cls().to_dict()
    small: dict[str, Any] = {}
    for name, value in plain.items():
        if isinstance(value, bool) or value is None:
            continue
        if name in _LAYERS and isinstance(value, int):
            small[name] = min(value, 2)
        elif name in _WIDTHS and isinstance(value, int):
            small[name] = _WIDTH
        elif name in _HEADS and isinstance(value, int):
            small[name] = min(value, 4)
        elif name in _INNER and isinstance(value, int):
            small[name] = 2 * _WIDTH
        elif name in _CONVOLVED and isinstance(value, int | list | tuple):
            # Else they outweigh the layers, which are found as the largest stack.
            small[name] = _WIDTH // 4 if isinstance(value, int) else [_WIDTH // 4] * len(value)
        elif name in _FEW and isinstance(value, int):
            small[name] = min(value, 2)
        elif name == "vocab_size" and isinstance(value, int):
            small[name] = _VOCABULARY
        elif name in _TOKENS and isinstance(value, int) and value >= _VOCABULARY:
            small[name] = 1
        elif name in ("head_dim", "d_kv", "kv_channels") and isinstance(value, int):
            small[name] = _WIDTH // 4
        elif name == "image_size" and isinstance(value, int):
            small[name] = _choose_side(plain)
        elif name == "layer_types" and isinstance(value, list):
            small[name] = _shorten_types(value)
    for name, inner in getattr(cls, "sub_configs", {}).items():
        if isinstance(inner, type) and issubclass(inner, PretrainedConfig) and inner is not transformers.AutoConfig:
            with contextlib.suppress(Exception):
                small[name] = shrink(inner)
    return small


def _choose_side(plain: Mapping[str, Any]) -> int:
    """Returns a picture's side: four patches, and at least 64 pixels where nothing says how large patches are."""
    patch = plain.get("patch_size")
    return 4 * patch if isinstance(patch, int) and patch >= 8 else 64


def _shorten_types(types: Sequence[str]) -> list[str]:
    """Returns two layers' types, of different kinds where there are several."""
    kinds = list(dict.fromkeys(types))
    return (kinds * 2)[:2]


# --- what a family can do --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """A line of the table: an architecture and the kind of record that it was tried on.

    Attributes:
        family: `model_type` of its config.json.
        modality: what it was given.
        part: the part that encodes; an empty text for the whole.
        pooling: names that give features.
        divided: number of layers that can be the first above a boundary, of all.
        trains: whether the last layer's own weights give a gradient for each record.
        adapts: whether adapters beside the last layer's linear layers do.
        refused: the sentence with which it is refused; an empty text where it is not.
    """

    family: str
    modality: str
    part: str = ""
    pooling: tuple[str, ...] = ()
    divided: str = "no"
    trains: bool = False
    adapts: bool = False
    refused: str = ""


def survey(family: str) -> list[Row]:
    """Returns what a family does with texts, pictures and recordings, or the sentences with which it is refused."""
    torch.manual_seed(0)
    try:
        config = CONFIG_MAPPING[family](**shrink(CONFIG_MAPPING[family]))
        with torch.device("meta"), silence():
            model = AutoModel.from_config(config, trust_remote_code=False)
    except Exception as error:  # noqa: BLE001  # Any: the rule fits most families, not all.
        return [Row(family, "", refused=f"not tried: no small one by the rule ({type(error).__name__})")]
    if sum(parameter.numel() for parameter in model.parameters()) > _LARGEST:
        return [Row(family, "", refused="not tried: the rule leaves it too large")]
    rows = [_survey_modality(family, config, modality) for modality in _list_modalities(model)]
    good = [row for row in rows if not row.refused]
    return good or rows[:1]


def _list_modalities(model: nn.Module) -> list[Literal["text", "image", "audio"]]:
    inputs = {"input_ids": "text", "pixel_values": "image", "input_values": "audio", "input_features": "audio"}
    names = {getattr(part, "main_input_name", "") for part in model.modules()}
    # Some parts inherit the name of their whole's input.
    own = {name for name in inputs if name in inspect.signature(model.forward).parameters}
    names = own if own and getattr(model, "main_input_name", "") not in own else names
    wanted = {inputs[name] for name in names if name in inputs}
    return [modality for modality in MODALITIES if modality in wanted] or ["text"]


def _survey_modality(family: str, config: PretrainedConfig, modality: Literal["text", "image", "audio"]) -> Row:
    files = Files(config=config.to_dict() | {"model_type": family}, processor=_make_processor(config, modality))
    settings = Transformers(modality=modality, files=files, pooling="mean", max_length=24, seconds=_SECONDS)
    try:
        settings.architecture()
    except BadInput as error:
        part = str(error).rpartition("`part: ")[2].partition("`")[0] if "`part: " in str(error) else ""
        settings = settings.model_copy(update={"part": part or None})
        if not part:
            return Row(family, modality, refused=str(error))
    try:
        return _survey_settings(family, settings)
    except BadInput as error:
        return Row(family, modality, settings.part or "", refused=str(error))


def _survey_settings(family: str, settings: Transformers) -> Row:
    architecture = settings.architecture()
    network = architecture.module.train(False)
    assert isinstance(network, PooledModel)
    with torch.device("cpu"):
        inputs_B = network.modality.noise(2)
    with torch.no_grad():
        together_BD = network(inputs_B)
        alone_BD = torch.cat([network(inputs_B[:1]), network(inputs_B[1:])])
    if not torch.allclose(together_BD, alone_BD, rtol=1e-3, atol=1e-4):
        return Row(family, settings.modality, settings.part or "", refused="a record's features depend on its batch")
    row = {"family": family, "modality": settings.modality, "part": settings.part or ""}
    return Row(**row, pooling=tuple(_list_poolings(settings)), **_survey_depth(settings, network, inputs_B))


def _list_poolings(settings: Transformers) -> Iterator[str]:
    for pooling in POOLINGS:
        with contextlib.suppress(BadInput, AttributeError, TypeError):
            settings.model_copy(update={"pooling": pooling}).architecture()
            yield pooling


def _survey_depth(settings: Transformers, network: PooledModel, inputs_B: Tensor) -> dict[str, Any]:
    try:
        blocks = settings.blocks(network)
    except BadInput:
        return {}
    good = [block for block in blocks if _trains(settings, block, None, inputs_B) is not None]
    if not good:
        return {}
    last = good[-1]
    divided = "every layer" if len(good) == len(blocks) else f"from {last}"
    targets = sorted(
        {
            name.rpartition(".")[2]
            for name, part in network.model.get_submodule(last).named_modules()
            if type(part) is nn.Linear
        }
    )
    # A linear layer of positions, which all records share, has no gradient of each: the others do.
    tried = [targets, *([each] for each in targets)] if targets else []
    return {
        "divided": divided,
        "trains": bool(_trains(settings, last, None, inputs_B)),
        "adapts": any(_trains(settings, last, each, inputs_B) for each in tried),
    }


def _trains(settings: Transformers, block: str, targets: list[str] | None, inputs_B: Tensor) -> bool | None:
    """Returns whether records have gradients of their own above a block; None where it cannot be divided there."""
    torch.manual_seed(0)
    architecture = settings.architecture()
    lora = {"lora": {"rank": 2, "alpha": 2, "targets": targets}} if targets else {}
    trainable = Trainable.model_validate({"from": block, **lora})
    try:
        trunk = make_empty_trunk(settings, architecture.module, architecture.feature_dim, trainable, "trainable")
        with torch.no_grad():
            # Another one: a network that was divided is not used again.
            boundary_B = settings.divide(settings.architecture().module.train(False), block).below(inputs_B)
    except BadInput:
        return None
    except (RuntimeError, TypeError, ValueError, LookupError, AttributeError):
        return None
    try:
        check_separable({"backbone.trunk": trunk})
        hooked = hook_record_gradients({"backbone.trunk": trunk})
        trunk(boundary_B.flatten(1).requires_grad_()).square().sum().backward()
        found = [parameter for parameter in hooked.parameters() if parameter.requires_grad]
        return bool(found) and all(
            getattr(parameter, "grad_sample", None) is not None and len(parameter.grad_sample) == len(inputs_B)
            for parameter in found
        )
    except Exception:  # noqa: BLE001  # Any: what does not train is said in the table.
        return False


def _make_processor(config: PretrainedConfig, modality: str) -> dict[str, Any] | None:
    if modality == "image":
        return _make_image_processor(config)
    if modality == "text":
        return None
    inner = [config, *(getattr(config, name, None) for name in getattr(config, "sub_configs", {}))]
    names = [FEATURE_EXTRACTOR_MAPPING_NAMES.get(getattr(each, "model_type", "")) for each in inner]
    name = next((name for name in names if name), "Wav2Vec2FeatureExtractor")
    bins = next((bins for each in inner if isinstance(bins := getattr(each, "num_mel_bins", None), int)), None)
    more = {"feature_size": bins, "num_mel_bins": bins} if bins and name != "Wav2Vec2FeatureExtractor" else {}
    if name == "ASTFeatureExtractor":
        more = {"num_mel_bins": bins, "max_length": config.max_length}
    try:
        extractor = getattr(transformers, name)(**more)
    except (TypeError, ValueError, ImportError):
        extractor = transformers.Wav2Vec2FeatureExtractor()
    values: dict[str, Any] = extractor.to_dict()
    return values


def _make_image_processor(config: PretrainedConfig) -> dict[str, Any]:
    inner = [config, *(getattr(config, name, None) for name in getattr(config, "sub_configs", {}))]
    if any("siglip2" in getattr(each, "model_type", "") for each in inner):
        patches = next((n for each in inner if isinstance(n := getattr(each, "num_patches", None), int)), 256)
        processor: Any = transformers.Siglip2ImageProcessor(max_num_patches=patches)
        values: dict[str, Any] = processor.to_dict()
        return values
    sides = [getattr(each, "image_size", None) for each in inner]
    side = next((side[0] if isinstance(side, list | tuple) else side for side in sides if side), 64)
    values = transformers.ViTImageProcessor(size={"height": side, "width": side}).to_dict()
    return values


# --- the page --------------------------------------------------------------------------------------------------------


def list_families() -> list[str]:
    """Returns the families with an encoder, sorted: those that classify, fill in or transcribe, and parts of others."""
    tasks = (
        "MASKED_LM",
        "SEQUENCE_CLASSIFICATION",
        "TEXT_ENCODING",
        "IMAGE_CLASSIFICATION",
        "ZERO_SHOT_IMAGE_CLASSIFICATION",
        "MASK_GENERATION",
        "AUDIO_CLASSIFICATION",
        "CTC",
        "SPEECH_SEQ_2_SEQ",
    )
    names = [getattr(modeling_auto, f"MODEL_FOR_{task}_MAPPING_NAMES", {}) for task in tasks]
    parts = ("_vision_model", "_text_model", "_encoder", "-encoder")
    found = {name for mapping in names for name in mapping}
    found |= {name for name in modeling_auto.MODEL_MAPPING_NAMES if name.endswith(parts)}
    return sorted(name for name in found if name in modeling_auto.MODEL_MAPPING_NAMES and name in CONFIG_MAPPING)


def format_row(row: Row) -> str:
    """Returns a line of the table."""
    part = f"`{row.part}`" if row.part else "whole"
    if row.refused:
        return f"| {row.family} | {row.modality} | | | | | {_tidy(row.refused)} |"
    yes = {True: "yes", False: "no"}
    cells = [row.family, row.modality, part, ", ".join(row.pooling), row.divided, yes[row.trains], yes[row.adapts]]
    return f"| {' | '.join(cells)} |"


def _tidy(sentence: str) -> str:
    return sentence.replace("|", "/").replace("\n", " ")


def write_page(lines: Sequence[str]) -> None:
    """Writes the page.

    Args:
        lines: rows as they are printed.
    """
    rows = {line for line in lines if line.startswith("| ")}
    untried = {row for row in rows if "not tried:" in row}
    refused = {row for row in rows - untried if not row.rstrip(" |").endswith(("yes", "no"))}
    seen = {row.split("|")[1].strip() for row in rows}
    text = [
        "# Architectures of transformers",
        "",
        "<!-- Written by docs/architectures.py; do not edit. -->",
        "",
        "What a backbone of kind `transformers` does with each family (`model_type` of config.json) with an encoder:",
        "a small model with random weights, made by a rule, encodes two records, is divided at each of its layers, and",
        "gives a gradient for each record through its last layer. `part` is what to write where the whole does not",
        "encode. `trains`: the last layer's own weights; `adapts`: LoRA beside its linear layers, or some of them.",
        "",
        "| family | records | part | pooling | divides at | trains | adapts |",
        "|---|---|---|---|---|---|---|",
        *sorted(rows - untried - refused),
        "",
        "## Refused before a run starts",
        "",
        "As the rule makes them: some of these fail because its small sizes do not fit each other, and the sentence is",
        "the same. Wav2Vec2-BERT is one: with sizes chosen by hand and random weights it loads and encodes, as a test",
        "does. No folder as its owners publish it was tried.",
        "",
        "| family | records | sentence |",
        "|---|---|---|",
        *sorted("|".join([*row.split("|")[:3], row.split("|")[-2], ""]) for row in refused),
        "",
        "## Not tried",
        "",
        "The rule makes no small model of these; larger ones may work, and are refused with a sentence where not:",
        ", ".join(sorted({row.split("|")[1].strip() for row in untried})) + ".",
        "",
    ]
    left = [family for family in list_families() if family not in seen]
    if left:
        text += ["Not surveyed yet:", ", ".join(left) + ".", ""]
    text += [
        "Without linear layers in its last layer a net takes no adapters: convolutional ones train their own weights.",
        "",
    ]
    PAGE.write_text("\n".join(text), encoding="utf-8")


def main(names: Sequence[str]) -> None:
    """Prints the rows of some families; of all where none is named."""
    rows = []
    for family in names or list_families():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                found = survey(family)
            except Exception as error:  # noqa: BLE001  # Any: the others are still surveyed.
                found = [Row(family, "", refused=f"not tried: {type(error).__name__} {error}")]
        rows += found
        for row in found:
            print(format_row(row), flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--page"]:
        write_page(Path(sys.argv[2]).read_text(encoding="utf-8").splitlines())
    else:
        main(sys.argv[1:])
