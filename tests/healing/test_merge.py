"""Experts folded into others: against a plain merge in float64, and where that must change nothing."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment

from moesurgeon.engine.routing import routing_of
from moesurgeon.engine.streams import Stream
from moesurgeon.errors import CheckpointError
from moesurgeon.healing import heal as module
from moesurgeon.healing.block import error_of, own_values
from moesurgeon.healing.merge import SAMPLE, Merged, Merger, counts, nearest, put, routed, similarity, survivors
from moesurgeon.pipeline.subject import Subject, open_subject
from moesurgeon.surgery.plan import compose
from moesurgeon.surgery.prune import plan_prune
from tests.families.conftest import Stock
from tests.families.factory import config_of, load_tensors, save_checkpoint, save_tensors
from tests.healing.cases import HELD, KEPT, Stop, cut, healed, stopped
from tests.laws.walks import same, walked

NAMES = ("mixtral", "deepseek", "deepseek_v3", "qwen2_moe", "granitemoe")


def _source(stop: Stop) -> Stream:
    return Stream(stop.student.source)


def _experts(stop: Stop, source: Stream) -> list[tuple[torch.Tensor, torch.Tensor]]:
    experts: Any = source.blocks[stop.layer.number].experts
    return [
        (gate_up.double(), down.double()) for gate_up, down in zip(experts.gate_up_proj, experts.down_proj, strict=True)
    ]


@pytest.mark.parametrize("name", NAMES)
def test_a_merge_is_the_plain_one(name: str, stock: Stock) -> None:
    """All of it again, in float64: tokens, similarity, nearest survivor, pairing of units, averages."""
    subject = open_subject(str(stock(name)))
    with stopped(subject, cut(subject), which=1) as stop:
        kept = KEPT[stop.layer.number]
        found = Merger(stop.student).merged(stop.layer, stop.train)
        assert found is not None
        source = _source(stop)
        with source.bound(stop.layer.number + 1, stop.layer.read[stop.student.source]):
            block = source.blocks[stop.layer.number]
            logits, chosen = routed(block, stop.train.inputs)
            experts, act = _experts(stop, source), block.experts.act_fn  # type: ignore[union-attr]
        x = stop.train.inputs.double()
        assert len(x) < SAMPLE
        tokens = [int((chosen == expert).sum()) for expert in range(8)]
        assert list(found.tokens) == tokens and sum(tokens) == len(x) * subject.anatomy.top_k
        hidden = [act(gate) * up for gate, up in ((x @ gate_up.T).chunk(2, -1) for gate_up, _down in experts)]
        scores = routing_of(subject.anatomy).scores(logits).double()
        outputs = [hidden[e] @ down.T * scores[:, [e]] for e, (_gate_up, down) in enumerate(experts)]
        alike = np.zeros((8, 8))
        for i in range(8):
            for j in range(8):
                cosine = (outputs[i] * outputs[j]).sum() / outputs[i].norm() / outputs[j].norm()
                alike[i, j] = (cosine + np.corrcoef(logits[:, i].double(), logits[:, j].double())[0, 1]) / 2
        groups = subject.anatomy.groups[0]
        expected = {}
        for dropped in set(range(8)) - set(kept):
            near = [each for each in kept if each // (8 // groups) == dropped // (8 // groups)]
            expected[dropped] = max(near, key=lambda each: alike[dropped, each])
        assert found.into == expected
        gate_ups, downs = found.values.values()
        for place, survivor in enumerate(kept):
            members = [dropped for dropped, home in expected.items() if home == survivor]
            total = sum(tokens[each] for each in (survivor, *members)) or 1
            gate_up, down = experts[survivor]
            if not members:
                assert torch.equal(gate_ups[place].double(), gate_up) and torch.equal(downs[place].double(), down)
                continue
            share = tokens[survivor] / total
            mean = [share * gate_up, share * down]
            for member in members:
                order, sign = _pairs((*experts[survivor], hidden[survivor]), (*experts[member], hidden[member]))
                gate, up = experts[member][0].chunk(2)
                mean[0] += tokens[member] / total * torch.cat([gate[order], up[order] * sign[:, None]])
                mean[1] += tokens[member] / total * experts[member][1][:, order] * sign
            torch.testing.assert_close(gate_ups[place].double(), mean[0], rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(downs[place].double(), mean[1], rtol=1e-5, atol=1e-6)


def _pairs(one: tuple[torch.Tensor, ...], other: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    best = []
    for turn in (1.0, -1.0):
        vectors = []
        for (gate_up, down, active), factor in ((one, 1.0), (other, turn)):
            gate, up = gate_up.chunk(2)
            weights = torch.cat([gate, factor * up, factor * down.T], dim=1)
            vectors.append((torch.nn.functional.normalize(weights), torch.nn.functional.normalize(factor * active.T)))
        best.append(sum(mine @ theirs.T for mine, theirs in zip(*vectors, strict=True)))
    rows, columns = linear_sum_assignment(-torch.maximum(*best).numpy())
    sign = torch.where(best[0] >= best[1], 1.0, -1.0)
    return torch.from_numpy(columns), sign[rows, columns]


def _with_copies(folder: Path, name: str, **overrides: Any) -> tuple[Subject, dict[int, dict[int, int]]]:
    """Make each expert that ``cut`` drops a shuffled copy of the one that stays before it, and is routed like it."""
    save_checkpoint(folder / "random", name, **overrides)
    subject, tensors = open_subject(str(folder / "random")), load_tensors(folder / "random")
    draw = torch.Generator().manual_seed(5)
    homes: dict[int, dict[int, int]] = {}
    for layer in subject.anatomy.moe_layers:
        router = subject.anatomy.router_weight(layer)
        homes[layer] = {}
        for dropped in sorted(set(range(8)) - set(KEPT[layer])):
            # of its routing group; half of the experts are one
            home = next(each for each in KEPT[layer] if each // 4 == dropped // 4)
            homes[layer][dropped] = home
            width = subject.anatomy.expert_width
            order = torch.randperm(width, generator=draw)
            for each, role in subject.anatomy.of_kind("expert", layer=layer):
                if role.expert == home:
                    theirs = each.replace(f"experts.{home}.", f"experts.{dropped}.")
                    own = tensors[each]
                    tensors[theirs] = own[:, order] if role.projection == "down" else own[order]
            tensors[router][dropped] = tensors[router][home] * (1 + 1e-4 * (dropped - 3.5))
    save_tensors(folder / "copies", config_of(folder / "random"), tensors)
    return open_subject(str(folder / "copies")), homes


@pytest.mark.parametrize(
    ("name", "options"), [("mixtral", {"num_experts_per_tok": 1}), ("mixtral", {}), ("deepseek", {})]
)
def test_copies_go_home_and_change_nothing(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    """Merging a copy with its original is the original, however its units are ordered."""
    subject, homes = _with_copies(tmp_path, name, **options)
    for which, layer in enumerate(subject.anatomy.moe_layers):
        with stopped(subject, cut(subject), which=which) as stop:
            found = Merger(stop.student).merged(stop.layer, stop.train)
            assert found is not None and found.into == homes[layer]
            assert sum(found.tokens[dropped] for dropped in homes[layer]) > 0
            own = own_values(stop.block)
            assert found.values.keys() <= own.keys()
            for each, tensor in found.values.items():
                torch.testing.assert_close(tensor, own[each], rtol=1e-5, atol=1e-6)


def test_a_model_of_copies_is_what_it_was(tmp_path: Path) -> None:
    """Where one expert is chosen, the original gets what its copies had: nothing is lost by the cut."""
    subject, homes = _with_copies(tmp_path, "mixtral", num_experts_per_tok=1)
    done = healed(subject, cut(subject), "none", merge=True)
    for report in done.reports:
        (step,) = report["steps"]
        assert step["step"] == "merge" and step["error"] < 1e-9
        assert step["into"] == {str(dropped): home for dropped, home in homes[report["layer"]].items()}
    mine, theirs = (walked([stream], HELD)[0] for stream in (done.student, done.teacher))
    for one, other, batch in zip(mine, theirs, HELD, strict=True):
        found, wanted = one[batch.is_text], other[batch.is_text]
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3 * float(wanted.std()))


@pytest.mark.parametrize("method", ["none", "ridge", "distill"])
@pytest.mark.parametrize("kept", [True, False])
def test_the_better_start_is_taken(kept: bool, method: Any, stock: Stock, monkeypatch: pytest.MonkeyPatch) -> None:
    """A start that is all wrong is left out, to the last bit; a smaller output is better than the wrong expert's."""
    subject = open_subject(str(stock("mixtral")))
    plan, factor = cut(subject), 0.8 if kept else 1e6

    def started(self: Merger, layer: Any, data: Any) -> Merged:
        block = self._student.blocks[layer.number]
        values = {
            name: tensor * (factor if "down" in name else 1)
            for name, tensor in own_values(block).items()
            if name.startswith("experts.")
        }
        return Merged(values, {1: 0}, (1,) * 8)

    monkeypatch.setattr(Merger, "merged", started)
    plain, found = (healed(subject, plan, method, merge=merge) for merge in (False, True))
    for report in found.reports:
        step = report["steps"][0]
        assert step["step"] == "merge"
        assert step["kept"] == (step["healed_error"] < step["unmerged_error"])
        assert report["healed_error"] <= min(step["healed_error"], step["unmerged_error"])
    if kept:
        assert any(report["steps"][0]["kept"] for report in found.reports)
        first = next(report for report in found.reports if report["steps"][0]["kept"])
        block = found.student.blocks[first["layer"]]
        assert f"{block.name}.experts.gate_up_proj" in found.student.overlay.tensors
    else:
        assert not any(report["steps"][0]["kept"] for report in found.reports)
        mine, theirs = found.student.overlay.tensors, plain.student.overlay.tensors
        assert mine.keys() == theirs.keys() and all(torch.equal(mine[each], theirs[each]) for each in mine)
        for one, other in zip(found.reports, plain.reports, strict=method != "none"):
            assert {**one, "steps": one["steps"][1:]} == other


