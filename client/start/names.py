"""A head for classes that nobody has a record of, from their names and public networks alone.

A text backbone reads "a photo of a NAME" for the classes of the pre-training's classifier, whose weights are public.
Kernel ridge regression maps such texts to the classifier's rows; what it says of the new names are the rows of the new
head. Where the prior's own backbone reads texts, the rows are what the labels' texts are to it
(`common.model.text_start`).

# Shapes: N classes of the pre-training, K new classes, T features of a text, D features.
"""

from __future__ import annotations

import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Self

import torch
from pydantic import ConfigDict, Field, model_validator
from torch import Tensor

from common.backbones import NamedClasses, read_pretrained
from common.inputs import CellName, CellNames, Text
from common.model.backbones import Backbone, open_pretrained
from common.model.text_start import ROW_LENGTH, encode_rows
from common.plugins import Frozen, LocalPath, Spec, resolve
from common.run import Name
from common.tasks.parts.declared import StartText
from common.types import BadInput, BadRecord

WIDTH, RIDGE = 0.2, 0.3
"""Kernel exp((cosine - 1) / WIDTH) and ridge. Chosen on public classes that were left out, a fifth at a time: of five
of them, a class's row agrees best with the row made from its own name for 88.0 % (width 0.1: 86.6, 0.4: 87.8, 1: 87.2;
linear ridge: 86.3); between ridges 0.1 and 1 nothing changes."""
_BATCH = 64


class NamesFile(Frozen):
    """A task whose classes are known by name.

    Attributes:
        task: name of the new task.
        labels: its labels; or label -> phrases that say what it means.
        prompt: phrase for a label that has none of its own; `{}` stands for the label.
        text: settings of a backbone that reads texts; without it the prior's own.
        classifier: settings of the prior's backbone as its run file has them, with its public weights and their
            classifier.
        classes: a file with the name of each class of that classifier, one a line, in its order; torchvision's models
            of 1000 classes need none.
    """

    model_config = ConfigDict(title="file of names")

    task: Name
    labels: CellNames | dict[CellName, Annotated[list[StartText], Field(min_length=1, max_length=100)]]
    prompt: str = "a photo of a {}"
    text: Spec | None = None
    classifier: Spec | None = None
    classes: LocalPath | None = None

    @model_validator(mode="after")
    def _check_prompt(self) -> Self:
        try:
            parts = [part[1:] for part in string.Formatter().parse(self.prompt) if part[1] is not None]
        except ValueError:
            parts = []
        # A width or a second place within the braces is no label.
        if parts != [("", "", None)]:
            raise ValueError(f"prompt: expected a phrase with one {{}} for the label, got {self.prompt!r}")
        if len(self.labels) < 2:
            raise ValueError(f"labels: expected at least 2 labels, got {len(self.labels)}")
        if (self.text is None) != (self.classifier is None):
            raise ValueError("expected `text` and `classifier` together, or neither where the prior reads texts")
        return self

    def list_texts(self) -> dict[str, list[str]]:
        """Returns the phrases of each label."""
        if isinstance(self.labels, Mapping):
            return dict(self.labels)
        return {label: [self.prompt.format(label)] for label in self.labels}


@dataclass(frozen=True)
class PublicClasses:
    """The classes of a public classifier.

    Attributes:
        names: their names.
        rows_ND: the classifier's weights as the prior's heads read features: projected, where its backbone projects.
    """

    names: Sequence[str]
    rows_ND: Tensor


def make_rows(file: NamesFile, backbone: Backbone) -> Tensor:
    """Returns the rows of a head for a file's labels, float32 [K, D].

    Args:
        file: the names.
        backbone: the prior's backbone.

    Raises:
        BadInput: the prior reads no texts and no classifier is named, the classifier is not of the prior's backbone,
            its classes have no names, or the names mean the same to the text backbone.
    """
    texts = file.list_texts()
    if file.text is None or file.classifier is None:
        try:
            return encode_rows(list(texts.values()), backbone, "labels")
        except BadInput as error:
            raise BadInput(
                f"{error}; a prior that reads no texts needs `text`, a text backbone, and `classifier`, the public "
                "weights of its backbone"
            ) from error
    classes = open_classes(file.classifier, file.classes, backbone)
    reader = open_pretrained(file.text, "text")
    known_NT = _encode(reader, [[file.prompt.format(name)] for name in classes.names])
    return map_names(known_NT, _encode(reader, list(texts.values())), classes.rows_ND)


