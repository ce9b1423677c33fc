"""What may not be read or written, is too long, leads in a circle, or lies on a full disk: never a bug of ours.

Exit code 3 for what was to be read, 5 (2 for what can never be written under this name) for what was to be written.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.cli.invoke import moesurgeon, one_line, succeeded, without_amounts
from tests.conftest import BUILTIN
from tests.faults.forked import ended, forked

MIXTRAL = BUILTIN[0]
TEXT = ("-t", "builtin:json", "--max-tokens", "256", "--length", "64")
LONG = "x" * 300
KEPT = {str(layer): [0, 1, 2, 3, 4, 5] for layer in range(4)}

# By the word PATH stands for what cannot be used; OUT for an output that can.
READ: dict[str, list[str]] = {
    "inspect": ["inspect", "PATH"],
    "verify": ["verify", "PATH"],
    "verify --source": ["verify", MIXTRAL, "--source", "PATH"],
    "retop": ["retop", "PATH", "OUT"],
    "retop --profile": ["retop", MIXTRAL, "OUT", "--profile", "PATH"],
    "prune": ["prune", "PATH", "OUT", "--keep-experts", "KEPT"],
    "prune --profile": ["prune", MIXTRAL, "OUT", "--keep", "6", "--profile", "PATH"],
    "prune --keep-experts": ["prune", MIXTRAL, "OUT", "--keep-experts", "PATH"],
    "prune --heal": ["prune", MIXTRAL, "OUT", "--keep-experts", "KEPT", "--heal", "PATH/a.txt"],
    "prune --heal-teacher": ["prune", MIXTRAL, "OUT", "--keep-experts", "KEPT", "--heal", "builtin:json",
                             "--heal-teacher", "PATH"],
    "profile": ["profile", "PATH", "-o", "OUT", *TEXT],
    "profile -t": ["profile", MIXTRAL, "-o", "OUT", "-t", "PATH/a.txt"],
    "profile -t FOLDER": ["profile", MIXTRAL, "-o", "OUT", "-t", "PATH"],
    "profile show": ["profile", "show", "PATH"],
    "profile diff": ["profile", "diff", "PATH", "PATH"],
    "profile merge": ["profile", "merge", "PATH", "PATH", "-o", "OUT"],
    "profile import": ["profile", "import", "PATH/a.json", "-o", "OUT", "--checkpoint", MIXTRAL],
    "evaluate": ["evaluate", "PATH", *TEXT],
    "evaluate --against": ["evaluate", MIXTRAL, "--against", "PATH", *TEXT],
    "recover --teacher": ["recover", MIXTRAL, "OUT", "--teacher", "PATH", *TEXT],
    "sample": ["sample", "PATH", "-o", "OUT.jsonl"],
    "run": ["run", "PATH/recipe.yaml", "-o", "OUT"],
}  # fmt: skip
WRITTEN: dict[str, list[str]] = {
    "retop": ["retop", MIXTRAL, "PATH/out"],
    "retop --per-layer-out": ["retop", MIXTRAL, "OUT", "--profile", "PROFILE", "--per-layer-average", "1.5",
                              "--per-layer-out", "PATH/k.json"],
    "prune": ["prune", MIXTRAL, "PATH/out", "--keep-experts", "KEPT"],
    "prune --run": ["prune", MIXTRAL, "OUT", "--stages", "7", "--heal", "builtin:json", "--run", "PATH/run"],
    "prune --curve-plot": ["prune", MIXTRAL, "OUT", "--keep", "6", "--profile", "PROFILE", "--curve", "--curve-plot",
                           "PATH/c.png"],
    "profile": ["profile", MIXTRAL, "-o", "PATH/profile", *TEXT],
    "profile show --csv": ["profile", "show", "PROFILE", "--csv", "PATH/a.csv"],
    "profile merge": ["profile", "merge", "PROFILE", "OTHER", "-o", "PATH/profile"],
    "profile import": ["profile", "import", "COUNTS", "-o", "PATH/profile", "--checkpoint", MIXTRAL],
    "recover": ["recover", MIXTRAL, "PATH/out", "--teacher", MIXTRAL, *TEXT],
    "recover --log": ["recover", MIXTRAL, "OUT", "--teacher", MIXTRAL, "--log", "PATH/a.csv", *TEXT],
    "recover --cache": ["recover", MIXTRAL, "OUT", "--teacher", MIXTRAL, "--cache", "PATH/cache", *TEXT],
    "recover --save-adapter": ["recover", MIXTRAL, "OUT", "--teacher", MIXTRAL, "--save-adapter", "PATH/a", *TEXT],
    "sample": ["sample", MIXTRAL, "-o", "PATH/own.jsonl", "--uniform", "--max-tokens", "64"],
    "run": ["run", "RECIPE", "-o", "PATH/run"],
}  # fmt: skip


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Usable inputs: a profile, counts, a list of experts, a recipe."""
    folder = tmp_path_factory.mktemp("given")
    succeeded("profile", MIXTRAL, "-o", folder / "PROFILE", *TEXT, "--json")
    succeeded("profile", MIXTRAL, "-o", folder / "OTHER", "-t", "builtin:logs", *TEXT[2:], "--json")
    (folder / "KEPT").write_text(json.dumps(KEPT))
    (folder / "COUNTS").write_text(json.dumps({str(layer): list(range(1, 9)) for layer in range(4)}))
    (folder / "RECIPE").write_text(f"checkpoint: {MIXTRAL}\nsteps: [{{retop: {{}}}}]\n")
    return folder