@pytest.mark.parametrize("name", ["mixtral", "deepseek_v3"])
def test_two_layers_at_a_time_merge_as_all_in_memory(name: str, stock: Stock, tmp_path: Path) -> None:
    from tests.engine.small import source_of

    subject = open_subject(str(stock(name)))
    expected = healed(subject, cut(subject), "ridge", merge=True)
    source = source_of(subject)
    source.supply.allow(source.supply.least)
    found = healed(subject, cut(subject), "ridge", merge=True, source=source, folder=tmp_path)
    assert found.reports == expected.reports
    assert same(walked([found.student], HELD)[0], walked([expected.student], HELD)[0])


def test_several_cuts_are_one_map(stock: Stock) -> None:
    subject = open_subject(str(stock("mixtral")))
    first = cut(subject)
    anatomy = first.result(subject.anatomy)
    second = plan_prune(anatomy, {layer: (0, 2, 3, 5) for layer in anatomy.moe_layers})
    both = compose(first, second)
    for layer in subject.anatomy.moe_layers:
        assert survivors(first, layer, 8) == KEPT[layer]
        assert survivors(both, layer, 8) == tuple(KEPT[layer][place] for place in (0, 2, 3, 5))
    assert survivors(None, 0, 8) == tuple(range(8))
    done = healed(subject, both, "ridge", merge=True)
    for report in done.reports:
        gone = set(range(8)) - set(survivors(both, report["layer"], 8))
        assert set(map(int, report["steps"][0]["into"])) == gone


