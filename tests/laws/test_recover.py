"""Recovery: it starts from the edited model, its gradient is the formula's, and it writes what it judged.

Legend: T tokens, E experts, K experts per token, M candidates, H hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from moesurgeon.checkpoint.reader import ShardReader
from moesurgeon.engine.model import MoeBlock, logits_of, moe_blocks
from moesurgeon.engine.observe import expert_outputs
from moesurgeon.engine.routing import Routing, routing_of, selection_bias
from moesurgeon.engine.streams import Stream
from moesurgeon.errors import NothingToDo, UsageError
from moesurgeon.evaluation.measure import LOSS, measure
from moesurgeon.pipeline import recover as pipeline
from moesurgeon.pipeline.options import Running, Text, Writing
from moesurgeon.pipeline.recover import RecoverSpec, recover
from moesurgeon.pipeline.retop import retop
from moesurgeon.pipeline.subject import Subject, open_subject
from moesurgeon.recovery import train
from moesurgeon.recovery.adapters import adapt_routers
from moesurgeon.recovery.estimator import learning_routers, straight_through
from moesurgeon.recovery.objective import Losses, distillation, language_loss
from moesurgeon.recovery.train import NOISE, Recovered, Schedule, recover_routers
from moesurgeon.surgery.retop import RetopSpec
from moesurgeon.traces.windows import Corpus, Window
from tests.engine.small import VOCABULARY, batches_for, corpus_of, running, saved, small_model, stream_of

LENGTH = 32

# ---- the start: the adapted model is the edited one ----

GATES = {
    "renormalised": ("mixtral", {}),
    "raw": ("deepseek_v1", {}),
    "renormalised, but for top-1": ("deepseek_v1", {"norm_topk_prob": True}),
    "raw, scaled, in groups": ("deepseek_v2", {}),
    "sigmoid, renormalised, scaled, biased, in groups": ("deepseek_v3", {}),
    "raw beside a gated shared expert": ("qwen2_moe", {}),
}


@pytest.mark.parametrize("candidates", [None, 1, 3, 99])
@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize(("family", "changes"), GATES.values(), ids=GATES.keys())
def test_at_step_0_the_adapted_model_is_the_edited_one(
    family: str, changes: dict[str, Any], top_k: int, candidates: int | None, tmp_path: Path
) -> None:
    subject = saved(small_model(family, num_experts_per_tok=top_k, **changes), tmp_path / "model")
    _assert_starts_from_the_edited_model(subject, candidates)


@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("candidates", [None, 1, 3])
def test_at_step_0_the_adapted_builtin_is_the_edited_one(
    tiny: Subject, top_k: int, candidates: int | None, out: Path
) -> None:
    retop(tiny.name, RetopSpec(top_k=top_k), Writing(output=out, link=True, allow_noop=True))
    _assert_starts_from_the_edited_model(open_subject(str(out)), candidates)


def _assert_starts_from_the_edited_model(subject: Subject, candidates: int | None) -> None:
    model = running(subject)
    tokens = torch.arange(60).reshape(3, 20)
    edited = logits_of(model, tokens, None)
    with learning_routers(model, subject.anatomy, candidates=candidates) as routed:
        adapted = adapt_routers(model, subject.anatomy, rank=4)
        logits = adapted(input_ids=tokens, use_cache=False).logits
        assert (logits - edited).abs().max() <= 1e-6 * max(1.0, float(edited.abs().max()))
        assert [tuple(layer.chosen.shape) for layer in routed] == [(60, subject.anatomy.top_k)] * len(
            subject.anatomy.moe_layers
        )
        # A pass without gradients, which judges, is the edited model to the bit, and leaves nothing behind.
        assert torch.equal(logits_of(model, tokens, None), edited)
        assert len(routed) == len(subject.anatomy.moe_layers)
        trained = [name for name, parameter in adapted.named_parameters() if parameter.requires_grad]
        assert all(".gate.lora_" in name for name in trained)
        assert len(trained) == 2 * len(subject.anatomy.moe_layers)


def test_the_routers_are_restored_even_after_an_error(tmp_path: Path) -> None:
    subject = saved(small_model("mixtral"), tmp_path / "model")
    model = running(subject)
    blocks = moe_blocks(model, subject.anatomy)
    with pytest.raises(RuntimeError, match="inside"), learning_routers(model, subject.anatomy, candidates=None):
        raise RuntimeError("inside")
    assert all(block.router.forward == type(block.router).forward.__get__(block.router) for block in blocks)


# ---- the gradient ----


def _analytic(
    routing: Routing, logits_E: torch.Tensor, chosen: list[int], candidates: list[int], pull_E: torch.Tensor
) -> torch.Tensor:
    """Return d<G, y>/dlogits [E] of the estimator for one token, term by term; ``pull`` [E] is <G, f_j>.

    weight_j = g_j / sum g with g_j = p_j for the chosen and 0 else, and dg_j = dp_j for every candidate.
    """
    p = logits_E.softmax(0) if routing.scoring == "softmax" else logits_E.sigmoid()
    total = sum(float(p[j]) for j in chosen)
    gradient = torch.zeros_like(logits_E)
    for i in range(len(logits_E)):
        if routing.scoring == "softmax":
            dp = {j: float(p[j] * (float(i == j) - p[i])) for j in candidates}
        else:
            dp = {j: float(p[j] * (1 - p[j]) * float(i == j)) for j in candidates}
        for j in candidates:
            if routing.renormalises:
                # The second term is zero for a softmax with all experts as candidates: sum dp = 0.
                inside = float(p[j]) if j in chosen else 0.0
                change = dp[j] / total - inside * sum(dp.values()) / total**2
            else:
                change = dp[j]
            gradient[i] += routing.scale * float(pull_E[j]) * change
    return gradient


@pytest.mark.parametrize("count", [None, 4])
@pytest.mark.parametrize("top_k", [1, 2, 3])
@pytest.mark.parametrize("renormalises", [True, False])
@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
def test_the_gradient_is_the_formula_in_float64(
    scoring: str, renormalises: bool, top_k: int, count: int | None
) -> None:
    routing = Routing(scoring, renormalises, 1.5, 1, 1, "max")
    random = torch.Generator().manual_seed(top_k)
    logits_TE = torch.randn(5, 7, dtype=torch.float64, generator=random).requires_grad_()
    outputs_TEH = torch.randn(5, 7, 11, dtype=torch.float64, generator=random)
    g_TH = torch.randn(5, 11, dtype=torch.float64, generator=random)
    scores = logits_TE.softmax(-1) if scoring == "softmax" else logits_TE.sigmoid()
    candidates_TM = scores.detach().topk(count or 7, dim=-1).indices
    chosen_TK = candidates_TM[:, :top_k]
    weights_TM = straight_through(routing, scores, chosen_TK, candidates_TM)
    # Forwards: the hard choice, exactly.
    hard = scores.detach().gather(-1, chosen_TK)
    hard = 1.5 * (hard / hard.sum(-1, keepdim=True) if renormalises else hard)
    torch.testing.assert_close(weights_TM[:, :top_k].detach(), hard, rtol=1e-14, atol=0)
    assert (weights_TM[:, top_k:] == 0).all()
    # Backwards: every candidate's output speaks.
    picked = outputs_TEH.gather(1, candidates_TM[..., None].expand(-1, -1, 11))
    (torch.einsum("tm,tmh->th", weights_TM, picked) * g_TH).sum().backward()
    assert logits_TE.grad is not None
    for token in range(5):
        pull = outputs_TEH[token] @ g_TH[token]
        expected = _analytic(
            routing, logits_TE[token].detach(), chosen_TK[token].tolist(), candidates_TM[token].tolist(), pull
        )
        torch.testing.assert_close(logits_TE.grad[token], expected, rtol=1e-10, atol=1e-12)


def test_for_a_renormalised_top_1_it_is_the_sum_over_experts_by_p1() -> None:
    """(1 / p1) sum_j <G, f_j> dp_j, written with the softmax's Jacobian."""
    routing = Routing("softmax", True, 1.0, 1, 1, "max")
    random = torch.Generator().manual_seed(0)
    logits_TE = torch.randn(6, 8, dtype=torch.float64, generator=random).requires_grad_()
    pull_TE = torch.randn(6, 8, dtype=torch.float64, generator=random)
    order = logits_TE.detach().argsort(-1, descending=True)
    weights = straight_through(routing, logits_TE.softmax(-1), order[:, :1], order)
    (weights * pull_TE.gather(-1, order)).sum().backward()
    p = logits_TE.detach().softmax(-1)
    jacobian = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    expected = torch.einsum("tj,tji->ti", pull_TE, jacobian) / p.max(-1, keepdim=True).values
    torch.testing.assert_close(logits_TE.grad, expected, rtol=1e-12, atol=1e-14)


