"""The model card says what was done, operation by operation, and stays what it was otherwise."""

import pytest

from moesurgeon.surgery.card import edited_card
from moesurgeon.surgery.plan import EditPlan

RETOP = EditPlan({}, record=[{"operation": "retop", "top_k": {"before": 2, "after": 1}}])
PRUNE = EditPlan({}, record=[{"operation": "prune", "experts": {"after": 6}, "expert_map": {"0": {"1": 0}}}])
CARD = "---\nlicense: apache-2.0\n---\n\n# Model\n\nText.\n"


def test_operations_are_added_in_order_to_one_section() -> None:
    card = edited_card(edited_card(CARD, RETOP), PRUNE)
    assert card.startswith(CARD.rstrip())
    assert card.count("## Surgery") == 1
    assert card.index("`retop`") < card.index("`prune`")
    assert '"top_k": {"before": 2, "after": 1}' in card
    assert card.endswith("\n") and not card.endswith("\n\n")


def test_long_maps_are_left_to_the_provenance_file() -> None:
    card = edited_card(CARD, PRUNE)
    assert "expert_map" not in card
    assert "moesurgeon.json" in card


@pytest.mark.parametrize("card", ["", CARD, "no newline at the end"])
def test_nothing_done_is_nothing_said(card: str) -> None:
    assert edited_card(card, EditPlan({})) == card


def test_without_a_card_there_is_one_afterwards() -> None:
    assert edited_card("", RETOP).startswith("## Surgery\n\n")


def test_sections_after_the_surgery_stay_after_it() -> None:
    card = edited_card(CARD, RETOP) + "\n## Citation\n\nPlease.\n"
    again = edited_card(card, PRUNE)
    assert again.index("`retop`") < again.index("`prune`") < again.index("## Citation")
    assert again.endswith("\n## Citation\n\nPlease.\n")
    assert again.count("## ") == card.count("## ")


def test_a_line_per_operation_whatever_it_holds() -> None:
    plan = EditPlan({}, record=[{"operation": "prune", "criterion": "two\nlines\n## Surgery"}])
    card = edited_card(edited_card(CARD, plan), RETOP)
    assert len([line for line in card.splitlines() if line.startswith("- `")]) == 2
