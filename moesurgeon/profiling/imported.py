"""Token counts that a server recorded, read from the forms that servers and balancers write.

- ``{"LAYER": [count, ...]}``: by the number of the layer
- ``{"logical_count": [[count, ...], ...]}``: SGLang's expert distribution, a row per layer of the model, also with a
  leading dimension of steps, which are added up
- ``[[count, ...], ...]``: the ``weight`` of DeepSeek's EPLB, a row per layer
- CSV with the columns layer, expert, tokens; what is listed twice is added up

Counts say who was used, and nothing of weights and outputs: a profile of them serves the frequency criterion only.

Legend: L mixture layers, E experts.
"""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

import numpy as np

from moesurgeon.checkpoint.strict_json import holds_numbers, parse_strictly, whole_number
from moesurgeon.errors import InputError
from moesurgeon.profiling.statistics import Array, Statistics
from moesurgeon.surgery.anatomy import Anatomy

DOMAIN = "served"
_FORMS = (
    'a JSON {"LAYER": [counts]}, {"logical_count": [[counts]]} or [[counts]], or a CSV with the columns layer, expert, '
    "tokens"
)


def imported(path: Path, text: str, anatomy: Anatomy) -> Statistics:
    """Return statistics of the counts in ``text``, the content of ``path``; InputError if they do not fit ``anatomy``.

    Tokens of text are what a layer's counts come to over top-k, on average over layers.
    """
    by_layer = _from_json(path, text, anatomy) if text.lstrip()[:1] in ("{", "[") else _from_csv(path, text, anatomy)
    for layer in sorted(by_layer.keys() - set(anatomy.moe_layers)):
        if by_layer.pop(layer).any():
            raise InputError(f"{path} counts tokens in layer {layer}, which has no experts; is it another model's?")
    if missing := [layer for layer in anatomy.moe_layers if layer not in by_layer or not by_layer[layer].any()]:
        raise InputError(f"{path} counts no tokens in layers {missing[:8]}; record all layers with experts")
    statistics = Statistics.empty((DOMAIN,), anatomy.moe_layers, anatomy.experts, anatomy.top_k)
    counts_LE = np.stack([by_layer[layer] for layer in anatomy.moe_layers])
    statistics.sums["tokens"][0, 0] = counts_LE
    statistics.sums["seen"][0, 0] = max(1, round(float(counts_LE.sum(axis=1).mean()) / anatomy.top_k))
    return statistics


def _from_json(path: Path, text: str, anatomy: Anatomy) -> dict[int, Array]:
    try:
        loaded: Any = parse_strictly(text)
        if isinstance(loaded, dict) and "logical_count" not in loaded:
            return {whole_number(layer): _row(path, f"layer {layer}", row, anatomy) for layer, row in loaded.items()}
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not {_FORMS} ({str(error)[:120]})") from error
    rows = _array(path, "the counts", loaded["logical_count"] if isinstance(loaded, dict) else loaded)
    if rows.ndim == 3:  # steps first
        rows = rows.sum(axis=0)
    if rows.ndim != 2:
        raise InputError(f"{path} is not {_FORMS}: the counts have {rows.ndim} dimensions")
    layers = {len(anatomy.moe_layers): anatomy.moe_layers, anatomy.layers: tuple(range(anatomy.layers))}
    if len(rows) not in layers:
        raise InputError(
            f"{path} has {len(rows)} rows; the checkpoint has {anatomy.layers} layers, {len(anatomy.moe_layers)} of "
            "them with experts: give a row for each"
        )
    return {
        layer: _row(path, f"layer {layer}", row, anatomy) for layer, row in zip(layers[len(rows)], rows, strict=True)
    }


def _from_csv(path: Path, text: str, anatomy: Anatomy) -> dict[int, Array]:
    reader = csv.DictReader(io.StringIO(text), skipinitialspace=True)
    names = [name.strip().lower() for name in reader.fieldnames or () if name]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise InputError(f"{path}: its first line names the column {twice[0]} twice; keep one of them")
    columns = {name.strip().lower(): name for name in reader.fieldnames or () if name}
    if missing := [name for name in ("layer", "expert", "tokens") if name not in columns]:
        raise InputError(f"{path} is not {_FORMS}: its first line names no {', '.join(missing)}")
    counts: dict[int, Array] = {}
    for line in reader:
        values = [line[columns[name]] for name in ("layer", "expert", "tokens")]
        try:
            layer, expert = (whole_number(value.strip()) for value in values[:2])
            tokens = _count(values[2])
        except (AttributeError, TypeError, ValueError) as error:
            raise InputError(f"{path}, line {reader.line_num}: {values} are no numbers; correct it") from error
        if None in line:
            raise InputError(f"{path}, line {reader.line_num} has more cells than the first line; correct it")
        if not 0 <= expert < anatomy.experts:
            raise InputError(
                f"{path}, line {reader.line_num}: there is no expert {expert}; the checkpoint has {anatomy.experts}"
            )
        if not 0 <= tokens < np.inf:
            raise InputError(f"{path}, line {reader.line_num}: {tokens:g} is no count of tokens; correct it")
        counts.setdefault(layer, np.zeros(anatomy.experts))[expert] += tokens
    return counts


def _row(path: Path, what: str, values: Any, anatomy: Anatomy) -> Array:
    row = _array(path, what, values)
    if row.shape != (anatomy.experts,):
        raise InputError(
            f"{path}: {what} has {row.size} counts, the checkpoint {anatomy.experts} experts; logical experts are "
            "meant, without a server's redundant copies"
        )
    return row


def _count(text: str) -> float:
    """Return the number in a cell; ValueError also for 1_000, which Python takes."""
    if "_" in text:
        raise ValueError(text)
    return float(text)


def _array(path: Path, what: str, values: Any) -> Array:
    if not isinstance(values, np.ndarray) and not holds_numbers(values):
        raise InputError(f"{path}: {what} are not numbers in equal rows; give {_FORMS}")
    try:
        array = np.array(values, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise InputError(f"{path}: {what} are not numbers in equal rows; give {_FORMS}") from error
    if not np.isfinite(array).all() or (array < 0).any():
        raise InputError(f"{path}: {what} are not all counts from 0 on; correct the file")
    return array