def _arguments(command: list[str], path: Path | str, given: Path, out: Path) -> list[str]:
    def filled(word: str) -> str:
        if word.split("/", maxsplit=1)[0] == "PATH":
            return word.replace("PATH", str(path), 1)
        if word.split(".", maxsplit=1)[0] == "OUT":
            return word.replace("OUT", str(out), 1)
        return str(given / word) if word in ("PROFILE", "OTHER", "KEPT", "COUNTS", "RECIPE") else word

    return [filled(word) for word in command]


def _too_long(tmp_path: Path) -> Path:
    return tmp_path / LONG


def _circle(tmp_path: Path) -> Path:
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    return tmp_path / "circle"


def _below_a_file(tmp_path: Path) -> Path:
    (tmp_path / "file").write_text("mine")
    return tmp_path / "file" / "below"


def _no_home(tmp_path: Path) -> Path:
    return Path("~nobody2/x")


PLACES: dict[str, Callable[[Path], Path]] = {
    "too long": _too_long, "circle": _circle, "below a file": _below_a_file, "no home": _no_home
}  # fmt: skip


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("command", READ)
def test_an_input_that_cannot_be(command: str, place: str, given: Path, tmp_path: Path) -> None:
    path = PLACES[place](tmp_path)
    one_line(moesurgeon(*_arguments(READ[command], path, given, tmp_path / "out")), 3, str(path)[:200])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("command", WRITTEN)
def test_an_output_that_cannot_be(command: str, place: str, given: Path, tmp_path: Path) -> None:
    if "plot" in command:
        pytest.importorskip("matplotlib", reason="pip install 'moesurgeon[plot]'")
    path = PLACES[place](tmp_path)
    outcome = moesurgeon(*_arguments(WRITTEN[command], path, given, tmp_path / "out"))
    assert outcome.code in (2, 5), outcome.err
    one_line(outcome, outcome.code, str(path)[:200])
    assert not (tmp_path / "out").exists()


@pytest.fixture
def secret() -> Iterator[Path]:
    """A folder that only its owner may look into, where others may go."""
    with tempfile.TemporaryDirectory(dir="/tmp") as place:
        folder = Path(place)
        folder.chmod(0o777)
        (folder / "closed").mkdir()
        (folder / "closed" / "a.txt").write_text("some text")
        (folder / "closed").chmod(0o700)
        yield folder


@pytest.mark.parametrize(("commands", "code"), [(READ, 3), (WRITTEN, 5)], ids=["read", "written"])
def test_what_may_not_be_read_or_written(
    commands: dict[str, list[str]], code: int, given: Path, secret: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a process that may not do everything, as root may."""
    if os.geteuid():
        pytest.skip("only root may become somebody else")
    shutil.copytree(given, secret / "given")
    (secret / "given").chmod(0o755)
    monkeypatch.chdir(secret)

    def attempt() -> None:
        os.setgroups([])
        os.setgid(65534)
        os.setuid(65534)
        wrong = []
        for command, words in commands.items():
            outcome = moesurgeon(*_arguments(words, secret / "closed", secret / "given", secret / "out"))
            if outcome.code != code or str(secret / "closed") not in outcome.err or outcome.err.count("\n") != 1:
                wrong.append(f"{command}: {outcome}")
        (secret / "wrong").write_text("\n".join(wrong))

    assert ended(forked(attempt)) == 0
    assert (secret / "wrong").read_text() == ""


FULL: dict[str, list[str]] = {
    name: WRITTEN[name]
    for name in ("retop", "prune", "profile", "profile show --csv", "profile merge", "profile import", "sample")
} | {
    "recover": ["recover", "TOP1", "PATH/out", "--teacher", MIXTRAL, *TEXT, "--steps", "1", "--tokens-per-step", "64",
                "--heldout-tokens", "64"],
}  # fmt: skip


@pytest.mark.parametrize("command", FULL)
def test_a_disk_that_is_full(command: str, given: Path, tmp_path: Path) -> None:
    """A limit on the size of files stands in for it; nothing half written is left, no empty file either."""
    place = tmp_path / "place"
    place.mkdir()
    words = _arguments(FULL[command], place, given, tmp_path / "out")
    if "TOP1" in words:
        succeeded("retop", MIXTRAL, tmp_path / "top1", "--json")
        words = [str(tmp_path / "top1") if word == "TOP1" else word for word in words]
    if "sample" in words:
        words[words.index("64")] = "4096"

    def limited() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (600, 600))
        said = moesurgeon(*words)
        told = [line for line in without_amounts(said.err) if not line.startswith("note: ")]
        os.write(writing, f"{said.code} {chr(10).join(told)}{chr(10)}".encode())

    reading, writing = os.pipe()
    assert ended(forked(limited)) == 0
    os.close(writing)
    with os.fdopen(reading) as said:
        message = said.read()
    assert message.startswith("5 moesurgeon: ") and message.count("\n") == 1, message
    assert "output could not be written" in message or str(place) in message
    assert {path.name for path in place.iterdir()} <= {".out.recover"}  # what the same command goes on from
    assert not [path for path in place.rglob("*") if path.is_file()]
