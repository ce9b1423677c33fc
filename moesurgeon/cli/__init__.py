"""The command line: registers the commands, one file each."""

from __future__ import annotations

import io
import sys

import typer

import moesurgeon
from moesurgeon.cli import evaluate, harness, inspect, profile, prune, recover, retop, run, verify

app = typer.Typer(
    name="moesurgeon",
    help="Surgery on Mixture-of-Experts checkpoints on disk.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,  # rich is slow to import and --help has to be quick
    pretty_exceptions_enable=False,
)
for command in (inspect, retop, profile, prune, recover, evaluate, harness, verify, run):
    app.command(command.NAME)(command.command)


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
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal that lacks a character of the bars gets a "?"
    app()
