"""Recovery refuses what cannot work, and writes what it judged: the best state, as good as reported."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moesurgeon.engine.streams import Overlay, Stream
from moesurgeon.engine.whole import filled
from moesurgeon.errors import NothingToDo, UsageError
from moesurgeon.evaluation.measure import LOSS, measure
from moesurgeon.pipeline.subject import Subject, open_subject
from moesurgeon.recovery import resident, train
from moesurgeon.recovery.judge import Judge
from moesurgeon.recovery.objective import Losses
from moesurgeon.recovery.result import Recovered, Training
from moesurgeon.recovery.schedule import Schedule
from moesurgeon.recovery.train import NOISE
from moesurgeon.surgery.anatomy import Anatomy
from moesurgeon.surgery.plan import identity
from moesurgeon.traces.windows import Corpus
from tests.engine.small import batches_for, source_of, stream_of
from tests.laws.recoveries import CASES, LENGTH, SHORT, Case, bytes_of, case_of, random_corpora, recovered_to, texts

# ---- what is refused ----


def test_the_plain_loss_is_refused_where_it_has_no_gradient(tiny_mixtral_1: Subject, out: Path) -> None:
    with pytest.raises(UsageError, match="the gate renormalises, so the weight is the constant 1") as raised:
        recovered_to(tiny_mixtral_1.name, "builtin:tiny-mixtral", out, losses=Losses(objective="lm"))
    assert raised.value.exit_code == 2
    assert not out.exists()


def test_the_plain_loss_is_accepted_where_it_has_one(
    tiny_deepseek_1: Subject, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with texts(monkeypatch, *random_corpora(tiny_deepseek_1)):
        report = recovered_to(
            tiny_deepseek_1.name, "builtin:tiny-deepseek", out, losses=Losses(objective="lm"), allow_noop=True
        )
    assert report["gradient_norm"] > NOISE
    assert [entry["step"] for entry in report["log"]] == [2]


@pytest.mark.parametrize("balance", [0.0, 0.01])
def test_an_objective_that_does_not_reach_the_routers_is_refused(
    balance: float, tiny_mixtral_1: Subject, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With one candidate even distillation has no gradient; the balancing loss, which has one, must not hide it."""
    with (
        texts(monkeypatch, *random_corpora(tiny_mixtral_1)),
        pytest.raises(UsageError, match="rounding noise: this objective does not reach them") as raised,
    ):
        recovered_to(
            tiny_mixtral_1.name,
            "builtin:tiny-mixtral",
            out,
            losses=Losses(balance=balance),
            schedule=replace(SHORT, candidates=1),
        )
    assert not isinstance(raised.value, NothingToDo)
    assert not out.exists()


# ---- the result ----


@pytest.fixture(scope="module", params=CASES.values(), ids=CASES.keys())
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    return case_of(request.param, tmp_path_factory.mktemp("case"))


# Routers that were made at random change whom they choose as they learn: the floor has a test of its own.
SCHEDULE = Schedule(steps=16, tokens_per_step=512, judge_every=4, learning_rate=1e-2, min_share=0.0)


@pytest.fixture(scope="module")
def recovered(case: Case, tmp_path_factory: pytest.TempPathFactory) -> tuple[Subject, dict[str, Any]]:
    """The student, recovered and written."""
    out = tmp_path_factory.mktemp("recovered") / "out"
    with pytest.MonkeyPatch.context() as patch, texts(patch, case.training, case.heldout):
        report = _run(case, out)
    return open_subject(str(out)), report


def _run(case: Case, out: Path, **changes: Any) -> dict[str, Any]:
    schedule = replace(SCHEDULE, **changes.pop("schedule", {}))
    losses = Losses(objective=case.objective)  # type: ignore[arg-type]
    return recovered_to(case.student.name, case.teacher.name, out, losses=losses, schedule=schedule, **changes)


def test_only_routers_change(case: Case, recovered: tuple[Subject, dict[str, Any]]) -> None:
    before, after = bytes_of(case.student), bytes_of(recovered[0])
    assert before.keys() == after.keys()
    assert case.student.anatomy.tensors.keys() == recovered[0].anatomy.tensors.keys()
    changed = {name for name in before if before[name] != after[name]}
    assert changed == {case.student.anatomy.router_weight(layer) for layer in case.student.anatomy.moe_layers}


def test_what_is_written_is_the_best_state_and_as_good_as_reported(
    case: Case, recovered: tuple[Subject, dict[str, Any]]
) -> None:
    """On text that was not trained on, with the weights as they are stored (rounded to bfloat16 in one case)."""
    subject, report = recovered
    losses = {
        name: _loss(stream_of(one), case.heldout)
        for name, one in (("before", case.student), ("after", subject), ("teacher", case.teacher))
    }
    assert report["loss_before"] == pytest.approx(losses["before"], rel=1e-9)
    assert report["loss_after"] == pytest.approx(losses["after"], rel=1e-9)
    assert report["teacher_loss"] == pytest.approx(losses["teacher"], rel=1e-6)
    assert report["loss_after"] == min(entry["heldout"] for entry in report["log"])
    assert losses["teacher"] < losses["after"] < losses["before"]
    gap = losses["before"] - losses["teacher"]
    assert report["gap_closed"] == pytest.approx((losses["before"] - losses["after"]) / gap, rel=1e-6)


