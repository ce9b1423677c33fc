"""The tensors that healing made anew, in a file of their own until the one write of the checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from moesurgeon.checkpoint.header import TensorSpec, build_header, read_header
from moesurgeon.checkpoint.install import sync
from moesurgeon.checkpoint.writer import Fresh, content_key
from moesurgeon.errors import InputError
from moesurgeon.surgery import edits
from moesurgeon.surgery.anatomy import Anatomy
from moesurgeon.surgery.plan import EditPlan, identity


def save_healed(plan: EditPlan, path: Path) -> dict[str, str]:
    """Write what the last operation of ``plan`` made anew to ``path``; return the key of each tensor's bytes."""
    outputs = [plan.outputs[name] for name in plan.record[-1]["replaced"]]
    keys = {}
    with path.open("wb") as file:
        file.write(build_header([output.spec for output in outputs], {}))
        for output in outputs:
            made = b""
            for part in output.parts:
                assert isinstance(part, Fresh), "healed tensors are new as a whole"
                made += part.load()
            file.write(made)
            keys[output.spec.name] = content_key(made)
    sync(path)
    return keys


def plan_from(path: Path, anatomy: Anatomy, record: Mapping[str, Any], keys: Mapping[str, str]) -> EditPlan:
    """Plan to replace tensors of ``anatomy`` by those in ``path``, as ``record`` says; InputError if they do not fit.

    Their bytes are read when they are asked for.
    """
    stored = {each.name: each for each in read_header(path, path.name).tensors}
    outputs = dict(identity(anatomy).outputs)
    if set(stored) != set(record["replaced"]) or set(stored) != set(keys):
        raise InputError(f"{path} does not hold the tensors that its stage healed; remove the folder and begin anew")
    for name, each in stored.items():
        spec = anatomy.tensors.get(name)
        if spec is None or (spec.dtype, spec.shape) != (each.dtype, each.shape):
            raise InputError(f"{path}: {name!r} is no tensor of this stage; remove the folder and begin anew")
        load = partial(_read, path, each.offset, each.nbytes)
        plain = TensorSpec(spec.name, spec.dtype, spec.shape)
        outputs[name] = edits.replace(plain, load, key=keys[name])
    return EditPlan(outputs, record=[dict(record)])


def _read(path: Path, offset: int, length: int) -> bytes:
    with path.open("rb") as file:
        file.seek(offset)
        return file.read(length)
