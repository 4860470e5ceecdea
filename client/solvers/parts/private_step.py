"""One private step with Opacus: everything of a step that touches per-record gradients, clipping or noise.

Per-record gradients of grouped convolutions are computed here without the products between groups, which Opacus 1.6
forms and drops: a depthwise convolution of 960 channels has 8,640 weights, and Opacus makes 8.3 million values of each
record on the way.

# Shapes: R records, U units of a batch; G groups, O outputs and P inputs of one group's window, Q positions.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from opacus import GradSampleModule
from opacus.grad_sample.conv import compute_conv_grad_sample
from opacus.optimizers import DPOptimizer
from opacus.optimizers.optimizer import _check_processed_flag, _mark_as_processed
from opacus.utils.tensor_utils import unfold2d
from opacus.validators import ModuleValidator
from torch import Tensor, nn

from client.data.units import Units
from client.solvers.parts.objective import get_unit_indices, select_batch, sum_losses
from common.privacy.clipping import sum_by_unit, zero_nonfinite
from common.privacy.noise import NoiseStream, release
from common.tasks import Task
from common.types import BadInput, Plan

_CHUNK_VALUES = 2**24
"""Per-record gradient values held at once (64 MiB): larger batches are clipped in parts and summed."""


class StreamOptimizer(DPOptimizer):  # type: ignore[misc]  # Opacus is untyped.
    """Opacus' clipping and summing; noise from the site's stream and one constant divisor for each parameter."""

    def __init__(
        self, optimizer: torch.optim.Optimizer, *, plan: Plan, divisors: list[float], stream: NoiseStream
    ) -> None:
        DPOptimizer.__init__(
            self,
            optimizer,
            noise_multiplier=plan.noise_multiplier,
            max_grad_norm=plan.clip_norm,
            expected_batch_size=None,
            loss_reduction="sum",
        )
        self._divisors = divisors
        self._stream = stream

    def add_noise(self) -> None:
        """Writes (clipped sum + noise) into each parameter's gradient. One draw of the stream is one release."""
        sizes = [parameter.numel() for parameter in self.params]
        totals = [parameter.summed_grad for parameter in self.params]
        for total in totals:
            _check_processed_flag(total)
        deviation = self.noise_multiplier * self.max_grad_norm
        normals = self._stream.gaussian((sum(sizes),))
        noisy = release(torch.cat([total.flatten() for total in totals]), deviation, normals)
        for parameter, part, total in zip(self.params, torch.split(noisy, sizes), totals, strict=True):
            parameter.grad = part.to(parameter.dtype).view_as(parameter)
            _mark_as_processed(total)

    def scale_grad(self) -> None:
        """Divides by the declared batch size: after the noise, so it costs nothing."""
        for parameter, divisor in zip(self.params, self._divisors, strict=True):
            parameter.grad /= divisor


def compute_conv2d_gradients(
    layer: nn.Conv2d, activations: Sequence[Tensor], backprops: Tensor
) -> dict[Tensor, Tensor]:
    """Returns per-record gradients of a convolution's parameters, as Opacus' own sampler does.

    Args:
        layer: the convolution; one without groups is left to Opacus.
        activations: the layer's inputs, one tensor [R, channels, height, width].
        backprops: gradient of the loss by the layer's outputs, in their shape.
    """
    if layer.groups == 1 or len(backprops) == 0:
        dense: dict[Tensor, Tensor] = compute_conv_grad_sample(layer, activations, backprops)
        return dense
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
    """Opacus' hooks with the sampler above for convolutions."""

    GRAD_SAMPLERS = {**GradSampleModule.GRAD_SAMPLERS, nn.Conv2d: compute_conv2d_gradients}


def check_separable(modules: Mapping[str, nn.Module]) -> None:
    """Raises BadInput for modules that mix the examples of a batch, so that no per-record gradient exists."""
    for name, module in modules.items():
        # The second as `hook_record_gradients` would find it, but before anything is charged.
        errors = ModuleValidator.validate(module, strict=False) or RecordGradients.validate(module, strict=False)
        if errors:
            part = f"trainable: {name}" if "." in name else f"tasks.{name}: the head"
            raise BadInput(f"{part} cannot be trained privately: {errors[0]}")


