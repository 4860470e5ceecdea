"""Languages for an audit's tasks that write texts: their backbone is not there, and its words are public.

The solver's code is audited, and its promise holds for every loss: so the words need not be those of the run's own
backbone. A stand-in has few of them, with random rows as long as the audit's heads are wide.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NoReturn

import torch
from torch import Tensor

from common.tasks import Task, WritesTexts
from common.types import BadInput

_TOKENS = 48


@dataclass(frozen=True)
class StandInLanguage:
    """Numbers as tokens; 0 ends a text.

    Attributes:
        longest: largest number of a text's tokens.
        width: length of a token's row.
        start: the token before a text.
        end: the token that ends it.
        scale: factor of a state in a first head, which an audit does not use.
    """

    longest: int
    width: int
    start: int = 0
    end: int = 0
    scale: float = 1.0

    @cached_property
    def embedding_VD(self) -> Tensor:
        """The rows of all tokens; their mean square length is 1, as the law of languages says."""
        rows_VD = torch.randn(_TOKENS, self.width, generator=torch.Generator().manual_seed(self.width))
        return rows_VD / rows_VD.square().sum(dim=1).mean().sqrt()

    @property
    def bias_V(self) -> Tensor:
        """Nothing is added to the tokens' logits."""
        return torch.zeros(_TOKENS)

    def read(self, text: str) -> list[int]:
        """Returns a text's tokens."""
        return [int(token) for token in text.split()]

    def write(self, tokens: Sequence[int]) -> str:
        """Returns the text of tokens."""
        return " ".join(map(str, tokens))

    # An audit trains on records that it makes up; nothing is written from any.

    def begin(self, features_BPD: Tensor) -> NoReturn:
        """Raises NotImplementedError."""
        raise NotImplementedError

    def step(self, known: Any, tokens_B: Tensor, place: int) -> NoReturn:
        """Raises NotImplementedError.

        Args:
            known: not looked at.
            tokens_B: not looked at.
            place: not looked at.
        """
        raise NotImplementedError

    def select(self, known: Any, rows_B: Tensor) -> NoReturn:
        """Raises NotImplementedError."""
        raise NotImplementedError


def open_on_stand_ins(tasks: Mapping[str, Task], feature_dims: Mapping[str, int]) -> dict[str, Task]:
    """Returns the tasks; those that write texts are opened on a language that their heads' outputs fit.

    Args:
        tasks: task -> its definition.
        feature_dims: task -> number of features that its head reads.

    Raises:
        BadInput: a head's outputs are not as many for every width.
    """
    return {name: _open(name, task, feature_dims[name]) for name, task in tasks.items()}


def _open(name: str, task: Task, feature_dim: int) -> Task:
    if not isinstance(task, WritesTexts):
        return task
    *_, last = (parameter for parameter in task.head(feature_dim).parameters() if parameter.dim() == 2)
    # A label has a number for each token.
    (longest,) = task.codec.missing().shape
    if longest < 3:
        raise BadInput(f"run.tasks.{name}.max_tokens: an audit needs texts of at least 3 tokens, got {longest}")
    return task.open_on(StandInLanguage(longest, len(last)))
