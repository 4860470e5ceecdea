"""Reads the steps of a folder of sentence-transformers behind its model: pooling, linear layers, norm, and prompts.

`modules.json` lists the steps, each with a folder of its own; `config_sentence_transformers.json` names prompts. Only
steps that stand here are read; of any other, the caller is told to say himself how positions are pooled.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from common.backbones.parts.hub.huggingface import Location
from common.backbones.parts.weights import read_state
from common.errors import nearest
from common.types import BadInput

_POOLINGS = {"mean": "mean", "cls": "cls", "lasttoken": "last"}
_OLDER = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_lasttoken": "lasttoken",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
}
_ACTIVATIONS = {"Identity": nn.Identity, "Tanh": nn.Tanh, "ReLU": nn.ReLU, "GELU": nn.GELU, "SiLU": nn.SiLU}
_REMEDY = "write `pooling` to read the model without its folder's own steps"


@dataclass(frozen=True)
class SentenceSteps:
    """The steps of a folder behind its model.

    Attributes:
        pooling: as in the settings of a transformers backbone.
        dense: settings of linear layers: `in`, `out`, `bias`, `activation`.
        folders: folder of each of these layers.
        normalize: whether features are divided by their L2 norm.
        counts_prompt: whether a prompt's own positions are pooled too.
    """

    pooling: str
    dense: tuple[dict[str, Any], ...]
    folders: tuple[str, ...]
    normalize: bool
    counts_prompt: bool


def read_steps(location: Location) -> SentenceSteps | None:
    """Returns the steps of a folder; None of one that is not of sentence-transformers. Raises BadInput."""
    modules = location.list_settings("modules.json")
    if modules is None:
        return None
    pooling, normalize, counts_prompt = "mean", False, True
    dense: list[dict[str, Any]] = []
    folders: list[str] = []
    for module in modules:
        name, folder = str(module.get("type", "")).rpartition(".")[2], str(module.get("path", ""))
        settings = location.settings(f"{folder}/config.json") if folder else {}
        if name == "Pooling":
            pooling = _read_pooling(settings or {})
            counts_prompt = bool((settings or {}).get("include_prompt", True))
        elif name == "Dense":
            dense.append(_read_dense(settings or {}))
            folders.append(folder)
        elif name == "Normalize":
            normalize = True
        elif name != "Transformer" or normalize or dense:
            raise BadInput(
                "folder: expected in modules.json a Transformer, then Pooling, Dense or Normalize, got "
                f"{name!r}; {_REMEDY}"
            )
    return SentenceSteps(pooling, tuple(dense), tuple(folders), normalize, counts_prompt)


def find_prompt(location: Location, name: str | None, steps: SentenceSteps | None) -> str:
    """Returns the text that stands in front of every text; an empty one for none.

    Args:
        location: the model's folder.
        name: name of one of its prompts, `none`, or a text, which has a space or a colon; None for the prompt that the
            folder uses by itself, if any.
        steps: its other steps.

    Raises:
        BadInput: there is no prompt of that name, or its positions are not pooled, which this cannot do.
    """
    settings = location.settings("config_sentence_transformers.json") or {}
    prompts = settings.get("prompts") or {}
    name = name if name is not None else settings.get("default_prompt_name")
    if name is None or (name == "none" and name not in prompts):
        return ""
    if name not in prompts and (" " in name or ":" in name):
        prompts = {name: name}
    if name not in prompts:
        raise BadInput(
            f"prompt: expected one of {', '.join(sorted(prompts)) or 'none, as the folder has none'}, got {name!r}"
            f"{nearest(name, list(prompts))}; a text of your own needs a space or a colon"
        )
    if prompts[name] and steps is not None and not steps.counts_prompt:
        raise BadInput("prompt: expected a model that pools its prompt's positions too; write `prompt: none`")
    return str(prompts[name])


def build_dense(settings: Mapping[str, Any]) -> list[nn.Module]:
    """Returns a linear layer and its activation."""
    layer = nn.Linear(settings["in"], settings["out"], bias=settings["bias"])
    return [layer, _ACTIVATIONS[settings["activation"]]()]


def read_dense_state(location: Location, steps: SentenceSteps) -> dict[str, Tensor]:
    """Returns the weights of the linear layers by their names among `build_dense`'s modules. Raises BadInput."""
    state: dict[str, Tensor] = {}
    for number, folder in enumerate(steps.folders):
        path = location.file(f"{folder}/model.safetensors")
        if path is None:
            raise BadInput(
                f"folder: expected {folder}/model.safetensors; pickled weights are not read: convert them with "
                f"sentence-transformers' own `save`, or {_REMEDY}"
            )
        for name, tensor in read_state(path, "folder").items():
            state[f"dense.{2 * number}.{name.removeprefix('linear.')}"] = tensor.float()
    return state


def _read_pooling(settings: Mapping[str, Any]) -> str:
    found = settings.get("pooling_mode") or [name for key, name in _OLDER.items() if settings.get(key)] or "mean"
    names = [found] if isinstance(found, str) else list(found)
    if len(names) != 1 or names[0] not in _POOLINGS:
        raise BadInput(f"folder: expected pooling by mean, cls or lasttoken, got {', '.join(names)}; {_REMEDY}")
    return _POOLINGS[names[0]]


def _read_dense(settings: Mapping[str, Any]) -> dict[str, Any]:
    activation = str(settings.get("activation_function", "Tanh")).rpartition(".")[2]
    sizes = settings.get("in_features"), settings.get("out_features")
    plain = settings.get("module_input_name", "sentence_embedding") == "sentence_embedding"
    if activation not in _ACTIVATIONS or settings.get("use_residual") or not plain or None in sizes:
        raise BadInput(f"folder: expected a Dense step of one linear layer, got another with {activation!r}; {_REMEDY}")
    return {"in": sizes[0], "out": sizes[1], "bias": bool(settings.get("bias", True)), "activation": activation}