@dataclass
class Traced:
    """Per layer of one backward pass: logits and their gradient, the experts' input, output and G."""

    blocks: list[MoeBlock]
    logits: list[torch.Tensor]
    chosen: list[torch.Tensor]
    inputs: list[torch.Tensor]
    outputs: list[torch.Tensor]

    def reach(self) -> list[float]:
        """Return, per layer, sum_t |dL/dlogits_t| / sum_t |G_t| |y_t|: how much of what the loss wants
        of the block's output arrives at the router. Free of the sizes of loss, weights and batch."""
        found = []
        for logits, output in zip(self.logits, self.outputs, strict=True):
            assert logits.grad is not None
            assert output.grad is not None
            wanted = (output.grad.norm(dim=-1) * output.detach().norm(dim=-1)).sum()
            found.append(float(logits.grad.norm(dim=-1).sum() / wanted))
        return found


def _traced(
    model: PreTrainedModel, subject: Subject, candidates: int | None, loss: Callable[[], torch.Tensor]
) -> Traced:
    blocks = moe_blocks(model, subject.anatomy)
    traced = Traced(blocks, [], [], [], [])
    handles = []
    for block in blocks:
        block.router.weight.requires_grad_(True)  # type: ignore[operator]
        block.router.weight.grad = None

        def keep(_module: Any, inputs: Any, output: torch.Tensor) -> None:
            output.retain_grad()
            traced.inputs.append(inputs[0].detach())
            traced.outputs.append(output)

        handles.append(block.experts.register_forward_hook(keep))
    with learning_routers(model, subject.anatomy, candidates=candidates) as routed:
        value = loss()
        for layer in routed:
            layer.logits.retain_grad()
        value.backward()
    for handle in handles:
        handle.remove()
    traced.logits, traced.chosen = [layer.logits for layer in routed], [layer.chosen for layer in routed]
    return traced


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("mixtral", {"num_experts_per_tok": 1}),
        ("mixtral", {"num_experts_per_tok": 2}),
        ("deepseek_v1", {"num_experts_per_tok": 1}),
        ("deepseek_v1", {"num_experts_per_tok": 2}),
        ("deepseek_v3", {"num_experts_per_tok": 2}),
    ],
)
def test_in_the_running_model_the_gradient_is_the_formula(family: str, changes: dict[str, Any], tmp_path: Path) -> None:
    subject = saved(small_model(family, **changes), tmp_path / "model")
    model = running(subject)
    tokens = torch.arange(40).reshape(2, 20)
    text = torch.ones_like(tokens, dtype=torch.bool)
    traced = _traced(model, subject, None, lambda: language_loss(model(input_ids=tokens).logits, tokens, text))
    routing = routing_of(subject.anatomy)
    everyone = list(range(subject.anatomy.experts))
    for number, block in enumerate(traced.blocks):
        inputs, g_TH = traced.inputs[number], traced.outputs[number].grad
        gradient = traced.logits[number].grad
        assert g_TH is not None
        assert gradient is not None
        pull_TE = torch.zeros(len(inputs), subject.anatomy.experts, dtype=torch.float64)
        with torch.no_grad():
            every_TE = torch.tensor([everyone] * len(inputs))
            for expert, token, _rank, f_TH in expert_outputs(block.experts, inputs, every_TE):
                pull_TE[token, expert] = (f_TH.double() * g_TH[token].double()).sum(-1)
        expected = torch.stack(
            [
                _analytic(
                    routing,
                    traced.logits[number][token].detach().double(),
                    traced.chosen[number][token].tolist(),
                    everyone,
                    pull_TE[token],
                )
                for token in range(len(inputs))
            ]
        )
        assert (gradient.double() - expected).norm() <= 1e-4 * expected.norm()


