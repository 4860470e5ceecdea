"""Writing texts with a backbone's language and a head: token by token, the most probable one or a beam of texts.

What is written has the shape of the head's own outputs, so that it is judged and served as they are, with one more
column: the token that was chosen at a place and 1, or 0 where the text has ended.

# Shapes: B records, P places, T places of a text, D features of a state, V tokens, W texts of a beam.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from common.tasks import WRITTEN_AT_ONCE

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from common.backbones import Language

Head = Callable[["Tensor"], "Tensor"]


def write_texts(language: Language, head: Head, features_BPD: Tensor, beam: int) -> Tensor:
    """Returns the outputs [B, T, D + 1] of texts that are written from features.

    Args:
        language: language of the backbone whose features they are.
        head: features of a place -> its outputs.
        features_BPD: features of records; what they hold of a text that is known is not looked at.
        beam: number of texts that are kept at each place; 1 takes the most probable token.
    """
    import torch

    if torch.compiler.is_exporting():
        # A graph has no parts of a fixed size.
        return _write_best(language, head, features_BPD)
    if beam > 1:
        rows = [_write_beam(language, head, row_1PD, beam) for row_1PD in torch.split(features_BPD, 1)]
        rows = rows or [_write_best(language, head, features_BPD)]
        return torch.cat(rows)
    missing = -len(features_BPD) % WRITTEN_AT_ONCE
    padded_BPD = torch.cat([features_BPD, features_BPD.new_zeros((missing, *features_BPD.shape[1:]))])
    written = [_write_best(language, head, each) for each in torch.split(padded_BPD, WRITTEN_AT_ONCE)]
    return torch.cat(written)[: len(features_BPD)]


def open_logits(language: Language, device: torch.device) -> Head:
    """Returns what computes logits [R, V] of outputs, in float32; the rows of all tokens are read once."""
    embedding_VD, bias_V = language.embedding_VD.to(device), language.bias_V.to(device)

    def compute(outputs_RD: Tensor) -> Tensor:
        logits_RV: Tensor = outputs_RD.float() @ embedding_VD.T + bias_V
        return logits_RV

    return compute


def compute_logits(language: Language, outputs_RD: Tensor) -> Tensor:
    """Returns the logits [R, V] of outputs, in float32."""
    return open_logits(language, outputs_RD.device)(outputs_RD)


def _write_best(language: Language, head: Head, features_BPD: Tensor) -> Tensor:
    import torch

    tokens_B = torch.full((features_BPD.shape[0],), language.start, device=features_BPD.device)
    known, going_B, columns = language.begin(features_BPD), torch.ones_like(tokens_B, dtype=torch.bool), []
    tell = open_logits(language, features_BPD.device)
    for place in range(language.longest):
        states_BD, known = language.step(known, tokens_B, place)
        outputs_BD = head(states_BD).float()
        tokens_B = tell(outputs_BD).argmax(dim=1)
        columns.append(torch.cat([outputs_BD, (tokens_B + 1)[:, None].float()], dim=1) * going_B[:, None])
        going_B = going_B & (tokens_B != language.end)
    return torch.stack(columns, dim=1)


def _write_beam(language: Language, head: Head, features_1PD: Tensor, width: int) -> Tensor:
    """Returns the outputs [1, T, D + 1] of the text whose tokens' mean log probability is largest.

    Args:
        language: language of the backbone.
        head: features of a place -> its outputs.
        features_1PD: features of one record.
        width: number of unfinished texts that are kept; as many as there are gives the exact answer.
    """
    import torch

    known, tell = language.begin(features_1PD), open_logits(language, features_1PD.device)
    tokens_W = torch.tensor([language.start], device=features_1PD.device)
    sums_W, written_WTD = tokens_W.new_zeros(1, dtype=torch.float64), None
    best: tuple[float, Tensor] | None = None
    for place in range(language.longest):
        states_WD, known = language.step(known, tokens_W, place)
        outputs_WD = head(states_WD).float()
        sums_WV = sums_W[:, None] + tell(outputs_WD).double().log_softmax(dim=1)
        if place + 1 < language.longest:
            ended_W, length = sums_WV[:, language.end].clone(), place + 1
            sums_WV[:, language.end] = -torch.inf
        else:
            # A text that is cut off counts as it is.
            ended_W, length = sums_WV.amax(dim=1), language.longest
        row = int(ended_W.argmax())
        end = language.end if place + 1 < language.longest else int(sums_WV[row].argmax())
        score = float(ended_W[row]) / length
        if best is None or score > best[0]:
            best = (score, _append(written_WTD, outputs_WD, torch.tensor([row]), torch.tensor([end]))[0])
        flat = sums_WV.flatten().topk(min(width, sums_WV.numel() - len(sums_WV)))
        rows_W, tokens_W = flat.indices // sums_WV.shape[1], flat.indices % sums_WV.shape[1]
        sums_W, known = flat.values, language.select(known, rows_W)
        written_WTD = _append(written_WTD, outputs_WD, rows_W, tokens_W)
    assert best is not None
    padded: Tensor = torch.nn.functional.pad(best[1], (0, 0, 0, language.longest - len(best[1])))
    return padded[None]


def _append(written_WTD: Tensor | None, outputs_WD: Tensor, rows_W: Tensor, tokens_W: Tensor) -> Tensor:
    """Returns some rows of what is written, each with one place more."""
    import torch

    own = torch.cat([outputs_WD[rows_W], (tokens_W + 1)[:, None].to(outputs_WD)], dim=1)[:, None]
    return own if written_WTD is None else torch.cat([written_WTD[rows_W], own], dim=1)
