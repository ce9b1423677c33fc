"""The laws of surgery, on both builtin checkpoints: what an edit must leave as it was, to the last bit."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open

from moesurgeon.pipeline.subject import Subject, open_subject
from moesurgeon.surgery import edits
from moesurgeon.surgery.anatomy import Anatomy
from moesurgeon.surgery.apply import Written, apply
from moesurgeon.surgery.layouts import plan_layout
from moesurgeon.surgery.plan import EditPlan, compose, identity
from moesurgeon.surgery.prune import plan_prune
from moesurgeon.surgery.retop import RetopSpec, plan_retop
from tests.families.running import load_stock, logits_expert_by_expert, logits_of, tokens_for

KEPT_SHARES = (0.75, 0.5)  # three quarters and a half of the experts


def _written(plan: EditPlan, source: Subject, target: Path, **options: Any) -> Subject:
    _apply(plan, source, target, **options)
    return open_subject(str(target))


def _apply(plan: EditPlan, source: Subject, target: Path, **options: Any) -> Written:
    return apply(plan, source.checkpoint, target, **options)


def _some(anatomy: Anatomy, share: float, seed: int = 0) -> dict[int, tuple[int, ...]]:
    """Return random experts to keep, others in every layer."""
    rng = np.random.default_rng(seed)
    count = max(anatomy.top_k, round(share * anatomy.experts))
    return {
        layer: tuple(sorted(rng.choice(anatomy.experts, count, replace=False).tolist())) for layer in anatomy.moe_layers
    }


def _dropped(anatomy: Anatomy, kept: Mapping[int, Sequence[int]]) -> dict[int, list[int]]:
    return {layer: sorted(set(range(anatomy.experts)) - set(experts)) for layer, experts in kept.items()}


def _stored(folder: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Return dtype, shape and bytes of every tensor, read by the safetensors library."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - not a dict
                tensor = file.get_tensor(name)
                raw = tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()
                found[name] = (str(tensor.dtype), tuple(tensor.shape), raw)
    return found


def _files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def _linked(folder: Path, other: Path) -> set[str]:
    """Return the names of the shards that are one file in both folders."""
    shards = [path for path in folder.glob("*.safetensors") if (other / path.name).exists()]
    return {path.name for path in shards if path.samefile(other / path.name)}


def _layouts(anatomy: Anatomy) -> list[str]:
    return ["per-expert", "fused", *(["qwen2-moe"] if anatomy.family.name == "deepseek_v1" else [])]


def _json(path: Path) -> Any:
    return json.loads(path.read_text())


@pytest.mark.parametrize("link", [False, True], ids=["copied", "linked"])
def test_the_identity_reproduces_every_tensor(tiny: Subject, out: Path, link: bool) -> None:
    written = _apply(identity(tiny.anatomy), tiny, out, link=link)
    assert _stored(out) == _stored(tiny.root)
    assert _json(out / "config.json") == _json(tiny.root / "config.json")
    name = "model.safetensors.index.json"
    assert _json(out / name)["weight_map"] == _json(tiny.root / name)["weight_map"]
    for auxiliary in ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "README.md"):
        assert (out / auxiliary).read_bytes() == (tiny.root / auxiliary).read_bytes()
    assert written.linked == (written.shards if link else 0)
    assert _linked(out, tiny.root) == (set(tiny.checkpoint.headers) if link else set())


def test_a_linked_copy_shares_only_the_shards_that_did_not_change(tiny: Subject, out: Path) -> None:
    before = _files(tiny.root)
    router = tiny.checkpoint.tensors[tiny.anatomy.router_weight(tiny.anatomy.moe_layers[-1])]
    outputs = dict(identity(tiny.anatomy).outputs)
    outputs[router.name] = edits.replace(router, lambda: bytes(router.nbytes), key="zeros")
    _apply(EditPlan(outputs), tiny, out, link=True)
    assert _linked(out, tiny.root) == set(tiny.checkpoint.headers) - {router.shard}
    assert _files(tiny.root) == before
    stored, source = _stored(out), _stored(tiny.root)
    assert {name for name in source if stored[name] != source[name]} == {router.name}
    assert stored[router.name] == (*source[router.name][:2], bytes(router.nbytes))


def test_the_same_plan_gives_the_same_files(tiny: Subject, tmp_path: Path) -> None:
    kept = _some(tiny.anatomy, 0.5)
    for name in ("first", "second"):
        prune = plan_prune(tiny.anatomy, kept)
        _apply(compose(prune, plan_layout(prune.result(tiny.anatomy), "fused")), tiny, tmp_path / name)
    assert _files(tmp_path / "first") == _files(tmp_path / "second")


@pytest.mark.parametrize("share", KEPT_SHARES)
def test_pruning_is_masking(tiny: Subject, out: Path, share: float) -> None:
    """In float32, bit for bit: the original with the dropped experts' router logits at -inf.

    Also where the gate takes the softmax's weights as they are: a logit of -inf adds nothing to its sum.
    """
    kept = _some(tiny.anatomy, share)
    _written(plan_prune(tiny.anatomy, kept), tiny, out)
    masked = logits_expert_by_expert(load_stock(tiny.root), _dropped(tiny.anatomy, kept))
    assert torch.equal(logits_expert_by_expert(load_stock(out)), masked)
    assert not torch.equal(logits_expert_by_expert(load_stock(tiny.root)), masked), "the mask did nothing"


def test_every_layout_computes_the_same(tiny: Subject, tmp_path: Path) -> None:
    """Bit for bit, and for Qwen2-MoE as well.

    Its shared expert's down projection is doubled and then halved by the gate: factors of two move
    through every product and sum without rounding.
    """
    logits = logits_of(load_stock(tiny.root))
    for layout in _layouts(tiny.anatomy):
        written = _written(plan_layout(tiny.anatomy, layout), tiny, tmp_path / layout)
        assert (written.anatomy.layout.name == "fused") is (layout == "fused")
        model = load_stock(written.root)
        assert torch.equal(logits_of(model), logits), layout
        assert type(model).__module__.startswith("transformers.") is (
            layout == "qwen2-moe" or tiny.anatomy.family.name == "mixtral"
        )


def test_fused_and_back_returns_every_byte(tiny: Subject, tmp_path: Path) -> None:
    fused = _written(plan_layout(tiny.anatomy, "fused"), tiny, tmp_path / "fused")
    assert not any(".experts.0." in name for name in fused.anatomy.tensors)
    back = _written(plan_layout(fused.anatomy, "per-expert"), fused, tmp_path / "back")
    assert _stored(back.root) == _stored(tiny.root)
    assert _json(back.root / "config.json") == _json(tiny.root / "config.json")


def test_pruning_commutes_with_the_layout(tiny: Subject, tmp_path: Path) -> None:
    kept = _some(tiny.anatomy, 0.5)
    prune, fuse = plan_prune(tiny.anatomy, kept), plan_layout(tiny.anatomy, "fused")
    for name, plan in (
        ("prune first", compose(prune, plan_layout(prune.result(tiny.anatomy), "fused"))),
        ("fuse first", compose(fuse, plan_prune(fuse.result(tiny.anatomy), kept))),
    ):
        _apply(plan, tiny, tmp_path / name)
    assert _stored(tmp_path / "prune first") == _stored(tmp_path / "fuse first")
    assert _json(tmp_path / "prune first" / "config.json") == _json(tmp_path / "fuse first" / "config.json")


def test_pruning_twice_is_pruning_once(tiny: Subject, tmp_path: Path) -> None:
    first = _some(tiny.anatomy, 0.75)
    once = _written(plan_prune(tiny.anatomy, first), tiny, tmp_path / "first")
    second = _some(once.anatomy, 0.5, seed=1)
    _apply(plan_prune(once.anatomy, second), once, tmp_path / "second")
    both = {layer: tuple(first[layer][new] for new in second[layer]) for layer in first}
    _apply(plan_prune(tiny.anatomy, both), tiny, tmp_path / "both")
    assert _stored(tmp_path / "second") == _stored(tmp_path / "both")


def test_top_1_is_the_stock_model_with_the_key_edited_by_hand(tiny: Subject, tmp_path: Path) -> None:
    _apply(plan_retop(tiny.anatomy, RetopSpec(top_k=1)), tiny, tmp_path / "retop")
    by_hand = tmp_path / "by hand"
    by_hand.mkdir()
    for path in tiny.root.iterdir():
        (by_hand / path.name).write_bytes(path.read_bytes())
    config = _json(by_hand / "config.json") | {"num_experts_per_tok": 1}
    (by_hand / "config.json").write_text(json.dumps(config))
    logits = logits_of(load_stock(tmp_path / "retop"))
    assert torch.equal(logits, logits_of(load_stock(by_hand)))
    assert not torch.equal(logits, logits_of(load_stock(tiny.root)))


def _three_plans(anatomy: Anatomy, layout: str) -> tuple[EditPlan, EditPlan, EditPlan]:
    """Return the plans of retop, prune and layout, each made from the one before."""
    retop = plan_retop(anatomy, RetopSpec(top_k=1))
    anatomy = retop.result(anatomy)
    prune = plan_prune(anatomy, _some(anatomy, 0.5))
    return retop, prune, plan_layout(prune.result(anatomy), layout)


def test_one_write_is_three_writes(tiny: Subject, tmp_path: Path) -> None:
    retop, prune, other = _three_plans(tiny.anatomy, _layouts(tiny.anatomy)[-1])
    _apply(compose(compose(retop, prune), other), tiny, tmp_path / "one")
    subject = tiny
    for number, plan in enumerate((retop, prune, other)):
        subject = _written(plan, subject, tmp_path / str(number))
    assert _stored(tmp_path / "one") == _stored(subject.root)
    assert _json(tmp_path / "one" / "config.json") == _json(subject.root / "config.json")
    one, three = (_json(folder / "moesurgeon.json")["history"] for folder in (tmp_path / "one", subject.root))
    assert [op for step in one for op in step["operations"]] == [op for step in three for op in step["operations"]]


def test_results_load_and_generate_in_stock_transformers(tiny: Subject, tmp_path: Path) -> None:
    for layout in _layouts(tiny.anatomy):
        retop, prune, other = _three_plans(tiny.anatomy, layout)
        _apply(compose(compose(retop, prune), other), tiny, tmp_path / layout)
        model = load_stock(tmp_path / layout)  # asserts that no key is missing or unexpected
        start = tokens_for(model, rows=1, length=4)
        longer = model.generate(start, attention_mask=torch.ones_like(start), max_new_tokens=8, min_new_tokens=8)
        assert longer.shape == (1, 12)
        assert torch.equal(longer[:, :4], start)
