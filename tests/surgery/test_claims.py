"""Claims of config.json that the tensors do not keep are named, and copied as they are."""

import json
from pathlib import Path
from typing import Any

import pytest

from moesurgeon.checkpoint.header import TensorSpec
from moesurgeon.pipeline.inspect import inspect
from moesurgeon.pipeline.options import Writing
from moesurgeon.pipeline.retop import retop
from moesurgeon.pipeline.subject import Subject
from moesurgeon.pipeline.verify import verify
from moesurgeon.surgery.anatomy import Anatomy, examine
from moesurgeon.surgery.claims import broken_claims
from moesurgeon.surgery.retop import RetopSpec
from tests.cli.broken import whole, with_config


def _claims(subject: Subject, tensors: dict[str, TensorSpec] | None = None, **config: Any) -> list[str]:
    anatomy = subject.anatomy
    return list(broken_claims(examine({**anatomy.config, **config}, tensors or anatomy.tensors)))


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"num_nextn_predict_layers": 1}, "promises 1 MTP layers (num_nextn_predict_layers)"),
        ({"mtp_num_hidden_layers": 2}, "promises 2 MTP layers (mtp_num_hidden_layers)"),
        ({"num_mtp_modules": 3}, "promises 3 MTP layers (num_mtp_modules)"),
        ({"text_config": {"num_nextn_predict_layers": 1}}, "(text_config.num_nextn_predict_layers)"),
        ({"quantization_config": {"quant_method": "fp8"}}, "says that the weights are quantised (fp8), but none is"),
        ({"text_config": {"vocab_size": 7}}, "and text_config.vocab_size = 7"),
        ({"text_config": {"num_experts_per_tok": 7}}, "num_experts_per_tok = 2 and text_config.num_experts_per_tok"),
    ],
)
def test_a_broken_claim_is_named(tiny_mixtral: Subject, config: dict[str, Any], says: str) -> None:
    (claim,) = _claims(tiny_mixtral, **config)
    assert says in claim


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"num_nextn_predict_layers": 0},
        {"num_mtp_modules": 3, "use_mtp": False},
        {"text_config": {"num_experts_per_tok": 2}},
    ],
)
def test_what_is_kept_is_no_broken_claim(tiny_mixtral: Subject, config: dict[str, Any]) -> None:
    assert _claims(tiny_mixtral, **config) == []


def test_stored_layers_keep_the_promise(tiny_mixtral: Subject) -> None:
    anatomy: Anatomy = tiny_mixtral.anatomy
    extra = "mtp.layers.0.enorm.weight"
    tensors = {**anatomy.tensors, extra: TensorSpec(extra, "BF16", (128,))}
    assert _claims(tiny_mixtral, tensors, mtp_num_hidden_layers=1) == []


def test_quantised_weights_without_a_word_are_named(tiny_mixtral: Subject) -> None:
    name = "model.layers.0.block_sparse_moe.experts.0.w1.weight"
    spec = tiny_mixtral.anatomy.tensors[name]
    tensors = {**tiny_mixtral.anatomy.tensors, name: TensorSpec(name, "F8_E4M3", spec.shape)}
    (claim,) = _claims(tiny_mixtral, tensors)
    assert "has no quantization_config" in claim
    assert _claims(tiny_mixtral, tensors, quantization_config={"quant_method": "fp8"}) == []


def test_inspect_verify_and_what_writes_say_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "promising"
    with_config(num_nextn_predict_layers=1)(folder)
    (problem,) = inspect(str(folder))["problems"]
    assert "MTP layers" in problem
    assert verify(str(folder))["warnings"] == [problem]
    notes: list[str] = []

    class Notes:
        def __getattr__(self, name: str) -> Any:
            from moesurgeon.progress import SILENT

            return getattr(SILENT, name)

        def note(self, message: str) -> None:
            notes.append(message)

    retop(str(folder), RetopSpec(top_k=1), Writing(output=tmp_path / "out"), Notes())
    assert f"note: {problem}" in notes


def test_a_head_that_is_tied_and_stored_otherwise_is_named(tmp_path: Path) -> None:
    folder = whole(tmp_path / "tied")
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "tie_word_embeddings": True}))
    (problem,) = inspect(str(folder))["problems"]
    assert "another lm_head.weight is stored" in problem


def test_what_a_write_leaves_out_is_reported(tmp_path: Path) -> None:
    folder = whole(tmp_path / "much")
    (folder / "original").mkdir()
    for name in ("params.json", "pytorch_model.bin"):
        (folder / name).write_text("{}")
    left_out = ["original/", "params.json", "pytorch_model.bin"]
    assert inspect(str(folder))["left_out"] == left_out
    for dry_run in (True, False):
        report = retop(str(folder), RetopSpec(top_k=1), Writing(output=tmp_path / "out", dry_run=dry_run))
        assert report["left_out"] == left_out
    assert not {path.name for path in (tmp_path / "out").iterdir()} & {"original", "params.json", "pytorch_model.bin"}