def _loss(stream: Stream, corpus: Corpus) -> float:
    measured = measure(stream, corpus.domains, batches_for(corpus, LENGTH))
    return float(measured.sums[:, LOSS].sum() / measured.positions.sum())


def test_the_best_state_is_kept_when_a_later_one_is_worse(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    states: list[dict[str, torch.Tensor]] = []
    judgements = iter([3.0, 1.0, 2.0, 1.5])
    judged, start = Judge.judged, []

    def noted(judge: Judge, *given: Any) -> Any:
        """Of the start, as it is; then as above; at the end, of the best state, as it is."""
        found = judged(judge, *given)
        if not start:
            start.append(found)
        elif len(states) < 4 and adapted:
            states.append(adapted[-1].state())
            sums = np.zeros_like(found.sums)
            sums[0] = next(judgements) * found.measured.positions.sum()
            return replace(found, sums=sums)
        return found

    adapted: list[Any] = []

    class Noted(resident.Adapted):
        def __init__(self, *given: Any, **named: Any) -> None:
            super().__init__(*given, **named)
            adapted.append(self)

    monkeypatch.setattr(Judge, "judged", noted)
    monkeypatch.setattr(resident, "Adapted", Noted)
    result = _recovered(case, replace(SCHEDULE, steps=4, judge_every=1))
    assert [entry["heldout"] for entry in result.log] == [3.0, 1.0, 2.0, 1.5]
    best = adapted[0].state()
    assert all(torch.equal(best[name], states[1][name]) for name in best)
    assert not all(torch.equal(best[name], states[3][name]) for name in best)
    assert result.tensors is not None


def _recovered(case: Case, schedule: Schedule, **given: Any) -> Recovered:
    """Train without writing, with the student as its own teacher."""
    subject = case.student
    source = source_of(subject)
    student = Stream(source, Overlay(plan=identity(subject.anatomy)))
    losses = given.pop("losses", Losses(objective=case.objective))  # type: ignore[arg-type]
    training = Training(losses=losses, schedule=schedule, length=LENGTH, **given)
    teacher = with_two_experts(subject)
    return train.train(student, filled(source), teacher, case.training, case.heldout, training)


def with_two_experts(subject: Subject) -> Anatomy:
    """Return the anatomy of ``subject`` with two experts per token."""
    return replace(subject.anatomy, top_k=2, top_ks=(2,) * len(subject.anatomy.top_ks))


def test_judging_does_not_disturb_the_training(case: Case) -> None:
    """The last state of a run that judges at every step is that of one that judges at the end."""
    often = _recovered(case, replace(SCHEDULE, steps=4, judge_every=1))
    once = _recovered(case, replace(SCHEDULE, steps=4, judge_every=4))
    assert often.log[-1] == once.log[-1]


def test_the_same_seed_gives_the_same_bytes(
    case: Case, recovered: tuple[Subject, dict[str, Any]], out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with texts(monkeypatch, case.training, case.heldout):
        torch.manual_seed(12345)  # whatever happened before in the process
        again = _run(case, out)
        other = _run(case, out.with_name("other"), schedule={"seed": 1})
    assert again["log"] == recovered[1]["log"]
    for path in recovered[0].root.iterdir():
        assert (out / path.name).read_bytes() == path.read_bytes(), path.name
    routers = [case.student.anatomy.router_weight(layer) for layer in case.student.anatomy.moe_layers]
    mine, theirs = bytes_of(recovered[0]), bytes_of(open_subject(other["output"]))
    assert all(mine[name] != theirs[name] for name in routers)


def test_nothing_better_writes_nothing(case: Case, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    still = {"learning_rate": 0.0, "steps": 2, "judge_every": 1}
    with texts(monkeypatch, case.training, case.heldout):
        with pytest.raises(NothingToDo, match="nothing better than the start") as raised:
            _run(case, out, schedule=still)
        assert raised.value.exit_code == 2
        assert not out.exists()
        report = _run(case, out, schedule=still, allow_noop=True)
    assert report["loss_after"] == report["loss_before"]
    assert report["gap_closed"] == 0.0
    # The start is judged like every other state: standing still is worth exactly nothing.
    assert [entry["heldout"] for entry in report["log"]] == [report["loss_before"]] * 2
    assert bytes_of(open_subject(str(out))) == bytes_of(case.student)


@pytest.mark.parametrize("min_share", [0.25, 0.0])
def test_a_state_that_starves_an_expert_is_the_best_only_if_it_may(
    min_share: float, case: Case, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train, "starves", lambda usage: True)
    with texts(monkeypatch, case.training, case.heldout):
        if min_share:
            with pytest.raises(NothingToDo, match="let experts fall below --min-share"):
                _run(case, out, schedule={"min_share": min_share})
            assert not out.exists()
        else:
            assert _run(case, out, schedule={"min_share": min_share})["gap_closed"] > 0
