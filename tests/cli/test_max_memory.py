"""``--max-memory``: what it refuses, and that a checkpoint that does not fit gives the same report."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from moesurgeon.engine import free
from moesurgeon.engine.loading import Loader
from moesurgeon.pipeline import walking
from tests.cli.broken import SHARD, whole
from tests.cli.invoke import contents, moesurgeon, one_line, refused, succeeded
from tests.engine.tight import tight

MIXTRAL = "builtin:tiny-mixtral"
TEXT = ("-t", "builtin:json", "--max-tokens", "512", "--length", "64", "--device", "cpu")
COMMANDS = {
    "profile": lambda out: ["profile", MIXTRAL, "-o", out],
    "evaluate": lambda out: ["evaluate", MIXTRAL, "--against", "builtin:tiny-mixtral"],
}
INPUT, USAGE = 3, 2


@pytest.fixture
def streamed(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is free is just enough for two layers of each checkpoint, whatever this process has already."""
    monkeypatch.setattr(walking, "share_out", tight)


@pytest.mark.parametrize("command", COMMANDS)
def test_too_little_is_refused_in_one_line(command: str, out: Path) -> None:
    arguments = [*COMMANDS[command](out), *TEXT]
    for limit in ("1MB", "1B"):
        message = refused(USAGE, *arguments, "--max-memory", limit, says=("this needs", f"--max-memory is {limit}"))
        assert "shorten --length, or compute in a smaller --dtype" in message
    refused(USAGE, *arguments, "--max-memory", "some", says=("'some' is no size", "5GB"))
    refused(USAGE, *arguments, "--max-memory", "-1", says=("is no size",))
    assert contents(out.parent) == {}


@pytest.mark.parametrize("command", COMMANDS)
def test_too_little_that_is_free_does_not_blame_an_option(
    command: str, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(free, "available_bytes", lambda: 1000)
    message = refused(USAGE, *COMMANDS[command](out), *TEXT, says=("and 800B of the memory that is free may be used",))
    assert "--max-memory" not in message


@pytest.mark.parametrize("command", COMMANDS)
def test_what_does_not_fit_gives_the_same_report(
    command: str, out: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    arguments = [*COMMANDS[command](out), *TEXT, "--json"]
    expected = succeeded(*arguments, "--max-memory", "1TB").json
    assert expected.pop("resident") is True
    request.getfixturevalue("streamed")
    overwrite = ["--overwrite"] if command == "profile" else []
    found = succeeded(*arguments, *overwrite).json
    assert found.pop("resident") is False
    for report in (expected, found):
        report.pop("tokens_per_second", None)
        report.pop("memory")
    assert found == expected
    assert set(contents(out.parent)) <= {"out", "out/profile.json", "out/stats.safetensors"}


@pytest.mark.usefixtures("streamed")
@pytest.mark.parametrize("command", COMMANDS)
def test_weights_that_are_no_numbers_are_found_on_the_way(command: str, out: Path, tmp_path: Path) -> None:
    source = whole(tmp_path / "source")
    tensors = load_file(source / SHARD)
    name = next(name for name in tensors if ".experts.0." in name)
    tensors[name][:] = float("nan")
    save_file(tensors, source / SHARD, {"format": "pt"})
    arguments = [source if part == MIXTRAL else part for part in COMMANDS[command](out)]
    refused(INPUT, *arguments, *TEXT, says=(f"since {name} holds NaN", "restore the checkpoint"))


@pytest.mark.usefixtures("streamed")
@pytest.mark.parametrize("command", COMMANDS)
def test_a_shard_that_is_cut_on_the_way_is_noticed(
    command: str, out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its header was right when the run began."""
    source = whole(tmp_path / "source")
    read, size = Loader._read_into, (source / SHARD).stat().st_size

    def cutting(self: Loader, spec: object, start: int, memory: torch.Tensor) -> None:
        read(self, spec, start, memory)  # type: ignore[arg-type]
        if spec.shard == SHARD:  # type: ignore[attr-defined]
            with (source / SHARD).open("r+b") as file:
                file.truncate(size // 3)

    monkeypatch.setattr(Loader, "_read_into", cutting)
    arguments = [source if part == MIXTRAL else part for part in COMMANDS[command](out)]
    one_line(moesurgeon(*arguments, *TEXT), INPUT, "became shorter while it was read; leave it alone and try again")


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("command", COMMANDS)
def test_a_dtype_that_cannot_run_is_named(command: str, dtype: torch.dtype, out: Path, tmp_path: Path) -> None:
    source = whole(tmp_path / "source")
    tensors = load_file(source / SHARD)
    name = next(name for name in tensors if ".experts.0." in name)
    tensors[name] = tensors[name].to(dtype)
    save_file(tensors, source / SHARD, {"format": "pt"})
    arguments = [source if part == MIXTRAL else part for part in COMMANDS[command](out)]
    refused(INPUT, *arguments, *TEXT, says=(name, "is stored as", "dequantise the checkpoint"))
