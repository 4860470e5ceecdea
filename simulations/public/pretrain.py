"""Pre-training of one of a run's small backbones on public records: a classifier's, or one that writes texts.

The weights are kept where the metadata of their file names the digest of the same settings and records.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import nn

from client.data.sources import Source, open_source
from common.backbones import Kind, LearnsTexts, find_weights_file
from common.backbones.small_cnn import collect_tensors
from common.files import write_atomic
from common.model.backbones import Untrained, open_untrained
from common.plugins import Spec, resolve
from common.types import BadInput
from server.rounds.messenger import Observe
from simulations.config import Pretrain, SimulationConfig
from simulations.public.pretrain_texts import train_writer


@dataclass(frozen=True)
class PretrainedBackbone:
    """Weights of a pre-trained backbone.

    Attributes:
        path: file of the weights.
        train_accuracy: accuracy on the public records; of texts, on their tokens in the last epoch; None where the
            weights are of an earlier call.
        cached: whether the weights are of an earlier call.
    """

    path: Path
    train_accuracy: float | None
    cached: bool


def pretrain(config: SimulationConfig, observe: Observe) -> PretrainedBackbone:
    """Trains a backbone of the run on public records and writes its weights.

    With labels it is trained beside a linear classifier; one that writes texts makes its vocabulary first.

    Args:
        config: a simulation with a `pretrain` section.
        observe: receives the progress in epochs.

    Raises:
        BadInput: the simulation has no `pretrain` section, its backbone names no file to write to, or a record has a
            label that is not listed.
    """
    plan = config.pretrain
    if plan is None:
        raise BadInput("pretrain: expected a section that says how to train the backbone, got nothing")
    key = f"run.{config.run.backbone_key(_name(config))}"
    kind: Kind = resolve("common.backbones", _settings(config), key)
    if isinstance(kind, LearnsTexts):
        return _pretrain_texts(kind, config, key, observe)
    if plan.label is None or plan.labels is None:
        raise BadInput("pretrain.labels: expected `label` and `labels` for a backbone that is trained as a classifier")
    untrained = open_untrained(_settings(config), key, seed=plan.seed)
    if untrained.weights_path is None:
        raise BadInput(f"{key}.weights: expected a file to write the weights to, got nothing")
    sources = [open_source(spec, f"pretrain.sources.{i}").open() for i, spec in enumerate(plan.sources)]
    made_from = _compute_digest(config, [source.digest() for source in sources])
    if _is_cached(untrained.weights_path, made_from):
        return PretrainedBackbone(untrained.weights_path, None, cached=True)
    items, labels = _load_records(plan, sources, untrained)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(plan.seed)
        classifier = nn.Linear(untrained.feature_dim, len(plan.labels))
        accuracy = _train(untrained.module, classifier, items, labels, config, observe)
    state = collect_tensors(untrained.module, classifier)
    untrained.weights_path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(untrained.weights_path, save(state, metadata={"made_from": made_from}))
    return PretrainedBackbone(untrained.weights_path, accuracy, cached=False)


def _pretrain_texts(kind: Kind, config: SimulationConfig, key: str, observe: Observe) -> PretrainedBackbone:
    plan = config.pretrain
    assert plan is not None and isinstance(kind, LearnsTexts)
    weights = find_weights_file(kind)
    if weights is None:
        raise BadInput(f"{key}.weights: expected a file to write the weights to, got nothing")
    sources = [open_source(spec, f"pretrain.sources.{i}").open() for i, spec in enumerate(plan.sources)]
    made_from = _compute_digest(config, [source.digest() for source in sources])
    if _is_cached(weights, made_from):
        return PretrainedBackbone(weights, None, cached=True)
    writer, accuracy = train_writer(kind, plan, sources, observe)
    kind.save(writer, {"made_from": made_from})
    return PretrainedBackbone(weights, accuracy, cached=False)


def _name(config: SimulationConfig) -> str:
    name = config.pretrained_backbone()
    assert name is not None
    return name


def _settings(config: SimulationConfig) -> Spec:
    return config.run.backbone_specs[_name(config)]


def _load_records(plan: Pretrain, sources: list[Source], untrained: Untrained) -> tuple[torch.Tensor, torch.Tensor]:
    items, labels = [], []
    for source in sources:
        for position, record in enumerate(source.index()):
            name = record.cells.get(plan.label or "")
            if plan.labels is None or name not in plan.labels:
                raise BadInput(f"pretrain.labels: {record.file} row {record.row} has another label in {plan.label!r}")
            items.append(untrained.preprocess(source.load(position)))
            labels.append(plan.labels.index(name))
    return torch.stack(items), torch.tensor(labels)


def _train(
    encoder: nn.Module,
    classifier: nn.Module,
    items: torch.Tensor,
    labels: torch.Tensor,
    config: SimulationConfig,
    observe: Observe,
) -> float:
    plan = config.pretrain
    assert plan is not None
    model = nn.Sequential(encoder, classifier).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=plan.learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, plan.epochs)
    for epoch in range(plan.epochs):
        observe("pretraining", epoch, plan.epochs)
        for batch in torch.split(torch.randperm(len(items)), plan.batch_size):
            optimizer.zero_grad()
            shift = torch.randint(-plan.max_shift, plan.max_shift + 1, (2,)).tolist()
            moved = torch.roll(items[batch], shift, dims=(-2, -1))
            loss = nn.functional.cross_entropy(model(moved), labels[batch])
            torch.autograd.backward(loss)
            optimizer.step()
        schedule.step()
    observe("pretraining", plan.epochs, plan.epochs)
    model.eval()
    with torch.inference_mode():
        return float((model(items).argmax(1) == labels).float().mean())


def _compute_digest(config: SimulationConfig, source_digests: list[str]) -> str:
    assert config.pretrain is not None
    backbone = _settings(config).model_dump(mode="json")
    backbone.pop("weights", None)
    facts = {"pretrain": config.pretrain.model_dump(mode="json"), "backbone": backbone, "records": source_digests}
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _is_cached(path: Path, made_from: str) -> bool:
    if not path.exists():
        return False
    try:
        with safe_open(path, framework="pt") as file:
            return bool((file.metadata() or {}).get("made_from") == made_from)
    except (OSError, SafetensorError):
        return False
