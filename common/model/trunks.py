"""Trunks: the parts of backbones that train, as further entries of a run's heads.

A trunk is one more module beside the heads of the tasks that stand on its backbone: it is sent, clipped, noised,
aggregated and kept as they are, under a name that no task can have (`RunConfig.trunk_of`). Only what trains of it
travels; the rest a site knows from the backbone.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from common.backbones import Divided, Divisible, Kind
from common.backbones.parts.boundary import INPUT, Trunk, list_trainable
from common.backbones.parts.projection import ProjectionLayer
from common.errors import nearest
from common.model.backbones import Backbone, FrozenBackbone
from common.model.parameters import compute_seed, create_heads
from common.model.text_start import start_from_texts
from common.run import Name, RunConfig, Trainable
from common.tasks import PlacesLabels, Task, ThinsPlaces, WritesTexts, open_on_backbones, pools_items, reads_places
from common.types import BadInput


@dataclasses.dataclass(frozen=True)
class Cut:
    """A backbone at a boundary.

    Attributes:
        below: the frozen part as a backbone of its own: its features are the outputs at the boundary, flattened.
        trunk: from those to the backbone's features; it computes what the backbone does until it is trained.
    """

    below: Backbone
    trunk: Trunk


def cut(backbone: Backbone, trainable: Trainable, group: str, key: str, seed: int) -> Cut:
    """A backbone divided where something begins to train; the backbone stays as it is.

    Args:
        backbone: whole.
        trainable: from which block on, and whether through adapters.
        group: name of the trunk's parameter group.
        key: of the setting, for messages.
        seed: of new adapters.

    Raises:
        BadInput: the kind or this network cannot be divided there; names the blocks.
    """
    whole = backbone.module
    divided, trunk = _divided(
        backbone.kind, copy.deepcopy(whole.encoder), whole.scale, copy.deepcopy(whole.projection), trainable, key, seed
    )
    num_values = math.prod(divided.shape)
    flat = nn.Sequential(divided.below, nn.Flatten())
    below = dataclasses.replace(
        backbone,
        # Adapters change nothing below: they share the cached features.
        digest=hashlib.sha256(f"{backbone.digest} {trainable.from_}".encode()).hexdigest(),
        feature_dim=num_values,
        module=FrozenBackbone(flat, ProjectionLayer(None, num_values)),
        trunk=group,
    )
    return Cut(below, trunk)


def freeze_parts(run: RunConfig, backbones: Mapping[Name, Backbone]) -> dict[Name, Backbone]:
    """Returns the backbones a site encodes with: whole, or up to where something trains. Raises BadInput."""
    cuts = _cuts(run, backbones)
    return {name: cuts[name].below if name in cuts else backbone for name, backbone in backbones.items()}


def trunks(run: RunConfig, backbones: Mapping[Name, Backbone]) -> dict[str, nn.Module]:
    """Returns the trunks of these backbones, untrained, by parameter group. Raises BadInput."""
    return {f"{name}.trunk": own.trunk for name, own in _cuts(run, backbones).items()}


def create_modules(
    run: RunConfig, tasks: Mapping[str, Task], backbones: Mapping[Name, Backbone]
) -> dict[str, nn.Module]:
    """Returns every parameter group of some of a run's tasks before its first round.

    Args:
        run: the run.
        tasks: task -> its definition.
        backbones: name -> open backbone, for those that the tasks stand on.

    Raises:
        BadInput: a task labels places, and its backbone has one vector for a record, places without marks, or other
            places than the task trains on; of a head with `pooling` and a backbone of bags there is one alone.
    """
    own = {name: run.backbone_of(name) for name in tasks}
    tasks = open_on_backbones(tasks, {name: backbones[own[name]].language for name in tasks})
    for name, task in tasks.items():
        if pools_items(task) != (backbones[own[name]].bag is not None):
            raise BadInput(
                f"tasks.{name}.head.pooling: expected none but on a backbone of kind bag, got one"
                if pools_items(task)
                else f"tasks.{name}.head: expected `pooling`, such as attention, on a backbone of kind bag (a "
                "classification, multilabel, regression or survival), got none"
            )
        if isinstance(task, PlacesLabels) and not backbones[own[name]].num_marks:
            raise BadInput(
                f"tasks.{name}: expected a backbone with `pooling: frames` for a task of kind {task.kind}, got one "
                "whose places have no marks"
            )
        if reads_places(task) and not backbones[own[name]].grid:
            raise BadInput(
                f"tasks.{name}: expected a backbone with `maps` for a task of kind {task.kind}, got one whose features "
                "are those of a whole record"
            )
        _check_thinning(name, task, backbones[own[name]])
    dims = {name: backbones[own[name]].feature_dim for name in tasks}
    heads = create_heads(tasks, dims, run.seed)
    start_from_texts(heads, tasks, {name: backbones[own[name]] for name in tasks})
    _start_writing(heads, tasks)
    return {**heads, **trunks(run, {name: backbones[name] for name in own.values()})}


def _start_writing(heads: Mapping[str, nn.Module], tasks: Mapping[str, Task]) -> None:
    """Sets the weights of heads of tasks that write texts, in place: they begin as their backbones would write.

    Raises:
        BadInput: a head cannot.
    """
    for name, task in tasks.items():
        if isinstance(task, WritesTexts):
            try:
                task.start_head(heads[name])
            except BadInput as error:
                raise BadInput(f"tasks.{name}.{error}") from error


def _check_thinning(name: str, task: Task, backbone: Backbone) -> None:
    """Raises BadInput where a task trains on some places, and its labels have other places than its backbone."""
    labels = tuple(task.codec.missing().shape)
    if isinstance(task, ThinsPlaces) and task.every > 1 and labels != backbone.grid:
        raise BadInput(
            f"tasks.{name}.every: expected 1 where labels of {' x '.join(map(str, labels))} places stand on a backbone "
            f"of {' x '.join(map(str, backbone.grid))}, got {task.every}"
        )


def stand_in(num_rows: int, num_added: int) -> Trunk:
    """A small trunk in place of a real one: its features are its inputs, and after them what one trained layer adds.

    Args:
        num_rows: values of one input.
        num_added: outputs of the layer.
    """
    above = _Beside(num_rows, num_added)
    features = ProjectionLayer(None, num_rows + num_added)
    return Trunk(Divided(nn.Identity(), above, (num_rows,)), torch.ones(()), features).open(list_trainable(above))


def make_empty_trunk(kind: Kind, network: nn.Module, feature_dim: int, trainable: Trainable, key: str) -> Trunk:
    """Returns a trunk from settings alone, perhaps without memory (device meta).

    Args:
        kind: kind of the backbone.
        network: its network, with any weights.
        feature_dim: number of features before any projection.
        trainable: from which block on it trains.
        key: key of the setting, for messages.

    Raises:
        BadInput: the network cannot be divided there.
    """
    projection = ProjectionLayer(kind.projection, feature_dim)
    return _divided(kind, network, torch.ones(()), projection, trainable, key, seed=0)[1]


# --- parts -----------------------------------------------------------------------------------------------------------


class _Beside(nn.Module):
    """Inputs with a linear layer's outputs beside them."""

    def __init__(self, num_rows: int, num_added: int) -> None:
        super().__init__()
        self.layer = nn.Linear(num_rows, num_added)

    def forward(self, rows_BF: Tensor) -> Tensor:
        return torch.cat([rows_BF, self.layer(rows_BF)], dim=1)


