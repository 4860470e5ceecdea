"""Low-rank adapters (Hu et al. 2021, arXiv 2106.09685), by peft.

y = W x + (alpha / rank) B A x, of which A and B train.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from common.types import BadInput


def add_adapters(module: nn.Module, rank: int, alpha: int, targets: Sequence[str]) -> list[nn.Parameter]:
    """Put adapters beside a module's linear layers, in place; their parameters.

    B is zero, so that the module computes what it did; A is drawn from torch's current generator.

    Args:
        module: the module, such as the upper layers of a transformer.
        rank: of B A.
        alpha: see above.
        targets: last parts of the layers' names, such as `query`.

    Raises:
        BadInput: a target is no linear layer; names those there are.
    """
    linear = {name.rpartition(".")[2] for name, part in module.named_modules() if type(part) is nn.Linear}
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

    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(targets), lora_dropout=0.0, bias="none")
    inject_adapter_in_model(config, module)
    return [parameter for name, parameter in module.named_parameters() if ".lora_" in name]
