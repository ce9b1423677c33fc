"""Numbers in routers, and in all tensors, that cannot be meant."""

import struct
from pathlib import Path

import numpy as np
import pytest

from moesurgeon.checkpoint.locate import builtin_checkpoints
from moesurgeon.checkpoint.open import open_checkpoint
from moesurgeon.checkpoint.values import count_not_finite
from moesurgeon.errors import OutputError
from moesurgeon.pipeline.inspect import inspect
from moesurgeon.pipeline.subject import Subject
from moesurgeon.pipeline.verify import verify
from moesurgeon.surgery.routers import odd_routers
from tests.cli.broken import whole
from tests.cli.invoke import refused, succeeded

ROUTER = "model.layers.1.block_sparse_moe.gate.weight"


def _poke(folder: Path, name: str, values: dict[int, bytes]) -> Path:
    """Write bytes into the tensor ``name``, by their places in it."""
    checkpoint = open_checkpoint(folder)
    tensor = checkpoint.tensors[name]
    with checkpoint.path_of(tensor.shard).open("r+b") as file:
        for place, raw in values.items():
            file.seek(tensor.offset + place)
            file.write(raw)
    return folder


def _row(folder: Path, expert: int, value: float) -> dict[int, bytes]:
    """Return the bytes that make all of an expert's row (bfloat16) this ``value``."""
    shape = open_checkpoint(folder).tensors[ROUTER].shape
    return {expert * shape[1] * 2: struct.pack("<f", value)[2:] * shape[1]}


def _odd(folder: Path) -> list[str]:
    return [problem for problem in inspect(str(folder))["problems"] if ROUTER in problem]


@pytest.mark.parametrize("name", sorted(builtin_checkpoints()))
def test_trained_routers_are_not_odd(name: str) -> None:
    assert inspect(f"builtin:{name}")["problems"] == []


@pytest.mark.parametrize(
    ("value", "says"),
    [
        (-1e9, "the rows of expert 3 are off by orders"),
        (1e-9, "the rows of expert 3 are off by orders"),
        (float("nan"), "holds NaN or infinities (expert 3)"),
        (float("inf"), "holds NaN or infinities (expert 3)"),
    ],
)
def test_an_odd_row_is_named(tmp_path: Path, value: float, says: str) -> None:
    folder = whole(tmp_path / "odd")
    _poke(folder, ROUTER, _row(folder, 3, value))
    (odd,) = _odd(folder)
    assert odd.startswith(ROUTER) and says in odd


def test_copies_of_a_row_are_named(tmp_path: Path) -> None:
    folder = whole(tmp_path / "tie")
    tensor = open_checkpoint(folder).tensors[ROUTER]
    size = tensor.shape[1] * 2
    raw = (folder / tensor.shard).read_bytes()[tensor.offset : tensor.offset + size]
    _poke(folder, ROUTER, {5 * size: raw, 6 * size: raw})
    (odd,) = _odd(folder)
    assert "the rows of experts 5, 6 are copies of others" in odd


def test_a_bias_out_of_reach_is_named(tmp_path: Path) -> None:
    from tests.families.factory import save_checkpoint

    folder = save_checkpoint(tmp_path / "v3", "deepseek_v3", num_nextn_predict_layers=0)
    name = "model.layers.2.mlp.gate.e_score_correction_bias"
    _poke(folder, name, {4 * 4: struct.pack("<f", -1e9)})
    checkpoint = open_checkpoint(folder)
    from moesurgeon.surgery.anatomy import examine

    (odd,) = odd_routers(examine(checkpoint.config, checkpoint.tensors), checkpoint)
    assert odd == f"{name}: expert 4 is put out of reach or forced by a bias of -1e+09"


@pytest.mark.parametrize(
    ("dtype", "values"),
    [
        ("F64", np.array([1, np.nan, np.inf, -np.inf, 1e300], dtype="<f8")),
        ("F32", np.array([1, np.nan, np.inf, -np.inf, 1e38], dtype="<f4")),
        ("F16", np.array([1, np.nan, np.inf, -np.inf, 65504], dtype="<f2")),
        ("BF16", np.array([0x3F80, 0x7FC0, 0x7F80, 0xFF80, 0x7F7F], dtype="<u2")),
        ("F8_E5M2", np.array([0x3C, 0x7E, 0x7C, 0xFC, 0x7B], dtype="u1")),
        ("F8_E4M3", np.array([0x38, 0x7F, 0xFF, 0x7F, 0x7E], dtype="u1")),
    ],
)
def test_values_that_are_no_numbers_are_counted(dtype: str, values: np.ndarray) -> None:
    assert count_not_finite(dtype, values.tobytes()) == 3
    assert count_not_finite("I32", values.tobytes()) == 0


