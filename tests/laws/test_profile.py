"""The profile against a plain computation: hooks on the stock model, float64, one window at a time.

Legend: T tokens, E experts, K experts per token, H hidden, F expert width.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from moesurgeon.engine import observe
from moesurgeon.engine.device import Placement
from moesurgeon.engine.routing import routing_of
from moesurgeon.engine.streams import Source, Stream
from moesurgeon.errors import OutputError
from moesurgeon.pipeline.subject import Subject
from moesurgeon.profiling import profiler
from moesurgeon.profiling.artefact import Origin, Profile, load_profile, save_profile
from moesurgeon.profiling.profiler import take_profile
from moesurgeon.profiling.statistics import PEAK, PER_EXPERT, PER_LAYER, Statistics
from moesurgeon.traces.windows import Corpus, Window
from tests.engine.small import batches_for, corpus_of, random_windows, running, saved, small_model, stream_of

LENGTH = 40
EXACT = ("tokens", "first_choice")


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


@dataclass
class Seen:
    """What hooks saw of one block in one window: its input [T, H] and what its router returned."""

    inputs: torch.Tensor
    logits: torch.Tensor
    weights: torch.Tensor
    indices: torch.Tensor


@contextmanager
def _hooked(model: PreTrainedModel, layers: Iterable[int]) -> Iterator[dict[int, Seen]]:
    """Record every mixture block of the stock model with forward hooks on its router."""
    seen: dict[int, Seen] = {}
    handles = []
    for layer in layers:

        def hook(_router: Any, inputs: Any, output: Any, layer: int = layer) -> None:
            logits, weights, indices = (part.detach().clone() for part in output)
            seen[layer] = Seen(inputs[0].detach().reshape(-1, inputs[0].shape[-1]).clone(), logits, weights, indices)

        handles.append(model.get_submodule(f"model.layers.{layer}.mlp.gate").register_forward_hook(hook))
    yield seen
    for handle in handles:
        handle.remove()


def _by_hand(subject: Subject, windows: list[Window]) -> Iterator[tuple[int, Seen, torch.nn.Module]]:
    """Run a fresh stock model on one window at a time; yield each block's observations."""
    stock = AutoModelForCausalLM.from_pretrained(subject.root, dtype=torch.float32).eval()
    with _hooked(stock, subject.anatomy.moe_layers) as seen, torch.no_grad():
        for window in windows:
            stock(input_ids=torch.from_numpy(window.tokens.astype(np.int64))[None])
            for layer, block in seen.items():
                yield layer, block, stock.get_submodule(f"model.layers.{layer}.mlp")


def _plain(subject: Subject, windows: list[Window]) -> dict[str, np.ndarray]:
    """Return every sum of a profile of one domain, computed expert by expert in float64."""
    anatomy = subject.anatomy
    assert anatomy.family.router.scoring == "softmax"
    parts: dict[tuple[int, int], list[tuple[float, float]]] = defaultdict(list)  # (w, |f|) of each token
    firsts = np.zeros((len(anatomy.moe_layers), anatomy.experts))
    entropy, margin = np.zeros(len(anatomy.moe_layers)), np.zeros(len(anatomy.moe_layers))
    for layer, seen, block in _by_hand(subject, windows):
        row = anatomy.moe_layers.index(layer)
        scores_TE = (seen.inputs.double() @ block.gate.weight.double().T).softmax(-1)
        for token in range(len(seen.inputs)):
            x_H = seen.inputs[token].double()
            for expert, weight in zip(seen.indices[token].tolist(), seen.weights[token].tolist(), strict=True):
                gate_F, up_F = (block.experts.gate_up_proj[expert].double() @ x_H).chunk(2)
                f_H = block.experts.down_proj[expert].double() @ (gate_F * gate_F.sigmoid() * up_F)
                parts[row, expert].append((weight, float(f_H.norm())))
            p_E = scores_TE[token]
            firsts[row, int(p_E.argmax())] += 1
            entropy[row] -= float((p_E * p_E.log()).sum())
            best, second = sorted(p_E.tolist(), reverse=True)[:2]
            margin[row] += best - second
    sums = {name: np.zeros_like(firsts) for name in (*PER_EXPERT, PEAK)}
    for place, pairs in parts.items():
        w, norm = np.array(pairs).T
        for name, value in (
            ("tokens", len(w)),
            ("weight", w.sum()),
            ("norm", norm.sum()),
            ("norm2", (norm**2).sum()),
            ("weighted_norm", (w * norm).sum()),
            ("weighted_norm2", ((w * norm) ** 2).sum()),
            (PEAK, (w * norm).max()),
        ):
            sums[name][place] = value
    return sums | {"first_choice": firsts, "entropy": entropy, "margin": margin}


