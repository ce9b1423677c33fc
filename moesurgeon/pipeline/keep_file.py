"""A file that says which experts stay."""

from __future__ import annotations

from pathlib import Path

from moesurgeon.checkpoint.strict_json import parse_strictly, whole_number
from moesurgeon.errors import InputError
from moesurgeon.surgery.prune import Kept

_KEPT = '{"LAYER": [expert, ...]}'


def read_kept(path: Path) -> Kept:
    """Read ``{"LAYER": [expert, ...]}`` with the source's numbering."""
    try:
        loaded = parse_strictly(path.read_text(encoding="utf-8"))
        if not isinstance(loaded, dict):
            raise ValueError(f"it holds a {type(loaded).__name__}")
        kept = {whole_number(layer): experts for layer, experts in loaded.items()}
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}); give a JSON file {_KEPT}") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not of the form {_KEPT}: {str(error)[:200]}; correct it") from error
    if not kept or not all(_is_choice(experts) for experts in kept.values()):
        raise InputError(f"{path} must map each layer to a list of expert numbers that is not empty: {_KEPT}")
    for layer, experts in kept.items():
        if len(set(experts)) != len(experts):
            raise InputError(f"{path}: layer {layer} lists an expert twice; list each that stays once")
    return {layer: tuple(experts) for layer, experts in kept.items()}


def _is_choice(experts: object) -> bool:
    return isinstance(experts, list) and len(experts) > 0 and all(type(item) is int for item in experts)
