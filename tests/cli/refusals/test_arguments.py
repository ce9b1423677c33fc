"""What a command's own options refuse: retop, layouts, recover, and the command line itself."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.cli.conftest import TEXT
from tests.cli.invoke import refused
from tests.cli.refusals.places import MIXTRAL, USAGE


def test_top_k(out: Path) -> None:
    refused(USAGE, "retop", MIXTRAL, out, "--top-k", "0", says=("--top-k",))
    refused(USAGE, "retop", MIXTRAL, out, "--top-k", "-1", says=("--top-k",))
    refused(USAGE, "retop", MIXTRAL, out, "--top-k", "one", says=("--top-k",))
    refused(USAGE, "retop", MIXTRAL, out, "--top-k", "3", says=("--top-k 3", "between 1 and", "2"))
    refused(USAGE, "retop", MIXTRAL, out, "--top-k", "2", says=("nothing to do", "--allow-noop"))


@pytest.mark.parametrize("command", ["retop", "prune", "recover"])
def test_unknown_layout(command: str, out: Path, profiles: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    # Before any work: recover must not train first.
    monkeypatch.setattr("moesurgeon.pipeline.recover.filled", pytest.fail)
    arguments = {
        "retop": ["retop", MIXTRAL, out],
        "prune": ["prune", MIXTRAL, out, "--keep", "6", "--profile", profiles[MIXTRAL]],
        "recover": ["recover", MIXTRAL, out, "--teacher", MIXTRAL, *TEXT],
    }[command]
    refused(USAGE, *arguments, "--layout", "sparse", says=("'sparse'", "per-expert, fused"))
    refused(USAGE, *arguments, "--layout", "qwen2-moe", says=("DeepSeek-MoE v1", "not for Mixtral"))


def test_recover_arguments(out: Path, top1: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)  # as where tensorboard is not installed
    command = ("recover", top1[MIXTRAL], out, "--teacher", MIXTRAL, *TEXT)
    routers = (*command, "--adapt", "routers")
    refused(USAGE, *routers, "--objective", "lm", says=("top-1 Mixtral", "use --objective distill"))
    refused(USAGE, *command, "--objective", "hope", says=("--objective", "hope"))
    refused(USAGE, *command, "--adapt", "heads", says=("--adapt heads", "full-routers"))
    refused(USAGE, *command, "--adapt", "routers", "--adapt", "full-routers", says=("exclude each other",))
    saving = (*command, "--save-adapter", out.with_name("adapter"))
    refused(USAGE, *saving, "--adapt", "full-routers", says=("--save-adapter", "whole routers are no adapter"))
    refused(USAGE, *command, "--save-adapter", out, says=("--save-adapter", "overlap"))
    svd = (*routers, "--rank", "4", "--adapter", "adalora")
    refused(USAGE, *svd, "--adapt", "experts", says=("for --adapt routers alone", "in a second recover"))
    refused(USAGE, *svd, "--rank", "8", says=("a router of 8 experts has 8 at most", "lower --rank"))
    refused(USAGE, *svd, "--steps", "9", says=("--steps 10",))
    refused(USAGE, *routers, "--changed", "0.1", says=("--changed", "add --adapt experts"))
    refused(USAGE, *command, "--log", out.with_name("log.txt"), says=("says no format", ".csv"))
    refused(USAGE, *command, "--log", out / "log.csv", says=("there is no folder",))
    refused(USAGE, *command, "--tensorboard", out, says=("needs the package tensorboard", "pip install"))
    refused(USAGE, *command, "--max-memory", "1MB", says=("--max-memory is 1MB", "give at least"))
    mine = out.with_name("mine.csv")
    mine.write_text("mine")
    refused(USAGE, *command, "--log", mine, says=("mine.csv exists", "--overwrite"))
    assert mine.read_text() == "mine"
    mine.unlink()
    refused(USAGE, "recover", MIXTRAL, out, says=("--teacher",))
    for split in ("validation", "all"):
        refused(USAGE, *command, "--split", split, says=("would train on the text that judges", "use train"))
    for option in ("--steps", "--rank", "--judge-every", "--tokens-per-step", "--candidates", "--heldout-tokens"):
        refused(USAGE, *command, option, "0", says=(option,))
    for option in ("--learning-rate", "--balance", "--temperature", "--seed"):
        refused(USAGE, *command, option, "-1", says=(option,))
    for option, value in (("--learning-rate", "inf"), ("--lm", "inf"), ("--clip", "inf")):
        refused(USAGE, *command, option, value, says=(option, "no finite number"))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--learning-rate", "1e30"), ("training diverged at step 2", "--learning-rate 1e+30; lower it")),
        (("--learning-rate", "1e30", "--streamed"), ("training diverged at step 2", "lower it")),
        (("--temperature", "1e30"), ("training diverged at step 1", "the temperature of the losses")),
        (("--adapt", "experts", "--changed", "99"), ("no expert's traffic differs", "lower --changed")),
    ],
    ids=lambda value: " ".join(value[:2]),
)
def test_recover_that_cannot_learn(
    options: tuple[str, ...], says: tuple[str, ...], out: Path, top1: dict[str, Path]
) -> None:
    few = ("--steps", "3", "--tokens-per-step", "128", "--heldout-tokens", "128")
    refused(USAGE, "recover", top1[MIXTRAL], out, "--teacher", MIXTRAL, *TEXT, *few, *options, says=says)
    assert not out.exists()


@pytest.mark.parametrize("name", ["ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"])
def test_recover_does_not_divide_weights(
    name: str, out: Path, top1: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, "true")
    refused(
        USAGE, "recover", top1[MIXTRAL], out, "--teacher", MIXTRAL, *TEXT,
        says=("does not divide the weights", "launch it without", "layer by layer"),
    )  # fmt: skip


def test_recover_that_finds_nothing(out: Path, top1: dict[str, Path]) -> None:
    few = ("--steps", "1", "--tokens-per-step", "64", "--heldout-tokens", "64", "--learning-rate", "0")
    command = ("recover", top1[MIXTRAL], out, *TEXT, *few)
    refused(USAGE, *command, "--teacher", MIXTRAL, says=("nothing better than the start", "--allow-noop"))
    refused(USAGE, *command, "--teacher", top1[MIXTRAL], says=("its own teacher", "give the checkpoint before"))


@pytest.mark.parametrize(
    "arguments",
    [["frobnicate"], ["inspect"], ["retop", MIXTRAL], ["profile", MIXTRAL], ["run"], ["verify", MIXTRAL, MIXTRAL]],
    ids=" ".join,
)
def test_wrong_usage(arguments: list[str]) -> None:
    refused(USAGE, *arguments)
