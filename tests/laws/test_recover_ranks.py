"""Two processes train as one: the same gradients, judgements and files; and a killed run goes on where it was."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moesurgeon.engine.ranks import Ranks
from moesurgeon.errors import OutputError
from moesurgeon.pipeline.options import Writing
from moesurgeon.pipeline.prune import prune
from moesurgeon.pipeline.prune_spec import PruneSpec
from moesurgeon.pipeline.subject import Subject, open_subject
from tests.cli.invoke import succeeded
from tests.engine.processes import ends, launch
from tests.laws.recoveries import bytes_of
from tests.recovery.processes import model, results

TEXT = ("-t", "builtin:arithmetic", "-t", "builtin:json", "--max-tokens", "2048", "--length", "64", "--device", "cpu",
        "--heldout-tokens", "512")  # fmt: skip
STEPS = ("--steps", "4", "--judge-every", "2", "--tokens-per-step", "320", "--learning-rate", "0.01", "--allow-noop")


def test_the_gradients_of_two_are_those_of_one(tmp_path: Path) -> None:
    """With rows of several lengths, fewer rows than processes, rows that predict nothing; every term, every adapter.

    In float64, but for what the objectives themselves take in float32.
    """
    subject = model(tmp_path / "model")
    expected = results(Ranks(), subject)
    for code, _, err in ends(launch(2, "-m", "tests.recovery.processes", subject.root, tmp_path)):
        assert code == 0, err
    for name, array in expected.items():  # and of one process, streamed or not
        if name.startswith("Streamed"):
            _assert_equal(name, array, expected[name.replace("Streamed", "Resident")])
    for number in range(2):
        found = np.load(tmp_path / f"{number}.npz")
        assert set(found.files) == set(expected)
        for name, array in expected.items():
            _assert_equal(name, found[name], array)
    first, *others = (np.load(tmp_path / f"{number}.npz") for number in range(2))
    for other in others:  # to the bit, or what is trained would drift apart
        assert all(np.array_equal(other[name], first[name]) for name in first.files)


def _assert_equal(name: str, found: np.ndarray, expected: np.ndarray) -> None:
    if name.endswith(("sums", "counts")):
        assert np.array_equal(found, expected), name
        return
    scale = np.abs(expected).max()
    assert scale > 1e-4
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6 * scale, err_msg=name)


@pytest.fixture(scope="module")
def pruned(tmp_path_factory: pytest.TempPathFactory) -> Subject:
    """A student whose teacher is another model, which speaks before and is kept on the disk."""
    folder = tmp_path_factory.mktemp("pruned")
    kept = folder / "kept.json"
    kept.write_text(json.dumps({str(layer): [0, 2, 3, 5, 6, 7] for layer in range(4)}))
    prune("builtin:tiny-mixtral", PruneSpec(keep_experts=kept), Writing(output=folder / "out"))
    return open_subject(str(folder / "out"))


def _command(student: Subject, folder: Path) -> tuple[str | Path, ...]:
    more = (
        "--log",
        folder / "log.json",
        "--save-adapter",
        folder / "adapter",
        "--adapt",
        "routers",
        "--adapt",
        "experts",
    )
    return (
        "recover",
        student.name,
        folder / "out",
        "--teacher",
        "builtin:tiny-mixtral",
        *TEXT,
        *STEPS,
        *more,
        "--json",
    )


KILLED = """
import os, sys
from moesurgeon.cli import main
from moesurgeon.recovery.resident import Resident
before, calls = Resident.gradients, []
def dying(*arguments):
    calls.append(1)
    if os.environ["RANK"] == "1" and len(calls) == 4:
        os.kill(os.getpid(), 9)
    return before(*arguments)
Resident.gradients = dying
main()
"""


def test_two_recover_as_one_and_go_on_where_they_were_killed(pruned: Subject, tmp_path: Path) -> None:
    one, two, again = (tmp_path / name for name in ("one", "two", "again"))
    for folder in (one, two, again):
        folder.mkdir()
    expected = succeeded(*_command(pruned, one)).json
    (code, out, err), (other, nothing, quiet) = ends(launch(2, "-m", "moesurgeon", *_command(pruned, two)))
    assert (code, other, nothing, quiet) == (0, 0, "", ""), err + quiet
    found = json.loads(out)
    _assert_close(found, expected)
    assert json.loads((two / "log.json").read_text()) == found["log"]
    assert found["steps"] == 4 and found["saved_adapter"] == str(two / "adapter")
    assert sorted(each.name for each in two.iterdir()) == ["adapter", "log.json", "out"]
    mine, theirs = bytes_of(open_subject(str(one / "out"))), bytes_of(open_subject(str(two / "out")))
    assert mine.keys() == theirs.keys()

    # One dies: all end, with what goes on from the last judgement, and as if nothing had happened.
    command = ("-c", KILLED, *_command(pruned, again))
    (code, out, err), (killed, nothing, _) = ends(launch(2, *command))
    assert (code, killed, nothing) == (OutputError.exit_code, -9, "")
    assert "another process of this run ended or is out of reach" in json.loads(out)["error"]["message"]
    assert (again / ".out.recover" / "state.pt").is_file() and not (again / "out").exists()
    assert not (again / "adapter").exists()
    resumed, (other, _, quiet) = ends(launch(2, "-m", "moesurgeon", *_command(pruned, again)))
    assert (resumed[0], other, quiet) == (0, 0, ""), resumed[2]
    for name in ("out", "adapter"):
        for path in (two / name).iterdir():
            assert (again / name / path.name).read_bytes() == path.read_bytes(), path.name
    assert (again / "log.json").read_bytes() == (two / "log.json").read_bytes()
    assert sorted(each.name for each in again.iterdir()) == ["adapter", "log.json", "out"]


def _assert_close(found: Any, expected: Any, name: str = "") -> None:
    """Numbers to rounding, as Adam passes it on; all that is not a number as it is."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys(), name
        for key in expected:
            if key not in ("output", "saved_adapter", "usage"):
                _assert_close(found[key], expected[key], f"{name}.{key}")
    elif isinstance(expected, list):
        assert len(found) == len(expected), name
        for number, (mine, theirs) in enumerate(zip(found, expected, strict=True)):
            _assert_close(mine, theirs, f"{name}.{number}")
    elif isinstance(expected, float):
        assert found == pytest.approx(
            expected, rel=2e-3, abs=1e-2 if "closed" in name or "interval" in name else 1e-6
        ), name
    else:
        assert found == expected, name
