"""The profile against a plain computation: hooks on the stock model, float64, one window at a time."""

from __future__ import annotations

from collections.abc import Container, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moesurgeon.engine import observe
from moesurgeon.engine.device import Placement
from moesurgeon.engine.routing import routing_of
from moesurgeon.engine.streams import Source, Stream
from moesurgeon.errors import OutputError
from moesurgeon.pipeline.subject import Subject
from moesurgeon.profiling import collector, dispatch
from moesurgeon.profiling.artefact import Origin, Profile, load_profile, save_profile
from moesurgeon.profiling.profiler import take_profile
from moesurgeon.profiling.statistics import BINS, FACTORS, FOLDS, Statistics
from moesurgeon.profiling.uncertainty import per_token
from moesurgeon.traces.windows import Corpus
from tests.engine.small import batches_for, corpus_of, random_windows, running, saved, small_model, stream_of
from tests.laws.plain_profile import by_hand, plain_sums, tokens_of

LENGTH = 40
EXACT = {
    "tokens", "first_choice", "ranks", "together", "tokens.squares", "tokens.by_document", "tokens.by_tokens",
    "tokens.folds", "seen", "seen.folds", "documents", "documents.squares", "capacity", "dispatch",
}  # fmt: skip
NEARLY = ("entropy_bins", "margin_bins")  # a token at the edge of a bin falls as rounding has it
DISPATCHED = ("capacity", "dispatch")


@pytest.fixture(scope="module")
def stream(tiny: Subject) -> Stream:
    return stream_of(tiny)


@pytest.fixture(scope="module")
def corpus(tiny: Subject) -> Corpus:
    """Two domains; windows of many lengths, so that batches are padded."""
    vocabulary = int(tiny.checkpoint.config["vocab_size"])
    return corpus_of(
        random_windows("one", count=8, vocabulary=vocabulary, longest=LENGTH),
        random_windows("two", count=5, vocabulary=vocabulary, longest=LENGTH),
    )


@pytest.fixture(scope="module")
def taken(stream: Stream, corpus: Corpus) -> Statistics:
    return _profile(stream, corpus)


def _profile(stream: Stream, corpus: Corpus, rows: int | None = None) -> Statistics:
    return take_profile(stream, corpus.domains, batches_for(corpus, LENGTH, rows))


def _same(left: Statistics, right: Statistics, *, but: Container[str] = ()) -> None:
    """Assert that counts are equal and sums equal to rounding."""
    assert (left.domains, left.layers, set(left.sums)) == (right.domains, right.layers, set(right.sums))
    for name in left.sums:
        if name in but:
            continue
        _close(left.sums[name], right.sums[name], name)


def _close(left: np.ndarray, right: np.ndarray, name: str, rtol: float = 1e-5) -> None:
    if name in NEARLY:
        assert left.sum() == right.sum() and np.abs(left - right).sum() <= 2 + 0.002 * left.sum(), name
    elif name in EXACT:
        assert np.array_equal(left, right), name
    else:
        np.testing.assert_allclose(left, right, rtol=rtol, err_msg=name)


