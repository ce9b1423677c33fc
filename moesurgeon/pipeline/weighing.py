"""What speaks for and against a choice of experts: how stable it is, and what those that go had of the traffic."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from moesurgeon.surgery.prune import Kept

if TYPE_CHECKING:
    from moesurgeon.profiling.statistics import Statistics
    from moesurgeon.selection.stability import Stability


def weigh(statistics: Statistics, found: Stability | None, kept: Kept, evidence: dict[str, Any]) -> list[str]:
    """Add to ``evidence`` how sure the choice is, ``found`` being how stable, and return what speaks against it."""
    evidence["stability"] = None if found is None else found.as_dict()
    warnings = []
    if found is None:
        warnings.append(
            "the profile has too few documents to tell whether other text would make the same choice; profile more text"
        )
    elif not found.is_settled:
        needed = "more of it" if found.tokens is None else f"about {found.tokens:,} tokens"
        warnings.append(
            f"the profile is too short for this choice: half of its documents would change {found.changed:.0%} of what "
            f"goes (layer {found.worst_layer}: {found.worst:.0%}); {needed} would settle it"
        )
    return warnings + weigh_support(statistics, kept, evidence)


def weigh_support(statistics: Statistics, kept: Kept, evidence: dict[str, Any]) -> list[str]:
    """Add to ``evidence`` which experts go though the profile hardly saw them, and return what is to be said of it."""
    from moesurgeon.profiling.uncertainty import SUPPORT, has_support

    supported = has_support(statistics)
    unsure = {
        str(layer): experts
        for row, layer in enumerate(statistics.layers)
        if (experts := [e for e in range(statistics.experts) if e not in kept[layer] and not supported[row, e]])
    }
    evidence["low_support"] = unsure
    if not unsure:
        return []
    places = [f"layer {layer}: {', '.join(map(str, experts[:8]))}" for layer, experts in unsure.items()]
    count = sum(map(len, unsure.values()))
    return [
        f"{count} of the experts that go {'was' if count == 1 else 'were'} given under {SUPPORT} tokens "
        f"({'; '.join(places[:6])}{'; ...' if len(places) > 6 else ''}): hardly seen is not cold, profile more text"
    ]


def weigh_traffic(
    statistics: Statistics, kept: Kept, evidence: dict[str, Any], criterion: str | None = None
) -> list[str]:
    """Add to ``evidence`` what the experts that go had of the traffic, and return a line for each layer it is much."""
    from moesurgeon.selection.traffic import removed_traffic, traffic_warnings

    evidence["traffic_removed"] = removed_traffic(statistics, kept)
    return traffic_warnings(evidence["traffic_removed"], criterion)
