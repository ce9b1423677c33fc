"""Where the teacher of a recovery is: in the student itself, in another model, in a cache."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from moesurgeon.errors import UsageError
from moesurgeon.pipeline import recover as pipeline
from moesurgeon.pipeline import recover_teacher
from moesurgeon.pipeline.options import Writing
from moesurgeon.pipeline.prune import prune
from moesurgeon.pipeline.prune_spec import PruneSpec
from moesurgeon.pipeline.retop import retop
from moesurgeon.pipeline.subject import Subject, open_subject
from moesurgeon.recovery.objective import Losses
from moesurgeon.surgery.retop import RetopSpec
from tests.engine.small import saved, small_model
from tests.laws.recoveries import QUICK, random_corpora, recovered_to, texts


def _top_1(folder: Path, **changes: int) -> tuple[Subject, Subject]:
    teacher = saved(small_model("mixtral", num_hidden_layers=2, **changes), folder / "teacher")
    retop(teacher.name, RetopSpec(top_k=1), Writing(output=folder / "top1"))
    return teacher, open_subject(str(folder / "top1"))


@pytest.mark.parametrize("losses", [Losses(), Losses(router=0.5, hidden=0.5, lm=0.1, z=0.01)], ids=["kl", "all"])
def test_a_student_that_is_its_own_teacher_learns_as_from_another_model(
    losses: Losses, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a vocabulary of 64 the cache holds the whole distribution, so that both are the same training."""
    teacher, student = _top_1(tmp_path, vocab_size=64)
    loaded = []
    fill = recover_teacher.fill_cache
    monkeypatch.setattr(
        recover_teacher, "fill_cache", lambda *given, **named: loaded.append(1) or fill(*given, **named)
    )
    with texts(monkeypatch, *random_corpora(student)):
        options: dict[str, Any] = {
            "losses": losses,
            "schedule": QUICK,
            "allow_noop": True,
            "adapt": ("routers", "experts"),
        }
        shared = recovered_to(student.name, teacher.name, tmp_path / "shared", **options)
        assert not loaded and shared["shares_weights"] is True
        monkeypatch.setattr(pipeline, "shares_weights", lambda *_: False)
        cached = recovered_to(student.name, teacher.name, tmp_path / "cached", **options)
        assert loaded == [1] and cached["shares_weights"] is False
    assert shared["teacher_loss"] == pytest.approx(cached["teacher_loss"], rel=1e-6)
    for one, other in zip(shared["log"], cached["log"], strict=True):
        for name in set(one) - {"step", "usage"}:
            assert one[name] == pytest.approx(other[name], rel=2e-4, abs=1e-7), name


def test_sharing_is_of_every_byte(tmp_path: Path) -> None:
    teacher, student = _top_1(tmp_path)
    assert recover_teacher.shares_weights(student, teacher)
    assert recover_teacher.shares_weights(teacher, teacher)
    # One byte of a tensor that no fingerprint samples.
    tensor = max(student.checkpoint.tensors.values(), key=lambda each: each.nbytes)
    with student.checkpoint.path_of(tensor.shard).open("r+b") as file:
        file.seek(tensor.offset + tensor.nbytes // 3)
        byte = file.read(1)
        file.seek(tensor.offset + tensor.nbytes // 3)
        file.write(bytes([byte[0] ^ 1]))
    changed = open_subject(student.name)
    assert changed.identity.tensors == teacher.identity.tensors
    assert not recover_teacher.shares_weights(changed, teacher)


def test_another_config_is_another_model(tmp_path: Path) -> None:
    teacher, student = _top_1(tmp_path)
    config = student.root / "config.json"
    config.write_text(config.read_text().replace('"rms_norm_eps": 1e-05', '"rms_norm_eps": 1e-06'))
    assert not recover_teacher.shares_weights(open_subject(student.name), teacher)


@pytest.mark.parametrize("losses", [Losses(), Losses(router=1.0)], ids=["kl", "router"])
def test_a_pruned_student_learns_from_a_cache_that_can_be_kept(
    losses: Losses, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher = saved(small_model("mixtral", num_hidden_layers=2), tmp_path / "teacher")
    kept = tmp_path / "kept.json"
    kept.write_text('{"0": [0, 2, 3, 5, 6, 7], "1": [1, 2, 4, 5, 6, 7]}')
    prune(teacher.name, PruneSpec(keep_experts=kept), Writing(output=tmp_path / "pruned"))
    student = open_subject(str(tmp_path / "pruned"))
    assert recover_teacher.experts_of_teacher(student, teacher) == {0: (0, 2, 3, 5, 6, 7), 1: (1, 2, 4, 5, 6, 7)}
    fill = recover_teacher.fill_cache
    with texts(monkeypatch, *random_corpora(student)):
        options: dict[str, Any] = {"losses": losses, "schedule": QUICK, "allow_noop": True, "cache": tmp_path / "cache"}
        first = recovered_to(student.name, teacher.name, tmp_path / "one", **options)
        assert len(list((tmp_path / "cache").iterdir())) == 1
        monkeypatch.setattr(recover_teacher, "fill_cache", pytest.fail)  # it has said all there is to say
        second = recovered_to(student.name, teacher.name, tmp_path / "two", **options)
        assert first["log"] == second["log"]
        monkeypatch.setattr(recover_teacher, "fill_cache", fill)
        recovered_to(
            student.name, teacher.name, tmp_path / "three", **{**options, "losses": replace(losses, temperature=2.0)}
        )
    assert len(list((tmp_path / "cache").iterdir())) == 2
    assert not list(tmp_path.glob(".*"))


def test_routers_of_unknown_experts_cannot_be_matched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    teacher = saved(small_model("mixtral", num_hidden_layers=2), tmp_path / "teacher")
    student = saved(small_model("mixtral", num_hidden_layers=2, num_local_experts=6), tmp_path / "student")
    with texts(monkeypatch, *random_corpora(student)):
        for options in ({"losses": Losses(router=1.0)}, {"adapt": ("experts",), "changed": 0.1}):
            with pytest.raises(UsageError, match="it is not known which of the 8 experts"):
                recovered_to(student.name, teacher.name, tmp_path / "out", **options)
