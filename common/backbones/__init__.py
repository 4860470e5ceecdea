"""Backbone kinds: the frozen pre-trained networks that heads stand on. One file in this folder is one kind.

A kind's module loads no torch until one of its methods needs it, so that commands that only read settings start fast.
`common.model.backbones` opens what is described here.

A kind writes `kind`, `projection`, `example`, `architecture` and `preprocess` (see `Kind`). Where it has weights it
also writes the members of `WeightedKind`; where it can be divided, those of `Divisible`. The functions below give the
rest.

# Shapes: B examples, D features, K classes of the pre-training.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Protocol, runtime_checkable

from pydantic import Field, SerializerFunctionWrapHandler, field_validator, model_serializer, model_validator

from common.inputs import MAX_ITEMS, Several, spread
from common.plugins import Frozen, LocalPath, Spec
from common.types import BadInput, BadRecord

if TYPE_CHECKING:
    from torch import Tensor, nn

    from common.inputs import Audio

Precision = Literal["float32", "bfloat16"]
CacheBits = Literal[8, 16]
"""Bits of a cached feature that heads read."""
"""Number format inside a backbone; its features are float32 in any case."""

SPEECH, QUIET = 0.3, 0.285
"""Marks of a recording's own places, behind their features (`Architecture.num_marks`); 0 where it has ended. They are
nearly the same, so that a head has a bias by them, and learns nothing of words from how loud they are: with marks that
differ more, word error rates of spoken digits nearly doubled."""


class Kernel(Frozen):
    """Random Fourier features (Rahimi and Recht 2007): a linear head on them is one on a Gaussian kernel.

    The head stays linear, convex and cheap under privacy, and yet follows curved borders; on normalised features each
    record's gradient stays bounded. Frequencies and phases are the same in every federation.

    Attributes:
        width: w of exp(-|x - y|^2 / 2 w^2), in the units of the features, after `normalize`.
        dim: number of random features R; they approximate the kernel to about 1 / sqrt(R).
    """

    width: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    dim: Annotated[int, Field(ge=1, le=65536)]


class PublicShift(Frozen):
    """A declared public mean of the raw features, which is subtracted from them.

    Attributes:
        public: a file that `headwater simulate public-mean` made of public records for this very backbone; null in
            settings that travel, because the mean is then among the weights.
    """

    public: LocalPath | None


class Projection(Frozen):
    """Settings of the last steps of a backbone, in their order: shift, project, normalise, kernel.

    Attributes:
        dim: number of top right singular vectors of the pre-training classifier's weights (minus their class mean) to
            project on; null keeps all features.
        shift: `batch_norm` subtracts the mean that the last BatchNorm's parameters predict after its ReLU;
            `{public: FILE}` subtracts the declared mean of public records' features.
        normalize: whether features are divided by their L2 norm.
        kernel: random Fourier features of the result; null for none.
    """

    dim: Annotated[int, Field(ge=1)] | None = None
    shift: Literal["none", "batch_norm"] | PublicShift = "none"
    normalize: bool
    kernel: Kernel | None = None


class Contrast(Frozen):
    """Settings of how far each place stands out of its own picture (`common.backbones.parts.contrast`).

    Attributes:
        sides: sides, in places, of the squares around each place out of which it may stand, odd numbers.
        levels: number of features over which each value is spread; a linear head is a curve with so many corners.
    """

    sides: Annotated[list[Annotated[int, Field(ge=3, le=255)]], Field(min_length=1, max_length=8)] = [7, 27]
    levels: Annotated[int, Field(ge=2, le=64)] = 6

    @field_validator("sides")
    @classmethod
    def _check_sides(cls, sides: list[int]) -> list[int]:
        if len(set(sides)) != len(sides) or any(side % 2 == 0 for side in sides):
            raise ValueError(f"expected different odd numbers of places, got {sides}")
        return sides


class Maps(Frozen):
    """Settings of feature maps.

    Attributes:
        layers: names of the layers whose outputs are read, such as `features.6` or `layer2`.
        grid: number of places along each side.
        colours: whether the picture's own colours stand beside the layers, as deviations from their mean over it.
        context: side, in places, of the square around each whose mean stands beside it; 1 for none.
        contrast: whether, and how, what stands out of the picture itself is read beside the layers; null for none.
        relative: whether the mean over a picture's own places is subtracted from each feature: what all of its places
            have in common tells nothing of where something is, and takes a part of each clipped gradient.
        directions: number of random directions, the same in every federation, onto which the features of a place are
            projected at last; null for all features.
    """

    layers: Annotated[list[str], Field(min_length=1)]
    grid: Annotated[int, Field(ge=1, le=256)]
    colours: bool = False
    context: Annotated[int, Field(ge=1, le=63)] = 1
    contrast: Contrast | None = None
    relative: bool = False
    directions: Annotated[int, Field(ge=1, le=65536)] | None = None

    @model_serializer(mode="wrap")
    def _serialize_as_written(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        values: dict[str, Any] = handler(self)
        # Older digests cover settings without them.
        unset = {"contrast": None, "relative": False, "directions": None}
        return {key: value for key, value in values.items() if key not in unset or value != unset[key]}

    @model_validator(mode="after")
    def _check(self) -> Maps:
        if len(set(self.layers)) != len(self.layers):
            raise ValueError("layers: expected each layer once")
        if self.context % 2 == 0:
            raise ValueError(f"context: expected an odd number of places, got {self.context}")
        return self


@dataclass(frozen=True)
class RawTensor:
    """One input of a network that is handed on.

    Attributes:
        name: such as `pixels` or `input_ids`.
        dtype: number format, as torch and numpy name it.
        shape: lengths of one record's axes; the name of an axis stands where it may have any length.
        meaning: one sentence about its numbers, for whoever fills it.
        longest: the greatest length of a named axis; None for no bound.
    """

    name: str
    dtype: Literal["uint8", "int64", "float32", "float64"]
    shape: tuple[int | str, ...]
    meaning: str
    longest: int | None = None


@dataclass(frozen=True)
class RawInputs:
    """The beginning of a network that is handed on: tensors as others have them -> inputs as `preprocess` makes them.

    Law (tests/contracts/test_backbones.py): `module` of stacked tensors of `prepare` gives what `preprocess` gives.

    Attributes:
        tensors: the network's inputs.
        module: one batch for each of them -> batch of preprocessed items.
        before: the steps from a source item to the tensors, in order: the name of each as `step`, and its numbers.
        prepare: source item -> one tensor for each input; raises BadRecord.
        files: name -> content of files that these steps need, such as a tokenizer.
    """

    tensors: tuple[RawTensor, ...]
    module: nn.Module
    before: Sequence[Mapping[str, Any]]
    prepare: Callable[[Any], tuple[Tensor, ...]]
    files: Mapping[str, bytes] = field(default_factory=dict)


class Language(Protocol):
    """The words of a backbone that writes texts: as public and as frozen as its weights.

    A text's tokens stand at the first places of a record's features, each place holding the state from which its token
    is told: what comes before is the true text (teacher forcing). A head maps states to states, and
    `outputs . embedding + bias` are the logits of the tokens. To write a text, `begin` and `step` give the state behind
    the tokens that are written so far.

    Law (tests/contracts/test_backbones.py): the states that `step` gives behind a text's own tokens are those at the
    places of its features.
    """

    @property
    def longest(self) -> int:
        """Largest number of a text's tokens, with the one that ends it: T."""

    @property
    def start(self) -> int:
        """The token that stands before a text."""

    @property
    def end(self) -> int:
        """The token that ends a text."""

    @property
    def scale(self) -> float:
        """The factor of a state in the first head, so that it tells what the backbone itself would."""

    @property
    def embedding_VD(self) -> Tensor:
        """The public rows of all tokens, float32, whose mean square length is 1."""

    @property
    def bias_V(self) -> Tensor:
        """Numbers that are added to the tokens' logits, float32; the least one for tokens that are never written."""

    def read(self, text: str) -> list[int]:
        """Returns a text's tokens, without the one that ends it. Raises BadRecord: it is none of this language."""

    def write(self, tokens: Sequence[int]) -> str:
        """Returns the text of tokens."""

    def begin(self, features_BPD: Tensor) -> Any:
        """Returns what is known of records before any token is written."""

    def step(self, known: Any, tokens_B: Tensor, place: int) -> tuple[Tensor, Any]:
        """Returns the features [B, D] from which the token at a place is told, and what is known then.

        Args:
            known: what `begin` or the last step returned.
            tokens_B: the token before that place; at the first place, `start`.
            place: the place, from 0.
        """

    def select(self, known: Any, rows_B: Tensor) -> Any:
        """Returns what is known of some rows, any of them several times."""