def hook_record_gradients(modules: Mapping[str, nn.Module]) -> nn.Module:
    """Makes the modules' backward pass store per-record gradients, and returns them in one module.

    Raises:
        BadInput: a module mixes the examples of a batch.
    """
    check_separable(modules)
    # A list, not a dict: a task may be called "keys" or "train".
    hooked: nn.Module = RecordGradients(nn.ModuleList(modules.values()), loss_reduction="sum")
    return hooked


def release_step(
    optimizer: StreamOptimizer,
    modules: Mapping[str, nn.Module],
    tasks: Mapping[str, Task],
    units: Units,
    members: Tensor,
) -> None:
    """Clips and sums the gradients of some units, adds noise once and moves the weights.

    Args:
        optimizer: optimizer of all trainable parameters of the modules, in their order.
        modules: heads and trunks, as given to `hook_record_gradients`.
        tasks: task -> its definition.
        units: usable units.
        members: indices of the units in the step's sample; an empty sample is released too.
    """
    for batch, last in _split_sample(units, members, modules):
        optimizer.zero_grad(set_to_none=True)
        loss = sum_losses(modules, tasks, _require_input_gradients(batch))
        if loss is not None:
            loss.backward()  # type: ignore[no-untyped-call]
        _store_unit_gradients(modules, batch)
        optimizer.signal_skip_step(do_skip=not last)
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def _split_sample(units: Units, members: Tensor, modules: Mapping[str, nn.Module]) -> Iterator[tuple[Units, bool]]:
    """Yields the sample in parts that fit into memory, and for each if it is the last; an empty sample is one part."""
    values = 1
    for name, module in modules.items():
        num_parameters = sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)
        unit_R = get_unit_indices(name, units)
        values += num_parameters * max(1, int(torch.bincount(unit_R).max()) if len(unit_R) else 1)
    parts = torch.split(members, max(1, _CHUNK_VALUES // values))
    for number, part in enumerate(parts, start=1):
        yield select_batch(units, part), number == len(parts)


def _require_input_gradients(batch: Units) -> Units:
    """Returns the same batch with features that require a gradient.

    Nobody reads it; but PyTorch warns at every step when a module with a backward hook has no such input, and switching
    warnings off would reach other threads. Contiguous, because Opacus 1.6 computes wrong gradients of a convolution,
    silently, when its input is stored channels-last.
    """
    return Units(
        batch.num_units,
        {
            name: replace(records, features_RD=records.features_RD.detach().contiguous().requires_grad_())
            for name, records in batch.tasks.items()
        },
    )


def _store_unit_gradients(modules: Mapping[str, nn.Module], batch: Units) -> None:
    """Replaces Opacus' per-record gradients by finite per-unit ones, zero for modules without a record in the batch."""
    trainable, gradients_U = [], []
    for name, module in modules.items():
        unit_R = get_unit_indices(name, batch)
        for parameter in module.parameters():
            if parameter.requires_grad:
                trainable.append(parameter)
                gradients_U.append(_sum_gradient_by_unit(parameter, unit_R, batch.num_units))
    for parameter, gradient_U in zip(trainable, zero_nonfinite(gradients_U), strict=True):
        parameter.grad_sample = gradient_U  # type: ignore[attr-defined]  # Opacus keeps it there.


def _sum_gradient_by_unit(parameter: nn.Parameter, unit_R: Tensor, num_units: int) -> Tensor:
    if not len(unit_R):
        return parameter.new_zeros((num_units, *parameter.shape))
    gradient_R = parameter.grad_sample  # type: ignore[attr-defined]
    if not isinstance(gradient_R, Tensor):  # Opacus makes a list when gradients of an earlier step were kept.
        raise ValueError("expected the record gradients of one backward pass, got those of several")
    return sum_by_unit(gradient_R, unit_R, num_units)
