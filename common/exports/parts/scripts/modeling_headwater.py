"""A model that was trained with Headwater, for transformers: backbone, projection and head from `config.json`.

It is loaded by `AutoModel...from_pretrained(FOLDER, trust_remote_code=True)` and needs transformers and torch, for the
networks of torchvision also torchvision. `logits` are calibrated outputs of a classification (softmax, or sigmoid of
several labels, gives probabilities), and what other tasks predict.

# Shapes: B records, L tokens, T positions, D features, K outputs.
"""

from __future__ import annotations

import importlib
import itertools
import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize
from transformers import AutoConfig, AutoModel, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput

from common.backbones.parts.nets import CifarNet, build_small_cnn


class HeadwaterConfig(PretrainedConfig):
    """Settings of the network, its projection and its head, as plain values."""

    model_type = "headwater"

    def __init__(
        self,
        network: dict[str, Any] | None = None,
        projection: dict[str, Any] | None = None,
        head: dict[str, Any] | None = None,
        task: dict[str, Any] | None = None,
        **more: Any,
    ) -> None:
        self.network, self.projection, self.head, self.task = network or {}, projection or {}, head or {}, task or {}
        super().__init__(**more)


class PooledTransformer(nn.Module):
    """A model of transformers, or a part of it, and the pooling of its positions."""

    def __init__(self, network: dict[str, Any]) -> None:
        super().__init__()
        settings = dict(network["config"])
        whole = AutoModel.from_config(AutoConfig.for_model(settings.pop("model_type"), **settings))
        self.model = whole.get_submodule(network["part"] or "")
        self.pooling, self.max_positions = network["pooling"], network["max_positions"]
        if self.pooling != "pooler" and isinstance(getattr(self.model, "pooler", None), nn.Module):
            self.model.pooler = None
        self.model.to(getattr(torch, network["dtype"]))

    def forward(self, values_B: Tensor, **inputs: Tensor) -> Tensor:
        """Returns features_BD, or B x (T * D) of all positions."""
        mask_BT = inputs.get("attention_mask")
        if values_B.is_floating_point():
            values_B = values_B.to(next(self.model.parameters()).dtype)
        output = self.model(values_B, **inputs)
        if self.pooling == "pooler":
            pooled_BD: Tensor = output.pooler_output.flatten(1).float()
            return pooled_BD
        hidden_BTD: Tensor = output.last_hidden_state
        if hidden_BTD.ndim == 4:
            hidden_BTD = hidden_BTD.flatten(2).transpose(1, 2)
        if self.pooling == "cls":
            return hidden_BTD[:, 0].float()
        if self.pooling == "last":
            rows_B = torch.arange(len(hidden_BTD), device=hidden_BTD.device)
            last_B = -torch.ones_like(rows_B) if mask_BT is None else mask_BT.sum(1).long() - 1
            return hidden_BTD[rows_B, last_B].float()
        if mask_BT is not None:
            hidden_BTD = hidden_BTD * mask_BT.unsqueeze(2)
        if self.pooling == "tokens":
            missing = 0 if self.max_positions is None else self.max_positions - hidden_BTD.shape[1]
            return nn.functional.pad(hidden_BTD, (0, 0, 0, missing)).flatten(1).float()
        count = hidden_BTD.shape[1] if mask_BT is None else mask_BT.sum(1, keepdim=True)
        averaged_BD: Tensor = hidden_BTD.float().sum(1) / count
        return averaged_BD


