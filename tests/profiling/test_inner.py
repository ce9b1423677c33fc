"""The file of inner products: written in any order, refused when damaged, read layer by layer."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from moesurgeon.errors import OutputError, ProfileError
from moesurgeon.profiling import inner as inner_module
from moesurgeon.profiling.artefact import Origin, Profile, load_profile, save_profile
from moesurgeon.profiling.inner import Inner, InnerWriter, Shape
from moesurgeon.profiling.statistics import Statistics

SHAPE = Shape(layers=(1, 3), tokens=5, kept=3, experts=4, has_bias=True)
RULE = {"scoring": "softmax"}
ORIGIN = Origin(
    fingerprint="f" * 64, family="mixtral", splits={}, trace_hashes={}, length=8, placement="cpu", transformers="5"
)  # fmt: skip


def _rows(seed: int) -> np.ndarray:
    """Rows [5, 9 + 3 + 1 + 4 + 3] as a collector gives them."""
    rng = np.random.default_rng(seed)
    experts = np.stack([np.sort(rng.permutation(4)[:3]) for _ in range(5)])
    return np.concatenate([rng.normal(size=(5, 17)), experts], axis=1)


def _written(path: Path, shape: Shape = SHAPE) -> Inner:
    writer = InnerWriter(path, shape)
    for layer in (3, 1):
        rows = _rows(layer)
        writer.put_rows(layer, 2, rows[2:])
        writer.put_rows(layer, 0, rows[:2])
        writer.put_bias(layer, np.arange(4) + layer)
    writer.put_tokens(np.array([0, 0, 1, 1, 1]), np.array([7, 0, 2, 2, 3]))
    writer.sync()
    return Inner.open(path, shape, RULE)


def test_what_was_put_is_what_is_read(tmp_path: Path) -> None:
    inner = _written(tmp_path / "new" / "inner.safetensors")
    assert inner.domain.tolist() == [0, 0, 1, 1, 1] and inner.fold.tolist() == [7, 0, 2, 2, 3]
    for layer in (1, 3):
        rows, found = _rows(layer).astype(np.float32), inner.layer(layer)
        assert np.array_equal(found.gram, rows[:, :9].reshape(5, 3, 3))
        assert np.array_equal(found.with_output, rows[:, 9:12])
        assert np.array_equal(found.output, rows[:, 12])
        assert np.array_equal(found.logits, rows[:, 13:17])
        assert found.experts is not None and np.array_equal(found.experts, rows[:, 17:])
        assert found.bias is not None and found.bias.tolist() == [layer, layer + 1, layer + 2, layer + 3]


def test_any_other_reader_of_safetensors_reads_it(tmp_path: Path) -> None:
    inner = _written(tmp_path / "inner.safetensors")
    arrays = load_file(inner.path)
    assert {name: array.shape for name, array in arrays.items()} == {
        "gram": (2, 5, 3, 3), "with_output": (2, 5, 3), "output": (2, 5), "logits": (2, 5, 4), "experts": (2, 5, 3),
        "bias": (2, 4), "domain": (5,), "fold": (5,),
    }  # fmt: skip
    assert np.array_equal(arrays["gram"][1], inner.layer(3).gram)
    assert inner.path.stat().st_size == SHAPE.nbytes + len(inner_module.build_header(SHAPE.tensors(), {}))


def test_with_all_experts_there_is_no_list_of_them(tmp_path: Path) -> None:
    shape = replace(SHAPE, kept=4, has_bias=False)
    writer = InnerWriter(tmp_path / "inner.safetensors", shape)
    writer.put_rows(1, 0, np.ones((5, 16 + 4 + 1 + 4)))
    writer.sync()
    found = Inner.open(tmp_path / "inner.safetensors", shape, RULE).layer(1)
    assert found.experts is None and found.bias is None and found.gram.shape == (5, 4, 4)


def test_a_file_that_is_there_is_gone_on_with(tmp_path: Path) -> None:
    path = tmp_path / "inner.safetensors"
    _written(path)
    before = path.read_bytes()
    InnerWriter(path, SHAPE).sync()
    assert path.read_bytes() == before
    InnerWriter(path, replace(SHAPE, tokens=6)).sync()
    assert not any(path.read_bytes()[-6 * 3 * 2 * 2 :])  # another size: begun anew


def _damaged_header(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[9:12] = b"???"
    path.write_bytes(content)


def _with(name: str, value: Any) -> Any:
    def change(path: Path) -> None:
        arrays = load_file(path)
        if value is None:
            del arrays[name]
        elif callable(value):
            arrays[name] = value(arrays[name])
        else:
            arrays[name].flat[0] = value
        save_file(arrays, path)

    return change


DAMAGE = {
    "gone": Path.unlink,
    "cut off": lambda path: os.truncate(path, 100),
    "header": _damaged_header,
    "an array less": _with("logits", None),
    "another shape": _with("gram", lambda array: array[:, :4]),
    "another dtype": _with("output", lambda array: array.astype(np.float64)),
    "not a number": _with("gram", np.nan),
    "infinite": _with("with_output", np.inf),
    "no such expert": _with("experts", 4),
    "no expert at all": _with("experts", -1),
    "bias": _with("bias", np.nan),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_is_refused(damage: str, tmp_path: Path) -> None:
    profile = Profile(Statistics.empty(("one", "two"), (1, 3), 4, 2), ORIGIN, _written(tmp_path / "inner.safetensors"))
    save_profile(profile, tmp_path / "profile")
    DAMAGE[damage](tmp_path / "profile" / "inner.safetensors")
    with pytest.raises(ProfileError, match=r"inner.safetensors is damaged .* make the profile again"):
        inner = load_profile(tmp_path / "profile").inner
        assert inner is not None
        inner.layer(1)


def test_a_profile_has_them_beside_its_statistics(tmp_path: Path) -> None:
    inner = _written(tmp_path / "scratch" / "inner.safetensors")
    save_profile(Profile(Statistics.empty(("one", "two"), (1, 3), 4, 2), ORIGIN, inner), tmp_path / "profile")
    shutil.rmtree(tmp_path / "scratch")
    loaded = load_profile(tmp_path / "profile")
    assert loaded.inner is not None
    assert loaded.inner.shape == SHAPE and loaded.inner.rule == RULE
    assert np.array_equal(loaded.inner.layer(3).output, _rows(3)[:, 12].astype(np.float32))
    assert loaded.summary()["inner"] == {"tokens": 5, "experts": 3}
    assert json.loads((tmp_path / "profile" / "profile.json").read_text())["inner"]["file"] == "inner.safetensors"
    # Written again from there, the first one stays whole.
    save_profile(loaded, tmp_path / "again")
    for folder in ("profile", "again"):
        assert load_profile(tmp_path / folder).inner.layer(1).gram.shape == (5, 3, 3)  # type: ignore[union-attr]


@pytest.mark.parametrize("change", [{"tokens": "5"}, {"kept": 4}, {"tokens": -1}, {"has_bias": False}, {"rule": None}])
def test_facts_that_do_not_fit_the_file_are_refused(change: dict[str, Any], tmp_path: Path) -> None:
    inner = _written(tmp_path / "inner.safetensors")
    save_profile(Profile(Statistics.empty(("one", "two"), (1, 3), 4, 2), ORIGIN, inner), tmp_path / "profile")
    facts = json.loads((tmp_path / "profile" / "profile.json").read_text())
    facts["inner"] |= change
    (tmp_path / "profile" / "profile.json").write_text(json.dumps(facts))
    with pytest.raises(ProfileError, match="damaged"):
        load_profile(tmp_path / "profile")


def test_a_disk_without_room_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_arguments: object) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OutputError, match=r"No space left on device\); free space, or lower --inner"):
        InnerWriter(tmp_path / "inner.safetensors", SHAPE)
