"""Any number of processes gives what one gives, to the bit; the first speaks for all, and none waits for the dead."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from moesurgeon.engine.ranks import Ranks
from moesurgeon.errors import OutputError
from tests.cli.invoke import moesurgeon, succeeded
from tests.engine.processes import ends, launch, results

TEXT = ("-t", "builtin:arithmetic", "-t", "builtin:json", "--max-tokens", "1024", "--length", "64", "--device", "cpu")
BIN = Path(sys.executable).parent
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def test_three_processes_are_one(tmp_path: Path) -> None:
    """Also with fewer batches than processes, and with layers and hidden states that come from disk."""
    alone = tmp_path / "alone"
    alone.mkdir()
    expected = results(Ranks(), alone)
    together = tmp_path / "together"
    together.mkdir()
    for code, _, err in ends(launch(3, "-m", "tests.engine.processes", together)):
        assert code == 0, err
    for number in range(3):
        found = np.load(together / f"{number}.npz")
        assert set(found.files) == set(expected)
        for name, array in expected.items():
            assert np.array_equal(found[name], array), (number, name)
    for name in ("many", "fewer"):
        kinds = [{key: array for key, array in expected.items() if f"{name} {kind}" in key} for kind in
                 ("memory", "file")]  # fmt: skip
        assert all(np.array_equal(*pair) for pair in zip(*(kind.values() for kind in kinds), strict=True))


def _profiled(launcher: list[str], out: Path) -> subprocess.CompletedProcess[str]:
    command = [*launcher, "-m", "moesurgeon", "profile", "builtin:tiny-deepseek", "-o", str(out), *TEXT, "--json"]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, check=False, timeout=240)
    assert done.returncode == 0, done.stderr
    return done


LAUNCHERS = {
    "torchrun": ["torchrun", "--standalone", "--nproc_per_node", "2"],
    "accelerate": ["accelerate", "launch", "--num_processes", "2", "--cpu"],
}


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_profile_is_the_same_bytes_under_a_launcher(launcher: str, tmp_path: Path) -> None:
    name, *options = LAUNCHERS[launcher]
    done = _profiled([str(BIN / name), *options], tmp_path / "together")
    expected = succeeded("profile", "builtin:tiny-deepseek", "-o", tmp_path / "alone", *TEXT, "--json").json
    assert len(done.stdout.splitlines()) == 1  # the first process speaks for all
    assert json.loads(done.stdout) == {**expected, "path": str(tmp_path / "together")}
    for path in (tmp_path / "alone").iterdir():
        assert (tmp_path / "together" / path.name).read_bytes() == path.read_bytes(), path.name
    assert sorted(path.name for path in tmp_path.iterdir()) == ["alone", "together"]


def test_an_evaluation_says_the_same() -> None:
    arguments = ("evaluate", "builtin:tiny-mixtral", "--against", "builtin:tiny-mixtral", *TEXT, "--json")
    expected = succeeded(*arguments).json
    (first, out, err), (second, nothing, quiet) = ends(launch(2, "-m", "moesurgeon", *arguments))
    assert (first, second, nothing, quiet) == (0, 0, "", ""), err + quiet
    found = json.loads(out)
    for report in (found, expected):
        assert report.pop("tokens_per_second") > 0
    assert found == expected


DYING = """
import os, sys
from moesurgeon.cli import main
from moesurgeon.engine.walk import Layer
move, calls = Layer.move, []
def dying(*arguments):
    calls.append(1)
    if os.environ["RANK"] == "1" and len(calls) == 3:
        os.kill(os.getpid(), 9)
    move(*arguments)
Layer.move = dying
main()
"""


def test_the_death_of_one_is_the_end_of_all(tmp_path: Path) -> None:
    command = ("-c", DYING, "profile", "builtin:tiny-mixtral", "-o", tmp_path / "profile", *TEXT, "--json")
    (code, out, err), (killed, nothing, _) = ends(launch(2, *command))
    assert (killed, nothing) == (-9, "")
    assert code == OutputError.exit_code
    message = json.loads(out)["error"]["message"]
    assert "another process of this run ended or is out of reach" in message and "run all again" in message
    assert f"moesurgeon: {message}" in err.splitlines()
    assert not (tmp_path / "profile").exists()


@pytest.mark.parametrize("size", ["1", "2"])
def test_only_the_first_process_prints(size: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", size)
    monkeypatch.setenv("RANK", "1")
    done, failed = moesurgeon("inspect", "builtin:tiny-mixtral"), moesurgeon("inspect", "nowhere", "--json")
    assert (done.code, failed.code) == (0, 3)
    if size == "1":  # left over from somewhere: a run of one has one process
        assert "Mixtral" in done.out
        assert failed.json["error"]["exit_code"] == 3
        return
    assert (done.out, done.err) == ("", "")
    assert failed.out == ""
    assert failed.err.startswith("[process 1] moesurgeon: nowhere does not exist") and failed.err.count("\n") == 1
