"""Which options depend on another: an option that was typed and would be ignored is wrong usage.

The tables say for every option of every command that it stands by itself (``INDEPENDENT``) or what it needs
(``DEPENDENT``); a test holds that none is left out. The parser asks :func:`refuse_useless` before the command starts.

A condition is written as people type it:

    --heal                         it was given (a number: is not 0)
    --heal-method=ridge|distill    it has one of these values, typed or by default
    no --uniform                   it was not given
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from moesurgeon.errors import UsageError


@dataclass(frozen=True)
class Needs:
    """An option needs one of ``conditions``; without it is of no use: it ``says`` something about nothing."""

    says: str
    conditions: tuple[str, ...]


Dependencies = Mapping[str, tuple[Needs, ...]]


def _all(options: Iterable[str], *needs: Needs) -> dict[str, tuple[Needs, ...]]:
    return dict.fromkeys(options, needs)


def _healing(given: str) -> dict[str, tuple[Needs, ...]]:
    """Return what the options of healing need where text that heals is named by the option ``given``."""
    heals = Needs("is about healing, and nothing heals", (given,))
    runs = Needs("is about running the model, and nothing runs it", (given,))
    return {
        **_all(
            (
                "--heal-method",
                "--heal-tokens",
                "--heal-budget",
                "--heal-heldout",
                "--heal-teacher",
                "--heal-sample",
                "--validation",
            ),
            heals,
        ),
        **_methods(heals),
        "--heal-router": (heals, _ROUTER_FIT),
        **_all(("--device", "--dtype", "--max-memory"), runs),
    }


def _methods(heals: Needs) -> dict[str, tuple[Needs, ...]]:
    return {"--heal-steps": (heals, _DISTILLATION), "--heal-rank": (heals, _REFIT)}


_STAGED = ("--stages", "--gate", "--search")
_DISTILLATION = Needs("bounds the distillation, and this method has none", ("--heal-method=distill",))
_REFIT = Needs("is about the refit, and this method has none", ("--heal-method=ridge|distill",))
_ROUTER_FIT = Needs("lets healing change the routers, and --heal-method none changes nothing",
                    ("--heal-method=scale|ridge|distill",))  # fmt: skip
_LAYERS = Needs("is about healing the layers, and nothing heals them", ("--heal-method=scale|ridge|distill",))
_TRAINING = Needs("is about the training, and --steps 0 trains nothing", ("--steps",))
_DISTIL = Needs("is about the distillation, and --objective lm has none", ("--objective=distill",))
_ROUTERS = Needs("is about routers, and none is trained", ("--adapt=routers|full-routers",))
_EXPERTS = Needs("is about experts, and none is trained", ("--adapt=experts|experts-all",))
_ADAPTERS = Needs("is about adapters, and whole routers have none", ("--adapt=routers|experts|experts-all",))
_MODEL = Needs("is about running the model, and --uniform runs none", ("no --uniform",))

INDEPENDENT: Mapping[str, frozenset[str]] = {
    "inspect": frozenset({"--json"}),
    "retop": frozenset(
        {"--top-k", "--profile", "--calibrate", "--layout", "--vllm-config", "--link", "--shard-size",
         "--overwrite", "--dry-run", "--allow-noop", "--json"}
    ),
    "profile": frozenset(
        {"--output", "--traces", "--split", "--max-tokens", "--budget", "--weight", "--sample", "--length", "--device",
         "--dtype", "--max-memory", "--resume", "--inner", "--latency", "--overwrite", "--json"}
    ),
    "profile show": frozenset({"--layer", "--csv", "--plot", "--json"}),
    "profile merge": frozenset({"--output", "--overwrite", "--json"}),
    "profile diff": frozenset({"--checkpoint", "--json"}),
    "profile import": frozenset({"--output", "--checkpoint", "--overwrite", "--json"}),
    "prune": frozenset(
        {"--profile", "--keep", "--ratio", "--below", "--keep-experts", "--virtual", "--heal", "--layout",
         "--vllm-config", "--link", "--shard-size", "--overwrite", "--dry-run", "--allow-noop", "--json"}
    ),
    "recover": frozenset(
        {"--teacher", "--traces", "--validation", "--heal-method", "--steps", "--split", "--sample", "--length",
         "--device", "--dtype", "--max-memory", "--layout", "--vllm-config", "--link", "--shard-size", "--overwrite",
         "--dry-run",
         "--allow-noop", "--json"}
    ),
    "evaluate": frozenset(
        {"--against", "--traces", "--gate", "--continuations", "--split", "--max-tokens", "--budget", "--sample",
         "--length", "--include-healed", "--device", "--dtype", "--max-memory", "--json"}
    ),
    "harness": frozenset({"--task", "--tasks-folder", "--limit", "--device", "--dtype", "--max-memory", "--json"}),
    "sample": frozenset(
        {"--output", "--max-tokens", "--length", "--rows", "--uniform", "--seed", "--overwrite", "--json"}
    ),
    "verify": frozenset({"--source", "--full", "--json"}),
    "run": frozenset({"--output", "--overwrite", "--json"}),
}  # fmt: skip

DEPENDENT: Mapping[str, Dependencies] = {
    "retop": {
        "--per-layer": (Needs("follows from a profile with inner products (profile --inner)", ("--profile",)),),
        "--per-layer-average": (Needs("follows from a profile with inner products (profile --inner)", ("--profile",)),),
        "--per-layer-out": (
            Needs("writes how the experts per token are divided, and nothing divides them", ("--per-layer-average",)),
        ),
        **_healing("--calibrate"),
    },
    "profile": {"--inner-experts": (Needs("is about inner products, and none are kept", ("--inner",)),)},
    "prune": {
        "--criterion": (
            Needs(
                "chooses experts, and nothing says how many",
                ("--keep", "--ratio", "--below", *_STAGED),
            ),
            Needs("chooses experts, and --keep-experts has chosen", ("no --keep-experts",)),
        ),
        "--seed": (Needs("is for the random criterion", ("--criterion=random",)),),
        "--protect": (
            Needs("goes by a profile, and there is none", ("--profile", *_STAGED)),
        ),
        "--explain": (
            Needs("tells what a profile says of the dropped experts", ("--profile", *_STAGED)),
        ),
        "--curve": (
            Needs("follows from a profile with inner products (profile --inner)", ("--profile",)),
            *(Needs(f"is about one cut, and {each} is about several", (f"no {each}",)) for each in _STAGED),
        ),
        "--curve-plot": (Needs("draws the curves, and none are asked for", ("--curve",)),),
        "--stages": (Needs("judges on text every step", ("--heal",)),),
        "--gate": (Needs("judges on text every step", ("--heal",)),),
        "--search": (
            Needs("judges on text every count", ("--heal",)),
            Needs("looks for the smallest count that passes a gate", ("--gate",)),
        ),
        "--run": (
            Needs("is where the steps of a cut are kept, and there are none", _STAGED),
        ),
        "--merge": (Needs("is decided by what experts do on text", ("--heal",)),),
        **_healing("--heal"),
    },
    "recover": {
        **_all(("--heal-tokens", "--heal-budget", "--heal-heldout"), _LAYERS),
        **_methods(_LAYERS),
        **_all(
            ("--objective", "--adapt", "--tokens-per-step", "--learning-rate", "--balance", "--router-distill",
             "--hidden", "--z-loss", "--capacity", "--judge-every", "--patience", "--min-share", "--warmup", "--clip",
             "--recompute", "--seed", "--max-tokens", "--heldout-tokens", "--budget", "--cache", "--log",
             "--tensorboard", "--save-adapter", "--streamed"),
            _TRAINING,
        ),
        "--adapter": (_TRAINING, Needs("is about the routers' adapters, and they get none", ("--adapt=routers",))),
        "--rank": (_TRAINING, _ADAPTERS),
        **_all(("--changed", "--expert-rate"), _TRAINING, _EXPERTS),
        **_all(("--temperature", "--lm"), _TRAINING, _DISTIL),
        "--candidates": (_TRAINING, _ROUTERS, _DISTIL),
    },
    "profile show": {"--overwrite": (Needs("replaces a file, and none is written", ("--csv", "--plot")),)},
    "evaluate": {
        "--new-tokens": (Needs("is about continuations of prompts, and none are asked for", ("--continuations",)),)
    },
    "sample": _all(("--temperature", "--device", "--dtype", "--max-memory"), _MODEL),
}  # fmt: skip


def refuse_useless(command: str, typed: Iterable[str], values: Mapping[str, Any], metavars: Mapping[str, str]) -> None:
    """Raise UsageError for the first of the ``typed`` options of ``command`` that needs what is not there.

    ``values``: of all options by name, typed or by default; ``metavars``: what stands for the value of each, if
    anything does.
    """
    table = DEPENDENT.get(command, {})
    for option in typed:
        for needs in table.get(option, ()):
            if not any(_holds(condition, values) for condition in needs.conditions):
                remedies = _remedies(needs.conditions, metavars)
                raise UsageError(f"{option} {needs.says}: {remedies}, or leave {option} out")


def _parts(condition: str) -> tuple[str, tuple[str, ...], bool]:
    """Return the option, its values (none: any) and whether it has to be there.

    >>> _parts("--heal-method=ridge|distill"), _parts("no --uniform")
    (('--heal-method', ('ridge', 'distill'), True), ('--uniform', (), False))
    """
    option, _, wanted = condition.removeprefix("no ").partition("=")
    return option, tuple(wanted.split("|")) if wanted else (), not condition.startswith("no ")


def _holds(condition: str, values: Mapping[str, Any]) -> bool:
    option, wanted, present = _parts(condition)
    value = values[option]
    if not wanted:
        return bool(value) is present
    return any(each in wanted for each in (value if isinstance(value, (list, tuple)) else [value]))


def _remedies(conditions: Iterable[str], metavars: Mapping[str, str]) -> str:
    """Return what to do for one of ``conditions`` to hold: they all want something added, or left out."""
    parts = [_parts(condition) for condition in conditions]
    said = [" ".join(filter(None, (option, wanted[0] if wanted else metavars[option]))) for option, wanted, _ in parts]
    return f"add {' or '.join(said)}" if parts[0][2] else f"leave {parts[0][0]} out"
