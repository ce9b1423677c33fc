"""Inner products of expert outputs on disk: what every later question about a subset or a top-k is answered from.

Of N tokens in each of L mixture layers all experts were run, f_i being the output of expert i before weighting
and y the block's routed output, and kept was what has no hidden dimension any more:

- ``gram`` [L, N, m, m]: <f_i, f_j>
- ``with_output`` [L, N, m]: <f_j, y>
- ``output`` [L, N]: |y|^2
- ``logits`` [L, N, E]: the router's, as it returns them
- ``experts`` [L, N, m]: which experts those m are, where they are fewer than E; ascending
- ``bias`` [L, E]: what takes part in the choice only, where the family has one
- ``domain`` and ``fold`` [N]: of each token, as numbers

Shared experts cancel: they see the same input whichever routed experts are chosen, so the block's output and
that of any variant of its routing have the same shared part, and their difference has none.

Legend: L mixture layers, N tokens, m experts that were run for a token, E experts.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moesurgeon.checkpoint.header import TensorSpec, build_header, read_header
from moesurgeon.checkpoint.install import sync
from moesurgeon.errors import CheckpointError, OutputError, ProfileError

NAME = "inner.safetensors"
_DTYPES: Mapping[str, Any] = {"F32": np.float32, "I16": np.int16, "I32": np.int32}
_ROWS = 1 << 12  # of a layer that are checked at once


@dataclass(frozen=True, kw_only=True)
class Shape:
    """The sizes of inner products: ``layers`` by number, ``tokens`` N, ``kept`` m of ``experts`` E."""

    layers: tuple[int, ...]
    tokens: int
    kept: int
    experts: int
    has_bias: bool

    @property
    def row(self) -> dict[str, tuple[int, ...]]:
        """What there is of one token in one layer, by name, with its shape."""
        parts: dict[str, tuple[int, ...]] = {
            "gram": (self.kept, self.kept),
            "with_output": (self.kept,),
            "output": (),
            "logits": (self.experts,),
        }
        return parts | ({"experts": (self.kept,)} if self.kept < self.experts else {})

    def tensors(self) -> list[TensorSpec]:
        """Return what the file holds."""
        layers, tokens = len(self.layers), self.tokens
        found = [
            TensorSpec(name, "I16" if name == "experts" else "F32", (layers, tokens, *shape))
            for name, shape in self.row.items()
        ]
        if self.has_bias:
            found.append(TensorSpec("bias", "F32", (layers, self.experts)))
        # What has four bytes comes first: all stay aligned.
        ends = [TensorSpec(name, "I32", (tokens,)) for name in ("domain", "fold")]
        return sorted([*found, *ends], key=lambda spec: spec.dtype == "I16")

    @property
    def nbytes(self) -> int:
        return sum(spec.nbytes for spec in self.tensors())


@dataclass(frozen=True)
class InnerLayer:
    """Of one layer: ``gram`` [N, m, m], ``with_output`` [N, m], ``output`` [N], ``logits`` [N, E], ``experts`` [N, m]
    or None where all are there, ``bias`` [E] or None. Mapped from the file, not read."""

    gram: NDArray[np.float32]
    with_output: NDArray[np.float32]
    output: NDArray[np.float32]
    logits: NDArray[np.float32]
    experts: NDArray[np.int16] | None
    bias: NDArray[np.float32] | None


@dataclass(frozen=True)
class Inner:
    """The inner products in ``path``; nothing is read before it is asked for.

    ``rule``: the router's rule (``subset_errors.routing_at`` makes one of it that can be asked).
    """

    path: Path
    shape: Shape
    rule: Mapping[str, Any]
    _offsets: Mapping[str, int] = field(repr=False)

    @classmethod
    def open(cls, path: Path, shape: Shape, rule: Mapping[str, Any]) -> Inner:
        """Check names, dtypes and sizes of the file against ``shape``; ProfileError if they differ."""
        try:
            stored = read_header(path, NAME).tensors
        except (OSError, CheckpointError) as error:
            raise _damaged(path, str(error)) from error
        if {(each.name, each.dtype, each.shape) for each in stored} != {
            (each.name, each.dtype, each.shape) for each in shape.tensors()
        }:
            raise _damaged(path, "its arrays are not those that profile.json describes")
        return cls(path, shape, rule, {each.name: each.offset for each in stored})

    @classmethod
    def of_profile(cls, folder: Path, facts: Mapping[str, Any]) -> Inner | None:
        """Return the inner products that the profile with these ``facts`` in ``folder`` has; None if it has none."""
        said = facts.get("inner")
        if said is None:
            return None
        shape = Shape(
            layers=tuple(facts["layers"]),
            tokens=said["tokens"],
            kept=said["kept"],
            experts=facts["experts"],
            has_bias=said["has_bias"],
        )
        return cls.open(folder / NAME, shape, dict(said["rule"]))

    def facts(self) -> dict[str, Any]:
        """Return what profile.json says of them."""
        shape = self.shape
        return {
            "file": NAME, "tokens": shape.tokens, "kept": shape.kept, "has_bias": shape.has_bias, "rule": self.rule
        }  # fmt: skip

    def put_into(self, folder: Path) -> None:
        """Let ``folder`` have the file too: as a link where the file system can, else as a copy."""
        try:
            os.link(self.path, folder / NAME)
        except OSError:
            shutil.copyfile(self.path, folder / NAME)

    @property
    def domain(self) -> NDArray[np.int32]:
        """The domain of each token [N], by number."""
        return self._mapped("domain")

    @property
    def fold(self) -> NDArray[np.int32]:
        """The fold of documents of each token [N]."""
        return self._mapped("fold")

    def layer(self, number: int) -> InnerLayer:
        """Return what there is of layer ``number``; ProfileError if any of it is no number."""
        place = self.shape.layers.index(number)
        parts = {name: self._mapped(name)[place] for name in self.shape.row}
        bias = self._mapped("bias")[place] if self.shape.has_bias else None
        for name, array in (*parts.items(), ("bias", bias)):
            if array is not None and not _is_sound(array, self.shape.experts):
                raise _damaged(self.path, f"layer {number}, {name}")
        return InnerLayer(
            parts["gram"], parts["with_output"], parts["output"], parts["logits"], parts.get("experts"), bias
        )

    def _mapped(self, name: str) -> Any:
        spec = next(spec for spec in self.shape.tensors() if spec.name == name)
        if 0 in spec.shape:
            return np.empty(spec.shape, _DTYPES[spec.dtype])
        offset = self._offsets[name]
        return np.memmap(self.path, mode="r", dtype=_DTYPES[spec.dtype], shape=spec.shape, offset=offset)


class InnerWriter:
    """Fills the file ``path``, made as large as ``shape`` says, layer by layer in any order.

    A file that is there already is gone on with. Raises OutputError if there is no room for it.
    """

    def __init__(self, path: Path, shape: Shape) -> None:
        self._path, self._shape = path, shape
        header = build_header(shape.tensors(), {})
        size = len(header) + shape.nbytes
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if not path.is_file() or path.stat().st_size != size:
                _reserve(path, header, size)
        except OSError as error:
            raise OutputError(
                f"{path} of {size / 1e9:.2f} GB cannot be made ({error.strerror}); free space, or lower --inner"
            ) from error
        stored = {each.name: each for each in read_header(path, NAME).tensors}
        self._arrays: dict[str, Any] = {
            name: np.memmap(path, mode="r+", dtype=_DTYPES[each.dtype], shape=each.shape, offset=each.offset)
            for name, each in stored.items()
        }

    def put_tokens(self, domain: NDArray[Any], fold: NDArray[Any]) -> None:
        """Say of each token [N] whose it is."""
        self._arrays["domain"][:] = domain
        self._arrays["fold"][:] = fold

    def put_bias(self, layer: int, bias: NDArray[Any]) -> None:
        self._arrays["bias"][self._shape.layers.index(layer)] = bias

    def put_rows(self, layer: int, start: int, rows: NDArray[Any]) -> None:
        """Store ``rows`` [n, width] from token ``start`` on, each the parts of :attr:`Shape.row` in turn."""
        place, column = self._shape.layers.index(layer), 0
        for name, shape in self._shape.row.items():
            width = int(np.prod(shape))
            values = rows[:, column : column + width].reshape(len(rows), *shape)
            self._arrays[name][place, start : start + len(rows)] = values
            column += width

    def sync(self) -> None:
        """Have all that was put on the disk."""
        for array in self._arrays.values():
            array.flush()
        sync(self._path)


def _reserve(path: Path, header: bytes, size: int) -> None:
    """Make ``path`` with all of its blocks: a mapped file that has none fails where it is written to, with a signal."""
    with path.open("wb") as file:
        file.write(header)
        file.flush()
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, size)
        else:
            file.truncate(size)


def _is_sound(array: NDArray[Any], experts: int) -> bool:
    if array.dtype == np.int16:
        return bool(((array >= 0) & (array < experts)).all())
    return all(bool(np.isfinite(array[first : first + _ROWS]).all()) for first in range(0, len(array), _ROWS))


def _damaged(path: Path, what: str) -> ProfileError:
    return ProfileError(f"{path} is damaged ({what}); make the profile again with moesurgeon profile --inner")
