"""The model card of an edited checkpoint: the source's, plus a section on what was done."""

from __future__ import annotations

import json
import re

from moesurgeon.surgery.plan import EditPlan

_HEADING = "## Surgery"
_LONG = {"expert_map", "dropped", "documents", "choice_documents", "unused_documents"}


def edited_card(card: str, plan: EditPlan) -> str:
    """Return ``card`` with the operations of ``plan`` added to its section on surgery."""
    lines = []
    for operation in plan.record:
        details = {key: value for key, value in operation.items() if key not in _LONG and key != "operation"}
        lines.append(f"- `{operation['operation']}` {json.dumps(details, ensure_ascii=False)}")
    if not lines:
        return card
    addition = "\n".join(lines) + "\n"
    if section := re.search(rf"^{_HEADING}$", card, flags=re.MULTILINE):
        following = re.compile(r"^##? ", flags=re.MULTILINE).search(card, section.end())
        end = following.start() if following else len(card)
        return card[:end].rstrip() + "\n" + addition + ("\n" + card[end:] if following else "")
    intro = "Edited with moesurgeon; expert maps, dropped tensors and documents are in `moesurgeon.json`."
    return f"{card.rstrip()}\n\n{_HEADING}\n\n{intro}\n\n{addition}".lstrip()
