"""Chronos-Bolt and MOMENT: pre-trained encoders of T5 over patches of a series, one channel at a time.

Names of parameters are those of the published files, so that these load as they are. Scaling, patches and masks follow
the published code: Chronos-Bolt (Ansari et al. 2024, package `chronos-forecasting`) and MOMENT (Goswami et al. 2024,
package `momentfm`, which holds to a version of transformers of 2023). Decoders and heads are not built. A channel's
features are the mean of its patches' states over the patches with an observed step, as `MOMENT.embed` has them.

# Shapes: B series, C channels, N = B * C, T time steps, P patches, L steps of a patch, D features.
"""

from __future__ import annotations

import math
from typing import Any, Literal, Protocol, final

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.models.t5.modeling_t5 import T5Stack

from common.backbones.parts.hub.huggingface import read_config, silence
from common.types import BadInput

Family = Literal["chronos_bolt", "moment"]
_TINY = 1e-5
"""Added to MOMENT's deviation, and Chronos-Bolt's where that is 0."""

_UNUSED = "encoder.embed_tokens.weight"
"""Rows for words, which no series reads."""


class _ChannelReader(Protocol):
    def __call__(self, values_NT: Tensor, seen_NT: Tensor) -> tuple[Tensor, Tensor]:
        """Returns states_NPD, and 1 for patches with an observed step, [N, P]."""


@final
class PatchedT5(nn.Module):
    """Values and marks of observed ones, [B, 2, C, T] -> features.

    Attributes:
        feature_dim: number of features.
    """

    def __init__(self, config: dict[str, Any], family: Family, *, num_channels: int, apart: bool) -> None:
        """Builds the model.

        Args:
            config: its configuration, as its folder has it.
            family: which model it is.
            num_channels: number of channels of a series; each is read alone.
            apart: whether the features of channels stand one after the other; else they are averaged.

        Raises:
            BadInput: no such model can be built.
        """
        super().__init__()
        try:
            self.model = _ChronosBolt(config) if family == "chronos_bolt" else _Moment(config)
        except (AttributeError, KeyError, TypeError, ValueError, RuntimeError, ZeroDivisionError) as error:
            raise BadInput(
                f"folder: expected a {family} that can be built from its config.json, got {type(error).__name__}"
            ) from error
        self._apart = apart
        self.feature_dim = self.model.width * (num_channels if apart else 1)

    def forward(self, inputs_B2CT: Tensor) -> Tensor:
        """Returns features_BD; those of a channel without an observed step are 0."""
        shape = inputs_B2CT.shape
        values_NT, seen_NT = inputs_B2CT.transpose(0, 1).flatten(1, 2).unbind(0)
        read: _ChannelReader = self.model
        states_NPD, shown_NP = read(values_NT, seen_NT)
        sums_ND = (states_NPD * shown_NP[..., None]).sum(1)
        features_BCD = (sums_ND / shown_NP.sum(1, keepdim=True).clamp_min(1.0)).view(shape[0], shape[2], -1)
        return features_BCD.flatten(1) if self._apart else features_BCD.mean(1)