def test_verify_full_finds_them_in_any_tensor(tmp_path: Path) -> None:
    name = "model.layers.2.self_attn.v_proj.weight"
    folder = _poke(whole(tmp_path / "nan"), name, {100: b"\xc0\x7f", 200: b"\x80\x7f"})
    verify(str(folder))
    with pytest.raises(OutputError, match=f"{name} holds 2 values that are NaN or infinite"):
        verify(str(folder), full=True)


def test_verify_full_warns_of_routers(tmp_path: Path) -> None:
    folder = whole(tmp_path / "odd")
    _poke(folder, ROUTER, _row(folder, 3, -1e9))
    assert any("off by orders" in warning for warning in verify(str(folder), full=True)["warnings"])
    assert verify(str(folder))["warnings"] == []


@pytest.mark.parametrize(
    ("name", "where"),
    [
        ("model.layers.1.self_attn.v_proj.weight", "layer 1"),
        ("model.layers.1.input_layernorm.weight", "layer 1"),
        (ROUTER, "layer 1"),
        ("model.layers.2.block_sparse_moe.experts.3.w2.weight", "layer 2"),
    ],
)
@pytest.mark.parametrize("command", ["profile", "evaluate"])
def test_a_walk_names_layer_and_tensor(tmp_path: Path, name: str, where: str, command: str) -> None:
    folder = whole(tmp_path / "nan")
    size = open_checkpoint(folder).tensors[name].nbytes
    _poke(folder, name, {0: b"\xc0\x7f" * (size // 2)})
    extra = ["-o", tmp_path / "profile"] if command == "profile" else ["--split", "validation"]
    says = (f"{where}: hidden states are not finite", name, "NaN or infinities")
    notes = f"note: {name} holds NaN" if name == ROUTER and command == "profile" else None
    _refused_saying(command, folder, [*extra, "-t", "builtin:json", "--max-tokens", "512"], says, notes)
    assert not (tmp_path / "profile").exists()


def _refused_saying(
    command: str, folder: Path, extra: list[str | Path], says: tuple[str, ...], note: str | None
) -> None:
    from tests.cli.invoke import moesurgeon

    outcome = moesurgeon(command, folder, *extra)
    assert outcome.code == 3, outcome.err
    *notes, last = outcome.err.strip().splitlines()
    for part in says:
        assert part in last, outcome.err
    if note is not None:
        assert any(line.startswith(note) for line in notes)


def test_the_head_and_the_embedding_are_named_as_well(tmp_path: Path) -> None:
    for name, says in (
        ("lm_head.weight", "the loss is not a number, since lm_head.weight holds"),
        ("model.embed_tokens.weight", "the embedding: hidden states are not finite, since model.embed_tokens.weight"),
    ):
        folder = whole(tmp_path / name)
        size = open_checkpoint(folder).tensors[name].nbytes
        _poke(folder, name, {0: b"\xc0\x7f" * (size // 2)})
        refused(3, "evaluate", folder, "-t", "builtin:json", "--max-tokens", "512", says=(says,))


def test_an_expert_that_hardly_a_token_goes_to_is_found_where_all_are_run(tmp_path: Path) -> None:
    folder, name = whole(tmp_path / "nan"), "model.layers.2.block_sparse_moe.experts.3.w2.weight"
    size = open_checkpoint(folder).tensors[name].nbytes
    _poke(folder, name, {0: b"\xc0\x7f" * (size // 2)})
    router = name.replace("experts.3.w2", "gate")
    shape = open_checkpoint(folder).tensors[router].shape
    # A row of zeros: hardly a token goes there by itself.
    _poke(folder, router, {3 * shape[1] * 2: bytes(2 * shape[1])})
    extra = ["-o", tmp_path / "profile", "--inner", "256", "-t", "builtin:json", "--max-tokens", "512"]
    _refused_saying("profile", folder, extra, ("layer 2", name, "NaN"), f"note: {router}: the rows of expert 3")


def test_prune_names_what_it_copies(tmp_path: Path, tiny_mixtral: Subject) -> None:
    folder = whole(tmp_path / "odd")
    _poke(folder, ROUTER, _row(folder, 3, float("nan")))
    keep = tmp_path / "keep.json"
    keep.write_text(str({str(layer): [0, 1, 2, 3] for layer in tiny_mixtral.anatomy.moe_layers}).replace("'", '"'))
    report = succeeded("prune", folder, tmp_path / "out", "--keep-experts", keep, "--dry-run", "--json").json
    assert any(f"{ROUTER} holds NaN" in warning for warning in report["warnings"])
