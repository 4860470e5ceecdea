"""The model card: the README.md of every exported folder."""

from __future__ import annotations

from collections.abc import Sequence

from common.exports.parts.exported import Exported


def write_card(exported: Exported, name: str, used: Sequence[str]) -> str:
    """Returns the text of the card.

    Args:
        exported: what was exported.
        name: of the format.
        used: sentences that say how each file of the format is used.
    """
    config = exported.model.config
    lines = [f"# {', '.join(exported.tasks)}", "", f"Trained by run `{config.run}` and exported as {name}.", ""]
    lines += [f"- {sentence}" for sentence in used]
    lines += ["- `preprocessing.json` states what comes before the network and what its outputs are."]
    if exported.left_out:
        lines += ["", exported.explain_left_out()]
    return "\n".join(lines) + "\n"
