"""A file that says which experts stay."""

from __future__ import annotations

import json
from pathlib import Path

from moesurgeon.errors import InputError
from moesurgeon.surgery.prune import Kept

_KEPT = '{"LAYER": [expert, ...]}'


def read_kept(path: Path) -> Kept:
    """Read ``{"LAYER": [expert, ...]}`` with the source's numbering."""
    try:
        pairs = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=list)
        layers = [int(layer) for layer, _experts in pairs]
        kept = {int(layer): tuple(experts) for layer, experts in pairs}
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}); give a JSON file {_KEPT}") from error
    except (ValueError, TypeError, RecursionError) as error:
        raise InputError(f"{path} is not of the form {_KEPT}: {str(error)[:200]}; correct it") from error
    if not kept or not all(experts and all(type(item) is int for item in experts) for experts in kept.values()):
        raise InputError(f"{path} must map each layer to a list of expert numbers that is not empty: {_KEPT}")
    if len(layers) != len(kept):
        raise InputError(f"{path} names a layer twice; list each once")
    for layer, experts in kept.items():
        if len(set(experts)) != len(experts):
            raise InputError(f"{path}: layer {layer} lists an expert twice; list each that stays once")
    return kept
