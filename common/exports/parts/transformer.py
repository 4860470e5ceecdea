"""A model as transformers has it: one of the library's own classes where that gives its numbers, else a class of ours.

# Shapes: B records, D features, K outputs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from common.exports.parts.exported import Exported
from common.exports.parts.program import check, draw_inputs
from common.types import BadInput

_AUTO = {
    "pixel_values": "AutoModelForImageClassification",
    "input_ids": "AutoModelForSequenceClassification",
    "input_values": "AutoModelForAudioClassification",
    "input_features": "AutoModelForAudioClassification",
}
_PROBLEMS = {"classification": "single_label_classification", "multilabel": "multi_label_classification"}


@dataclass(frozen=True)
class Described:
    """Settings of `HeadwaterModel` and the tensors that it loads.

    Attributes:
        settings: arguments of `HeadwaterConfig`.
        state: tensors by name.
        auto: the class of transformers through which it is opened.
        input: name of the first input.
    """

    settings: dict[str, Any]
    state: dict[str, Tensor]
    auto: str
    input: str


def describe(exported: Exported) -> Described:
    """Returns a model as `HeadwaterModel` builds it.

    Raises:
        BadInput: the format cannot hold such a task, backbone or input.
    """
    (task,) = exported.tasks
    settings = exported.model.config.tasks[task].settings
    if settings["kind"] not in (*_PROBLEMS, "regression", "anomaly", "embedding"):
        raise BadInput(f"--format huggingface holds no task of kind {settings['kind']}; choose onnx or torch")
    network, name = _describe_network(exported)
    head, head_state = _describe_head(exported, task)
    projection: dict[str, Any] = {"normalize": False, "tensors": {}}
    state = {f"head.{key}": value for key, value in head_state.items()} | {"scale": torch.ones(())}
    if not exported.left_out:
        own = exported.model.backbones[exported.backbone]
        parts = {key: value.detach().cpu() for key, value in own.module.state_dict().items()}
        shapes = {key.removeprefix("projection."): value for key, value in parts.items() if key[:11] == "projection."}
        normalizes = bool((own.public_spec().get("projection") or {}).get("normalize", False))
        projection = {"normalize": normalizes, "tensors": {key: list(value.shape) for key, value in shapes.items()}}
        state |= {key: value for key, value in parts.items() if key != "encoder.tokenizer"}
    columns = exported.list_columns()[task]
    described = {
        "network": network,
        "projection": projection,
        "head": head,
        "task": settings,
        "id2label": dict(enumerate(columns)),
        "label2id": {column: number for number, column in enumerate(columns)},
        "problem_type": _PROBLEMS.get(settings["kind"], "regression"),
        "run": exported.model.config.run,
        "backbone_digest": exported.origin.digest,
    }
    probabilities = settings["kind"] in _PROBLEMS
    return Described(described, state, _AUTO.get(name, "AutoModel") if probabilities else "AutoModel", name)


def open_described(exported: Exported, described: Described) -> Any:
    """Returns the model, compared with the network on random inputs. Raises BadInput where they differ."""
    from common.exports.parts.scripts.modeling_headwater import HeadwaterConfig, HeadwaterModel

    model = HeadwaterModel(HeadwaterConfig(**described.settings)).eval()
    model.load_state_dict(described.state)
    compare(exported, model, described.input)
    return model


def find_own_class(exported: Exported) -> Any | None:
    """Returns a model of one of transformers' own classes that gives the network's numbers; None where there is none.

    Its head must be one linear layer on what the backbone pools, with nothing between: the temperature and the offset
    become part of the layer.
    """
    from common.backbones.parts.layers import PooledModel
    from common.backbones.transformers import Transformers

    (task,) = exported.tasks
    kind = exported.model.config.tasks[task].settings["kind"]
    own = exported.model.backbones[exported.backbone]
    head, state = _describe_head(exported, task)
    network = own.module.encoder
    if exported.left_out or kind not in _PROBLEMS or not isinstance(own.kind, Transformers):
        return None
    if not isinstance(network, PooledModel) or own.kind.part is not None or own.kind.projection is not None:
        return None
    if own.kind.dtype != "float32" or head["centre"] or len(head["dims"]) != 2 or float(own.module.scale) != 1.0:
        return None
    columns = exported.list_columns()[task]
    model = _build_own(own.kind.files.config if own.kind.files else {}, exported.raw.tensors[0].name, columns)
    if model is None:
        return None
    weight_KD = state["layers.weight"] / state["temperature"]
    bias_K = state.get("layers.bias", torch.zeros(())) / state["temperature"] + state["offset"]
    if not _fill(model, network.model, weight_KD, bias_K):
        return None
    model.config.problem_type = _PROBLEMS[kind]
    try:
        compare(exported, model, exported.raw.tensors[0].name)
    except (BadInput, TypeError):
        return None
    return model


def _build_own(config: dict[str, Any], name: str, columns: list[str]) -> Any | None:
    import transformers

    from common.backbones.parts.hub.huggingface import read_config, silence

    numbers = {column: number for number, column in enumerate(columns)}
    read = read_config({**config, "id2label": dict(enumerate(columns)), "label2id": numbers})
    with silence(), torch.random.fork_rng(devices=[]):
        try:
            return getattr(transformers, _AUTO[name]).from_config(read, trust_remote_code=False).eval()
        except (ValueError, KeyError, AttributeError):
            return None


def _fill(model: Any, network: nn.Module, weight_KD: Tensor, bias_K: Tensor) -> bool:
    """Returns whether a backbone's weights and one linear layer are all that a class of transformers needs."""
    prefix = f"{model.base_model_prefix}."
    base = {f"{prefix}{name}": value for name, value in network.state_dict().items()}
    rest = {name: value for name, value in model.state_dict().items() if name not in base}
    heads = [name for name, value in rest.items() if value.shape == weight_KD.shape and name.endswith(".weight")]
    if len(heads) != 1 or set(rest) - {heads[0], heads[0][: -len("weight")] + "bias"}:
        return False
    filled = {heads[0]: weight_KD, **{name: bias_K for name in rest if name != heads[0]}}
    if len(rest) == 1 and bool(bias_K.any()):
        return False
    if not set(base) <= set(model.state_dict()):
        return False
    model.load_state_dict({**base, **{name: value.expand_as(rest[name]).clone() for name, value in filled.items()}})
    return True