@pytest.fixture
def small_scale(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Buckets, dispatches and blocks small enough that short windows fill them."""
    scale = {"positions": (0, 4, 11, 20, 33), "sizes": (25, 60, 120), "block": 8}
    monkeypatch.setattr(collector, "POSITIONS", scale["positions"])
    monkeypatch.setattr(dispatch, "SIZES", scale["sizes"])
    monkeypatch.setattr(dispatch, "BLOCK_ROWS", scale["block"])
    return scale | {"factors": FACTORS, "bins": BINS, "folds": FOLDS}


@pytest.mark.parametrize("rows", [None, 3])
def test_every_sum_is_that_of_tokens_taken_one_by_one(
    rows: int | None, tiny: Subject, stream: Stream, corpus: Corpus, small_scale: dict[str, Any]
) -> None:
    """Per domain, position, layer, expert, rank, pair, document, fold and dispatch."""
    anatomy, batches = tiny.anatomy, batches_for(corpus, LENGTH, rows)
    taken = take_profile(stream, corpus.domains, batches)
    shape = (len(anatomy.moe_layers), anatomy.experts, anatomy.top_k)
    dispatched = [batch.windows for batch in batches]
    plain = plain_sums(list(tokens_of(tiny, corpus.windows)), corpus, dispatched, shape=shape, **small_scale)
    assert set(plain) == set(taken.sums)
    for name, expected in plain.items():
        assert expected.any(), name  # there is something to compare
        # The model and the profiler's norms are in float32; the sums are not.
        _close(taken.sums[name], expected, name, rtol=5e-5)
    # Padding is not counted: every token of the text is routed K times, and no other is.
    routed = taken.by_domain("tokens").sum(axis=2)
    assert routed.tolist() == [[count * anatomy.top_k] * shape[0] for count in corpus.tokens.values()]
    assert taken.seen.tolist() == list(corpus.tokens.values())


def test_utilisation_is_the_share_of_tokens(tiny: Subject, taken: Statistics) -> None:
    share = taken.utilization()
    np.testing.assert_allclose(share.sum(axis=1), 1.0, rtol=1e-12)
    np.testing.assert_allclose(share, taken.total("tokens") / (taken.seen.sum() * tiny.anatomy.top_k), rtol=1e-12)
    per_text = per_token(taken, "tokens").value
    np.testing.assert_allclose(per_text.sum(axis=1), tiny.anatomy.top_k, rtol=1e-12)


def test_profiles_add_up_to_the_profile_of_both_texts(stream: Stream, corpus: Corpus, taken: Statistics) -> None:
    # Halves of one domain (documents are of two windows each), and a domain that only one of them has.
    first = corpus_of([w for w in corpus.windows if w.domain == "one" and w.document % 2])
    second = corpus_of([w for w in corpus.windows if w.domain == "two" or not w.document % 2])
    parts = [_profile(stream, part) for part in (first, second)]
    assert parts[0].domains == ("one",)
    # What is dispatched together is a matter of the batch, and these are other batches.
    _same(parts[0].merged(parts[1]), taken, but=DISPATCHED)
    turned = parts[1].merged(parts[0])
    order = [turned.domains.index(domain) for domain in taken.domains]
    for name in EXACT - {"together", *DISPATCHED}:
        assert np.array_equal(turned.sums[name][order], taken.sums[name])
    for name in DISPATCHED:
        assert np.array_equal(turned.sums[name], parts[0].sums[name] + parts[1].sums[name])


@pytest.mark.parametrize("rows", [1, 3])
def test_neither_order_nor_batch_size_matters(rows: int, stream: Stream, corpus: Corpus, taken: Statistics) -> None:
    order = np.random.default_rng(7).permutation(len(corpus.windows))
    shuffled = replace(corpus, windows=[corpus.windows[index] for index in order])
    _same(_profile(stream, shuffled, rows), taken, but=DISPATCHED)


def test_a_profile_reads_back_as_it_was_saved(tiny: Subject, taken: Statistics, tmp_path: Path) -> None:
    origin = Origin(
        fingerprint=tiny.fingerprint,
        family=tiny.anatomy.family.name,
        splits={"one": "report", "two": "all"},
        trace_hashes={"one": "1" * 64, "two": "2" * 64},
        length=LENGTH,
        placement="cpu float32",
        transformers="5",
    )
    save_profile(Profile(taken, origin), tmp_path / "profile")
    loaded = load_profile(tmp_path / "profile")
    assert loaded.origin == origin
    assert replace(loaded.statistics, sums={}) == replace(taken, sums={})
    assert set(loaded.statistics.sums) == set(taken.sums)
    for name, array in taken.sums.items():
        assert loaded.statistics.sums[name].dtype == np.float64
        assert np.array_equal(loaded.statistics.sums[name], array)
    save_profile(Profile(taken, origin), tmp_path / "again")
    for path in (tmp_path / "profile").iterdir():
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes()


def test_profiling_leaves_a_model_as_it_was(tiny: Subject, corpus: Corpus) -> None:
    model = running(tiny)
    tokens = torch.from_numpy(corpus.windows[0].tokens.astype(np.int64))[None]
    with torch.no_grad():
        before = model(input_ids=tokens).logits
        _profile(Stream(Source.of_model(model, tiny.anatomy)), corpus_of(corpus.windows[:2]))
        assert torch.equal(model(input_ids=tokens).logits, before)


# Every family and every way that its config can route.
CASES = [
    ("mixtral", {}),
    ("mixtral", {"num_experts_per_tok": 1}),
    ("deepseek_v1", {}),
    ("deepseek_v1", {"norm_topk_prob": True, "n_shared_experts": None}),
    ("deepseek_v1", {"norm_topk_prob": True, "num_experts_per_tok": 1}),
    ("deepseek_v2", {}),
    ("deepseek_v2", {"topk_method": "greedy"}),
    ("deepseek_v3", {}),
    ("deepseek_v3", {"norm_topk_prob": False, "n_group": 1, "topk_group": 1}),
    ("deepseek_v3", {"num_experts_per_tok": 1}),
    ("qwen2_moe", {}),
    ("qwen2_moe", {"norm_topk_prob": True}),
    ("qwen2_moe", {"mlp_only_layers": [1]}),
]


def _small(family: str, changes: dict[str, Any], folder: Path) -> tuple[Subject, Stream, Corpus]:
    subject = saved(small_model(family, **changes), folder / "model")
    return subject, stream_of(subject), corpus_of(random_windows("one", count=6, vocabulary=96, longest=LENGTH))


@pytest.mark.parametrize(("family", "changes"), CASES)
def test_every_family_is_profiled(family: str, changes: dict[str, Any], tmp_path: Path) -> None:
    subject, stream, corpus = _small(family, changes, tmp_path)
    taken = _profile(stream, corpus)
    counts, weights = np.zeros_like(taken.total("tokens")), np.zeros_like(taken.total("weight"))
    for layer, seen, _ in by_hand(subject, corpus.windows):
        row = taken.layers.index(layer)
        np.add.at(counts[row], seen.indices.flatten().numpy(), 1)
        np.add.at(weights[row], seen.indices.flatten().numpy(), seen.weights.double().flatten().numpy())
    assert np.array_equal(taken.total("tokens"), counts)
    np.testing.assert_allclose(taken.total("weight"), weights, rtol=1e-5)
    assert (np.count_nonzero(counts, axis=1) > subject.anatomy.top_k).all()  # it had something to choose


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v1", "deepseek_v2", "deepseek_v3", "qwen2_moe"])
def test_rounding_in_bfloat16_is_not_taken_for_another_rule(family: str, tmp_path: Path) -> None:
    """DeepSeek v1 takes its softmax in the model's dtype: near ties fall as rounding has it."""
    subject = saved(small_model(family).to(torch.bfloat16), tmp_path / "model")
    stream = stream_of(subject, Placement(torch.device("cpu"), torch.bfloat16))
    corpus = corpus_of(random_windows("one", count=40, vocabulary=96, longest=LENGTH))
    taken = _profile(stream, corpus)
    assert taken.total("tokens").sum(axis=1).tolist() == [corpus.tokens["one"] * subject.anatomy.top_k] * len(
        taken.layers
    )


FALSE_RULES = [
    ("mixtral", {"renormalises": False}),
    ("mixtral", {"scale": 1.001}),
    ("deepseek_v1", {"renormalises": True}),
    ("deepseek_v1", {"scoring": "sigmoid"}),
    ("deepseek_v2", {"scale": 1.0}),
    ("deepseek_v2", {"groups": 1, "kept_groups": 1}),
    ("deepseek_v2", {"group_score": "top2-sum"}),
    ("deepseek_v3", {"scoring": "softmax"}),
    ("deepseek_v3", {"renormalises": False}),
    ("deepseek_v3", {"kept_groups": 3}),
    ("deepseek_v3", {"group_score": "max"}),
    ("qwen2_moe", {"renormalises": True}),
]


@pytest.mark.parametrize(("family", "wrong"), FALSE_RULES)
def test_a_false_rule_is_found_out(
    family: str, wrong: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, stream, corpus = _small(family, {}, tmp_path)
    monkeypatch.setattr(collector, "routing_of", lambda anatomy: replace(routing_of(anatomy), **wrong))
    with pytest.raises(OutputError, match=r"the weights are not what the .* rule makes") as raised:
        _profile(stream, corpus)
    assert raised.value.exit_code == 5


@pytest.mark.parametrize("wrong", [{"renormalises": True}, {"scale": 1.05}, {"scoring": "sigmoid"}])
def test_a_false_rule_is_found_out_in_bfloat16(
    wrong: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Small raw weights (1/64 each and less) must not hide in an absolute tolerance."""
    changes = {"n_routed_experts": 64, "initializer_range": 0.02}
    subject = saved(small_model("deepseek_v1", **changes).to(torch.bfloat16), tmp_path / "model")
    stream = stream_of(subject, Placement(torch.device("cpu"), torch.bfloat16))
    corpus = corpus_of(random_windows("one", count=6, vocabulary=96, longest=LENGTH))
    _profile(stream, corpus)
    monkeypatch.setattr(collector, "routing_of", lambda anatomy: replace(routing_of(anatomy), **wrong))
    with pytest.raises(OutputError, match="the weights are not what"):
        _profile(stream, corpus)


def test_a_selection_bias_that_is_overlooked_is_found_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, stream, corpus = _small("deepseek_v3", {}, tmp_path)
    monkeypatch.setattr(collector, "selection_bias", lambda router: None)
    with pytest.raises(OutputError, match="the weights are not what"):
        _profile(stream, corpus)


@pytest.mark.parametrize("wrong", ["gate and up swapped", "one expert for another"])
def test_a_false_replay_is_found_out(
    wrong: str, stream: Stream, corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    def swapped(experts: Any, inputs_TH: torch.Tensor, indices_TK: torch.Tensor) -> Iterator[Any]:
        for expert in indices_TK.unique().tolist():
            token, rank = torch.where(indices_TK == expert)
            up, gate = torch.nn.functional.linear(inputs_TH[token], experts.gate_up_proj[expert]).chunk(2, dim=-1)
            hidden = experts.act_fn(gate) * up
            yield expert, token, rank, torch.nn.functional.linear(hidden, experts.down_proj[expert])

    def shifted(experts: Any, inputs_TH: torch.Tensor, indices_TK: torch.Tensor) -> Iterator[Any]:
        yield from outputs(experts, inputs_TH, (indices_TK + 1) % experts.num_experts)

    outputs = observe.expert_outputs
    monkeypatch.setattr(observe, "expert_outputs", swapped if wrong.startswith("gate") else shifted)
    with pytest.raises(OutputError, match="does not reproduce the block's output") as raised:
        _profile(stream, corpus)
    assert raised.value.exit_code == 5
