"""Options that depend on another: none is forgotten, and none is taken where it would be ignored."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import typer.main

from moesurgeon.cli import app
from moesurgeon.cli.dependencies import DEPENDENT, INDEPENDENT
from moesurgeon.cli.parser import option_name
from tests.cli.invoke import moesurgeon, one_line, refused
from tests.cli.refusals.places import MIXTRAL

GROUP: Any = typer.main.get_command(app)
OPTIONS = {
    name: {option_name(each): each for each in command.params if each.param_type_name == "option"}
    for name, command in GROUP.commands.items()
}


@pytest.mark.parametrize("command", OPTIONS)
def test_every_option_is_declared(command: str) -> None:
    """A new option is added to INDEPENDENT, or to DEPENDENT with what it needs."""
    there = set(OPTIONS[command]) - {"--help"}
    dependent = set(DEPENDENT.get(command, ()))
    assert INDEPENDENT[command] | dependent == there
    assert not INDEPENDENT[command] & dependent


@pytest.mark.parametrize("command", DEPENDENT)
def test_what_is_needed_is_an_option_of_the_command(command: str) -> None:
    for needs in DEPENDENT[command].values():
        for condition in (condition for each in needs for condition in each.conditions):
            assert condition.removeprefix("no ").partition("=")[0] in OPTIONS[command], condition


# The least that a command line needs besides the option, and what takes the place of its value.
COMPLETE: dict[str, list[str]] = {
    "retop": [MIXTRAL, "OUT"],
    "profile": [MIXTRAL, "-o", "OUT"],
    "prune": [MIXTRAL, "OUT"],
    "recover": [MIXTRAL, "OUT", "--teacher", MIXTRAL],
    "evaluate": [MIXTRAL],
    "profile show": ["OUT"],
    "sample": [MIXTRAL, "-o", "OUT.jsonl"],
}
VALUES = {"--heal-method": "ridge", "--adapter": "lora", "--objective": "lm", "--clip": "0.5", "--min-share": "0.5"}
WITHOUT = {"recover": ["--steps", "0"], "sample": ["--uniform"]}


@pytest.mark.parametrize(
    ("command", "option"), [(command, option) for command in DEPENDENT for option in DEPENDENT[command]]
)
def test_each_is_refused_where_it_would_be_ignored(command: str, option: str, tmp_path: Path) -> None:
    parameter = OPTIONS[command][option]
    value = [] if parameter.is_flag else [VALUES.get(option, "64" if option == "--new-tokens" else "1")]
    value = ["64"] if option == "--heldout-tokens" or "tokens" in option or option == "--heal-heldout" else value
    arguments = [part.replace("OUT", str(tmp_path / "out")) for part in COMPLETE[command]]
    message = refused(2, command, *arguments, *WITHOUT.get(command, []), option, *value)
    assert message.startswith(f"{option} ") and message.endswith(f", or leave {option} out"), message
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["prune", "--keep", "6", "--seed", "1"], "--seed is for the random criterion: add --criterion random"),
        (["prune", "--curve-plot", "c.svg"], "draws the curves, and none are asked for: add --curve"),
        (["prune", "--heal", "builtin:json", "--run", "r"], "add --stages COUNTS or --gate EXPR or --search"),
        (["prune", "--heal", "builtin:json", "--heal-method", "ridge", "--heal-steps", "9"], "--heal-method distill"),
        (["prune", "--keep-experts", "f.json", "--keep", "6", "--criterion", "reap"], "leave --keep-experts out"),
        (["retop", "--calibrate", "builtin:json", "--heal-method", "scale", "--heal-rank", "9"], "--heal-method ridge"),
        (["recover", "--adapt", "routers", "--expert-rate", "0.1"], "--adapt experts"),
        (["recover", "--adapt", "full-routers", "--rank", "8"], "whole routers have none"),
        (["recover", "--objective", "lm", "--temperature", "2"], "--objective distill"),
        (["recover", "--heal-tokens", "4096"], "nothing heals them"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)  # fmt: skip
def test_values_count_as_well(arguments: list[str], says: str, tmp_path: Path) -> None:
    command, *rest = arguments
    complete = [part.replace("OUT", str(tmp_path / "out")) for part in COMPLETE[command]]
    one_line(moesurgeon(command, *complete, *rest), 2, says)


def test_what_is_typed_with_what_it_needs_is_taken(tmp_path: Path) -> None:
    """The checkpoint that is missing comes first: the options are fine."""
    heal = ("--heal", "builtin:json", "--heal-steps", "600", "--heal-router", "--merge")
    refused(3, "prune", tmp_path / "none", tmp_path / "out", *heal, "--criterion", "random", "--keep", "6",
            "--seed", "0", says=("does not exist",))  # fmt: skip
