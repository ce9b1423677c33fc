"""Gates: what they say, what they refuse, and that they can do nothing else."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesurgeon.errors import UsageError
from moesurgeon.evaluation.figures import figures_of, name_of
from moesurgeon.evaluation.gate import Gate, failure, parse_gate

REPORT: dict[str, Any] = {
    "tokens": 100,
    "loss": 2.0,
    "perplexity": 7.4,
    "interval": [7.0, 7.9],
    "domains": {
        "code": {"loss": 1.5, "interval": [4.0, 5.0]},
        "my-code": {"loss": 1.0, "perplexity": 2.7},
        "items": {"loss": 3.0},
        "chat.v2": {"loss": 2.5},
    },
    "lengths": {"0-127": {"perplexity_ratio": 1.1}, "512-1023": {"perplexity_ratio": 1.3}},
    "degeneration": {"loops": 0.0, "first_loop_at": None, "domains": {"code": {"loops": 0.0}}},
    "against": {
        "loss": 1.9,
        "kl": 0.01,
        "agreement": 0.95,
        "perplexity_ratio": 1.1,
        "interval": [1.05, 1.15],
        "domains": {"code": {"loss": 1.4, "perplexity_ratio": 1.04, "share_of_rise": None}},
        "degeneration": {"loops": 0.25},
    },
}
FIGURES = figures_of(REPORT)


def _gate(*expressions: str) -> Gate:
    gate = parse_gate(expressions)
    assert gate is not None
    return gate


def _judged(*expressions: str) -> dict[str, Any]:
    return _gate(*expressions).judge(FIGURES)


@pytest.mark.parametrize(
    ("expression", "passes"),
    [
        ("perplexity_ratio <= 1.1", True),
        ("perplexity_ratio < 1.1", False),
        ("perplexity_ratio <= 1.2 and domains.code.perplexity_ratio <= 1.05", True),
        ("perplexity_ratio <= 1.02 or kl < 0.02", True),
        ("not kl < 0.02", False),
        ("not (kl > 0.02 or agreement < 0.9)", True),
        ('domains["my-code"].perplexity == 2.7', True),
        ("domains['chat.v2'].loss != 2.5", False),
        ("domains.items.loss == 3", True),  # a domain, not a method of a dictionary
        ('lengths["512-1023"].perplexity_ratio < 1.2', False),
        ("loss == 2 and against.loss == 1.9", True),  # one's own first
        ("domains.code.loss == 1.5 and against.domains.code.loss == 1.4", True),
        ("interval[1] < 8 and against.interval[1] <= 1.15", True),
        ("1 < perplexity_ratio < 1.2", True),
        ("1 < perplexity_ratio < 1.05 < 2", False),
        ("loss - against.loss <= 0.1 * against.loss", True),
        ("max(kl, 1 - agreement) < 0.06", True),
        ("min(perplexity, loss, 1) == 1 and abs(-2) == 2", True),
        ("abs(loss - against.loss) / against.loss < 0.01", False),
        ("-kl < +kl", True),
        ("degeneration.loops <= against.degeneration.loops", True),
        ("degeneration.loops == 0 or degeneration.first_loop_at > 32", True),  # has no value, and none is needed
        ("  kl\n< 1  ", True),
    ],
)
def test_what_passes(expression: str, passes: bool) -> None:
    judged = _judged(expression)
    assert judged["passed"] is passes
    assert judged["expression"] == " ".join(expression.split())
    assert all(condition["passed"] in (True, False) for condition in judged["conditions"])


def test_several_gates_all_have_to_hold() -> None:
    judged = _judged("kl < 1 and loss < 1", "kl > 2 or agreement > 0.9")
    assert judged == {
        "expression": "(kl < 1 and loss < 1) and (kl > 2 or agreement > 0.9)",
        "passed": False,
        "conditions": [
            {"expression": "kl < 1", "passed": True},
            {"expression": "loss < 1", "passed": False},
            {"expression": "kl > 2 or agreement > 0.9", "passed": True},
        ],
        "values": {"kl": 0.01, "loss": 2.0, "agreement": 0.95},
    }
    assert failure(judged) == "gate failed: loss < 1 (kl is 0.01, loss is 2, agreement is 0.95)"
    assert parse_gate([]) is None


ONE_DOCUMENT = figures_of(
    {"documents": 1, "loss": 2.0, "interval": [None, None], "against": {"interval": [None, None]}}
)


@pytest.mark.parametrize(
    "expression",
    ["interval[1] < 8", "loss < 3 and against.interval[0] < 1", "not interval[1] > 8", "1 < interval[0] < 9"],
)
def test_an_interval_of_one_document_is_refused(expression: str) -> None:
    for judge in (_gate(expression).refuse_unknown_intervals, _gate(expression).judge):
        with pytest.raises(UsageError, match=r"has no value, since one document gives no interval; give text of two"):
            judge(ONE_DOCUMENT)
    _gate(expression).refuse_unknown_intervals({path: 1.0 for path in ONE_DOCUMENT})


def test_a_gate_may_ask_for_the_documents_first() -> None:
    gate = _gate("documents == 1 or interval[1] < 8")
    gate.refuse_unknown_intervals(ONE_DOCUMENT)
    assert gate.judge(ONE_DOCUMENT)["passed"] is True
    _gate("loss < 3").refuse_unknown_intervals(ONE_DOCUMENT)


def test_a_condition_behind_one_that_fails_needs_no_value() -> None:
    judged = _judged("degeneration.loops > 0 and degeneration.first_loop_at > 10")
    assert judged["passed"] is False
    assert [condition["passed"] for condition in judged["conditions"]] == [False, None]
    assert failure(judged).startswith("gate failed: degeneration.loops > 0 (")
    assert "first_loop_at is none" in failure(judged)


@pytest.mark.parametrize(
    ("expression", "says"),
    [
        ("", "cannot be read"),
        ("loss <", "cannot be read"),
        ("loss < 1; kl < 1", "cannot be read"),
        ("loss = 1", "cannot be read"),
        ("loss < 1\nkl < 1", "cannot be read"),
        ("domains.my-code.in.loss < 1", "cannot be read"),
        ("\0", "cannot be read"),
        ("kl < 1 # and loss < 1", "has a comment"),
        ("loss", "loss is a number; compare it"),
        ("1.0", "is a number; compare it"),
        ("loss < 1 and kl", "kl is a number; compare it"),
        ("loss < 1 or kl", "kl is a number where a condition is needed"),
        ("not loss", "loss is a number where a condition is needed"),
        ("(loss < 1) < 2", "loss < 1 is a condition, not a number"),
        ("(loss < 1) + 1 > 0", "loss < 1 is a condition, not a number"),
        ("True", "True is not possible"),
        ("loss < True", "True is not possible"),
        ("loss == None", "None is not possible"),
        ("loss < 'a'", "'a' is not possible"),
        ("1 < 2", "names no figure"),
        ("loss < 1j", "1j is not possible"),
        ("loss is 1", "is not possible"),
        ("loss in (1, 2)", "is not possible"),
        ("loss ** 9 < 1", "loss ** 9 is not possible"),
        ("9 ** 9 ** 9 < 1", "is not possible"),
        ("loss % 2 < 1", "is not possible"),
        ("loss // 2 < 1", "is not possible"),
        ("loss << 9 < 1", "is not possible"),
        ("loss @ loss < 1", "is not possible"),
        ("~loss < 1", "is not possible"),
        ("[loss] < [1]", "is not possible"),
        ("loss if kl else 1 < 2", "is not possible"),
        ("(lambda: 1)() < 2", "is not possible"),
        ("[x for x in domains] == 1", "is not possible"),
        ("(loss := 1) < 2", "is not possible"),
        ("f'{loss}' < 2", "is not possible"),
        ("__import__('os').system('id') < 1", "is not possible"),
        ("open('x') < 1", "is not possible"),
        ("print(loss) < 1", "is not possible"),
        ("max(loss) < 1", "is not possible"),
        ("max(*interval) < 1", "is not possible"),
        ("max(loss, 1, key=abs) < 1", "is not possible"),
        ("abs(loss, kl) < 1", "is not possible"),
        ("loss.real() < 1", "is not possible"),
        ("domains[loss].loss < 1", "is not possible"),
        ("domains[-1].loss < 1", "is not possible"),
        ("domains[0:1].loss < 1", "is not possible"),
        ("(loss + 1).real < 1", "is not possible"),
        ("loss < " + "1" * 2001, "longer than 2000"),
        ("(" * 300 + "loss" + ")" * 300 + " < 1", "cannot be read"),
        ("-" * 900 + "loss < 1", "nested too deep"),
        ("not " * 400 + "loss < 1", "nested too deep"),
        ("+".join(["loss"] * 60) + " < 1", "nested too deep"),
    ],
)
def test_what_is_no_gate_is_refused_when_it_is_read(expression: str, says: str) -> None:
    with pytest.raises(UsageError) as raised:
        parse_gate([expression])
    assert says in str(raised.value)
    assert len(str(raised.value)) < 2600


def test_many_conditions_are_not_deep() -> None:
    assert _judged(" and ".join(["kl < 1"] * 150))["passed"]
    assert _judged(" or ".join(["kl > 1"] * 150 + ["kl < 1"]))["passed"]


@pytest.mark.parametrize(
    ("expression", "says"),
    [
        ("perplexty < 1", "there is no perplexty; did you mean perplexity? the report has tokens, loss,"),
        ("domains.cod.loss < 1", "there is no domains.cod.loss; did you mean domains.code? domains has code,"),
        ("domains.code.acc < 1", "there is no domains.code.acc; domains.code has loss, interval, perplexity_ratio"),
        ('lengths["256-511"].loss < 1', 'lengths has ["0-127"], ["512-1023"]'),
        ("domains.code < 1", "domains.code is no figure by itself; name one of loss, interval"),
        ("interval < 1", "interval is no figure by itself; name one of [0], [1]"),
        ("interval[2] < 1", "there is no interval[2]; interval has [0], [1]"),
        ("loss.real < 1", "there is no loss.real"),
        ("loss.__class__ < 1", "there is no loss.__class__"),
        ("domains.__class__.__mro__ < 1", "there is no domains.__class__.__mro__"),
        ("domains.keys < 1", "there is no domains.keys"),
    ],
)
def test_names_that_do_not_exist(expression: str, says: str) -> None:
    for attempt in (_gate(expression).check, _gate(expression).judge):
        with pytest.raises(UsageError) as raised:
            attempt(FIGURES)
        assert says in str(raised.value)


def test_an_option_that_would_help_is_named() -> None:
    without = figures_of({key: value for key, value in REPORT.items() if key != "against"})
    with pytest.raises(UsageError, match="kl needs --against CKPT"):
        _gate("kl < 1").check(without, {"--against CKPT": FIGURES})
    with pytest.raises(UsageError, match="there is no kll"):
        _gate("kll < 1").check(without, {"--against CKPT": FIGURES})


def test_figures_without_a_value() -> None:
    with pytest.raises(UsageError, match="first_loop_at has no value in this report"):
        _judged("degeneration.first_loop_at > 32")
    with pytest.raises(UsageError, match="share_of_rise has no value"):
        _judged("kl < 1 and domains.code.share_of_rise < 0.5")


@pytest.mark.parametrize("expression", ["loss / 0 < 1", "loss / degeneration.loops < 1", "1 / (loss - 2) < 1"])
def test_division_by_zero(expression: str) -> None:
    with pytest.raises(UsageError, match="divides by zero"):
        _judged(expression)


def test_numbers_without_bounds() -> None:
    huge = "1" + "0" * 900
    assert _judged(f"loss < {huge}")["passed"]
    assert _judged("loss < 1e999")["passed"]
    with pytest.raises(UsageError, match="too large"):
        _judged(f"loss + {huge} > 1")


def test_figures_that_are_no_numbers_fail() -> None:
    assert not _gate("loss < 1 or loss >= 1").judge({("loss",): math.nan})["passed"]


def test_names_are_written_as_they_are_read() -> None:
    for path in FIGURES:
        assert _gate(f"{name_of(path)} < 1").figures == [path]


@settings(max_examples=300, deadline=None)
@given(st.text(alphabet="los kd.<>=()[]'\"0123+-*/,andortxm_\\\n\t{}:;@~%^&|!#é\0", max_size=60))
def test_anything_else_is_one_error_or_a_gate(text: str) -> None:
    try:
        gate = parse_gate([text])
        assert gate is not None
        gate.judge(FIGURES)
    except UsageError as error:
        assert str(error)


@settings(max_examples=100, deadline=None)
@given(st.recursive(
    st.sampled_from(["kl < 1", "kl > 1", "1 < loss < 3", "loss <= kl"]),
    lambda inner: st.one_of(
        st.tuples(inner, st.sampled_from(["and", "or"]), inner).map(lambda parts: f"({' '.join(parts)})"),
        inner.map(lambda part: f"(not {part})"),
    ),
    max_leaves=12,
))  # fmt: skip
def test_logic_is_that_of_python(expression: str) -> None:
    expected = eval(expression, {"__builtins__": {}}, {"kl": 0.01, "loss": 2.0})  # a test's own expression
    assert _judged(expression)["passed"] is expected