def build_network(network: dict[str, Any]) -> nn.Module:
    """Returns the backbone's network, without its projection; the identity where features are given."""
    kind = network["kind"]
    if kind == "given":
        return nn.Identity()
    if kind == "transformers":
        return PooledTransformer(network)
    if kind == "small_cnn":
        return build_small_cnn(network["channels"], network["pool"])
    if kind == "cifar_resnet":
        return CifarNet((network["depth"] - 2) // 6)
    models = importlib.import_module("torchvision.models")
    model: nn.Module = models.get_model(
        network["model"], weights=None, num_classes=network["num_classes"], **network["options"]
    )
    last = [name for name, part in model.named_modules() if isinstance(part, nn.Linear)][-1]
    model.set_submodule(last, nn.Identity())
    return model


class HeadwaterProjection(nn.Module):
    """The last steps of the backbone, each where it has it: shift, project, normalise, random Fourier features."""

    def __init__(self, settings: dict[str, Any]) -> None:
        super().__init__()
        self.normalizes = settings["normalize"]
        for name, shape in settings["tensors"].items():
            self.register_buffer(name, torch.zeros(shape))

    def forward(self, features_BD: Tensor) -> Tensor:
        """Returns the features that the head reads."""
        own = dict(self.named_buffers())
        if "shift" in own:
            features_BD = features_BD - own["shift"]
        if "matrix" in own:
            features_BD = features_BD @ own["matrix"]
        if self.normalizes:
            features_BD = normalize(features_BD, dim=1)
        if "frequencies" in own:
            angles_BR = features_BD @ own["frequencies"] + own["phases"]
            features_BD = angles_BR.cos() * math.sqrt(2.0 / angles_BR.shape[1])
        return features_BD


class HeadwaterHead(nn.Module):
    """The trained head: perhaps a centre, one or two layers, a temperature and an offset."""

    def __init__(self, settings: dict[str, Any]) -> None:
        super().__init__()
        dims, bias = settings["dims"], settings["bias"]
        layers = [nn.Linear(inner, outer, bias=bias) for inner, outer in itertools.pairwise(dims)]
        self.layers = layers[0] if len(layers) == 1 else nn.Sequential(layers[0], nn.Tanh(), layers[1])
        self.temperature = nn.Buffer(torch.ones(()))
        self.offset = nn.Buffer(torch.zeros(dims[-1]))
        if settings["centre"]:
            self.register_buffer("centre", torch.zeros(dims[0]))

    def forward(self, features_BD: Tensor) -> Tensor:
        """Returns outputs_BK."""
        centre = self._buffers.get("centre")
        if centre is not None:
            features_BD = normalize(normalize(features_BD, dim=-1) - centre, dim=-1)
        outputs_BK: Tensor = self.layers(features_BD) / self.temperature + self.offset
        return outputs_BK


class HeadwaterModel(PreTrainedModel):
    """Raw inputs as the processor or tokenizer makes them -> `logits`."""

    config_class = HeadwaterConfig

    def __init__(self, config: HeadwaterConfig) -> None:
        super().__init__(config)
        self.encoder = build_network(config.network)
        self.register_buffer("scale", torch.ones(()))
        self.projection = HeadwaterProjection(config.projection)
        self.head = HeadwaterHead(config.head)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Draws nothing: all weights are in the file."""

    def forward(
        self,
        pixel_values: Tensor | None = None,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        input_values: Tensor | None = None,
        input_features: Tensor | None = None,
        features: Tensor | None = None,
        **ignored: Any,
    ) -> SequenceClassifierOutput:
        """Returns the outputs of a batch; exactly one of the inputs is given, and the mask of texts.

        Args:
            pixel_values: pictures, as the image processor makes them.
            input_ids: tokens of texts.
            attention_mask: 1 for a token, 0 for padding.
            token_type_ids: 0 in the first text, 1 in a second one that is read together with it.
            input_values: recordings of one length.
            input_features: spectra, as the feature extractor makes them.
            features: features of a backbone that is not part of this folder.
            **ignored: what trainers and pipelines pass besides.
        """
        given = [each for each in (pixel_values, input_ids, input_values, input_features, features) if each is not None]
        if len(given) != 1:
            raise ValueError(f"expected one kind of input, got {len(given)}")
        more = {"attention_mask": attention_mask, "token_type_ids": token_type_ids} if input_ids is not None else {}
        raw_BD = self.encoder(given[0], **{name: own for name, own in more.items() if own is not None})
        features_BD = self.projection(raw_BD.to(torch.float32) * self.scale)
        return SequenceClassifierOutput(logits=self._serve(self.head(features_BD)))

    def _serve(self, outputs_BK: Tensor) -> Tensor:
        task = self.config.task
        if task["kind"] == "regression":
            low, high = map(float, task["range"])
            return (outputs_BK * ((high - low) / 2) + (low + high) / 2).clamp(low, high)
        if task["kind"] == "anomaly":
            return (outputs_BK - 1.0).abs()
        return normalize(outputs_BK, dim=1) if task["kind"] == "embedding" else outputs_BK