def test_nothing_dropped_is_nothing_merged(stock: Stock) -> None:
    subject = open_subject(str(stock("deepseek")))
    everyone = plan_prune(subject.anatomy, {layer: tuple(range(8)) for layer in subject.anatomy.moe_layers})
    assert all(report["steps"] == [] for report in healed(subject, everyone, "none", merge=True).reports)


def test_nearest_keeps_within_the_routing_group() -> None:
    alike = np.full((8, 8), 0.1)
    alike[0, 7] = alike[5, 1] = 0.9
    alike[0, 3] = alike[5, 6] = 0.2
    kept = (1, 2, 3, 4, 6, 7)
    assert nearest(alike, kept) == {0: 7, 5: 1}
    assert nearest(alike, kept, groups=2) == {0: 3, 5: 6}
    assert nearest(np.zeros((4, 4)), (3, 1)) == {0: 1, 2: 1}


def test_without_tokens_the_survivor_stays(stock: Stock) -> None:
    """Nothing is known of a dropped expert that no token was given to."""
    subject = open_subject(str(stock("mixtral")))
    with stopped(subject, cut(subject)) as stop:
        one_token = replace(
            stop.train,
            **{name: getattr(stop.train, name)[:1] for name in ("inputs", "target", "indices", "weights")},
        )
        found = Merger(stop.student).merged(stop.layer, one_token)
        assert found is not None
        own, block = own_values(stop.block), stop.block
        idle = [place for place, survivor in enumerate(KEPT[0]) if not _busy(found, survivor)]
        assert len(idle) >= 4 and error_of(block, own, one_token) >= 0
        for name, tensor in found.values.items():
            for place in idle:
                assert torch.equal(tensor[place], own[name][place])


