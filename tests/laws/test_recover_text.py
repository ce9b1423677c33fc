"""How much text a recovery asks its teacher for, and what its bars say of the work."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moesurgeon.engine.batches import rows_for
from moesurgeon.pipeline import recover_teacher
from moesurgeon.pipeline.options import Running, Text, Writing
from moesurgeon.pipeline.prune import prune
from moesurgeon.pipeline.prune_spec import PruneSpec
from moesurgeon.pipeline.recover import RecoverSpec, recover
from moesurgeon.pipeline.subject import Subject, open_subject
from moesurgeon.progress import Advance
from moesurgeon.recovery import said
from moesurgeon.recovery.resident import Resident
from moesurgeon.recovery.schedule import Schedule
from moesurgeon.traces.windows import Corpus, Window
from tests.engine.small import corpus_of, saved, small_model
from tests.laws.recoveries import LENGTH, bytes_of, recovered_to, texts

TOGETHER = rows_for(LENGTH)


@pytest.fixture
def pruned(tmp_path: Path) -> tuple[Subject, Subject]:
    """A teacher, and a student that is not the same model."""
    teacher = saved(small_model("mixtral", num_hidden_layers=1), tmp_path / "teacher")
    kept = tmp_path / "kept.json"
    kept.write_text('{"0": [0, 2, 3, 5, 6, 7]}')
    prune(teacher.name, PruneSpec(keep_experts=kept), Writing(output=tmp_path / "pruned"))
    return teacher, open_subject(str(tmp_path / "pruned"))


def corpora(subject: Subject, windows: int) -> tuple[Corpus, Corpus]:
    random = np.random.default_rng(0)
    tokens = random.integers(0, subject.anatomy.config["vocab_size"], (windows + 4, LENGTH)).astype(np.int32)
    made = [Window("text", number, 0, row) for number, row in enumerate(tokens)]
    return corpus_of(made[:windows]), corpus_of(made[windows:])


def test_a_teacher_is_asked_for_what_the_steps_need(
    pruned: tuple[Subject, Subject], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And what it said of more is of use for less, to the same bytes."""
    teacher, student = pruned
    asked: list[int] = []
    fill = recover_teacher.fill_cache

    def noted(*given: Any, **named: Any) -> None:
        asked.append(len(named["corpus"].windows))
        fill(*given, **named)

    monkeypatch.setattr(recover_teacher, "fill_cache", noted)

    def trained(name: str, cache: str, steps: int, seed: int = 0) -> dict[str, bytes]:
        schedule = Schedule(steps=steps, tokens_per_step=32 * LENGTH, judge_every=steps, seed=seed, learning_rate=1e-2)
        changes: dict[str, Any] = {"schedule": schedule, "cache": tmp_path / cache, "allow_noop": True}
        report = recovered_to(student.name, teacher.name, tmp_path / name, **changes)
        assert report["tokens"] == report["domains"]["text"] == LENGTH * TOGETHER * (1 if steps < 9 else 2)
        return bytes_of(open_subject(str(tmp_path / name)))

    with texts(monkeypatch, *corpora(student, 3 * TOGETHER)):
        few = trained("few", "small", steps=2)
        trained("many", "large", steps=9)
        assert asked == [TOGETHER, 2 * TOGETHER]
        assert trained("fewer", "large", steps=2) == few
        trained("other", "large", steps=2, seed=3)
        assert len(asked) == 2 and len(list((tmp_path / "large").iterdir())) == 1
        trained("more", "small", steps=9)
        assert asked[2:] == [2 * TOGETHER] and len(list((tmp_path / "small").iterdir())) == 1


class Watched:
    """A progress that knows how far each bar is."""

    def __init__(self) -> None:
        self.bars: dict[str, list[float]] = {}  # done and total
        self.open: list[str] = []

    @contextmanager
    def task(self, label: str, total: float, unit: str) -> Iterator[Advance]:
        assert not self.open, f"{label} within {self.open}"
        bar = self.bars[label] = [0.0, total]
        self.open.append(label)

        def advance(done: float) -> None:
            bar[0] += done

        yield advance
        self.open.remove(label)

    def note(self, message: str) -> None:
        pass

    def part(self) -> float:
        """Return how much of the open bar is full."""
        (label,) = self.open
        done, total = self.bars[label]
        return done / total


@pytest.mark.parametrize("adapt", [("routers",), ("routers", "experts")])
def test_no_bar_is_full_while_there_is_work(
    adapt: Any, pruned: tuple[Subject, Subject], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher, student = pruned
    progress, parts = Watched(), dict[str, list[float]]()

    def watched(owner: Any, name: str) -> None:
        real = getattr(owner, name)

        def call(*given: Any, **named: Any) -> Any:
            parts.setdefault(name, []).append(progress.part())
            return real(*given, **named)

        monkeypatch.setattr(owner, name, call)

    for owner, name in ((Resident, "gradients"), (Resident, "judged"), (said, "_likeliest"), (said, "_pass")):
        watched(owner, name)
    schedule = Schedule(steps=5, tokens_per_step=2 * LENGTH, judge_every=2, learning_rate=1e-2)
    spec = RecoverSpec(teacher=teacher.name, schedule=schedule, adapt=adapt)
    with texts(monkeypatch, *corpora(student, TOGETHER + 40)):
        recover(
            student.name,
            spec,
            Text(length=LENGTH),
            Running(device="cpu"),
            Writing(output=tmp_path / "out", allow_noop=True),
            progress,
        )
    assert {name: len(found) for name, found in parts.items()} | {"judged": 0} == {
        "gradients": 5, "judged": 0, "_likeliest": 1, "_pass": 1,
    }  # fmt: skip
    assert len(parts["judged"]) >= 1 + 3
    assert all(part < 0.999 for found in parts.values() for part in found)
    for label in ("judging", "asking the teacher"):
        done, total = progress.bars[label]
        assert done == pytest.approx(total)
    done, total = progress.bars["recovering"]
    assert done <= total * 1.000001
    if len(parts["judged"]) > 4:  # something was won, and judged to the end
        assert done == pytest.approx(total)