class Adapters(Frozen):
    """Low-rank adapters beside linear layers of a decoder: y = W x + (alpha / rank) B A x, of which B alone trains.

    Attributes:
        rank: rank of the product B A.
        alpha: factor alpha of the formula.
        targets: last parts of the layers' names, such as `encoder_attn.q_proj`.
        seed: public seed of A, which stays as it is drawn.
    """

    rank: Annotated[int, Field(ge=1, le=1024)]
    alpha: Annotated[int, Field(ge=1, le=65536)]
    targets: Annotated[list[str], Field(min_length=1)]
    seed: Annotated[int, Field(ge=0)] = 0


class DecoderPart(Frozen):
    """The part of a backbone's decoder that trains in the head of a task.

    Attributes:
        lora: adapters; null for none.
        last: whether the decoder's last block trains.
    """

    lora: Adapters | None = None
    last: bool = False


@runtime_checkable
class DecoderLanguage(Protocol):
    """Further members of a language whose decoder stands in a head, where a part of it may train.

    The features of its backbone are those of sources alone.

    Law (tests/contracts/test_backbones.py): the states that `step` gives behind a text's own tokens are those that a
    copy of the decoder gives for all of them at once.
    """

    def make_first_map(self) -> Tensor:
        """Returns weights of a first head's linear map, by which it tells what the backbone itself would."""

    def find_map_shape(self) -> tuple[int, int]:
        """Returns the shape of those weights, also before there are any of the backbone's."""

    def restrict(self, texts: Sequence[str]) -> Language:
        """Returns the language of those tokens that some public texts are made of, each with a row of its own."""

    def open_decoder(self) -> nn.Module:
        """Returns a frozen copy of the decoder: encoded sources and the tokens before each place -> states."""

    def open_part(self, decoder: nn.Module, part: DecoderPart) -> None:
        """Lets a part of a copy of the decoder train, in place. Raises BadInput: it has no such part."""

    def write_through(self, decoder: nn.Module) -> Language:
        """Returns the language as another decoder writes it, such as one that was trained."""


