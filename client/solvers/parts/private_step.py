"""One private step with Opacus: everything of a step that touches per-record gradients, clipping or noise.

Per-record gradients of grouped convolutions are computed here without the products between groups, which Opacus 1.6
forms and drops: a depthwise convolution of 960 channels has 8,640 weights, and Opacus makes 8.3 million values of each
record on the way. Those of layer norms without a bias are computed here too: Opacus 1.6 stumbles over them.

# Shapes: R records, U units of a batch; G groups, O outputs and P inputs of one group's window, Q positions.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from opacus import GradSampleModule
from opacus.grad_sample.conv import compute_conv_grad_sample
from opacus.grad_sample.layer_norm import compute_layer_norm_grad_sample
from opacus.optimizers import DPOptimizer
from opacus.utils.tensor_utils import sum_over_all_but_batch_and_last_n, unfold2d
from opacus.validators import ModuleValidator
from torch import Tensor, nn

from client.data.units import TaskRecords, Units
from client.solvers.parts.objective import get_unit_indices, select_batch, sum_losses
from common.privacy.lattice import Lattice, bound_norms, check_unit_count
from common.privacy.noise import NoiseStream
from common.tasks import Task
from common.types import BadInput, Plan

_BLOCK_VALUES = 2**24
"""Per-record gradient values of a block (64 MiB in float32)."""

_BLOCK_RECORDS = 256
"""Most records of one task in a block."""


_LEAST_RECORDS = 8
"""Records of each task in a block at least, where they fit."""


class StreamOptimizer(DPOptimizer):  # type: ignore[misc]  # Opacus is untyped.
    """Opacus' optimizer with clipping and summing in integers, and noise from the site's stream.

    One constant divisor for each parameter takes the place of the batch size.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, *, plan: Plan, divisors: list[float], stream: NoiseStream
    ) -> None:
        assert plan.clip_norm is not None  # A private plan has one.
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
        self._lattice = Lattice.of(plan.clip_norm, plan.noise_multiplier)
        self._totals: list[Tensor] = []
        self.reset_totals()

    def count_usual_units(self) -> int:
        """Returns the power of two from the expected number of units of a step on, at least `_LEAST_RECORDS`.

        A block of many more would hold little but added records.
        """
        return max(_LEAST_RECORDS, 1 << math.ceil(math.log2(max(1.0, *self._divisors))))

    def reset_totals(self) -> None:
        """Sets the sums of clipped gradients to zero, before the first block of a step."""
        self._totals = [torch.zeros_like(parameter, dtype=torch.int64) for parameter in self.params]

    def clip_and_accumulate(self) -> None:
        """Adds the clipped gradients of a block's units to the totals, exactly."""
        gradients_U = [parameter.grad_sample for parameter in self.params]
        # One after the other: the order in which torch sums over an axis depends on a unit's place.
        square_U = torch.zeros(len(gradients_U[0]), dtype=torch.double, device=gradients_U[0].device)
        for gradient_U in gradients_U:
            square_U.add_(bound_norms(gradient_U.flatten(1)).square_())
        # The sum of a few squares may round: 2**-40 is more.
        factor_U = self._lattice.compute_factors(square_U.sqrt_().mul_(1.0 + 2.0**-40))
        for total, gradient_U in zip(self._totals, gradients_U, strict=True):
            total.add_(self._lattice.truncate(gradient_U, factor_U).sum(dim=0).long())

    def add_noise(self) -> None:
        """Writes (clipped sum + noise) into each parameter's gradient. One draw of the stream is one release."""
        sizes = [parameter.numel() for parameter in self.params]
        noise = self._stream.rounded_gaussian(sum(sizes), self._lattice.log2_deviation)
        whole = torch.cat([total.flatten() for total in self._totals])
        noisy = self._lattice.release(whole, noise, self._stream)
        for parameter, part, divisor in zip(self.params, torch.split(noisy, sizes), self._divisors, strict=True):
            parameter.grad = (part / divisor).to(parameter.dtype).view_as(parameter)

    def scale_grad(self) -> None:
        """Does nothing: `add_noise` divides in double precision, after the noise."""


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


def compute_layer_norm_gradients(
    layer: nn.LayerNorm, activations: Sequence[Tensor], backprops: Tensor
) -> dict[Tensor, Tensor]:
    """Returns per-record gradients of a layer norm's parameters, as Opacus' own sampler does.

    Args:
        layer: the norm; one with a bias is left to Opacus.
        activations: the layer's inputs, one tensor [R, ..., *normalized_shape].
        backprops: gradient of the loss by the layer's outputs, in their shape.
    """
    if layer.bias is not None:
        biased: dict[Tensor, Tensor] = compute_layer_norm_grad_sample(layer, activations, backprops)
        return biased
    if not layer.weight.requires_grad:
        return {}
    normed = nn.functional.layer_norm(activations[0], layer.normalized_shape, eps=layer.eps)
    return {layer.weight: sum_over_all_but_batch_and_last_n(normed * backprops, layer.weight.dim())}