@pytest.fixture(scope="module")
def tiny_mixtral_1(tmp_path_factory: pytest.TempPathFactory) -> Subject:
    out = tmp_path_factory.mktemp("top-1") / "mixtral"
    retop("builtin:tiny-mixtral", RetopSpec(top_k=1), Writing(output=out, link=True))
    return open_subject(str(out))


@pytest.fixture(scope="module")
def tiny_deepseek_1(tmp_path_factory: pytest.TempPathFactory) -> Subject:
    out = tmp_path_factory.mktemp("top-1") / "deepseek"
    retop("builtin:tiny-deepseek", RetopSpec(top_k=1), Writing(output=out, link=True))
    return open_subject(str(out))


def test_only_the_estimator_carries_the_loss_to_a_renormalised_top_1(
    tiny_mixtral: Subject, tiny_mixtral_1: Subject
) -> None:
    """p / p = 1: what autograd returns of it is the rounding of a division.

    Thresholds for :meth:`Traced.reach`: rounding leaves about 2^-24 of what the division gets, some 1e-9
    of |G||y| after the softmax; the estimator passes the differences between experts, about 0.2 of it.
    1e-6 and 1e-3 are two orders of magnitude from both, whatever the weights.
    """
    model, teacher = running(tiny_mixtral_1), running(tiny_mixtral)
    random = torch.Generator().manual_seed(0)
    tokens = torch.randint(tiny_mixtral.anatomy.config["vocab_size"], (4, 30), generator=random)
    text = torch.ones_like(tokens, dtype=torch.bool)
    wanted = logits_of(teacher, tokens, None)

    def plain() -> torch.Tensor:
        return language_loss(model(input_ids=tokens).logits, tokens, text)

    def distil() -> torch.Tensor:
        return distillation(model(input_ids=tokens).logits, wanted, text, 1.0)

    dead = _traced(model, tiny_mixtral_1, 1, plain)
    assert max(dead.reach()) < 1e-6
    norms = [block.router.weight.grad.norm() for block in dead.blocks]  # type: ignore[operator]
    assert float(torch.stack(norms).norm()) < NOISE
    assert max(_traced(model, tiny_mixtral_1, 1, distil).reach()) < 1e-6
    for loss in (plain, distil):
        assert min(_traced(model, tiny_mixtral_1, None, loss).reach()) > 1e-3