def map_names(known_NT: Tensor, new_KT: Tensor, rows_ND: Tensor) -> Tensor:
    """Returns the rows of new classes, each of length `ROW_LENGTH`.

    Args:
        known_NT: features of the texts of the public classes, of length 1, float64.
        new_KT: the same of the new classes.
        rows_ND: rows of the public classifier, float64.

    Raises:
        BadInput: the new texts are alike.
    """
    kernel_NN = torch.exp((known_NT @ known_NT.T - 1.0) / WIDTH)
    kernel_KN = torch.exp((new_KT @ known_NT.T - 1.0) / WIDTH)
    # Both sides centred: the mean of the public classes is no class's own.
    middle_N = kernel_NN.mean(0)
    centred_NN = kernel_NN - middle_N - middle_N[:, None] + middle_N.mean()
    centred_KN = kernel_KN - middle_N - kernel_KN.mean(1, keepdim=True) + middle_N.mean()
    ridge_NN = RIDGE * torch.eye(len(known_NT), dtype=known_NT.dtype)
    rows_KD = centred_KN @ torch.linalg.solve(centred_NN + ridge_NN, rows_ND - rows_ND.mean(0))
    rows_KD = rows_KD - rows_KD.mean(0)
    lengths_K1 = rows_KD.norm(dim=1, keepdim=True)
    if not bool((lengths_K1 > 1e-6 * rows_ND.norm(dim=1).mean()).all()):
        raise BadInput("labels: expected names that differ in meaning, got some that are alike to the text backbone")
    scaled_KD: Tensor = (rows_KD * (ROW_LENGTH / lengths_K1)).float()
    return scaled_KD


def open_classes(settings: Spec, names: Path | None, backbone: Backbone) -> PublicClasses:
    """Returns the classes of the public weights of a prior's backbone.

    Args:
        settings: settings of the backbone with its weights.
        names: file of the classes' names; None where the backbone's kind knows them.
        backbone: the prior's backbone.

    Raises:
        BadInput: the weights are of another backbone, have no classifier, or its classes have no names.
    """
    if open_pretrained(settings, "classifier").digest != backbone.digest:
        raise BadInput(
            "classifier: expected the weights and settings of the prior's backbone, got those of another; write them "
            "as in the prior's run file, with preprocess and projection"
        )
    kind = resolve("common.backbones", settings, "classifier")
    rows_ND = read_pretrained(kind).classifier_KD
    if rows_ND is None:
        raise BadInput("classifier: expected weights with the classifier of their pre-training, got some without")
    projection = backbone.module.projection
    if kind.projection is not None and kind.projection.kernel is not None:
        raise BadInput("classifier: expected a backbone without `kernel`, whose features a classifier's rows can meet")
    if kind.projection is not None and kind.projection.dim is not None:
        rows_ND = rows_ND.double() @ projection.matrix.cpu().double()
    listed = _read_names(names) if names is not None else kind.list_classes() if isinstance(kind, NamedClasses) else []
    if len(listed) != len(rows_ND):
        raise BadInput(
            f"classes: expected a file with the {len(rows_ND)} names of the classifier's classes, one a line, got "
            f"{len(listed)}"
        )
    return PublicClasses(listed, rows_ND.double())


def _read_names(path: Path) -> list[str]:
    try:
        return [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"classes: expected a file of names in UTF-8, got none that can be read at {path}") from error


def _encode(reader: Backbone, texts: Sequence[Sequence[str]]) -> Tensor:
    """Returns one row of length 1 for each list of texts: the mean of their features of length 1."""
    flat = [text for own in texts for text in own]
    try:
        inputs = [reader.preprocess(Text(text)) for text in flat]
    except BadRecord as error:
        raise BadInput(f"text: expected a backbone that reads texts, got one that says: {error}") from error
    parts = [reader.encode(inputs[first : first + _BATCH]) for first in range(0, len(inputs), _BATCH)]
    normalize = torch.nn.functional.normalize
    features = normalize(torch.cat(parts).double(), dim=1)
    means = [rows.mean(0) for rows in torch.split(features, [len(own) for own in texts])]
    return normalize(torch.stack(means), dim=1)
