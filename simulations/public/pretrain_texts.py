"""Pre-training of a backbone that writes texts on public pairs: its vocabulary, then its decoder behind true tokens.

The encoder stays as it is, so that its states are computed once.

# Shapes: N pairs, B of a batch, L places of a source, T places of a text, M width of the encoder's states, V tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from client.data.sources import Source
from common.backbones import LearnsTexts
from common.backbones.parts.language.vocabulary import make_vocabulary
from common.backbones.parts.language.writer import NONE, Writer
from common.inputs import Text
from common.types import BadInput, BadRecord
from server.rounds.messenger import Observe
from simulations.config import Pretrain

_WARM_STEPS = 400
_DROPOUT, _SMOOTHING, _LONGEST_GRADIENT = 0.1, 0.1, 1.0
_ENCODED_AT_ONCE = 64


def train_writer(
    kind: LearnsTexts, plan: Pretrain, sources: Sequence[Source], observe: Observe
) -> tuple[Writer, float]:
    """Returns a trained network and its accuracy on the tokens of the last epoch.

    Args:
        kind: the backbone's settings.
        plan: how it is trained.
        sources: opened sources of public pairs.
        observe: receives the progress in epochs.

    Raises:
        BadInput: a record is no pair of texts, or none can be used.
    """
    pairs = [source.load(position) for source in sources for position in range(len(source.index()))]
    texts = [pair.second for pair in pairs if isinstance(pair, Text) and pair.second]
    if len(texts) < len(pairs) or not pairs:
        raise BadInput("pretrain.sources: expected pairs of texts, as kind pairs or kind text with `text_pair` has")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(plan.seed)
        writer: Writer = kind.build(make_vocabulary(texts, kind.vocabulary))
        inputs_N = _preprocess(writer, pairs)
        states_NLM, lengths_N = _encode_sources(writer, inputs_N, observe)
        tokens_NT = inputs_N[:, -writer.longest :]
        return writer, _train(writer, plan, (states_NLM, lengths_N, tokens_NT), observe)


def _preprocess(writer: Writer, pairs: Sequence[Text]) -> Tensor:
    """Returns pairs as integers; those that are too long are left out."""
    found = []
    for pair in pairs:
        try:
            found.append(writer.preprocess(pair))
        except BadRecord:
            continue
    if not found:
        raise BadInput("pretrain.sources: expected pairs that are short enough for the backbone, got none")
    return torch.stack(found)


def _encode_sources(writer: Writer, inputs_N: Tensor, observe: Observe) -> tuple[Tensor, Tensor]:
    """Returns the encoder's states in 16 bits, and how many tokens a source has."""
    sources_N3L = torch.unflatten(inputs_N[:, : -writer.longest], 1, (3, -1))
    writer.eval()
    parts = []
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        for number, part in enumerate(torch.split(sources_N3L, _ENCODED_AT_ONCE)):
            observe("encoding", number * _ENCODED_AT_ONCE, len(inputs_N))
            parts.append(writer.encode(part).to(torch.bfloat16))
    # Cloned outside: autograd refuses inference tensors.
    return torch.cat(parts).clone(), sources_N3L[:, 1].sum(dim=1)


def _train(writer: Writer, plan: Pretrain, pairs: tuple[Tensor, Tensor, Tensor], observe: Observe) -> float:
    decoder, end = writer.decoder.train(), writer.open_vocabulary().end
    for part in decoder.modules():
        if isinstance(part, nn.Dropout):
            part.p = _DROPOUT
    steps = plan.epochs * math.ceil(len(pairs[0]) / plan.batch_size)
    warm = min(_WARM_STEPS, steps // 2)
    optimizer = torch.optim.AdamW(decoder.parameters(), lr=plan.learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / (warm + 1), max(0.0, (steps - step) / max(1, steps - warm)))
    )
    right = count = 0
    for epoch in range(plan.epochs):
        observe("pretraining", epoch, plan.epochs)
        right = count = 0
        for batch in _divide(pairs[2], plan.batch_size):
            logits_RV, tokens_R = _tell(writer, end, *(part[batch] for part in pairs))
            loss = nn.functional.cross_entropy(logits_RV.float(), tokens_R, label_smoothing=_SMOOTHING)
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            nn.utils.clip_grad_norm_(decoder.parameters(), _LONGEST_GRADIENT)
            optimizer.step()
            schedule.step()
            right += int((logits_RV.argmax(dim=1) == tokens_R).sum())
            count += len(tokens_R)
    observe("pretraining", plan.epochs, plan.epochs)
    writer.eval()
    return right / count


def _divide(tokens_NT: Tensor, batch_size: int) -> list[Tensor]:
    """Returns batches of pairs of about one length, in a random order."""
    length_N = (tokens_NT != NONE).sum(dim=1) + 2.0 * torch.rand(len(tokens_NT))
    batches = list(torch.split(torch.argsort(length_N), batch_size))
    return [batches[number] for number in torch.randperm(len(batches)).tolist()]


def _tell(writer: Writer, end: int, states_BLM: Tensor, lengths_B: Tensor, tokens_BT: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the logits of all tokens of some texts, and these tokens."""
    decoder = writer.decoder
    longest = int((tokens_BT != NONE).sum(dim=1).max())
    tokens_BT, states_BLM = tokens_BT[:, :longest], states_BLM[:, : int(lengths_B.max())]
    before_BT = torch.roll(tokens_BT, 1, dims=1).clamp(min=0)
    before_BT[:, 0] = end
    mask_BL = torch.arange(states_BLM.shape[1]) < lengths_B[:, None]
    own_BT = tokens_BT != NONE
    with torch.autocast("cpu", torch.bfloat16):
        states_BTD = decoder(before_BT, decoder.read_memory(states_BLM), mask_BL)
        logits_RV = states_BTD[own_BT] @ decoder.embedding.weight.T + decoder.bias
    return logits_RV, tokens_BT[own_BT]