@dataclass(frozen=True)
class Bag:
    """The rule by which a record of several items stays a bag: its items stand side by side, as places.

    Attributes:
        max_items: largest number of items of a record, the number of its places; what stands behind its last item is
            zeros, the mark too.
        cuts: whether of a record with more items so many are read, evenly spread; else it cannot be used.
    """

    max_items: int
    cuts: bool


def list_items(item: Any, bag: Bag | None) -> Sequence[Any]:
    """Returns the items of a record that a backbone reads: one, or those of `common.inputs.Several`.

    Args:
        item: the content of a record.
        bag: the backbone's rule for records of several items; None where their features are averaged.

    Raises:
        BadRecord: there is none, or there are more than a record may have.
    """
    items = item.items if isinstance(item, Several) else [item]
    most = MAX_ITEMS if bag is None or bag.cuts else bag.max_items
    if not 0 < len(items) <= most:
        raise BadRecord(f"expected between one and {most} items in the record")
    if bag is None or len(items) <= bag.max_items:
        return items
    return [items[at] for at in spread(len(items), bag.max_items)]


@dataclass(frozen=True)
class Architecture:
    """A network and the number of its features.

    Attributes:
        module: batch of preprocessed items -> raw features, [B, *`grid`, `feature_dim`].
        feature_dim: number of features before any projection.
        preprocess: used in place of `Kind.preprocess` where preprocessing needs what travels with the weights, such as
            a vocabulary.
        open_raw: opens the inputs of a network that is handed on, those of one item where records are bags; None where
            there are none but preprocessed items.
        grid: number of places along each axis of an item's features; none where an item has one vector.
        num_marks: number of features at the end that are no features of a network but marks of places: they stay as
            they are, behind what a projection makes of the others.
        language: what the network knows of the texts that it writes; None where it writes none.
        bag: where a record stays a bag of its items, which `module` encodes one by one, without the axis of `grid`;
            None averages the features of a record's items.
    """

    module: nn.Module
    feature_dim: int
    preprocess: Callable[[Any], Tensor] | None = None
    open_raw: Callable[[], RawInputs] | None = None
    grid: tuple[int, ...] = ()
    num_marks: int = 0
    language: Language | None = None
    bag: Bag | None = None


@dataclass(frozen=True)
class Pretrained:
    """The tensors that a kind reads from its weights.

    Attributes:
        state: tensors of `Kind.architecture().module`, by name.
        classifier_KD: weights of the pre-training's classifier, for a projection; None where there are none.
        shift_D: predicted or declared mean of the features, for a projection; None where there is none.
        scale: factor on the features; 1 unless the weights are random.
    """

    state: Mapping[str, Tensor]
    classifier_KD: Tensor | None = None
    shift_D: Tensor | None = None
    scale: float = 1.0


