"""Only what is meant to change changes; a killed recovery ends as an unbroken one; the student can be the teacher."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from moesurgeon.errors import NothingToDo, OutputError
from moesurgeon.pipeline.subject import Subject, open_subject
from moesurgeon.pipeline.verify import verify
from moesurgeon.recovery.resident import Resident
from moesurgeon.recovery.state import Store
from tests.laws.recoveries import CASES, QUICK, Case, bytes_of, case_of, recovered_to, texts


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return case_of(CASES["mixtral float32 distill"], tmp_path_factory.mktemp("case"))


@pytest.fixture
def reading(case: Case, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with texts(monkeypatch, case.training, case.heldout):
        yield


def _changed(before: Subject, after: str) -> set[str]:
    mine, theirs = bytes_of(before), bytes_of(open_subject(after))
    assert mine.keys() == theirs.keys()
    return {name for name in mine if mine[name] != theirs[name]}


def _names(subject: Subject, *projections: str, routers: bool) -> set[str]:
    anatomy = subject.anatomy
    named = {name for name, role in anatomy.of_kind("expert", "fused") if role.projection in projections}
    return named | {anatomy.router_weight(layer) for layer in anatomy.moe_layers if routers}


@pytest.mark.usefixtures("reading")
@pytest.mark.parametrize(
    ("adapt", "projections", "routers"),
    [
        (("full-routers",), (), True),
        (("experts",), ("down",), False),
        (("routers", "experts-all"), ("gate", "up", "down"), True),
    ],
)
def test_only_what_is_trained_changes(
    adapt: tuple[str, ...], projections: tuple[str, ...], routers: bool, case: Case, out: Path
) -> None:
    report = recovered_to(case.student.name, case.teacher.name, out, adapt=adapt, schedule=QUICK)
    assert report["loss_after"] < report["loss_before"]
    assert _changed(case.student, str(out)) == _names(case.student, *projections, routers=routers)
    assert set(report["parts"]) == {"experts" if projections else "routers", "routers" if routers else "experts"}
    assert set(report["plan"]["operations"][0]["replaced"]) == _changed(case.student, str(out))
    # What was done is in the record, and the rest is proved to be the source's.
    proof = verify(str(out), case.student.name)
    assert proof["tensors_replaced"] == len(_changed(case.student, str(out)))
    assert not list(out.parent.glob(".*"))


@pytest.mark.usefixtures("reading")
def test_the_parts_are_what_each_alone_would_be(case: Case, out: Path) -> None:
    """Written by hand: the routers of the result with the experts of the source, and the other way round."""
    report = recovered_to(case.student.name, case.teacher.name, out, adapt=("routers", "experts"), schedule=QUICK)
    result = open_subject(str(out))
    for part, names in (
        ("routers", _names(case.student, routers=True)),
        ("experts", _names(case.student, "down", routers=False)),
    ):
        mixed = _mixed(case.student, result, names, out.with_name(part))
        judged = recovered_to(
            str(mixed), case.teacher.name, out.with_name(f"{part}-judged"), schedule=replace(QUICK, learning_rate=0.0),
            allow_noop=True,
        )  # fmt: skip
        assert report["parts"][part]["loss"] == pytest.approx(judged["loss_before"], rel=1e-6)


def _mixed(base: Subject, other: Subject, names: set[str], folder: Path) -> Path:
    """Write ``base`` with the tensors ``names`` of ``other``."""
    from safetensors.torch import load_file, save_file

    folder.mkdir()
    (folder / "config.json").write_bytes((base.root / "config.json").read_bytes())
    tensors = {name: tensor for path in base.root.glob("*.safetensors") for name, tensor in load_file(path).items()}
    theirs = {name: tensor for path in other.root.glob("*.safetensors") for name, tensor in load_file(path).items()}
    save_file(tensors | {name: theirs[name] for name in names}, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.usefixtures("reading")
def test_only_experts_whose_traffic_changed_are_trained(case: Case, out: Path) -> None:
    report = recovered_to(
        case.student.name, case.teacher.name, out, adapt=("experts",), changed=0.5, schedule=QUICK, allow_noop=True
    )
    changed = _changed(case.student, str(out))
    assert changed < _names(case.student, "down", routers=False)
    assert changed or report["loss_after"] == report["loss_before"]


# ---- killed and gone on ----


class Killed(BaseException):
    pass


@pytest.mark.usefixtures("reading")
@pytest.mark.parametrize("step", [1, 4, 5])
def test_a_killed_recovery_ends_as_an_unbroken_one(
    step: int, case: Case, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    schedule = replace(QUICK, steps=8, patience=3)
    options: dict[str, Any] = {
        "adapt": ("full-routers", "experts"),
        "schedule": schedule,
        "log": out.with_name("l.csv"),
    }
    clean = recovered_to(case.student.name, case.teacher.name, out, **options)
    log, whole = out.with_name("l.csv").read_bytes(), _folder(out)
    again = out.with_name("again") / "out"
    again.parent.mkdir()
    options["log"] = again.with_name("l.csv")
    with monkeypatch.context() as patch:
        _kill_at(step, patch)
        with pytest.raises(Killed):
            recovered_to(case.student.name, case.teacher.name, again, **options)
    assert not again.exists()
    state = again.with_name(".out.recover")
    assert (state / "state.pt").exists() == (step > 2)
    steps = _counted(monkeypatch)
    resumed = recovered_to(case.student.name, case.teacher.name, again, **options)
    assert len(steps) == 8 - (step - 1) // 2 * 2
    assert {**resumed, "output": 0} == {**clean, "output": 0}
    assert _folder(again) == whole
    assert again.with_name("l.csv").read_bytes() == log
    assert not state.exists()


def _kill_at(step: int, patch: pytest.MonkeyPatch) -> None:
    """Let the step of this number end in a kill."""
    before, steps = Resident.gradients, []

    def losses(self: Any, *given: Any) -> Any:
        steps.append(1)
        if len(steps) == step:
            raise Killed
        return before(self, *given)

    patch.setattr(Resident, "gradients", losses)


def _counted(patch: pytest.MonkeyPatch) -> list[int]:
    """Return a list that has an entry for every step from here on."""
    before, steps = Resident.gradients, []

    def losses(self: Any, *given: Any) -> Any:
        steps.append(1)
        return before(self, *given)

    patch.setattr(Resident, "gradients", losses)
    return steps


def _folder(path: Path) -> Mapping[str, bytes]:
    return {each.name: each.read_bytes() for each in path.iterdir()}


@pytest.mark.usefixtures("reading")
def test_what_another_recovery_left_is_not_gone_on_from(case: Case, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clean = recovered_to(case.student.name, case.teacher.name, out, schedule=QUICK)
    other = out.with_name("other")
    with monkeypatch.context() as patch:
        _kill_at(4, patch)
        with pytest.raises(Killed):
            recovered_to(case.student.name, case.teacher.name, other, schedule=replace(QUICK, learning_rate=3e-2))
    assert (other.with_name(".other.recover") / "state.pt").exists()
    again = recovered_to(case.student.name, case.teacher.name, other, schedule=QUICK)
    assert again["log"] == clean["log"]


@pytest.mark.usefixtures("reading")
def test_a_disk_that_refuses_keeps_the_last_state(case: Case, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save, saved_states = Store.save, []

    def full(self: Store, state: Any) -> None:
        if saved_states:
            raise OutputError("no room")
        saved_states.append(state)
        save(self, state)

    monkeypatch.setattr(Store, "save", full)
    with pytest.raises(OutputError, match="no room"):
        recovered_to(case.student.name, case.teacher.name, out, schedule=QUICK)
    assert not out.exists()
    assert (out.with_name(".out.recover") / "state.pt").exists()


@pytest.mark.usefixtures("reading")
def test_patience_ends_a_run_that_gets_no_better(case: Case, out: Path) -> None:
    still = replace(QUICK, steps=40, judge_every=1, learning_rate=0.0, patience=3)
    report = recovered_to(case.student.name, case.teacher.name, out, schedule=still, allow_noop=True)
    assert report["steps"] == 3 == len(report["log"])
    with pytest.raises(NothingToDo):
        recovered_to(case.student.name, case.teacher.name, out.with_name("other"), schedule=still)
    assert not out.with_name(".other.recover").exists()


@pytest.mark.usefixtures("reading")
def test_recomputed_layers_give_the_same_run(case: Case, out: Path) -> None:
    one = recovered_to(case.student.name, case.teacher.name, out, schedule=QUICK)
    two = recovered_to(
        case.student.name, case.teacher.name, out.with_name("two"), schedule=replace(QUICK, recompute=True)
    )
    for mine, theirs in zip(one["log"], two["log"], strict=True):
        assert mine["heldout"] == pytest.approx(theirs["heldout"], rel=1e-6)
    assert one["gradient_norm"] == pytest.approx(two["gradient_norm"], rel=1e-5)


@pytest.mark.usefixtures("reading")
def test_adalora_changes_routers_alone_says_their_ranks_and_goes_on_where_it_was(
    case: Case, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    schedule = replace(QUICK, steps=10, rank=3, learning_rate=2e-2)
    options: dict[str, Any] = {"adapter": "adalora", "schedule": schedule}
    clean = recovered_to(case.student.name, case.teacher.name, out, **options)
    assert clean["loss_after"] < clean["loss_before"]
    assert _changed(case.student, str(out)) == _names(case.student, routers=True)
    assert verify(str(out), case.student.name)["tensors_replaced"] == len(case.student.anatomy.moe_layers)
    assert set(clean["ranks"]) == {"last", "written"}
    assert sum(clean["ranks"]["last"].values()) == 3 * len(case.student.anatomy.moe_layers)
    again = out.with_name("again")
    with monkeypatch.context() as patch:
        _kill_at(8, patch)  # after ranks have been taken away
        with pytest.raises(Killed):
            recovered_to(case.student.name, case.teacher.name, again, **options)
    resumed = recovered_to(case.student.name, case.teacher.name, again, **options)
    assert {**resumed, "output": 0} == {**clean, "output": 0}
    assert _folder(again) == _folder(out)
