"""A transformer of time series as a network that gives features.

# Shapes: B series, C channels, T time steps, P patches, D features.
"""

from __future__ import annotations

from typing import Any, final

import torch
from torch import Tensor, nn
from transformers import AutoModel

from common.backbones.parts.hub.huggingface import read_config, silence
from common.types import BadInput

_PLAIN = {"do_mask_input": False, "use_cls_token": False, "output_hidden_states": False, "output_attentions": False}
"""Settings of pre-training and of other outputs; a model that masks its input draws which steps it hides."""


@final
class SeriesModel(nn.Module):
    """Values and marks of observed ones, [B, 2, C, T] -> features, means over patches.

    Attributes:
        feature_dim: number of features.
    """

    def __init__(self, config: dict[str, Any], *, apart: bool) -> None:
        """Builds the model.

        Args:
            config: the model's configuration, as its folder has it.
            apart: whether the features of channels stand one after the other; else they are averaged.

        Raises:
            BadInput: no such model can be built.
        """
        super().__init__()
        try:
            with silence():
                self.model = AutoModel.from_config(
                    read_config({**config, **_PLAIN}), trust_remote_code=False, dtype=torch.float32
                )
        except (ImportError, TypeError, ValueError, RuntimeError, ZeroDivisionError, AttributeError) as error:
            raise BadInput(
                f"folder: expected a model that transformers can build, got {type(error).__name__}"
            ) from error
        self._mask = "past_observed_mask" if config["model_type"] == "patchtst" else "observed_mask"
        self._apart = apart
        width = int(config.get("d_model", self.model.config.d_model))
        self.feature_dim = width * (int(config["num_input_channels"]) if apart else 1)

    def forward(self, inputs_B2CT: Tensor) -> Tensor:
        """Returns features_BD."""
        values_BTC, seen_BTC = inputs_B2CT.transpose(2, 3).unbind(1)
        mask_BTC = seen_BTC > 0.5
        output = self.model(past_values=values_BTC, **{self._mask: mask_BTC})
        features_BCD: Tensor = output.last_hidden_state.mean(2)
        return features_BCD.flatten(1) if self._apart else features_BCD.mean(1)