@dataclass(frozen=True)
class Example:
    """A small instance of a kind, with which its contract tests run; it needs nothing but a folder.

    Attributes:
        settings: the backbone's settings as a user would write them.
        items: at least four different source items.
    """

    settings: Mapping[str, Any]
    items: Sequence[Any]


@dataclass(frozen=True)
class Divided:
    """The two sides of a freeze boundary.

    Attributes:
        below: batch of preprocessed items -> outputs at the boundary, [B, *shape].
        above: outputs at the boundary -> raw features.
        shape: shape of one example's output at the boundary.
    """

    below: nn.Module
    above: nn.Module
    shape: tuple[int, ...]


class Kind(Protocol):
    """The members that every plug-in file's class must have.

    Law (tests/contracts/test_backbones.py), stated for the `Backbone` made from it: frozen, deterministic, independent
    of the batch an item stands in; its digest changes with any weight, setting or preprocessing step that shapes
    features and with nothing else.

    Messages of `BadInput` begin with the setting's own name; the caller puts the key in front. A setting called
    `weights` that is a path says where the weights are: it is removed before settings travel.

    Attributes:
        kind: file name of the plug-in.
        projection: the last steps of the backbone; None leaves the features as they are.
    """

    kind: str
    projection: Projection | None

    @classmethod
    def example(cls, folder: Path) -> Example:
        """Returns a small instance for tests; files it needs are written to `folder`, the same on every call."""

    def architecture(self) -> Architecture:
        """Returns a new network, initialised from torch's current generator."""

    def preprocess(self, item: Any) -> Tensor:
        """Returns one source item (see `common.inputs`) as one input, without a batch dimension; all have one shape.

        Raises:
            BadRecord: the item cannot be used; the message holds nothing of its content.
            WeightsNeeded: `Architecture.preprocess` is needed, or files that are not here.
        """

    def model_dump(self, *, mode: str, by_alias: bool, exclude_unset: bool = False) -> dict[str, Any]:
        """Returns the settings as plain values (pydantic's).

        Args:
            mode: `json` for values that JSON has.
            by_alias: whether keys are those of a file.
            exclude_unset: whether settings that nobody wrote are left out.
        """

    def model_copy(self, *, update: Mapping[str, Any]) -> Kind:
        """Returns the same settings with some of them replaced (pydantic's)."""


@runtime_checkable
class WeightedKind(Protocol):
    """Further members of a kind with weights."""

    def pretrained(self) -> Pretrained:
        """Returns the weights. Called at the coordinator only.

        Raises:
            BadInput: they are missing, do not fit the architecture, or are a pickle with code.
        """

    def random(self) -> Pretrained:
        """Returns weights drawn from torch's current generator (see `common.backbones.parts.weights`)."""


@runtime_checkable
class ResolvedKind(Protocol):
    """A further member of a kind whose settings say more after its weights' folder or package was read."""

    def resolved(self) -> Kind:
        """Returns settings with everything that shapes features explicit and no location of weights.

        Resolving twice changes nothing.
        """


@runtime_checkable
class WeightsElsewhere(Protocol):
    """A further member of a kind whose weights are not only read from paths among its settings."""

    def list_weights_paths(self) -> list[Path] | None:
        """Returns the files and folders that are read; None where they are elsewhere, and may change there."""


@runtime_checkable
class Divisible(Protocol):
    """Further members of a kind whose network can be divided, so that its upper part trains."""

    def blocks(self, network: nn.Module) -> list[str]:
        """Returns the names of the blocks that a trunk can begin with, in order."""

    def divide(self, network: nn.Module, block: str) -> Divided:
        """Returns both sides of a block's input. The network is in eval mode, and must not be used afterwards.

        Args:
            network: the module of `Kind.architecture`, perhaps without memory (device meta).
            block: one of `blocks`.

        Raises:
            BadInput: this network cannot be divided there.
        """


@runtime_checkable
class ReadsColumns(Protocol):
    """A further member of a kind that reads rows of tables."""

    def list_columns(self) -> list[str]:
        """Returns the names of the columns that it reads of a row; none where it reads something else."""

    def list_clipped(self, row: Mapping[str, Any]) -> list[str]:
        """Returns the names of the columns whose number in a row lies beyond the declared range."""


