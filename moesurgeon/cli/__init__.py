"""The command line: registers the commands, one file each."""

from __future__ import annotations

import typer

import moesurgeon
from moesurgeon.cli import (
    evaluate,
    harness,
    inspect,
    profile,
    profile_diff,
    profile_import,
    profile_merge,
    profile_show,
    prune,
    recover,
    retop,
    run,
    sample,
    streams,
    verify,
)
from moesurgeon.cli.parser import Command, Commands

_COMMANDS = (
    inspect, retop, profile, profile_show, profile_merge, profile_diff, profile_import, prune, recover, evaluate,
    harness, sample, verify, run,
)  # fmt: skip


app = typer.Typer(
    name="moesurgeon",
    cls=Commands,
    help="Surgery on Mixture-of-Experts checkpoints on disk.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,  # rich is slow to import and --help has to be quick
    pretty_exceptions_enable=False,
)
for command in _COMMANDS:
    app.command(command.NAME, cls=Command)(command.command)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"moesurgeon {moesurgeon.__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: bool = typer.Option(False, "--version", callback=_show_version, is_eager=True, help="Show the version."),
) -> None:
    """Surgery on Mixture-of-Experts checkpoints on disk."""


def main() -> None:
    """Entry point of the ``moesurgeon`` script."""
    streams.prepare()
    app()