def name_published(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Returns a published file's tensors; where its rows for words have only their second name, under the first."""
    if "shared.weight" not in state and _UNUSED in state:
        return state | {"shared.weight": state[_UNUSED]}
    return state


def _build_stack(settings: dict[str, Any]) -> T5Stack:
    """Returns an encoder of T5 without rows for words."""
    plain = {"model_type": "t5", "vocab_size": 1, "is_decoder": False, "use_cache": False, "is_encoder_decoder": False}
    with silence():
        stack = T5Stack(read_config({**settings, **plain}))
    stack.embed_tokens = nn.Identity()
    return stack


def _measure(values_NT: Tensor, seen_NT: Tensor) -> tuple[Tensor, Tensor]:
    """Returns mean and deviation of the observed values, [N, 1]; 0 where there are none."""
    counts_N1 = seen_NT.sum(1, keepdim=True).clamp_min(1.0)
    means_N1 = (values_NT * seen_NT).sum(1, keepdim=True) / counts_N1
    squares_NT = ((values_NT - means_N1) * seen_NT).square()
    return means_N1, (squares_NT.sum(1, keepdim=True) / counts_N1).sqrt()


class _ResidualLayers(nn.Module):
    """A hidden layer beside a linear one (Das et al. 2023, arXiv 2304.08424)."""

    def __init__(self, inputs: int, hidden: int, outputs: int, activation: str) -> None:
        super().__init__()
        self.hidden_layer = nn.Linear(inputs, hidden)
        self.act = ACT2FN[activation]
        self.output_layer = nn.Linear(hidden, outputs)
        self.residual_layer = nn.Linear(inputs, outputs)

    def forward(self, inputs: Tensor) -> Tensor:
        out: Tensor = self.output_layer(self.act(self.hidden_layer(inputs))) + self.residual_layer(inputs)
        return out


class _ChronosBolt(nn.Module):
    """`ChronosBoltModelForForecasting.encode`; a [REG] token, where the model has one, is read but not averaged."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        own = config["chronos_config"]
        self.encoder = _build_stack(config)
        inner = self.encoder.config
        self.width: int = inner.d_model
        self._size, self._stride = int(own["input_patch_size"]), int(own["input_patch_stride"])
        self._with_token = own.get("use_reg_token", False) is True
        self.shared = nn.Embedding(2 if self._with_token else 1, self.width)
        self.input_patch_embedding = _ResidualLayers(2 * self._size, inner.d_ff, self.width, inner.dense_act_fn)

    def forward(self, values_NT: Tensor, seen_NT: Tensor) -> tuple[Tensor, Tensor]:
        means_N1, deviations_N1 = _measure(values_NT, seen_NT)
        scaled_NT = (values_NT - means_N1) / torch.where(deviations_N1 == 0, _TINY, deviations_N1)
        seen_NPL = seen_NT.unfold(1, self._size, self._stride)
        patches_NPL = torch.where(seen_NPL > 0, scaled_NT.unfold(1, self._size, self._stride), 0.0)
        shown_NP = (seen_NPL.sum(2) > 0).to(values_NT.dtype)
        states_NPD, attended_NP = self.input_patch_embedding(torch.cat([patches_NPL, seen_NPL], dim=2)), shown_NP
        if self._with_token:
            token_N1D = self.shared.weight[1].expand(values_NT.shape[0], 1, -1)
            states_NPD = torch.cat([states_NPD, token_N1D], dim=1)
            attended_NP = torch.cat([shown_NP, torch.ones_like(shown_NP[:, :1])], dim=1)
        out_NPD = self.encoder(inputs_embeds=states_NPD, attention_mask=attended_NP).last_hidden_state
        return out_NPD[:, : shown_NP.shape[1]], shown_NP


class _Moment(nn.Module):
    """`MOMENT.embed` of series of one channel, whose `input_mask` is 0 in patches without an observed step.

    Other gaps are 0 after scaling, the mean of the observed values, as that function has it for values that are not
    numbers.
    """

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        if config.get("transformer_type", "encoder_only") != "encoder_only":
            raise BadInput("folder: expected a MOMENT with the transformer_type encoder_only")
        self._size = int(config["patch_len"])
        self.encoder = _build_stack(config["t5_config"])
        self.width: int = self.encoder.config.d_model
        self.patch_embedding = _PatchEmbedding(config, self.width)
        self.normalizer = _Normalizer(config.get("revin_affine", False) is True)

    def forward(self, values_NT: Tensor, seen_NT: Tensor) -> tuple[Tensor, Tensor]:
        scaled_NT = torch.where(seen_NT > 0, self.normalizer(values_NT, seen_NT), 0.0)
        shown_NP = (seen_NT.unfold(1, self._size, self._size).sum(2) > 0).to(values_NT.dtype)
        states_NPD = self.patch_embedding(scaled_NT.unfold(1, self._size, self._size), shown_NP[..., None])
        out_NPD = self.encoder(inputs_embeds=states_NPD, attention_mask=shown_NP.long()).last_hidden_state
        return out_NPD, shown_NP


class _Normalizer(nn.Module):
    """`RevIN` of one channel."""

    def __init__(self, affine: bool) -> None:
        super().__init__()
        self.affine_weight = nn.Parameter(torch.ones(1, 1, 1)) if affine else None
        self.affine_bias = nn.Parameter(torch.zeros(1, 1, 1)) if affine else None

    def forward(self, values_NT: Tensor, seen_NT: Tensor) -> Tensor:
        means_N1, deviations_N1 = _measure(values_NT, seen_NT)
        scaled_NT = (values_NT - means_N1) / (deviations_N1 + _TINY)
        if self.affine_weight is None or self.affine_bias is None:
            return scaled_NT
        return scaled_NT * self.affine_weight[0] + self.affine_bias[0]


class _PatchEmbedding(nn.Module):
    """`PatchEmbedding`: patches, or one learnt vector where they are hidden, and their places."""

    def __init__(self, config: dict[str, Any], width: int) -> None:
        super().__init__()
        with_bias = config.get("value_embedding_bias", False) is True
        self.value_embedding = nn.Linear(int(config["patch_len"]), width, bias=with_bias)
        self.mask_embedding = nn.Parameter(torch.zeros(width))
        self._with_places = config.get("add_positional_embedding", True) is True

    def forward(self, patches_NPL: Tensor, shown_NP1: Tensor) -> Tensor:
        states_NPD: Tensor = shown_NP1 * self.value_embedding(patches_NPL) + (1 - shown_NP1) * self.mask_embedding
        return states_NPD + _make_positions(states_NPD) if self._with_places else states_NPD


def _make_positions(like_NPD: Tensor) -> Tensor:
    """Returns sines and cosines of places, [P, D]; published files have 5,000 of them, which need not travel."""
    count, width = like_NPD.shape[1], like_NPD.shape[2]
    places_P1 = torch.arange(count, device=like_NPD.device, dtype=torch.float32)[:, None]
    even_H = torch.arange(0, width, 2, device=like_NPD.device, dtype=torch.float32)
    angles_PH = places_P1 * (even_H * -(math.log(10000.0) / width)).exp()
    return torch.stack([angles_PH.sin(), angles_PH.cos()], dim=2).flatten(1)[:, :width]
