"""The stack of layers of a transformers model, and what the model hands to each layer beside the positions.

A model is watched while it encodes a probe: masks of its own (causal, sliding windows), rotary tables, biases by
distance. Whatever does not depend on the record is kept and handed to the layers again, cut to the number of positions
there are; a mask of padding is joined with the model's own. A model that hands on something else that does depend on
the record cannot be divided.

# Shapes: B examples, T positions, D features, L inputs of a text.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, final

import torch
from torch import Tensor, nn
from transformers.models.parakeet.modeling_parakeet import ParakeetEncoderBlock

from common.backbones.parts.hub.modalities import Modality, TextInput
from common.backbones.parts.hub.recordings import AudioInput
from common.types import BadInput

_SHORT = 5
"""Tokens of shorter texts."""


@dataclass(frozen=True)
class LayerCall:
    """The arguments of one layer beside the positions.

    Attributes:
        values: argument -> plain value, tensor, or tuple of tensors, each of one record (first axis 1) at the probe's
            length.
        axes: argument -> for each of its tensors, the axes along which positions lie.
        batched: arguments whose tensors the model hands on once for each record, though they are the same.
        positions: number of positions of the probe.
    """

    values: Mapping[str, Any] = field(default_factory=dict)
    axes: Mapping[str, tuple[tuple[int, ...], ...]] = field(default_factory=dict)
    batched: frozenset[str] = frozenset()
    positions: int = 0


@dataclass(frozen=True)
class Watched:
    """A model's stack as it runs.

    Attributes:
        calls: of each layer, in order.
        norm: name of the norm that the model applies to the last layer's output; None where there is none.
    """

    calls: tuple[LayerCall, ...]
    norm: str | None


def find_layers(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Returns the name and the layers of a model's largest stack. Raises BadInput where it has none."""
    stacks = [
        (sum(parameter.numel() for parameter in part.parameters()), name, part)
        for name, part in model.named_modules()
        if type(part) is nn.ModuleList and len({type(layer) for layer in part}) == 1
    ]
    if not stacks:
        raise BadInput("from: expected a backbone made of layers of one kind")
    _, name, layers = max(stacks, key=lambda stack: stack[0])
    return name, layers


def make_probe(modality: Modality) -> Tensor:
    """Returns two inputs; where inputs have lengths, the first is a longest one, and the second shorter."""
    with torch.device("cpu"):
        probe_B = modality.noise(2)
        if isinstance(modality, TextInput):
            probe_B = nn.functional.pad(probe_B, (0, modality.max_length - probe_B.shape[2]))
            probe_B[0, 0], probe_B[0, 1] = torch.randint(modality.vocab_size, (modality.max_length,)), 1
            probe_B[1, :, max(1, _count_short(modality) - 1) :] = 0
        elif isinstance(modality, AudioInput) and not modality.fixed:
            probe_B[1, :, _count_short(modality) :] = 0
    return probe_B