def _cuts(run: RunConfig, backbones: Mapping[Name, Backbone]) -> dict[Name, Cut]:
    return {
        name: cut(backbones[name], trainable, f"{name}.trunk", f"trainable.{name}", run.seed)
        for name, trainable in run.trainable.items()
        if name in backbones
    }


def _divided(
    kind: Kind,
    network: nn.Module,
    scale: Tensor,
    projection: ProjectionLayer,
    trainable: Trainable,
    key: str,
    seed: int,
) -> tuple[Divided, Trunk]:
    try:
        # Some kinds draw a probe at random, and adapters are drawn.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(compute_seed(key, seed))
            divided = _divide(kind, network, trainable.from_)
            trunk = Trunk(divided, scale, projection)
            lora = trainable.lora
            opened = (
                list_trainable(trunk.above)
                if lora is None
                else _add_adapters(trunk.above, lora.rank, lora.alpha, lora.targets)
            )
    except BadInput as error:
        raise BadInput(f"{key}.{error}") from error
    return divided, trunk.open(opened)


def _add_adapters(module: nn.Module, rank: int, alpha: int, targets: Sequence[str]) -> list[nn.Parameter]:
    """Puts low-rank adapters beside linear layers, in place, and returns their parameters.

    Hu et al. (2021), arXiv 2106.09685: y = W x + (alpha / rank) B A x, of which A and B train.

    B is zero, so that the module computes what it did; A is drawn from torch's current generator.

    Args:
        module: the module, such as the upper layers of a transformer.
        rank: of B A.
        alpha: see above.
        targets: last parts of the layers' names, such as `query`.

    Raises:
        BadInput: a target is no linear layer; names those there are.
    """
    names = [name for name, part in module.named_modules() if type(part) is nn.Linear]
    linear = {name.rpartition(".")[2] for name in names}
    wrong = sorted(set(targets) - linear)
    if wrong and not linear:
        raise BadInput(
            "lora: expected a part with linear layers, as backbones of kind transformers have; got one without any: "
            "leave lora out and its own weights train"
        )
    if wrong:
        raise BadInput(f"lora.targets: expected some of {', '.join(sorted(linear))}, got {', '.join(wrong)}")
    try:
        # Here: it takes seconds to import, and few runs use it.
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise BadInput("lora: expected the package peft; pip install 'headwater[lora]'") from error

    # Whole names: something else may be called as a layer is, and peft would refuse it.
    meant = [name for name in names if name.rpartition(".")[2] in targets]
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=meant, lora_dropout=0.0, bias="none")
    inject_adapter_in_model(config, module)
    return [parameter for name, parameter in module.named_parameters() if ".lora_" in name]


def _divide(kind: object, network: nn.Module, block: str) -> Divided:
    if not isinstance(kind, Divisible):
        raise BadInput("from: expected a kind of backbone that can be divided, got one that is frozen as a whole")
    network.train(False)
    blocks = kind.blocks(network)
    if block == INPUT:
        block = blocks[0]
    if block not in blocks:
        raise BadInput(
            f"from: expected input or one of {', '.join(blocks)}, got {block!r}{nearest(block, [INPUT, *blocks])}"
        )
    try:
        return kind.divide(network, block)
    except (RuntimeError, TypeError, ValueError, LookupError, AttributeError) as error:
        # A network whose forward pass is no chain there: torch refuses its parts.
        raise BadInput(
            f"from: expected a block at which this backbone can be divided, got {block!r}, where it cannot"
        ) from error
