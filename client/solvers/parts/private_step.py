"""One private step with Opacus: everything of a step that touches per-record gradients, clipping or noise.

# Shapes: R records, U units of a batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

import torch
from opacus.optimizers import DPOptimizer
from opacus.optimizers.optimizer import _check_processed_flag, _mark_as_processed
from opacus.validators import ModuleValidator
from torch import Tensor, nn

from client.data.units import Units
from client.solvers.parts.grouped import RecordGradients
from client.solvers.parts.objective import batch_of, loss_sum, unit_of
from common.privacy.clipping import neutralised, sum_by_unit
from common.privacy.noise import NoiseStream, released
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
        """Put (clipped sum + noise) into each parameter's gradient. One draw of the stream is one release."""
        sizes = [parameter.numel() for parameter in self.params]
        totals = [parameter.summed_grad for parameter in self.params]
        for total in totals:
            _check_processed_flag(total)
        deviation = self.noise_multiplier * self.max_grad_norm
        normals = self._stream.gaussian((sum(sizes),))
        noisy = released(torch.cat([total.flatten() for total in totals]), deviation, normals)
        for parameter, part, total in zip(self.params, torch.split(noisy, sizes), totals, strict=True):
            parameter.grad = part.to(parameter.dtype).view_as(parameter)
            _mark_as_processed(total)

    def scale_grad(self) -> None:
        """Divide by the declared batch size: after the noise, so it costs nothing."""
        for parameter, divisor in zip(self.params, self._divisors, strict=True):
            parameter.grad /= divisor


def check_separable(heads: Mapping[str, nn.Module]) -> None:
    """Refuse heads that mix the examples of a batch, so that no per-record gradient exists. Raises BadInput."""
    for name, head in heads.items():
        # The second as `with_record_gradients` would find it, but before anything is charged.
        errors = ModuleValidator.validate(head, strict=False) or RecordGradients.validate(head, strict=False)
        if errors:
            what = f"trainable: {name}" if "." in name else f"tasks.{name}: the head"
            raise BadInput(f"{what} cannot be trained privately: {errors[0]}")


def with_record_gradients(heads: Mapping[str, nn.Module]) -> nn.Module:
    """The heads in one module whose backward pass keeps each record's gradients.

    Raises:
        BadInput: a head mixes the examples of a batch.
    """
    check_separable(heads)
    # A list, not a dict: a task may be called "keys" or "train".
    module: nn.Module = RecordGradients(nn.ModuleList(heads.values()), loss_reduction="sum")
    return module


def release_step(
    optimizer: StreamOptimizer, heads: Mapping[str, nn.Module], tasks: Mapping[str, Task], units: Units, members: Tensor
) -> None:
    """Clip and sum the gradients of some units, noise once, move the weights.

    Args:
        optimizer: over all trainable parameters of the heads, in their order.
        heads: as given to `with_record_gradients`.
        tasks: task -> its definition.
        units: usable units.
        members: the step's sample; an empty one is released too.
    """
    for batch, last in _parts(units, members, heads):
        optimizer.zero_grad(set_to_none=True)
        loss = loss_sum(heads, tasks, _with_input_gradients(batch))
        if loss is not None:
            loss.backward()  # type: ignore[no-untyped-call]
        _keep_unit_gradients(heads, batch)
        optimizer.signal_skip_step(do_skip=not last)
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def _parts(units: Units, members: Tensor, heads: Mapping[str, nn.Module]) -> Iterator[tuple[Units, bool]]:
    """The sample in parts that fit into memory, each with whether it is the last; an empty sample is one part."""
    values = 1
    for name, head in heads.items():
        own = sum(parameter.numel() for parameter in head.parameters() if parameter.requires_grad)
        unit_R = unit_of(name, units)
        values += own * max(1, int(torch.bincount(unit_R).max()) if len(unit_R) else 1)
    parts = torch.split(members, max(1, _CHUNK_VALUES // values))
    for number, part in enumerate(parts, start=1):
        yield batch_of(units, part), number == len(parts)


def _with_input_gradients(batch: Units) -> Units:
    """The same batch with features that ask for a gradient.

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


def _keep_unit_gradients(heads: Mapping[str, nn.Module], batch: Units) -> None:
    """Replace Opacus' per-record gradients by finite per-unit ones; zero for heads without a record in the batch."""
    trainable, gradients_U = [], []
    for name, head in heads.items():
        unit_R = unit_of(name, batch)
        for parameter in head.parameters():
            if parameter.requires_grad:
                trainable.append(parameter)
                gradients_U.append(_gradient_by_unit(parameter, unit_R, batch.num_units))
    for parameter, gradient_U in zip(trainable, neutralised(gradients_U), strict=True):
        parameter.grad_sample = gradient_U  # type: ignore[attr-defined]  # Opacus keeps it there.


def _gradient_by_unit(parameter: nn.Parameter, unit_R: Tensor, num_units: int) -> Tensor:
    if not len(unit_R):
        return parameter.new_zeros((num_units, *parameter.shape))
    gradient_R = parameter.grad_sample  # type: ignore[attr-defined]
    if not isinstance(gradient_R, Tensor):  # Opacus makes a list when gradients of an earlier step were kept.
        raise ValueError("expected the record gradients of one backward pass, got those of several")
    return sum_by_unit(gradient_R, unit_R, num_units)