@runtime_checkable
class LearnsTexts(Protocol):
    """Further members of a kind that writes texts, which is pre-trained on public pairs of them.

    Attributes:
        vocabulary: number of tokens of its vocabulary.
    """

    vocabulary: int

    def build(self, vocabulary: bytes) -> Any:
        """Returns the network to train (`common.backbones.parts.language.writer.Writer`), its encoder pre-trained.

        Raises:
            BadInput: its encoder cannot be opened, or the vocabulary does not fit.
        """

    def save(self, writer: Any, metadata: Mapping[str, str]) -> None:
        """Writes what was trained to the file of the weights."""


@runtime_checkable
class ReadsBags(Protocol):
    """A further member of a kind whose records are bags of items."""

    def open_encoder(self) -> Kind:
        """Returns the settings of the backbone of one item, with its projection. Their key is `encoder`."""

    def join_weights(self, parts: Pretrained) -> Pretrained:
        """Returns the weights of the whole from those of the backbone of one item, with the shift of its projection."""


@runtime_checkable
class NamedClasses(Protocol):
    """A further member of a kind whose pre-training's classes have known names."""

    def list_classes(self) -> list[str]:
        """Returns the names of the classes of the classifier's rows, in their order; none where they are not known."""


@runtime_checkable
class Hears(Protocol):
    """A further member of a kind whose whole model writes what it hears, before anything of it is trained."""

    def open_transcriber(self, allows: Callable[[str], bool] | None) -> Callable[[Audio], str]:
        """Returns what the model writes of a recording.

        Args:
            allows: tells whether a piece of text may be written; None for all.

        Raises:
            BadInput: the model writes no text, or is not there.
        """


@runtime_checkable
class _WithWeightsSetting(Protocol):
    weights: object


OPTIONAL = (WeightedKind, ResolvedKind, WeightsElsewhere, Divisible, ReadsColumns, LearnsTexts, ReadsBags, NamedClasses)
"""Protocols that a kind has as a whole or not at all."""


def resolve_settings(kind: Kind) -> Kind:
    """Returns the settings that travel to the sites and that the digest covers: they hold no location of weights."""
    resolved = kind
    if isinstance(kind, ResolvedKind):
        resolved = kind.resolved()
    elif find_weights_file(kind) is not None:
        resolved = kind.model_copy(update={"weights": None})
    if kind.projection is None or find_public_mean_file(kind) is None:
        return resolved
    projection = kind.projection.model_copy(update={"shift": PublicShift(public=None)})
    return resolved.model_copy(update={"projection": projection})


def write_spec(kind: Kind) -> str:
    """Returns settings as canonical JSON: the same settings are the same text."""
    return json.dumps(kind.model_dump(mode="json", by_alias=True), sort_keys=True, separators=(",", ":"))


def find_weights_file(kind: Kind) -> Path | None:
    """Returns the local file that a kind's weights are read from, if they are."""
    return kind.weights if isinstance(kind, _WithWeightsSetting) and isinstance(kind.weights, Path) else None


def find_public_mean_file(kind: Kind) -> Path | None:
    """Returns the file that a declared public mean of a backbone's features is read from, if there is one."""
    shift = kind.projection.shift if kind.projection is not None else None
    return shift.public if isinstance(shift, PublicShift) else None


def declares_public_mean(settings: Spec | Mapping[str, Any]) -> bool:
    """Returns whether a backbone's settings, with or without paths, subtract a declared public mean.

    Features of such a backbone are centred: no budget needs to be spent on their mean.
    """
    values = settings.settings() if isinstance(settings, Spec) else settings
    projection = values.get("projection")
    shift = projection.get("shift") if isinstance(projection, Mapping) else None
    return isinstance(shift, Mapping) and "public" in shift


def list_weights_paths(kind: Kind) -> list[Path] | None:
    """Returns the files and folders that a kind's weights are read from; None where others may change them.

    A name of torchvision's is one file for ever, and no path.
    """
    if isinstance(kind, WeightsElsewhere):
        paths = kind.list_weights_paths()
    else:
        path = find_weights_file(kind)
        paths = [] if path is None else [path]
    mean = find_public_mean_file(kind)
    return paths if paths is None or mean is None else [*paths, mean]


def read_pretrained(kind: Kind) -> Pretrained:
    """Returns a kind's weights, which are no tensors at all where it has none. Raises BadInput."""
    return kind.pretrained() if isinstance(kind, WeightedKind) else Pretrained({})


def draw_random(kind: Kind) -> Pretrained:
    """Returns random weights for a kind. Raises BadInput where it has none."""
    if not isinstance(kind, WeightedKind):
        raise BadInput(f"kind: expected a backbone with weights, got {kind.kind!r}, which has none to draw at random")
    return kind.random()
