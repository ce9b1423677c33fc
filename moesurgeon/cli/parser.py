"""The parser: commands of one word or of two, options that depend on others, wrong usage in one line."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import typer
from typer.core import TyperCommand, TyperGroup

from moesurgeon.checkpoint.faults import explained
from moesurgeon.cli.dependencies import refuse_useless
from moesurgeon.cli.output import answering
from moesurgeon.errors import UsageError

# Newer versions of typer carry a click of their own: the base of its errors is found through the one it exports.
_WRONG_USAGE: Any = next(kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException")


WRITTEN = ("output", "per_layer_out", "curve_plot", "run", "cache", "log", "tensorboard", "save_adapter", "csv", "plot")
"""Parameters that name what a command writes; other paths are read."""


class Command(TyperCommand):
    """A command that refuses options that would be ignored, and says of an error of the system whose file it is."""

    def invoke(self, ctx: Any) -> Any:
        options = {parameter.name: parameter for parameter in self.params if parameter.param_type_name == "option"}
        typed = [name for name in options if ctx.get_parameter_source(name).name == "COMMANDLINE"]
        names = {name: option_name(parameter) for name, parameter in options.items()}
        values = {names[name]: ctx.params.get(name) for name in options}
        metavars = {names[name]: metavar_of(parameter) for name, parameter in options.items()}
        for name, value in values.items():
            if isinstance(value, float) and not math.isfinite(value):
                raise UsageError(f"{name} {value} is no finite number; give one")
        refuse_useless(str(self.name), (names[name] for name in typed), values, metavars)
        written = [Path(ctx.params[name]) for name in WRITTEN if ctx.params.get(name) is not None]
        for path in written:
            if str(path).startswith("~"):  # the shell leaves it where there is no such home
                raise UsageError(f"{path}: there is no such home; name a folder that exists")
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            raise
        except OSError as error:
            if (known := explained(error, written)) is None:
                raise RuntimeError(str(error)) from error
            raise known from error


class Commands(TyperGroup):
    """Commands of one word or of two: ``profile CKPT`` and ``profile show FOLDER``; the two words win."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        two = " ".join(args[:2])
        return super().resolve_command(ctx, [two, *args[2:]] if two in self.commands else args)

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        windows_expand_args: bool = True,
        **extra: Any,
    ) -> NoReturn:
        """Carry out a command line and end the process; what is wrong with it is said as all other errors are."""
        given = sys.argv[1:] if args is None else list(args)
        before = given[: given.index("--")] if "--" in given else given
        sys.exit(answering("--json" in before, lambda: self._carried_out(given, prog_name or "moesurgeon")))

    def _carried_out(self, args: list[str], name: str) -> None:
        try:
            with self.make_context(name, list(args)) as ctx:
                self.invoke(ctx)
        except _WRONG_USAGE as error:
            if type(error).__name__ == "NoArgsIsHelpError":  # `moesurgeon` alone
                error.show()
                raise typer.Exit(UsageError.exit_code) from None
            raise UsageError(_in_a_line(error)) from error


def option_name(parameter: Any) -> str:
    """Return the long name of an option."""
    return str(max(parameter.opts, key=len))


def metavar_of(parameter: Any) -> str:
    """Return what stands for the value of an option where that says more than its name."""
    return str(parameter.metavar or "")


def _in_a_line(error: Any) -> str:
    said = " ".join(error.format_message().split()).rstrip(".")
    path = error.ctx.command_path if getattr(error, "ctx", None) else "moesurgeon"
    return f"{said[:1].lower()}{said[1:]}; see {path} --help"
