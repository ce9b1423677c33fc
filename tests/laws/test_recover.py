"""Recovery refuses what cannot work, and writes what it judged: the best state, as good as reported."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from moesurgeon.checkpoint.reader import ShardReader
from moesurgeon.engine.streams import Stream
from moesurgeon.errors import NothingToDo, UsageError
from moesurgeon.evaluation.measure import LOSS, measure
from moesurgeon.pipeline import recover as pipeline
from moesurgeon.pipeline.options import Running, Text, Writing
from moesurgeon.pipeline.recover import RecoverSpec, recover
from moesurgeon.pipeline.subject import Subject, open_subject
from moesurgeon.recovery import train
from moesurgeon.recovery.objective import Losses
from moesurgeon.recovery.train import NOISE, Recovered, Schedule, recover_routers
from moesurgeon.traces.windows import Corpus, Window
from tests.engine.small import VOCABULARY, batches_for, corpus_of, running, saved, small_model, stream_of

LENGTH = 32

# ---- what is refused ----


def _random_corpora(subject: Subject) -> tuple[Corpus, Corpus]:
    random = np.random.default_rng(0)
    tokens = random.integers(0, subject.anatomy.config["vocab_size"], (8, LENGTH)).astype(np.int32)
    windows = [Window("text", number, 0, row) for number, row in enumerate(tokens)]
    return corpus_of(windows[:4]), corpus_of(windows[4:])


@contextmanager
def _text(monkeypatch: pytest.MonkeyPatch, training: Corpus, heldout: Corpus) -> Iterator[None]:
    """Let the pipeline read these corpora in place of traces."""
    corpora = {"calibration": training, "validation": heldout}
    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "read_text", lambda subject, text, *, builtin_split, **rest: corpora[builtin_split])
        yield


SHORT = Schedule(steps=2, tokens_per_step=64, judge_every=2)


def _recover(source: str, teacher: str, output: Path, **changes: Any) -> dict[str, Any]:
    spec = RecoverSpec(teacher=teacher, losses=changes.pop("losses", Losses()), schedule=changes.pop("schedule", SHORT))
    return recover(source, spec, Text(length=LENGTH), Running(device="cpu"), replace(Writing(output=output), **changes))


def test_the_plain_loss_is_refused_where_it_has_no_gradient(tiny_mixtral_1: Subject, out: Path) -> None:
    with pytest.raises(UsageError, match="the gate renormalises, so the weight is the constant 1") as raised:
        _recover(tiny_mixtral_1.name, "builtin:tiny-mixtral", out, losses=Losses(objective="lm"))
    assert raised.value.exit_code == 2
    assert not out.exists()


def test_the_plain_loss_is_accepted_where_it_has_one(
    tiny_deepseek_1: Subject, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with _text(monkeypatch, *_random_corpora(tiny_deepseek_1)):
        report = _recover(
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
        _text(monkeypatch, *_random_corpora(tiny_mixtral_1)),
        pytest.raises(UsageError, match="rounding noise: this objective does not reach them") as raised,
    ):
        _recover(
            tiny_mixtral_1.name,
            "builtin:tiny-mixtral",
            out,
            losses=Losses(balance=balance),
            schedule=replace(SHORT, candidates=1),
        )
    assert not isinstance(raised.value, NothingToDo)
    assert not out.exists()


# ---- the result ----


@dataclass(frozen=True)
class Case:
    """A teacher, a student with other routers and one expert per token, and text that the teacher wrote.

    On its own text nobody is better than the teacher, so a router that routes as the teacher's does
    lowers the loss: the random models have something to recover.
    """

    teacher: Subject
    student: Subject
    training: Corpus
    heldout: Corpus
    objective: str


_CASES = {
    "mixtral float32 distill": ("mixtral", {}, torch.float32, "distill"),
    # Raw weights: rounding a router to bfloat16 shows in every token, not only where a choice flips.
    "deepseek bfloat16 lm": ("deepseek_v1", {"first_k_dense_replace": 0}, torch.bfloat16, "lm"),
}


@pytest.fixture(scope="module", params=_CASES.values(), ids=_CASES.keys())
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    family, changes, dtype, objective = request.param
    folder = tmp_path_factory.mktemp("case")
    large = small_model(family, num_hidden_layers=2, **changes)
    with torch.no_grad():
        large.lm_head.weight.mul_(3.0)  # surer of the next token, so that there is more to lose
    small = small_model(family, num_hidden_layers=2, num_experts_per_tok=1, **changes)
    small.load_state_dict(large.state_dict())
    random = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for layer in small.model.layers:
            layer.mlp.gate.weight.normal_(0.0, 0.2, generator=random)
    teacher = saved(large.to(dtype), folder / "teacher")
    return Case(
        teacher,
        saved(small.to(dtype), folder / "student"),
        corpus_of(_written_by(running(teacher), count=48, seed=1)),
        corpus_of(_written_by(running(teacher), count=24, seed=2)),
        objective,
    )


def _written_by(model: PreTrainedModel, *, count: int, seed: int) -> list[Window]:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        first = torch.randint(VOCABULARY, (count, 1))
        mask = torch.ones_like(first)
        text = model.generate(
            first, attention_mask=mask, max_new_tokens=LENGTH - 1, do_sample=True, top_k=0, pad_token_id=0,
            eos_token_id=None,
        )  # fmt: skip
    return [Window("text", number, 0, row.numpy().astype(np.int32)) for number, row in enumerate(text)]


SCHEDULE = Schedule(steps=16, tokens_per_step=512, judge_every=4, learning_rate=1e-2)


@pytest.fixture(scope="module")
def recovered(case: Case, tmp_path_factory: pytest.TempPathFactory) -> tuple[Subject, dict[str, Any]]:
    """The student, recovered and written."""
    out = tmp_path_factory.mktemp("recovered") / "out"
    with pytest.MonkeyPatch.context() as patch, _text(patch, case.training, case.heldout):
        report = _run(case, out)
    return open_subject(str(out)), report


def _run(case: Case, out: Path, **changes: Any) -> dict[str, Any]:
    schedule = replace(SCHEDULE, **changes.pop("schedule", {}))
    losses = Losses(objective=case.objective)  # type: ignore[arg-type]
    return _recover(case.student.name, case.teacher.name, out, losses=losses, schedule=schedule, **changes)


def _bytes(subject: Subject) -> dict[str, bytes]:
    with ShardReader(subject.checkpoint) as reader:
        return {name: reader.read(tensor) for name, tensor in subject.checkpoint.tensors.items()}


def test_only_routers_change(case: Case, recovered: tuple[Subject, dict[str, Any]]) -> None:
    before, after = _bytes(case.student), _bytes(recovered[0])
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
    assert report["teacher_loss"] == pytest.approx(losses["teacher"], rel=1e-9)
    assert report["loss_after"] == min(entry["heldout"] for entry in report["log"])
    assert losses["teacher"] < losses["after"] < losses["before"]
    gap = losses["before"] - losses["teacher"]
    assert report["gap_closed"] == pytest.approx((losses["before"] - losses["after"]) / gap, rel=1e-6)


def _loss(stream: Stream, corpus: Corpus) -> float:
    measured = measure(stream, corpus.domains, batches_for(corpus, LENGTH))
    return float(measured.sums[:, LOSS].sum() / measured.positions.sum())


def test_the_best_state_is_kept_when_a_later_one_is_worse(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    states: list[dict[int, torch.Tensor]] = []
    merged = train.adapted_routers
    judgements = iter([3.0, 1.0, 2.0, 1.5])

    def noted(model: Any, anatomy: Any) -> dict[int, torch.Tensor]:
        states.append(merged(model, anatomy))
        return states[-1]

    monkeypatch.setattr(train, "adapted_routers", noted)
    monkeypatch.setattr(train._Judge, "loss", lambda judge: next(judgements))
    result = _recovered(case, replace(SCHEDULE, steps=4, judge_every=1))
    assert result.loss_after == 1.0
    assert result.routers is states[1]
    assert not torch.equal(states[1][0], states[3][0])
    assert [entry["heldout"] for entry in result.log] == [3.0, 1.0, 2.0, 1.5]


def _recovered(case: Case, schedule: Schedule) -> Recovered:
    return recover_routers(
        running(case.student),
        running(case.teacher),
        case.student.anatomy,
        case.teacher.anatomy,
        case.training,
        case.heldout,
        length=LENGTH,
        losses=Losses(objective=case.objective),  # type: ignore[arg-type]
        schedule=schedule,
    )


def test_judging_does_not_disturb_the_training(case: Case) -> None:
    """The last state of a run that judges at every step is that of one that judges at the end."""
    often = _recovered(case, replace(SCHEDULE, steps=4, judge_every=1))
    once = _recovered(case, replace(SCHEDULE, steps=4, judge_every=4))
    assert often.log[-1] == once.log[-1]


def test_the_same_seed_gives_the_same_bytes(
    case: Case, recovered: tuple[Subject, dict[str, Any]], out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with _text(monkeypatch, case.training, case.heldout):
        torch.manual_seed(12345)  # whatever happened before in the process
        again = _run(case, out)
        other = _run(case, out.with_name("other"), schedule={"seed": 1})
    assert again["log"] == recovered[1]["log"]
    for path in recovered[0].root.iterdir():
        assert (out / path.name).read_bytes() == path.read_bytes(), path.name
    routers = [case.student.anatomy.router_weight(layer) for layer in case.student.anatomy.moe_layers]
    mine, theirs = _bytes(recovered[0]), _bytes(open_subject(other["output"]))
    assert all(mine[name] != theirs[name] for name in routers)


def test_nothing_better_writes_nothing(case: Case, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    still = {"learning_rate": 0.0, "steps": 2, "judge_every": 1}
    with _text(monkeypatch, case.training, case.heldout):
        with pytest.raises(NothingToDo, match="nothing better than the start") as raised:
            _run(case, out, schedule=still)
        assert raised.value.exit_code == 2
        assert not out.exists()
        report = _run(case, out, schedule=still, allow_noop=True)
    assert report["loss_after"] == report["loss_before"]
    assert report["gap_closed"] == 0.0
    # The start is judged like every other state: standing still is worth exactly nothing.
    assert [entry["heldout"] for entry in report["log"]] == [report["loss_before"]] * 2
    assert _bytes(open_subject(str(out))) == _bytes(case.student)
