"""Where the tokens of dropped experts go: against counting token by token."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from moesurgeon.engine.batches import Batch
from moesurgeon.healing.dropped import numbers_of
from moesurgeon.pipeline.subject import Subject, open_subject
from moesurgeon.surgery.numbering import source_experts
from moesurgeon.surgery.plan import compose
from moesurgeon.surgery.prune import plan_prune
from moesurgeon.surgery.retop import RetopSpec, plan_retop
from tests.engine.small import source_of, stream_of
from tests.families.conftest import Stock
from tests.healing.cases import HELD, KEPT, LEARN, SHORT, cut, healed
from tests.laws.walks import RUNS, load_stock


def _routing(folder: Any, batches: list[Batch]) -> list[torch.Tensor]:
    """Return by mixture layer the experts [N, K] of all text, as stock transformers calls them."""
    model = load_stock(folder)
    found: dict[int, list[torch.Tensor]] = {}
    layers = model.base_model.layers  # type: ignore[union-attr]
    for number, layer in enumerate(layers):  # type: ignore[arg-type]
        for name, module in layer.named_modules():
            if name.endswith("experts") and hasattr(module, "gate_up_proj"):
                module.register_forward_pre_hook(
                    lambda _module, given, number=number: found.setdefault(number, []).append(given[1])
                )
    for batch in batches:
        with torch.no_grad():
            model(input_ids=batch.tokens, attention_mask=batch.mask, use_cache=False)
    masks = [batch.is_text.flatten() for batch in batches]
    return [
        torch.cat([one.view(len(mask), -1)[mask] for one, mask in zip(found[number], masks, strict=True)])
        for number in sorted(found)
    ]


@pytest.mark.parametrize("name", ["mixtral", "deepseek", "deepseek_v3", "qwen2_moe"])
def test_tokens_are_those_that_the_teacher_gave_them(name: str, stock: Stock) -> None:
    subject = open_subject(str(stock(name)))
    done = healed(subject, cut(subject), "ridge")
    given = _routing(stock(name), list(HELD))
    for report, layer, chosen in zip(done.reports, subject.anatomy.moe_layers, given, strict=True):
        dropped = [expert for expert in range(8) if expert not in KEPT[layer]]
        assert [each["expert"] for each in report["dropped"]] == dropped
        for each in report["dropped"]:
            assert each["tokens"] == int((chosen == each["expert"]).any(-1).sum())
            shares = [one["share"] for one in each["now"]]
            assert len(shares) <= 4 and shares == sorted(shares, reverse=True) and all(0 < one <= 1 for one in shares)
            assert {one["expert"] for one in each["now"]} <= set(KEPT[layer])
    total = [each for report in done.reports for each in report["dropped"] if each["tokens"] >= 20]
    assert sum(each["error_after"] < each["error_before"] for each in total) > len(total) / 2


def test_errors_and_goals_token_by_token(stock: Stock) -> None:
    """In the first layer teacher and student see the same input: all can be counted by hand."""
    from tests.healing.cases import stopped

    subject = open_subject(str(stock("mixtral")))
    with stopped(subject, cut(subject, top_k=1)) as stop:
        from moesurgeon.healing.block import output_of, own_values
        from moesurgeon.healing.dropped import explained

        own, data = own_values(stop.block), stop.heldout
        after = own | {"experts.down_proj": 0.5 * own["experts.down_proj"]}
        (given, *_) = _routing(stock("mixtral"), list(HELD))
        numbers = KEPT[0]
        found = explained(stop.block, own, after, data, given, numbers, experts=8)
        outputs = [output_of(stop.block, values, data.inputs).double() for values in (own, after)]
        assert [each["expert"] for each in found] == [1, 4]
        for each in found:
            mine = [t for t in range(len(data)) if each["expert"] in given[t].tolist()]
            assert each["tokens"] == len(mine) > 0
            counts_for = data.importance.double()
            norm = sum(float(data.target[t].double().square().sum() * counts_for[t]) for t in mine)
            for output, key in zip(outputs, ("error_before", "error_after"), strict=True):
                wrong = sum(float((output[t] - data.target[t].double()).square().sum() * counts_for[t]) for t in mine)
                assert each[key] == pytest.approx(wrong / norm, rel=1e-5)
            counts = {numbers[e]: sum(int(data.indices[t, 0]) == e for t in mine) / len(mine) for e in range(6)}
            assert sum(one["share"] for one in each["now"]) == pytest.approx(sum(sorted(counts.values())[-4:]))
            for one in each["now"]:
                assert one["share"] == pytest.approx(counts[one["expert"]])


def test_an_expert_without_tokens_is_said_to_have_none(stock: Stock) -> None:
    from moesurgeon.healing.block import own_values
    from moesurgeon.healing.dropped import explained
    from tests.healing.cases import stopped

    subject = open_subject(str(stock("mixtral")))
    with stopped(subject, cut(subject)) as stop:
        own = own_values(stop.block)
        given = torch.zeros(len(stop.heldout), 2, dtype=torch.long)
        found = explained(stop.block, own, own, stop.heldout, given, KEPT[0], experts=8)
        assert found[0] == {"expert": 1, "tokens": 0, "error_before": None, "error_after": None, "now": []}


@pytest.mark.parametrize("name", RUNS)
def test_it_changes_nothing_and_a_retop_drops_none(name: str, stock: Stock) -> None:
    subject = open_subject(str(stock(name)))
    if subject.anatomy.family.fixed_top_k is not None or subject.anatomy.top_k == 1:
        pytest.skip("its top-k is fixed")
    done = healed(subject, plan_retop(subject.anatomy, RetopSpec(top_k=1)), "scale", learn=LEARN[:1])
    assert all(report["dropped"] == [] for report in done.reports)
    pruned = healed(subject, cut(subject), "scale", learn=LEARN[:1])
    assert all(len(report["dropped"]) == 2 for report in pruned.reports)
    for block in (*done.student.blocks.values(), *pruned.teacher.blocks.values()):
        assert not block.experts._forward_pre_hooks


def _pruned_twice(subject: Subject) -> Any:
    first = cut(subject)
    second = {layer: (0, 2, 3, 5) for layer in subject.anatomy.moe_layers}
    return compose(first, plan_prune(first.result(subject.anatomy), second))


def test_numbers_go_through_several_prunes(stock: Stock) -> None:
    subject = open_subject(str(stock("mixtral")))
    plan = _pruned_twice(subject)
    for layer, kept in KEPT.items():
        assert source_experts(plan.record, layer, 8) == tuple(kept[place] for place in (0, 2, 3, 5))
    done = healed(subject, plan, "scale", pace=SHORT, learn=LEARN[:1])
    for report in done.reports:
        wanted = [KEPT[report["layer"]][place] for place in (0, 2, 3, 5)]
        assert [each["expert"] for each in report["dropped"]] == [e for e in range(8) if e not in wanted]


def test_a_teacher_with_other_numbers_explains_nothing(stock: Stock, tmp_path: Any) -> None:
    from moesurgeon.surgery.apply import apply

    subject = open_subject(str(stock("mixtral")))
    apply(cut(subject), subject.checkpoint, tmp_path / "six")
    smaller = open_subject(str(tmp_path / "six"))
    kept = {layer: (0, 1, 2, 3) for layer in smaller.anatomy.moe_layers}
    from moesurgeon.engine.streams import Overlay, Stream

    student = Stream(source_of(smaller), Overlay(plan=plan_prune(smaller.anatomy, kept)))
    assert numbers_of(student, stream_of(subject), 0) is None
    assert numbers_of(student, stream_of(smaller), 0) == (0, 1, 2, 3)