def test_a_raw_top_1_hears_the_plain_loss(tiny_deepseek_1: Subject) -> None:
    model = running(tiny_deepseek_1)
    random = torch.Generator().manual_seed(0)
    tokens = torch.randint(tiny_deepseek_1.anatomy.config["vocab_size"], (4, 30), generator=random)
    text = torch.ones_like(tokens, dtype=torch.bool)
    traced = _traced(model, tiny_deepseek_1, 1, lambda: language_loss(model(input_ids=tokens).logits, tokens, text))
    assert min(traced.reach()) > 1e-3


# ---- what is refused ----


def _random_corpora(subject: Subject) -> tuple[Corpus, Corpus]:
    random = np.random.default_rng(0)
    tokens = random.integers(0, subject.anatomy.config["vocab_size"], (8, LENGTH)).astype(np.int32)
    windows = [Window("text", number, 0, row) for number, row in enumerate(tokens)]
    return corpus_of(windows[:4]), corpus_of(windows[4:])


@contextmanager
def _text(monkeypatch: pytest.MonkeyPatch, training: Corpus, heldout: Corpus) -> Iterator[None]:
    """Let the pipeline read these corpora in place of traces."""
    corpora = {"calibration": training, "validation": heldout}
    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "read_text", lambda subject, text, *, builtin_split, **rest: corpora[builtin_split])
        yield


