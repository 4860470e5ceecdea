"""Feature maps: what a picture's network knows at each place, instead of one vector for the whole picture.

Layers of the network are read by name; each is brought to one grid, divided by its length at each place, and put beside
the others. A head on them is a linear map at each place.

# Shapes: B pictures, C channels, S sides of inputs, G places along a side of the grid, D features of a place.
"""

from __future__ import annotations

import copy
import math
from typing import final

import numpy as np
import torch
from torch import Tensor, nn

from common.backbones import Maps
from common.backbones.parts.contrast import compute_contrast, count_values
from common.errors import nearest
from common.types import BadInput

_MOST_DEVIATIONS = 3.0
_MOST_FIRST = 5


@final
class MapNetwork(nn.Module):
    """Some layers of a network as features of places, [B, 3, S, S] -> [B, G, G, D]."""

    matrix: Tensor

    def __init__(self, network: nn.Module, settings: Maps, side: int) -> None:
        """Reads layers of a network, whose other layers are left out.

        Args:
            network: the network, in eval mode; not to be used afterwards.
            settings: which layers, and their grid.
            side: height and width of its inputs.

        Raises:
            BadInput: there is no such layer, or its output has no places.
        """
        super().__init__()
        from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

        known = get_graph_node_names(network)[1]
        for name in settings.layers:
            if not any(each == name or each.startswith(f"{name}.") for each in known):
                raise BadInput(f"maps.layers: expected layers of the network, got {name!r}{nearest(name, known)}")
        self.extractor = create_feature_extractor(network, {name: name for name in settings.layers})
        self._settings = settings
        empty = torch.zeros(1, 3, side, side, device="meta")
        outputs = copy.deepcopy(self.extractor).eval().to("meta")(empty)
        shapes = {name: output.shape for name, output in outputs.items()}
        self._channels_last = {name: _find_places(name, shape) for name, shape in shapes.items()}
        width = sum(shapes[name][1 if last is False else -1] for name, last in self._channels_last.items())
        width += 3 if settings.colours else 0
        width *= 2 if settings.context > 1 else 1
        width += 0 if settings.contrast is None else count_values(settings.contrast)
        self.feature_dim = int(settings.directions or width)
        if settings.directions is not None:
            # Numpy's generator: its numbers are the same on every machine. They follow from the settings, and are no
            # part of the weights.
            matrix_DP = np.random.default_rng(0).standard_normal((int(width), settings.directions))
            matrix_DP /= math.sqrt(settings.directions)
            self.register_buffer("matrix", torch.from_numpy(matrix_DP).float(), persistent=False)

    def forward(self, pixels_B3SS: Tensor) -> Tensor:
        """Returns features_BGGD; before means are subtracted, of length 1 in each layer's part."""
        outputs = self.extractor(pixels_B3SS)
        maps = [_arrange(outputs[name], last) for name, last in self._channels_last.items()]
        parts = [nn.functional.normalize(_resize(each, self._settings.grid), dim=1) for each in maps]
        if self._settings.colours:
            parts.append(_resize(_compute_relative_colours(pixels_B3SS), self._settings.grid))
        features_BDGG = torch.cat(parts, dim=1)
        if self._settings.context > 1:
            reach = self._settings.context // 2
            around = nn.functional.avg_pool2d(
                features_BDGG, self._settings.context, stride=1, padding=reach, count_include_pad=False
            )
            features_BDGG = torch.cat([features_BDGG, around], dim=1)
        if self._settings.contrast is not None:
            # The darkest channel: stains darken one of them, and grey pictures have three alike.
            darkest_B1GG = _resize(pixels_B3SS.amin(dim=1, keepdim=True), self._settings.grid)
            features_BDGG = torch.cat([features_BDGG, compute_contrast(darkest_B1GG, self._settings.contrast)], dim=1)
        if self._settings.relative:
            features_BDGG = features_BDGG - features_BDGG.mean(dim=(2, 3), keepdim=True)
        features_BGGD = features_BDGG.movedim(1, -1)
        return features_BGGD if self._settings.directions is None else features_BGGD @ self.matrix


def _find_places(name: str, shape: torch.Size) -> bool | None:
    """Returns true where a layer's channels are last, false where they come first, None for tokens of patches."""
    if len(shape) == 4 and shape[2] == shape[3]:
        return False
    if len(shape) == 4 and shape[1] == shape[2]:
        return True
    side = int(shape[1] ** 0.5) if len(shape) == 3 else 0
    if side and shape[1] - side**2 <= _MOST_FIRST:
        return None
    raise BadInput(f"maps.layers: expected layers with places, got {name!r} of shape {tuple(shape[1:])}")


def _arrange(output: Tensor, channels_last: bool | None) -> Tensor:
    """Returns B x C x H x W of a layer's output."""
    if channels_last is None:
        side = int(output.shape[1] ** 0.5)
        # First tokens, of the whole picture or registers, are no places.
        patches_BTC = output[:, output.shape[1] - side**2 :]
        return patches_BTC.movedim(1, -1).reshape(len(output), output.shape[2], side, side)
    return output.movedim(-1, 1) if channels_last else output


def _resize(map_BCHW: Tensor, grid: int) -> Tensor:
    """Returns a map on the grid: means of places that fall together, and between places a straight line."""
    side = map_BCHW.shape[-1]
    if side > grid:
        return nn.functional.adaptive_avg_pool2d(map_BCHW, grid)
    if side < grid:
        return nn.functional.interpolate(map_BCHW, size=(grid, grid), mode="bilinear", align_corners=False)
    return map_BCHW


def _compute_relative_colours(pixels_B3SS: Tensor) -> Tensor:
    """Returns colours as deviations from the picture's own mean, in [-1, 1]."""
    apart = pixels_B3SS - pixels_B3SS.mean(dim=(2, 3), keepdim=True)
    deviation = apart.square().mean(dim=(1, 2, 3), keepdim=True).sqrt().clamp(min=1e-6)
    return (apart / (_MOST_DEVIATIONS * deviation)).clamp(-1.0, 1.0)
