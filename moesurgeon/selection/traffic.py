"""How much of the traffic the experts that go had: a criterion may drop busy ones, and that has to be said.

Legend: L mixture layers, E experts, k experts per token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from moesurgeon.profiling.statistics import Statistics
from moesurgeon.selection.candidates import share_of_tokens
from moesurgeon.selection.criteria import SUMS

MUCH = 1.25
"""So many times the even share, of an expert or of all that go in a layer, is called much."""
_COUNTING = ", or choose by a criterion that counts tokens, such as --criterion traffic-reap"
_LAYERS, _EXPERTS = 8, 4  # that are named; the report has all


def removed_traffic(statistics: Statistics, kept: Mapping[int, Sequence[int]]) -> dict[str, Any]:
    """Return by layer what the experts that are not ``kept`` had, as the profile counted it:

    ``share`` of all that the layer routed, and ``even``, what that would be if all experts had alike; of each of the
    ``experts``, the busiest first, its ``share`` of the tokens, with ``even_expert`` (k / E) to hold it against;
    ``much``: whether ``share`` is over 1.25 times ``even``, or that of an expert over 1.25 times ``even_expert``.
    """
    shares, experts = share_of_tokens(statistics), statistics.experts
    even_expert = statistics.top_k / experts
    report = {}
    for row, layer in enumerate(statistics.layers):
        gone = sorted(set(range(experts)) - set(kept[layer]), key=lambda expert: (-shares[row, expert], expert))
        share, even = float(shares[row, gone].sum()) / statistics.top_k, len(gone) / experts
        busiest = float(shares[row, gone[0]]) if gone else 0.0
        report[str(layer)] = {
            "share": share,
            "even": even,
            "even_expert": even_expert,
            "experts": [{"expert": expert, "share": float(shares[row, expert])} for expert in gone],
            "much": share > MUCH * even or busiest > MUCH * even_expert,
        }
    return report


def traffic_warnings(removed: Mapping[str, Any], criterion: str | None = None) -> list[str]:
    """Return a line for each layer that loses much of its traffic by :func:`removed_traffic`, and what to do.

    ``criterion``: by which the experts were chosen; None where they were named.
    """
    much = {layer: found for layer, found in removed.items() if found["much"]}
    if not much:
        return []
    order = sorted(much, key=lambda layer: (-much[layer]["share"], int(layer)))
    shown = sorted(order[:_LAYERS], key=int)
    more = len(much) - len(shown)
    return [
        *(_line(layer, much[layer]) for layer in shown),
        f"experts with much traffic go in {len(much)} of {len(removed)} layers{_rest(more)}: keep more of them"
        f"{'' if criterion in SUMS else _COUNTING}, and compare with evaluate",
    ]


def _line(layer: str, found: Mapping[str, Any]) -> str:
    """Return what a layer loses: first who had the most."""
    gone, even = found["experts"], found["even_expert"]
    busy = [each for each in gone if each["share"] > MUCH * even] or gone
    first, *others = busy[:_EXPERTS]
    told = f"layer {layer}: expert {first['expert']} had {_percent(first['share'])} of the tokens"
    told += "".join(f", expert {each['expert']} {_percent(each['share'])}" for each in others)
    told += f" (even: {_percent(even)})"
    if len(gone) == 1:
        return f"{told}, and goes"
    return (
        f"{told}; the {len(gone)} that go had {_percent(found['share'])} of its traffic (even: "
        f"{_percent(found['even'])})"
    )


def _rest(more: int) -> str:
    return f" ({more} are not named here, --json has all)" if more else ""


def _percent(share: float) -> str:
    """Return a share for people.

    >>> _percent(0.2449), _percent(0.03125), _percent(0.0041)
    ('24 %', '3.1 %', '0.41 %')
    """
    return f"{100 * share:.0f} %" if share >= 0.0995 else f"{100 * share:.2g} %"
