"""What random weights need to be an honest baseline rather than a straw man.

In eval mode an untrained BatchNorm (mean 0, variance 1) normalises nothing: a random MobileNetV2's features are of size
1e-9, on which no learning rate made for real features moves, and a shift predicted from BatchNorm's parameters, about
0.4, buries them. A linear probe on brain MRI with 128 projected, normalised dimensions: .25 (chance) with that shift,
.53 without. So random features are brought to unit size and not shifted.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from common.backbones import Architecture, Pretrained


def random_weights(encoder: Architecture, classifier_KD: Tensor, noise_B: Tensor) -> Pretrained:
    """An untrained encoder as a baseline.

    Args:
        encoder: freshly initialised.
        classifier_KD: random, for a projection.
        noise_B: random inputs of the size and spread of real ones; public by construction.
    """
    encoder.module.train(False)
    with torch.no_grad():
        size = float(encoder.module(noise_B).double().square().mean().sqrt())
    scale = 1.0 / size if size > 0 and math.isfinite(size) else 1.0
    state = encoder.module.state_dict()
    return Pretrained(state, classifier_KD.detach(), torch.zeros(encoder.feature_dim), scale)