def compare(exported: Exported, model: Any, name: str) -> None:
    """Checks that a model of transformers gives the network's numbers on random inputs.

    Args:
        exported: the network.
        model: its outputs have `logits`.
        name: of the first input.

    Raises:
        BadInput: they differ.
    """
    (task,) = exported.tasks
    kind = exported.model.config.tasks[task].settings["kind"]
    inputs = draw_inputs(exported)
    names = [name, *(tensor.name for tensor in exported.raw.tensors[1:])]
    given = dict(zip(names, inputs, strict=True))
    if name == "pixel_values":
        # The image processor standardises them.
        given[name] = exported.raw.module(*inputs)
    with torch.no_grad():
        logits = model(**given).logits
    served = logits.softmax(1) if kind == "classification" else logits.sigmoid() if kind == "multilabel" else logits
    check(exported, inputs, served)


def _describe_network(exported: Exported) -> tuple[dict[str, Any], str]:
    """Returns a network's settings and the name of its first input as transformers calls it. Raises BadInput."""
    own, raw = exported.model.backbones[exported.backbone], exported.raw
    if not own.grid and exported.left_out:
        return {"kind": "given"}, "features"
    if exported.origin.trainable is not None:
        raise BadInput("--format huggingface holds frozen backbones, got one with a trained part; choose onnx or torch")
    if own.grid:
        what = "with maps" if own.bag is None else "of bags"
        raise BadInput(f"--format huggingface holds no backbone {what}; choose onnx or torch")
    kind, spec = own.kind.kind, own.public_spec()
    if kind == "torchvision":
        from common.backbones.torchvision import IMAGENET_CLASSES, list_options

        crop = spec["preprocess"]["crop"]
        options = list_options(spec["model"], crop or spec["preprocess"]["resize"])
        more = {"model": spec["model"], "num_classes": IMAGENET_CLASSES, "options": options}
        return {"kind": kind, **more}, "pixel_values"
    if kind == "transformers":
        network: Any = own.module.encoder
        if len(raw.tensors[0].shape) == 2 or len(network.dense):
            raise BadInput(
                "--format huggingface holds no backbone of spectra, of patches, or with layers behind its pooling; "
                "choose onnx or torch"
            )
        settings = {name: spec[name] for name in ("part", "pooling", "dtype")}
        more = {"config": spec["files"]["config"], "max_positions": network.max_positions}
        return {"kind": kind, **settings, **more}, raw.tensors[0].name
    if kind in ("small_cnn", "cifar_resnet"):
        more = {name: spec[name] for name in ("channels", "pool", "depth") if name in spec}
        return {"kind": kind, **more}, "pixel_values"
    if isinstance(own.module.encoder, nn.Identity) and isinstance(raw.module, nn.Identity):
        return {"kind": "given"}, "features"
    raise BadInput(f"--format huggingface holds no backbone of kind {kind}; choose onnx or torch")


def _describe_head(exported: Exported, task: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Returns a head's settings and its tensors; the outputs are divided by `temperature` before `offset` is added."""
    served = exported.model.heads[task]
    state = {name: value.detach().cpu() for name, value in served.head.state_dict().items()}
    layers = {name.removeprefix("layers."): value for name, value in state.items() if not name.startswith("fixed.")}
    weights = [value for name, value in layers.items() if name.endswith("weight")]
    if not 1 <= len(weights) <= 2 or any(value.ndim != 2 for value in weights):
        raise BadInput("--format huggingface holds heads of one or two layers; choose onnx or torch")
    dims = [weights[0].shape[1], *(value.shape[0] for value in weights)]
    tensors = {f"layers.{name}": value for name, value in layers.items()}
    # offset + (outputs - offset) / temperature, where the outputs have the offset already.
    tensors |= {"temperature": served.temperature.cpu(), "offset": served.offset_O.cpu().expand(dims[-1]).clone()}
    if "fixed.centre" in state:
        tensors["centre"] = state["fixed.centre"]
    bias = any(name.endswith("bias") for name in layers)
    return {"dims": dims, "bias": bias, "centre": "fixed.centre" in state}, tensors
