"""``python -m moesurgeon.cli.reference``: the command line's reference as Markdown, from the commands themselves.

Names and defaults come from the parser, the rest from the annotations of the commands, so ``docs/cli.md``
cannot tell anything else than what runs (a test holds it current, whichever typer is installed).
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import typer.main

from moesurgeon import errors
from moesurgeon.cli import app

_INTRO = """\
# Command line

Made by `make docs` from the program itself; do not edit.

A checkpoint (`CKPT`) is a folder, `builtin:tiny-mixtral`, `builtin:tiny-deepseek` or `hf://org/name[@revision]`.
Results go to stdout, everything else to stderr. `--json` prints one object with `schema_version`, for an
error `{"schema_version": ..., "error": {"message": ..., "exit_code": ...}}`, and turns progress off.
`MOESURGEON_DEBUG=1` shows the traceback of every error. `moesurgeon --version` prints the version.
"""

EXIT_CODES = (
    (errors.EXIT_OK, "done"),
    (errors.EXIT_BUG, "a bug of moesurgeon; please report the traceback"),
    (errors.UsageError.exit_code, "wrong usage, or nothing would change (`--allow-noop` accepts that)"),
    (errors.InputError.exit_code, "unusable input: a checkpoint, profile, trace, recipe or list of experts"),
    (errors.GateFailed.exit_code, "a quality gate failed; the last good state was kept"),
    (errors.OutputError.exit_code, "the output could not be written, or a checkpoint did not verify"),
    (errors.EXIT_INTERRUPTED, "interrupted (Ctrl-C); nothing that looks finished is left, the same write goes on"),
    (errors.EXIT_PIPE, "the reader of the output went away, as in `moesurgeon ... \\| head`"),
)


def reference() -> str:
    """Return the whole page."""
    group: Any = typer.main.get_command(app)
    sections = [_INTRO, "\n".join(_table(("Exit code", "Meaning"), [(str(code), what) for code, what in EXIT_CODES]))]
    sections += ["\n".join(_section(name, group.commands[name])) for name in group.commands]
    return "\n\n".join(section.strip() for section in sections) + "\n"


def _section(name: str, command: Any) -> Iterator[str]:
    hints = get_type_hints(inspect.unwrap(command.callback), include_extras=True)
    arguments = [parameter for parameter in command.params if parameter.param_type_name == "argument"]
    options = [p for p in command.params if p.param_type_name == "option" and p.name != "help"]
    needed = [f"{option.opts[0]} {_value(option, hints)}" for option in options if option.required]
    usage = ["moesurgeon", name, *(argument.metavar for argument in arguments), *needed, "[OPTIONS]"]
    yield from (f"## {name}", "", " ".join(command.help.split()), "", "```", " ".join(usage), "```", "")
    if arguments:
        rows = [(f"`{argument.metavar}`", _cell(hints[argument.name].__metadata__[0].help)) for argument in arguments]
        yield from (*_table(("Argument", "Meaning"), rows), "")
    rows_ = [(_option(option, hints), _default(option), _meaning(option, hints)) for option in options]
    yield from _table(("Option", "Default", "Meaning"), rows_)


def _option(option: Any, hints: dict[str, Any]) -> str:
    value = _value(option, hints)
    # What switches off what is on by default has a name of its own.
    names = " / ".join([", ".join(sorted(option.opts, key=len)), *option.secondary_opts])
    return f"`{names} {value}`" if value else f"`{names}`"


def _value(option: Any, hints: dict[str, Any]) -> str:
    """Return what stands for the option's value; nothing for a flag."""
    if option.is_flag:
        return ""
    if option.metavar:
        return str(option.metavar)
    return {int: "N", float: "X", str: "NAME", Path: "PATH"}.get(_kind(hints[option.name]), "NAME")


def _kind(hint: Any) -> Any:
    """Return the type below Annotated and ``| None``: int, float, str, Path or a Literal."""
    inside = [part for part in get_args(hint) if part is not type(None)]
    return hint if get_origin(hint) is Literal or not inside else _kind(inside[0])


def _default(option: Any) -> str:
    if option.required:
        return "required"
    if option.is_flag or option.default is None:
        return ""
    values = option.default if isinstance(option.default, (list, tuple)) else [option.default]
    return ", ".join(f"`{value}`" for value in values)


def _meaning(option: Any, hints: dict[str, Any]) -> str:
    """Return the option's help with the values that it takes."""
    kind = _kind(hints[option.name])
    notes = [" or ".join(f"`{choice}`" for choice in get_args(kind))] if get_origin(kind) is Literal else []
    info = hints[option.name].__metadata__[0]
    notes += [f"at least {info.min:g}"] if info.min is not None else []
    return _cell(info.help) + (f" ({'; '.join(notes)})" if notes else "")


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _table(headings: tuple[str, ...], rows: list[Any]) -> Iterator[str]:
    for row in (headings, ("---",) * len(headings), *rows):
        yield f"| {' | '.join(row)} |"


if __name__ == "__main__":
    print(reference(), end="")
