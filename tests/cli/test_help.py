"""Help, version, reference, and how little is loaded for them."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

import moesurgeon
from moesurgeon import errors
from moesurgeon.cli.reference import EXIT_CODES, reference
from tests.cli import invoke
from tests.cli.invoke import finished, succeeded
from tests.conftest import BUILTIN

COMMANDS = (
    "inspect", "retop", "profile", "profile show", "profile merge", "profile diff", "profile import", "prune",
    "recover", "evaluate", "harness", "sample", "verify", "run",
)  # fmt: skip
HEAVY = ("torch", "lm_eval", "transformers", "peft", "accelerate", "datasets", "pyarrow", "huggingface_hub", "rich")


def test_help_lists_every_command() -> None:
    out = succeeded("--help").out
    listed = [
        re.split(r" {2,}", line.strip())[0] for line in out.partition("Commands:")[2].splitlines() if line.strip()
    ]
    assert listed == list(COMMANDS)
    nothing = invoke.moesurgeon()
    assert "Commands:" in nothing.out + nothing.err


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_a_command(command: str) -> None:
    out = succeeded(*command.split(), "--help").out
    assert out.startswith("Usage: ") and command in out.splitlines()[0]
    assert "--json" in out
    for name in re.findall(r"^ +(?:-\w, )?(--[\w-]+)", out, flags=re.MULTILINE):
        assert not name.startswith("--no-"), f"{name}: a flag has no opposite"


def test_version() -> None:
    assert succeeded("--version").out == f"moesurgeon {moesurgeon.__version__}\n"
    assert finished("--version").out == f"moesurgeon {moesurgeon.__version__}\n"  # python -m moesurgeon


def test_reference_is_current() -> None:
    page = Path(__file__).parents[2] / "docs" / "cli.md"
    assert page.read_text(encoding="utf-8") == reference(), "run `make docs`"


def test_reference_holds_everything() -> None:
    text = reference()
    assert re.findall(r"^## (.+)$", text, flags=re.MULTILINE) == list(COMMANDS)
    for command in COMMANDS:
        section = text.partition(f"## {command}\n")[2].partition("\n## ")[0]
        for option in re.findall(
            r"^ +(?:-\w, )?(--[\w-]+)", succeeded(*command.split(), "--help").out, flags=re.MULTILINE
        ):
            assert option == "--help" or re.search(rf"`(-\w, )?{option}[ `]", section), f"{command} {option}"


def test_exit_codes_are_all_told() -> None:
    told = [code for code, _what in EXIT_CODES]
    known = {kind.exit_code for kind in vars(errors).values() if hasattr(kind, "exit_code")}
    known |= {value for name, value in vars(errors).items() if name.startswith("EXIT_")}
    assert told == sorted(known)


def test_light_commands_load_no_heavy_package(tmp_path: Path, profiles: dict[str, Path]) -> None:
    """Planning and bytes need no torch, so they start in a fraction of a second."""
    name = BUILTIN[0]
    commands = [
        ["--help"],
        ["inspect", name],
        ["retop", name, tmp_path / "out"],
        ["retop", name, tmp_path / "foreseen", "--profile", profiles[name]],
        ["prune", name, tmp_path / "pruned", "--profile", profiles[name], "--keep", "6"],
        ["prune", name, tmp_path / "other", "--profile", profiles[name], "--keep", "6", "--dry-run", "--json"],
        ["verify", tmp_path / "pruned", "--source", name],
        ["profile", "show", profiles[name], "--json"],
        ["profile", "diff", profiles[name], profiles[name], "--json"],
    ]
    script = (
        "import sys\n"
        "from tests.cli.invoke import succeeded\n"
        f"for command in {[[str(part) for part in command] for command in commands]!r}:\n"
        "    succeeded(*command)\n"
        f"print([name for name in {HEAVY!r} if name in sys.modules])\n"
    )
    # Some versions of typer's test runner import rich.
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() in ("[]", "['rich']")


def test_importing_the_command_line_loads_next_to_nothing() -> None:
    script = f"import sys, moesurgeon.cli; print([name for name in {(*HEAVY, 'numpy')!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "[]"
