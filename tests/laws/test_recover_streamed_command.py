"""``recover`` that streams: it writes what a resident one does, also after a kill, and memory decides."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from moesurgeon.errors import UsageError
from moesurgeon.pipeline import recover as pipeline
from moesurgeon.pipeline import recover_streamed, recover_teacher
from moesurgeon.pipeline.options import Running, Text, Writing
from moesurgeon.pipeline.prune import prune
from moesurgeon.pipeline.prune_spec import PruneSpec
from moesurgeon.pipeline.recover import RecoverSpec
from moesurgeon.pipeline.subject import open_subject
from moesurgeon.recovery.memory import ResidentBytes
from moesurgeon.recovery.objective import Losses
from moesurgeon.recovery.schedule import Schedule
from moesurgeon.recovery.streamed import Streamed
from tests.engine.small import saved, small_model
from tests.laws.recoveries import CASES, LENGTH, Case, bytes_of, case_of, random_corpora, recovered_to, texts

# Four steps of a rate at which every part gets better.
QUICK = Schedule(rank=4, steps=4, tokens_per_step=128, judge_every=2, learning_rate=1e-2, expert_rate=2e-3)


@pytest.fixture(scope="module", params=CASES.values(), ids=CASES.keys())
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    return case_of(request.param, tmp_path_factory.mktemp("case"))


@pytest.fixture
def reading(case: Case, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with texts(monkeypatch, case.training, case.heldout):
        yield


def _options(case: Case, *adapt: str) -> dict[str, Any]:
    return {"adapt": adapt, "schedule": QUICK, "losses": Losses(objective=case.objective)}  # type: ignore[arg-type]


@pytest.mark.usefixtures("reading")
@pytest.mark.parametrize("adapt", [("full-routers",), ("routers", "experts-all")], ids="+".join)
def test_it_writes_what_a_resident_training_writes(adapt: tuple[str, ...], case: Case, out: Path) -> None:
    """Losses to 1e-4, weights to 1e-3 of the largest, the same tensors and no other."""
    options = _options(case, *adapt)
    resident = recovered_to(case.student.name, case.teacher.name, out, **options)
    report = recovered_to(case.student.name, case.teacher.name, out.with_name("streamed"), streamed=True, **options)
    assert (resident["resident"], resident["bytes_read_per_step"]) == (True, 0)
    assert report["resident"] is False
    total = case.student.checkpoint.nbytes
    assert total < report["bytes_read_per_step"] < 2 * total
    for mine, theirs in zip(resident["log"], report["log"], strict=True):
        for name in set(mine) - {"step", "usage"}:
            assert mine[name] == pytest.approx(theirs[name], rel=1e-4), name
    assert report["gradient_norm"] == pytest.approx(resident["gradient_norm"], rel=1e-4)
    assert report["loss_after"] < report["loss_before"]
    one, other = (open_subject(str(path)) for path in (out, out.with_name("streamed")))
    before, mine, theirs = (bytes_of(each) for each in (case.student, one, other))
    changed = {name for name in before if before[name] != theirs[name]}
    assert changed == {name for name in before if before[name] != mine[name]}
    assert set(report["plan"]["operations"][0]["replaced"]) == changed
    dtype = {"F32": torch.float32, "BF16": torch.bfloat16}
    for name in changed:
        values = [
            torch.frombuffer(bytearray(each[name]), dtype=dtype[case.student.anatomy.tensors[name].dtype]).float()
            for each in (mine, theirs)
        ]
        assert float((values[0] - values[1]).abs().mean()) <= 1e-3 * float(values[0].abs().mean()), name
    assert not list(out.parent.glob(".*"))


class Killed(BaseException):
    pass


@pytest.mark.usefixtures("reading")
def test_a_killed_one_ends_as_an_unbroken_one(case: Case, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {**_options(case, "full-routers", "experts"), "streamed": True}
    clean = recovered_to(case.student.name, case.teacher.name, out, **options)
    again, gradients, steps = out.with_name("again"), Streamed.gradients, []

    def dying(self: Streamed, *given: Any) -> Any:
        steps.append(1)
        if len(steps) == 4:
            raise Killed
        return gradients(self, *given)

    monkeypatch.setattr(Streamed, "gradients", dying)
    with pytest.raises(Killed):
        recovered_to(case.student.name, case.teacher.name, again, **options)
    assert again.with_name(".again.recover").is_dir()
    resumed = recovered_to(case.student.name, case.teacher.name, again, **options)
    assert len(steps) == 4 + 2  # those since the last judgement
    assert {**resumed, "output": 0} == {**clean, "output": 0}
    assert bytes_of(open_subject(str(again))) == bytes_of(open_subject(str(out)))
    assert not list(out.parent.glob(".*"))


def test_a_pruned_student_and_its_streamed_teacher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    teacher = saved(small_model("mixtral", num_hidden_layers=2), tmp_path / "teacher")
    kept = tmp_path / "kept.json"
    kept.write_text('{"0": [0, 2, 3, 5, 6, 7], "1": [1, 2, 4, 5, 6, 7]}')
    prune(teacher.name, PruneSpec(keep_experts=kept), Writing(output=tmp_path / "pruned"))
    walked = []
    fill = recover_teacher.fill_cache

    def noted(folder: Path, digest: str, stream: Any, **rest: Any) -> None:
        walked.append(stream.source.supply.plan.is_resident)
        fill(folder, digest, stream, **rest)

    monkeypatch.setattr(recover_teacher, "fill_cache", noted)
    with texts(monkeypatch, *random_corpora(open_subject(str(tmp_path / "pruned")))):
        reports = [
            recovered_to(
                str(tmp_path / "pruned"), teacher.name, tmp_path / f"out{streamed}", schedule=QUICK,
                losses=Losses(router=0.5, hidden=0.5), allow_noop=True, streamed=streamed,
            )
            for streamed in (False, True)
        ]  # fmt: skip
    assert walked == [True, False]
    assert reports[1]["teacher_loss"] == pytest.approx(reports[0]["teacher_loss"], rel=1e-9)
    for mine, theirs in zip(reports[0]["log"], reports[1]["log"], strict=True):
        for name in set(mine) - {"step", "usage"}:
            assert mine[name] == pytest.approx(theirs[name], rel=1e-4), name


@pytest.mark.usefixtures("reading")
def test_memory_decides(case: Case, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What does not fit is streamed, with as many layers in memory as there is room for; two have to fit."""
    options = _options(case, "full-routers")
    assert recovered_to(case.student.name, case.teacher.name, out, **options)["resident"] is True
    monkeypatch.setattr(recover_streamed, "resident_bytes", lambda *_: ResidentBytes(0, 1 << 50))
    report = recovered_to(case.student.name, case.teacher.name, out.with_name("two"), **options)
    assert (report["resident"], report["bytes_read_per_step"]) == (False, 0)
    spec = RecoverSpec(teacher=case.teacher.name, **options)
    little = Running(device="cpu", max_memory=1)
    with pytest.raises(UsageError, match=r"this needs .*, --max-memory is 1B: give at least"):
        pipeline.recover(
            case.student.name, spec, Text(length=LENGTH), little, replace(Writing(output=out.with_name("three")))
        )
    assert not list(out.parent.glob(".*"))