class RecordGradients(GradSampleModule):  # type: ignore[misc]  # Opacus is untyped.
    """Opacus' hooks with the samplers above for convolutions and layer norms."""

    GRAD_SAMPLERS = {
        **GradSampleModule.GRAD_SAMPLERS,
        nn.Conv2d: compute_conv2d_gradients,
        nn.LayerNorm: compute_layer_norm_gradients,
    }


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
    check_unit_count(units.num_units)
    optimizer.reset_totals()
    num_records = min(_count_block_records(modules, units), optimizer.count_usual_units())
    for block in split_fixed_blocks(select_batch(units, members), num_records):
        optimizer.zero_grad(set_to_none=True)
        loss = sum_losses(modules, tasks, _require_input_gradients(block))
        assert loss is not None  # Every block has records of every task, if only added ones.
        loss.backward()  # type: ignore[no-untyped-call]
        _store_unit_gradients(modules, block)
        optimizer.clip_and_accumulate()
    optimizer.zero_grad(set_to_none=True)
    optimizer.add_noise()
    optimizer.original_optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def split_fixed_blocks(units: Units, num_records: int) -> Iterator[Units]:
    """Yields units in blocks of one fixed shape, so that the same kernels compute every record's gradient.

    A block holds whole units and exactly `num_records` records of each task: those that are missing are added with
    weight zero, and belong to one more unit, the block's last, which is not the site's. A unit with more than half as
    many records has a block of its own, of a multiple of that size.

    What this leaves to assume is that a kernel of a fixed shape gives a record the same bits wherever in the block it
    stands and whatever the other records hold (tests/client/solvers/test_exact_sums.py searches for a counterexample).

    Args:
        units: usable units.
        num_records: records of each task in a block.
    """
    counts_U = torch.stack(
        [torch.bincount(records.unit_R, minlength=units.num_units) for records in units.tasks.values()]
    ).amax(dim=0)
    block_U, local_U, sizes = _assign_blocks(counts_U, num_records)
    rows: dict[str, Sequence[Tensor]] = {}
    for name, records in units.tasks.items():
        block_R = block_U[records.unit_R]
        per_block = torch.bincount(block_R, minlength=len(sizes)).tolist()
        rows[name] = torch.split(torch.argsort(block_R, stable=True), per_block)
    for number, (num_units, size) in enumerate(sizes):
        block = {
            name: _add_records(records.taken(rows[name][number], local_U[records.unit_R]), num_units, size)
            for name, records in units.tasks.items()
        }
        yield Units(num_units + 1, block)


def _assign_blocks(counts_U: Tensor, num_records: int) -> tuple[Tensor, Tensor, list[tuple[int, int]]]:
    """Returns each unit's block and its number there, and for each block its numbers of units and of records."""
    device = counts_U.device
    small_U = (counts_U > 0) & (counts_U <= max(1, num_records // 2))
    large_U = counts_U > max(1, num_records // 2)
    own_U = counts_U * small_U
    # Units whose first record lies in the same stretch share a block; the last one may reach beyond the stretch.
    width = num_records + 1 - max(1, int(own_U.max())) if len(counts_U) else num_records
    _, block_S = torch.unique_consecutive(((own_U.cumsum(0) - own_U) // width)[small_U], return_inverse=True)
    num_small = int(block_S.max()) + 1 if len(block_S) else 0
    per_block = torch.bincount(block_S, minlength=num_small)
    block_U = torch.zeros_like(counts_U)
    local_U = torch.zeros_like(counts_U)
    block_U[small_U] = block_S
    local_U[small_U] = torch.arange(len(block_S), device=device) - (per_block.cumsum(0) - per_block)[block_S]
    num_large = int(large_U.sum())
    block_U[large_U] = num_small + torch.arange(num_large, device=device)
    sizes = [(number, num_records) for number in per_block.tolist()]
    return (
        block_U,
        local_U,
        sizes + [(1, -(-count // num_records) * num_records) for count in counts_U[large_U].tolist()],
    )


def _add_records(records: TaskRecords, unit: int, size: int) -> TaskRecords:
    """Returns the records with others of weight zero behind them, which belong to another unit, up to a size."""
    missing = size - len(records.unit_R)

    def extend(values: Tensor, value: float) -> Tensor:
        return torch.cat([values, values.new_full((missing, *values.shape[1:]), value)])

    return replace(
        records,
        features_RD=extend(records.features_RD, 0.0),
        labels=extend(records.labels, 0),
        mask_R=extend(records.mask_R, False),
        unit_R=extend(records.unit_R, unit),
        weight_R=extend(records.weight_R, 0.0),
    )


def _count_block_records(modules: Mapping[str, nn.Module], units: Units) -> int:
    """Returns the number of records in a block, from numbers of parameters and shapes of features alone."""
    trained = {name: [each for each in module.parameters() if each.requires_grad] for name, module in modules.items()}
    values = sum(parameter.numel() for own in trained.values() for parameter in own)
    for name, records in units.tasks.items():
        # Opacus lays out what a layer reads at each place of a record.
        read = max((parameter[0].numel() for parameter in trained[name]), default=1)
        values = max(values, math.prod(records.features_RD.shape[1:-1]) * read)
    return min(_BLOCK_RECORDS, max(1, _BLOCK_VALUES // max(1, values)))


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
    """Replaces Opacus' per-record gradients by per-unit ones."""
    for name, module in modules.items():
        unit_R = get_unit_indices(name, batch)
        for parameter in module.parameters():
            if parameter.requires_grad:
                gradient_R = parameter.grad_sample  # type: ignore[attr-defined]  # Opacus keeps it there.
                if not isinstance(gradient_R, Tensor):  # A list, when gradients of an earlier step were kept.
                    raise ValueError("expected the record gradients of one backward pass, got those of several")
                sums_U = gradient_R.new_zeros((batch.num_units, *parameter.shape))
                parameter.grad_sample = sums_U.index_add_(0, unit_R, gradient_R)  # type: ignore[attr-defined]
