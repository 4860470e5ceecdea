"""Per-record gradients of grouped convolutions without the products between groups, which Opacus 1.6 forms and drops.

A depthwise convolution of 960 channels has 8,640 weights; Opacus makes 8.3 million values of each record on the way.

# Shapes: R records, G groups, O outputs and P inputs of one group's window, Q positions.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from opacus import GradSampleModule
from opacus.grad_sample.conv import compute_conv_grad_sample
from opacus.utils.tensor_utils import unfold2d
from torch import Tensor, nn


def conv2d_gradients(layer: nn.Conv2d, activations: Sequence[Tensor], backprops: Tensor) -> dict[Tensor, Tensor]:
    """As Opacus' own sampler, which does what has one group."""
    if layer.groups == 1 or len(backprops) == 0:
        found: dict[Tensor, Tensor] = compute_conv_grad_sample(layer, activations, backprops)
        return found
    windows_RSQ = unfold2d(
        activations[0].to(backprops.dtype),
        kernel_size=layer.kernel_size,
        padding=layer.padding,
        stride=layer.stride,
        dilation=layer.dilation,
    )
    num_records, groups = len(backprops), layer.groups
    windows_RGPQ = windows_RSQ.view(num_records, groups, -1, windows_RSQ.shape[-1])
    outputs_RGOQ = backprops.reshape(num_records, groups, -1, windows_RSQ.shape[-1])
    gradients: dict[Tensor, Tensor] = {}
    if layer.weight.requires_grad:
        weight_RGOP = torch.einsum("rgoq,rgpq->rgop", outputs_RGOQ, windows_RGPQ)
        gradients[layer.weight] = weight_RGOP.reshape(num_records, *layer.weight.shape)
    if layer.bias is not None and layer.bias.requires_grad:
        gradients[layer.bias] = outputs_RGOQ.sum(dim=3).reshape(num_records, -1)
    return gradients


class RecordGradients(GradSampleModule):  # type: ignore[misc]  # Opacus is untyped.
    """Opacus' hooks with the sampler above."""

    GRAD_SAMPLERS = {**GradSampleModule.GRAD_SAMPLERS, nn.Conv2d: conv2d_gradients}