def _busy(found: Merged, survivor: int) -> bool:
    return any(found.tokens[dropped] for dropped, home in found.into.items() if home == survivor)


def test_the_block_is_as_it_was_afterwards(stock: Stock) -> None:
    subject = open_subject(str(stock("deepseek")))
    with stopped(subject, cut(subject)) as stop:
        own = own_values(stop.block)
        before = error_of(stop.block, own, stop.heldout)
        values = {name: torch.zeros_like(tensor) for name, tensor in own.items() if name.startswith("experts.")}
        with pytest.raises(KeyError), put(stop.student, stop.block, values):
            assert error_of(stop.block, own_values(stop.block), stop.heldout) != before
            raise KeyError
        after = own_values(stop.block)
        assert all(torch.equal(own[name], after[name]) for name in own)
        routed(stop.block, stop.train.inputs)
        assert "forward" not in vars(stop.block.experts)
        assert sum(counts(stop.block, stop.train)) == len(stop.train) * 2


def test_in_pieces_as_in_one(stock: Stock, monkeypatch: pytest.MonkeyPatch) -> None:
    subject = open_subject(str(stock("mixtral")))
    with stopped(subject, cut(subject)) as stop:
        whole = similarity(stop.block, stop.train.inputs, routing_of(subject.anatomy))
        monkeypatch.setattr("moesurgeon.healing.merge.OUTPUTS", 20_000)
        torch.testing.assert_close(similarity(stop.block, stop.train.inputs, routing_of(subject.anatomy)), whole)
        torch.testing.assert_close(whole.diagonal(), torch.ones(6, dtype=torch.float64), rtol=1e-5, atol=1e-5)


def test_an_expert_that_overflows_is_named(stock: Stock) -> None:
    subject = open_subject(str(stock("mixtral")))
    with stopped(subject, cut(subject)) as stop:
        stop.layer.read[stop.student.source][f"{stop.block.name}.experts.down_proj"][1] = torch.inf
        with pytest.raises(CheckpointError, match=r"layer 0: an expert .* or leave --merge out"):
            Merger(stop.student).merged(stop.layer, stop.train)


def test_merging_is_off_by_default(stock: Stock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "Merger", pytest.fail)
    subject = open_subject(str(stock("mixtral")))
    done = healed(subject, cut(subject), "scale")
    assert all([step["step"] for step in report["steps"]] == ["scale"] for report in done.reports)