def _count_short(modality: TextInput | AudioInput) -> int:
    """Returns the number of steps of shorter inputs: what has another shape there has an axis of positions."""
    if isinstance(modality, TextInput):
        return min(_SHORT, modality.max_length - 1)
    return max(1, 3 * modality.num_steps // 5)


def watch(model: nn.Module, modality: Modality, stack: str, *, alone: bool) -> Watched:
    """Returns what a model hands to the layers of its stack.

    Args:
        model: the model, in eval mode; it stays as it is.
        modality: how it reads a batch.
        stack: name of the layers.
        alone: whether a record is always encoded without padding.

    Raises:
        BadInput: something beside masks depends on the record.
    """
    device = next(model.parameters()).device
    probe_B = make_probe(modality).to(device)
    runs = [_run_watched(model, modality, stack, _repeat(probe_B[:1]) if alone else probe_B)]
    if isinstance(modality, TextInput):
        runs.append(_run_watched(model, modality, stack, probe_B[:, :, : _count_short(modality)]))
    elif isinstance(modality, AudioInput) and alone:
        short = _count_short(modality) + modality.silence
        runs.append(_run_watched(model, modality, stack, _repeat(probe_B[1:, :, :short])))
    seen, norm, positions = runs[0]
    others = runs[-1][0]
    calls = (_read_call(*pair, len(probe_B), positions) for pair in zip(seen, others, strict=True))
    return Watched(tuple(calls), norm)


def _repeat(probe_1: Tensor) -> Tensor:
    """Returns an input twice: what a model makes for each record has a first axis of two."""
    return probe_1.expand(2, *probe_1.shape[1:])


def _run_watched(
    model: nn.Module, modality: Modality, stack: str, probe_B: Tensor
) -> tuple[list[dict[str, Any]], str | None, int]:
    """Returns the arguments of each layer's call beside its input, the norm behind the last, number of positions."""
    layers = list(model.get_submodule(stack).children())
    seen: list[dict[str, Any]] = []
    shapes: list[torch.Size] = []
    after: list[tuple[str, torch.Size]] = []

    def note_call(layer: nn.Module, args: Any, kwargs: Any) -> None:
        after.clear()
        bound = inspect.signature(layer.forward).bind(*args, **kwargs).arguments
        bound |= bound.pop("kwargs", {})
        first = next(iter(bound))
        shapes.append(bound[first].shape)
        seen.append({name: value for name, value in bound.items() if name != first})

    def note_norm(name: str, args: Any) -> None:
        if args and isinstance(args[0], Tensor):
            after.append((name, args[0].shape))

    final_shape: list[torch.Size] = []
    with ExitStack() as hooks, torch.no_grad():
        for layer in layers:
            hooks.enter_context(_hooked(layer.register_forward_pre_hook(note_call, with_kwargs=True)))
        last = layers[-1].register_forward_hook(lambda _, __, output: final_shape.append(_first(output).shape))
        hooks.enter_context(_hooked(last))
        for name, part in model.named_modules():
            if "norm" in type(part).__name__.lower() and not name.startswith(f"{stack}."):
                hook = part.register_forward_pre_hook(lambda _, args, name=name: note_norm(name, args))
                hooks.enter_context(_hooked(hook))
        modality.run(model, probe_B)
    if len(seen) != len(layers):
        raise BadInput("from: expected a backbone whose layers run once each, one after the other")
    norms = [name for name, shape in after if shape == final_shape[-1]]
    return seen, norms[0] if norms else None, shapes[0][1]


class _hooked:  # A context manager.
    def __init__(self, hook: torch.utils.hooks.RemovableHandle) -> None:
        self.hook = hook

    def __enter__(self) -> None:
        return

    def __exit__(self, *_: object) -> None:
        self.hook.remove()


def _first(output: Any) -> Tensor:
    value: Tensor = output[0] if isinstance(output, tuple) else output
    return value


def _read_call(seen: Mapping[str, Any], other: Mapping[str, Any], records: int, positions: int) -> LayerCall:
    values: dict[str, Any] = {}
    axes: dict[str, tuple[tuple[int, ...], ...]] = {}
    batched: set[str] = set()
    for name, value in seen.items():
        tensors = value if isinstance(value, tuple) and value and isinstance(value[0], Tensor) else (value,)
        if isinstance(tensors[0], Tensor):
            short = other[name] if isinstance(value, tuple) else (other[name],)
            values[name] = tuple(_read_constant(name, tensor, records) for tensor in tensors)
            values[name] = values[name] if isinstance(value, tuple) else values[name][0]
            if all(len(tensor) == records for tensor in tensors):
                batched.add(name)
            axes[name] = tuple(
                tuple(axis for axis, size in enumerate(tensor.shape) if size != less.shape[axis])
                for tensor, less in zip(tensors, short, strict=True)
                if isinstance(less, Tensor)
            )
        elif value is None or isinstance(value, bool | int | float | str | tuple):
            values[name] = value
        # Others, such as caches of a decoder, serve nothing here.
    return LayerCall(values, axes, frozenset(batched), positions)


def _read_constant(name: str, tensor: Tensor, records: int) -> Tensor:
    """Returns a tensor's part of the first record, which has no padding. Raises BadInput where records differ."""
    one = (tensor[:1] if len(tensor) == records else tensor).detach().clone()
    shared = tensor.device.type == "meta" or torch.equal(tensor, one.expand_as(tensor))
    if not shared and not is_mask(name):
        raise BadInput(f"from: expected a backbone whose layers read positions and masks alone, got {name!r} beside")
    return one


def is_mask(name: str) -> bool:
    """Returns whether a layer's argument says which positions count: a mask, or a bias with a mask in it."""
    return "mask" in name or name == "position_bias"


@final
class Handed(nn.Module):
    """The arguments that a model hands to each of some of its layers; no parameters, and nothing that is saved."""

    def __init__(self, layers: nn.ModuleList, calls: Sequence[LayerCall], *, adds_mask: bool) -> None:
        """Stores it.

        Args:
            layers: the layers.
            calls: of each.
            adds_mask: whether layers that are handed no mask take one of padding.
        """
        super().__init__()
        self._adds_mask = adds_mask
        self.padding = Padding()
        for part in layers.modules() if adds_mask else ():
            if type(part) is nn.Conv1d and part.kernel_size[0] > 1:
                part.register_forward_pre_hook(self.padding.hide)
        self._squares_mask = isinstance(layers[0], ParakeetEncoderBlock)
        self._calls: list[dict[str, Any]] = []
        self._axes = [call.axes for call in calls]
        self._longest = [call.positions for call in calls]
        self._batched = [call.batched for call in calls]
        numbers: dict[int, str] = {}
        for layer, call in zip(layers, calls, strict=True):
            own: dict[str, Any] = {}
            for name, value in call.values.items():
                own[name] = value
                if isinstance(value, Tensor):
                    own[name] = self._keep(value, numbers)
                elif isinstance(value, tuple) and value and isinstance(value[0], Tensor):
                    own[name] = tuple(self._keep(each, numbers) for each in value)
            if adds_mask and "attention_mask" in inspect.signature(layer.forward).parameters:
                own.setdefault("attention_mask", None)
            self._calls.append(own)

    def list_arguments(self, number: int, hidden: Tensor, mask_BT: Tensor | None) -> dict[str, Any]:
        """Returns the arguments of one layer beside its input.

        Args:
            number: of the layer.
            hidden: the layer's input.
            mask_BT: 1 where a position counts; None where all do.
        """
        arguments: dict[str, Any] = {}
        for name, value in self._calls[number].items():
            axes = self._axes[number].get(name, ())
            if isinstance(value, _Kept):
                arguments[name] = self._cut(value, axes[0] if axes else (), number, hidden.shape[1])
            elif isinstance(value, tuple) and value and isinstance(value[0], _Kept):
                pairs = zip(value, axes, strict=True)
                arguments[name] = tuple(self._cut(each, own, number, hidden.shape[1]) for each, own in pairs)
            else:
                arguments[name] = value
            if name in self._batched[number]:
                # Its length would be a constant of an exported graph.
                arguments[name] = _expand(arguments[name], hidden.shape[0])
            if mask_BT is not None and is_mask(name):
                arguments[name] = self._join(arguments[name], mask_BT, hidden)
        return arguments

    def _keep(self, value: Tensor, numbers: dict[int, str]) -> _Kept:
        # Layers share most of them. Outside of what is saved: they follow from the backbone's own weights.
        for other, name in numbers.items():
            kept = self._buffers[name]
            if other == id(value) or (kept is not None and _are_same(kept, value)):
                return _Kept(name)
        name = f"constant_{len(numbers)}"
        self.register_buffer(name, value, persistent=False)
        numbers[id(value)] = name
        return _Kept(name)

    def _cut(self, kept: _Kept, axes: tuple[int, ...], number: int, positions: int) -> Tensor:
        value, longest = self.get_buffer(kept.name), self._longest[number]
        for axis in axes:
            if value.shape[axis] == 2 * longest - 1:
                # A row for each distance between two positions, the distance 0 in the middle.
                value = value.narrow(axis, longest - positions, 2 * positions - 1)
            else:
                value = value.narrow(axis, 0, positions)
        return value

    def _join(self, own: Tensor | None, mask_BT: Tensor, hidden: Tensor) -> Tensor | None:
        """Returns a model's own mask joined with that of padding, in its own form."""
        if own is None and self._squares_mask:
            # Its convolution sees what no position may read.
            own_BT = mask_BT.bool()
            return (own_BT[:, :, None] & own_BT[:, None, :])[:, None]
        if own is None:
            return _create_additive_mask(mask_BT).to(hidden.dtype) if self._adds_mask else None
        if own.ndim == 2:
            return mask_BT.to(own.dtype)
        if own.dtype == torch.bool:
            return own & mask_BT.bool()[:, None, None, :]
        return own + _create_additive_mask(mask_BT).to(own.dtype)


class Padding:
    """Hides padding from convolutions over positions, which would carry what stands there to a record's own ones.

    No module, and no tensor of one: while a graph is exported a module may be given none.

    Attributes:
        read_BT: 1 where a position counts of the records that `UpperLayers` reads now; None where all do, and where the
            layers run in the whole model.
    """

    read_BT: Tensor | None = None

    def hide(self, conv: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Returns a convolution's input, [B, channels, T], with zeros in padding, as where a record is alone.

        Args:
            conv: the convolution.
            args: its input.
        """
        del conv
        (states_BCT,) = args
        if self.read_BT is None or states_BCT.shape[2] != self.read_BT.shape[1]:
            return args
        return (states_BCT * self.read_BT[:, None].to(states_BCT.dtype),)


@dataclass(frozen=True)
class _Kept:
    name: str


def _expand(value: Any, records: int) -> Any:
    """Returns a tensor, or several, of one record as those of some records."""
    if isinstance(value, tuple):
        return tuple(each.expand(records, *each.shape[1:]) for each in value)
    return value.expand(records, *value.shape[1:])


def _are_same(one: Tensor, other: Tensor) -> bool:
    if one.shape != other.shape or one.dtype != other.dtype or one.device != other.device:
        return False
    return one.device.type != "meta" and torch.equal(one, other)


def _create_additive_mask(mask_BT: Tensor) -> Tensor:
    """Returns 0 where a position counts and the least number where not, for each head and query."""
    return ((1.0 - mask_BT) * torch.finfo(mask_BT.dtype).min)[:, None, None, :]


class Reached(Exception):  # No error: a layer was reached.
    """The input of the layer at which a model stops."""

    def __init__(self, hidden: Tensor) -> None:
        super().__init__()
        self.hidden = hidden


class Stop:
    """A hook in front of a layer, which ends the model's run there.

    While a graph is exported the run goes on, for nothing: what exports keeps a list of the modules that it is in, and
    an exception would leave some of them there.

    Attributes:
        hidden: the layer's input in a run that went on; None before one.
    """

    hidden: Tensor | None = None

    def __call__(self, layer: nn.Module, args: Any, kwargs: Any) -> None:
        """Raises Reached, or keeps the layer's input.

        Args:
            layer: the layer.
            args: its arguments.
            kwargs: those with names.
        """
        del layer
        hidden = args[0] if args else next(iter(kwargs.values()))
        if not torch.compiler.is_exporting():
            raise Reached(hidden)
        self.hidden = hidden


def stop_before(model: nn.Module, stack: str, first: int) -> Stop:
    """Makes a model stop in place of running one of its layers; later ones are removed. Returns what stops it.

    Args:
        model: the model; it is changed.
        stack: name of its layers.
        first: number of the layer.
    """
    layers = model.get_submodule(stack)
    assert isinstance(layers, nn.ModuleList)  # `find_layers` says so.
    # The layer stays: models look at attributes of their layers before they call them.
    stop = Stop()
    layers[first].register_forward_pre_hook(stop, with_kwargs=True)
    model.set_submodule(stack, layers[: first + 1])
    return stop