def _same(left: Statistics, right: Statistics) -> None:
    """Assert that counts are equal and sums equal to rounding."""
    assert (left.domains, left.layers) == (right.domains, right.layers)
    assert np.array_equal(left.seen, right.seen)
    for name in (*PER_EXPERT, PEAK, *PER_LAYER):
        if name in EXACT:
            assert np.array_equal(left.sums[name], right.sums[name]), name
        else:
            np.testing.assert_allclose(left.sums[name], right.sums[name], rtol=1e-5, err_msg=name)


def test_counts_are_those_of_hooks_on_the_stock_model(tiny: Subject, corpus: Corpus, taken: Statistics) -> None:
    for number, domain in enumerate(corpus.domains):
        counts = np.zeros((len(tiny.anatomy.moe_layers), tiny.anatomy.experts))
        for layer, seen, _ in _by_hand(tiny, [w for w in corpus.windows if w.domain == domain]):
            for expert in seen.indices.flatten().tolist():
                counts[tiny.anatomy.moe_layers.index(layer), expert] += 1
        assert np.array_equal(taken.sums["tokens"][number], counts)
        # Padding is not counted: every token of the text is routed K times, and no other is.
        assert counts.sum(axis=1).tolist() == [corpus.tokens[domain] * tiny.anatomy.top_k] * len(counts)
    assert taken.seen.tolist() == list(corpus.tokens.values())


def test_sums_are_those_of_experts_run_by_hand(tiny: Subject, corpus: Corpus, taken: Statistics) -> None:
    for number, domain in enumerate(corpus.domains):
        plain = _plain(tiny, [window for window in corpus.windows if window.domain == domain])
        assert set(plain) == set(taken.sums)
        for name, expected in plain.items():
            # The model and the profiler's norms are in float32; the sums are not.
            rtol = 0.0 if name in EXACT else 2e-5
            np.testing.assert_allclose(taken.sums[name][number], expected, rtol=rtol, err_msg=f"{domain} {name}")


def test_utilisation_is_the_share_of_tokens(tiny: Subject, taken: Statistics) -> None:
    share = taken.utilization()
    np.testing.assert_allclose(share.sum(axis=1), 1.0, rtol=1e-12)
    np.testing.assert_allclose(share, taken.total("tokens") / (taken.seen.sum() * tiny.anatomy.top_k), rtol=1e-12)


def test_profiles_add_up_to_the_profile_of_both_texts(stream: Stream, corpus: Corpus, taken: Statistics) -> None:
    # Halves of one domain, and a domain that only one of them has.
    first = corpus_of([w for n, w in enumerate(corpus.windows) if w.domain == "one" and n % 2])
    second = corpus_of([w for n, w in enumerate(corpus.windows) if w.domain == "two" or not n % 2])
    parts = [_profile(stream, part) for part in (first, second)]
    assert parts[0].domains == ("one",)
    _same(parts[0].merged(parts[1]), taken)
    turned = parts[1].merged(parts[0])
    order = [turned.domains.index(domain) for domain in taken.domains]
    for name in EXACT:
        assert np.array_equal(turned.sums[name][order], taken.sums[name])


@pytest.mark.parametrize("rows", [1, 3])
def test_neither_order_nor_batch_size_matters(rows: int, stream: Stream, corpus: Corpus, taken: Statistics) -> None:
    order = np.random.default_rng(7).permutation(len(corpus.windows))
    shuffled = replace(corpus, windows=[corpus.windows[index] for index in order])
    _same(_profile(stream, shuffled, rows), taken)


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
    assert replace(loaded.statistics, seen=taken.seen, sums={}) == replace(taken, sums={})
    assert loaded.statistics.seen.tolist() == taken.seen.tolist()
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
    counts, weights = np.zeros_like(taken.sums["tokens"][0]), np.zeros_like(taken.sums["weight"][0])
    for layer, seen, _ in _by_hand(subject, corpus.windows):
        row = taken.layers.index(layer)
        np.add.at(counts[row], seen.indices.flatten().numpy(), 1)
        np.add.at(weights[row], seen.indices.flatten().numpy(), seen.weights.double().flatten().numpy())
    assert np.array_equal(taken.sums["tokens"][0], counts)
    np.testing.assert_allclose(taken.sums["weight"][0], weights, rtol=1e-5)
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
    monkeypatch.setattr(profiler, "routing_of", lambda anatomy: replace(routing_of(anatomy), **wrong))
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
    monkeypatch.setattr(profiler, "routing_of", lambda anatomy: replace(routing_of(anatomy), **wrong))
    with pytest.raises(OutputError, match="the weights are not what"):
        _profile(stream, corpus)


def test_a_selection_bias_that_is_overlooked_is_found_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, stream, corpus = _small("deepseek_v3", {}, tmp_path)
    monkeypatch.setattr(profiler, "selection_bias", lambda router: None)
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
