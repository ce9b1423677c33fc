"""``recover`` with its first half: layers healed on the way to the end-to-end training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from moesurgeon.errors import NothingToDo, OutputError, UsageError
from moesurgeon.healing.pace import Pace
from moesurgeon.pipeline import recover_layers as pipeline
from moesurgeon.pipeline.options import HealSpec, Running, Text, Writing
from moesurgeon.pipeline.recover import RecoverSpec
from moesurgeon.pipeline.recover_layers import recover_layers
from moesurgeon.pipeline.retop import retop
from moesurgeon.pipeline.verify import verify
from moesurgeon.recovery.schedule import Schedule
from moesurgeon.surgery.retop import RetopSpec
from tests.conftest import BUILTIN

TEXT = Text(traces=("builtin:json", "builtin:arithmetic"), max_tokens=2048, length=64)
HEAL = HealSpec(method="ridge", max_tokens=2048, heldout_tokens=1024, pace=Pace(steps=5))
RUNNING = Running(device="cpu", dtype="float32")


@pytest.fixture(scope="module", params=BUILTIN, ids=["mixtral", "deepseek"])
def edited(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A checkpoint with one expert per token, and what it was."""
    folder = tmp_path_factory.mktemp("edited") / "top1"
    retop(request.param, RetopSpec(top_k=1), Writing(output=folder))
    return folder, request.param


def run(
    edited: tuple[Path, str], out: Path, *, steps: int = 2, heal: HealSpec = HEAL, **writing: Any
) -> dict[str, Any]:
    schedule = Schedule(steps=steps, tokens_per_step=256, judge_every=1, rank=2)
    spec = RecoverSpec(teacher=edited[1], schedule=schedule, heldout_tokens=1024)
    return recover_layers(str(edited[0]), spec, heal, TEXT, RUNNING, Writing(output=out, **writing))


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}


def test_both_halves_are_one_operation(edited: tuple[Path, str], out: Path) -> None:
    report = run(edited, out)
    healed = report["healed"]
    assert healed["kept"] and healed["heldout"]["healed"] < healed["heldout"]["bare"]
    # The second half begins where the first one ended, and knows what that gave.
    assert report["loss_before"] == pytest.approx(healed["heldout"]["healed"], rel=1e-4)
    assert report["loss_after"] <= report["loss_before"]
    assert [each["method"] for each in report["healed_before"]] == ["ridge"]
    assert report["source"] == str(edited[0]) and not report["shares_weights"]
    assert sorted(path.name for path in out.parent.iterdir()) == ["out"]
    # The whole is what replaced tensors of the edited checkpoint, and nothing else.
    assert verify(str(out), source=str(edited[0]))["source"]


def test_layers_alone(edited: tuple[Path, str], out: Path) -> None:
    report = run(edited, out, steps=0)
    assert report["healed"]["kept"] and "steps" not in report
    changed = {name for name, data in files(out).items() if data != files(edited[0])[name]}
    assert changed
    planned = run(edited, out.with_name("dry"), steps=0, dry_run=True)
    assert planned["healed"]["planned"]["teacher"] == edited[1] and not out.with_name("dry").exists()


def test_what_training_cannot_better_is_written_as_healed(
    edited: tuple[Path, str], out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(edited, out, steps=0)
    still = out.with_name("still")
    monkeypatch.setattr("moesurgeon.recovery.train.starves", lambda usage: True)  # no state may be kept
    report = run(edited, still)
    assert report["gap_closed"] == 0
    assert files(still) == files(out)


def test_a_killed_run_goes_on_from_its_healed_layers(
    edited: tuple[Path, str], out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clean = out.with_name("clean")
    run(edited, clean)

    def killed(*_given: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "recover", killed)
        with pytest.raises(KeyboardInterrupt):
            run(edited, out)
    assert not out.exists() and (out.parent / ".out.layers" / "healing.json").is_file()

    def again(*_given: Any, **_named: Any) -> None:
        raise AssertionError("the layers were healed twice")

    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "healed", again)
        run(edited, out)
        with pytest.raises(AssertionError, match="twice"):  # other settings are another result
            run(edited, out.with_name("other"), heal=HealSpec(method="scale", max_tokens=2048, heldout_tokens=1024))
    assert files(out) == files(clean)


def test_refusals(edited: tuple[Path, str], out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="is its own teacher"):
        run((Path(edited[1]), edited[1]), out)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match="layers are healed by one process"):
        run(edited, out)
    monkeypatch.delenv("WORLD_SIZE")
    spec = RecoverSpec(teacher=edited[1], save_adapter=out.with_name("adapter"))
    with pytest.raises(UsageError, match="--steps 0 first"):
        recover_layers(str(edited[0]), spec, HEAL, TEXT, RUNNING, Writing(output=out))
    with pytest.raises(NothingToDo, match="healing lowered no held-out loss"):
        run(edited, out, steps=0, heal=HealSpec(method="none", max_tokens=2048, heldout_tokens=1024))
    assert not list(out.parent.iterdir())


def test_the_place_on_the_way_is_made_or_refused(edited: tuple[Path, str], out: Path) -> None:
    deep = out.parent / "not" / "there" / "out"
    assert run(edited, deep)["healed"]["kept"] and [path.name for path in deep.parent.iterdir()] == ["out"]
    (out.parent / ".out.layers").write_text("in the way")
    with pytest.raises(OutputError, match=r"\.out\.layers could not be made \(.*\); choose another output"):
        run(edited, out)
    assert not out.exists() and (out.parent / ".out.layers").read_text() == "in the way"
    (out.parent / ".out.layers").unlink()
    (out.parent / ".out.layers").mkdir()
    (out.parent / ".out.layers" / "mine").write_text("kept")
    with pytest.raises(UsageError, match="holds something else; move it away"):
        run(edited, out)
    assert (out.parent / ".out.layers" / "mine").read_text() == "kept"