SHORT = Schedule(steps=2, tokens_per_step=64, judge_every=2)


def _recover(source: str, teacher: str, output: Path, **changes: Any) -> dict[str, Any]:
    spec = RecoverSpec(teacher=teacher, losses=changes.pop("losses", Losses()), schedule=changes.pop("schedule", SHORT))
    return recover(source, spec, Text(length=LENGTH), Running(device="cpu"), replace(Writing(output=output), **changes))


def test_the_plain_loss_is_refused_where_it_has_no_gradient(tiny_mixtral_1: Subject, out: Path) -> None:
    with pytest.raises(UsageError, match="the gate renormalises, so the weight is the constant 1") as raised:
        _recover(tiny_mixtral_1.name, "builtin:tiny-mixtral", out, losses=Losses(objective="lm"))
    assert raised.value.exit_code == 2
    assert not out.exists()


def test_the_plain_loss_is_accepted_where_it_has_one(
    tiny_deepseek_1: Subject, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with _text(monkeypatch, *_random_corpora(tiny_deepseek_1)):
        report = _recover(
            tiny_deepseek_1.name, "builtin:tiny-deepseek", out, losses=Losses(objective="lm"), allow_noop=True
        )
    assert report["gradient_norm"] > NOISE
    assert [entry["step"] for entry in report["log"]] == [2]


@pytest.mark.parametrize("balance", [0.0, 0.01])
def test_an_objective_that_does_not_reach_the_routers_is_refused(
    balance: float, tiny_mixtral_1: Subject, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With one candidate even distillation has no gradient; the balancing loss, which has one, must not hide it."""
    with (
        _text(monkeypatch, *_random_corpora(tiny_mixtral_1)),
        pytest.raises(UsageError, match="rounding noise: this objective does not reach them") as raised,
    ):
        _recover(
            tiny_mixtral_1.name,
            "builtin:tiny-mixtral",
            out,
            losses=Losses(balance=balance),
            schedule=replace(SHORT, candidates=1),
        )
    assert not isinstance(raised.value, NothingToDo)
    assert not out.exists()


# ---- the result ----


@dataclass(frozen=True)
class Case:
    """A teacher, a student with other routers and one expert per token, and text that the teacher wrote.

    On its own text nobody is better than the teacher, so a router that routes as the teacher's does
    lowers the loss: the random models have something to recover.
    """

    teacher: Subject
    student: Subject
    training: Corpus
    heldout: Corpus
    objective: str


_CASES = {
    "mixtral float32 distill": ("mixtral", {}, torch.float32, "distill"),
    # Raw weights: rounding a router to bfloat16 shows in every token, not only where a choice flips.
    "deepseek bfloat16 lm": ("deepseek_v1", {"first_k_dense_replace": 0}, torch.bfloat16, "lm"),
}


@pytest.fixture(scope="module", params=_CASES.values(), ids=_CASES.keys())
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    family, changes, dtype, objective = request.param
    folder = tmp_path_factory.mktemp("case")
    large = small_model(family, num_hidden_layers=2, **changes)
    with torch.no_grad():
        large.lm_head.weight.mul_(3.0)  # surer of the next token, so that there is more to lose
    small = small_model(family, num_hidden_layers=2, num_experts_per_tok=1, **changes)
    small.load_state_dict(large.state_dict())
    random = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for layer in small.model.layers:
            layer.mlp.gate.weight.normal_(0.0, 0.2, generator=random)
    teacher = saved(large.to(dtype), folder / "teacher")
    return Case(
        teacher,
        saved(small.to(dtype), folder / "student"),
        corpus_of(_written_by(running(teacher), count=48, seed=1)),
        corpus_of(_written_by(running(teacher), count=24, seed=2)),
        objective,
    )


def _written_by(model: PreTrainedModel, *, count: int, seed: int) -> list[Window]:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        first = torch.randint(VOCABULARY, (count, 1))
        mask = torch.ones_like(first)
        text = model.generate(
            first, attention_mask=mask, max_new_tokens=LENGTH - 1, do_sample=True, top_k=0, pad_token_id=0,
            eos_token_id=None,
        )  # fmt: skip
    return [Window("text", number, 0, row.numpy().astype(np.int32)) for number, row in enumerate(text)]


SCHEDULE = Schedule(steps=16, tokens_per_step=512, judge_every=4, learning_rate=1e-2)


@pytest.fixture(scope="module")
def recovered(case: Case, tmp_path_factory: pytest.TempPathFactory) -> tuple[Subject, dict[str, Any]]:
    """The student, recovered and written."""
    out = tmp_path_factory.mktemp("recovered") / "out"
    with pytest.MonkeyPatch.context() as patch, _text(patch, case.training, case.heldout):
        report = _run(case, out)
    return open_subject(str(out)), report


def _run(case: Case, out: Path, **changes: Any) -> dict[str, Any]:
    schedule = replace(SCHEDULE, **changes.pop("schedule", {}))
    losses = Losses(objective=case.objective)  # type: ignore[arg-type]
    return _recover(case.student.name, case.teacher.name, out, losses=losses, schedule=schedule, **changes)


def _bytes(subject: Subject) -> dict[str, bytes]:
    with ShardReader(subject.checkpoint) as reader:
        return {name: reader.read(tensor) for name, tensor in subject.checkpoint.tensors.items()}


def test_only_routers_change(case: Case, recovered: tuple[Subject, dict[str, Any]]) -> None:
    before, after = _bytes(case.student), _bytes(recovered[0])
    assert before.keys() == after.keys()
    assert case.student.anatomy.tensors.keys() == recovered[0].anatomy.tensors.keys()
    changed = {name for name in before if before[name] != after[name]}
    assert changed == {case.student.anatomy.router_weight(layer) for layer in case.student.anatomy.moe_layers}


def test_what_is_written_is_the_best_state_and_as_good_as_reported(
    case: Case, recovered: tuple[Subject, dict[str, Any]]
) -> None:
    """On text that was not trained on, with the weights as they are stored (rounded to bfloat16 in one case)."""
    subject, report = recovered
    losses = {
        name: _loss(stream_of(one), case.heldout)
        for name, one in (("before", case.student), ("after", subject), ("teacher", case.teacher))
    }
    assert report["loss_before"] == pytest.approx(losses["before"], rel=1e-9)
    assert report["loss_after"] == pytest.approx(losses["after"], rel=1e-9)
    assert report["teacher_loss"] == pytest.approx(losses["teacher"], rel=1e-9)
    assert report["loss_after"] == min(entry["heldout"] for entry in report["log"])
    assert losses["teacher"] < losses["after"] < losses["before"]
    gap = losses["before"] - losses["teacher"]
    assert report["gap_closed"] == pytest.approx((losses["before"] - losses["after"]) / gap, rel=1e-6)


def _loss(stream: Stream, corpus: Corpus) -> float:
    measured = measure(stream, corpus.domains, batches_for(corpus, LENGTH))
    return float(measured.sums[:, LOSS].sum() / measured.positions.sum())


def test_the_best_state_is_kept_when_a_later_one_is_worse(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    states: list[dict[int, torch.Tensor]] = []
    merged = train.adapted_routers
    judgements = iter([3.0, 1.0, 2.0, 1.5])

    def noted(model: Any, anatomy: Any) -> dict[int, torch.Tensor]:
        states.append(merged(model, anatomy))
        return states[-1]

    monkeypatch.setattr(train, "adapted_routers", noted)
    monkeypatch.setattr(train._Judge, "loss", lambda judge: next(judgements))
    result = _recovered(case, replace(SCHEDULE, steps=4, judge_every=1))
    assert result.loss_after == 1.0
    assert result.routers is states[1]
    assert not torch.equal(states[1][0], states[3][0])
    assert [entry["heldout"] for entry in result.log] == [3.0, 1.0, 2.0, 1.5]


def _recovered(case: Case, schedule: Schedule) -> Recovered:
    return recover_routers(
        running(case.student),
        running(case.teacher),
        case.student.anatomy,
        case.teacher.anatomy,
        case.training,
        case.heldout,
        length=LENGTH,
        losses=Losses(objective=case.objective),  # type: ignore[arg-type]
        schedule=schedule,
    )


def test_judging_does_not_disturb_the_training(case: Case) -> None:
    """The last state of a run that judges at every step is that of one that judges at the end."""
    often = _recovered(case, replace(SCHEDULE, steps=4, judge_every=1))
    once = _recovered(case, replace(SCHEDULE, steps=4, judge_every=4))
    assert often.log[-1] == once.log[-1]


def test_the_same_seed_gives_the_same_bytes(
    case: Case, recovered: tuple[Subject, dict[str, Any]], out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with _text(monkeypatch, case.training, case.heldout):
        torch.manual_seed(12345)  # whatever happened before in the process
        again = _run(case, out)
        other = _run(case, out.with_name("other"), schedule={"seed": 1})
    assert again["log"] == recovered[1]["log"]
    for path in recovered[0].root.iterdir():
        assert (out / path.name).read_bytes() == path.read_bytes(), path.name
    routers = [case.student.anatomy.router_weight(layer) for layer in case.student.anatomy.moe_layers]
    mine, theirs = _bytes(recovered[0]), _bytes(open_subject(other["output"]))
    assert all(mine[name] != theirs[name] for name in routers)


def test_nothing_better_writes_nothing(case: Case, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    still = {"learning_rate": 0.0, "steps": 2, "judge_every": 1}
    with _text(monkeypatch, case.training, case.heldout):
        with pytest.raises(NothingToDo, match="nothing better than the start") as raised:
            _run(case, out, schedule=still)
        assert raised.value.exit_code == 2
        assert not out.exists()
        report = _run(case, out, schedule=still, allow_noop=True)
    assert report["loss_after"] == report["loss_before"]
    assert report["gap_closed"] == 0.0
    # The start is judged like every other state: standing still is worth exactly nothing.
    assert [entry["heldout"] for entry in report["log"]] == [report["loss_before"]] * 2
    assert _bytes(open_subject(str(out))) == _bytes(case.student)


def test_a_selection_bias_takes_part_in_the_balancing_loss(tmp_path: Path) -> None:
    """What is balanced is the choice that the block makes."""
    subject = saved(small_model("deepseek_v3", num_hidden_layers=2), tmp_path / "model")
    model = running(subject)
    with learning_routers(model, subject.anatomy, candidates=None) as routed:
        model(input_ids=torch.arange(60).reshape(3, 20), use_cache=False)
    (block,) = moe_blocks(model, subject.anatomy)
    routing = routing_of(subject.anatomy)
    scores = routing.scores(routed[0].logits.detach())
    chosen = routing.choose(scores, selection_bias(block), subject.anatomy.top_k)
    assert torch.equal(routed[0].chosen, chosen)
    assert not torch.equal(routed[0].chosen, routing.choose(scores, None, subject.anatomy.top_k))
