"""Token counts of servers, in each of their forms."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moesurgeon.errors import InputError
from moesurgeon.pipeline.subject import Subject
from moesurgeon.profiling.imported import imported

FILE = Path("counts")
RANDOM = np.random.default_rng(0)


@pytest.fixture(scope="module")
def counts(tiny_deepseek: Subject) -> dict[int, list[int]]:
    """Counts for each layer with experts; its first layer is dense."""
    anatomy = tiny_deepseek.anatomy
    assert anatomy.moe_layers == (1, 2, 3) and anatomy.layers == 4
    share = RANDOM.dirichlet(np.ones(anatomy.experts), len(anatomy.moe_layers))
    tokens = [RANDOM.multinomial(4000, row).tolist() for row in share]
    return dict(zip(anatomy.moe_layers, tokens, strict=True))


def _steps(counts: dict[int, list[int]]) -> list[Any]:
    """The same counts in two steps, with a row for the dense layer."""
    rows = np.array([[0] * 16, *counts.values()])
    return [(rows // 3).tolist(), (rows - rows // 3).tolist()]


def _csv(counts: dict[int, list[int]]) -> str:
    lines = [f"{layer},{expert},{tokens}" for layer, row in counts.items() for expert, tokens in enumerate(row)]
    return "\n".join(["layer,expert,tokens", *lines])


def _twice(counts: dict[int, list[int]]) -> str:
    """Other columns and another order; what is left out is zero, what comes twice is added up."""
    lines = [
        f"x, {tokens / 2}, {expert}, {layer}" for layer, row in counts.items() for expert, tokens in enumerate(row)
    ]
    return "\n".join(["rank, Tokens, Expert, Layer", *lines, *lines])


FORMS = {
    "by layer": json.dumps,
    "EPLB": lambda counts: json.dumps(list(counts.values())),
    "EPLB with the dense layer": lambda counts: json.dumps([[0] * 16, *counts.values()]),
    "SGLang": lambda counts: json.dumps({"rank": 0, "logical_count": [[0] * 16, *counts.values()]}),
    "SGLang in steps": lambda counts: json.dumps({"logical_count": _steps(counts)}),
    "CSV": _csv,
    "CSV with other columns": _twice,
}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS.keys())
def test_every_form_gives_the_same(form: Any, counts: dict[int, list[int]], tiny_deepseek: Subject) -> None:
    statistics = imported(FILE, form(counts), tiny_deepseek.anatomy)
    assert statistics.layers == (1, 2, 3) and statistics.top_k == tiny_deepseek.anatomy.top_k
    assert statistics.total("tokens").tolist() == list(counts.values())
    assert statistics.seen.tolist() == [1000.0]
    assert statistics.counts_only


def test_layers_that_do_not_add_up_to_the_same_are_loads_all_the_same(tiny_mixtral: Subject) -> None:
    """As in the example of EPLB's README."""
    rows = [[90, 132, 40, 61, 104, 165, 39, 4], [20, 107, 104, 64, 19, 197, 187, 157]] * 2
    statistics = imported(FILE, json.dumps(rows), tiny_mixtral.anatomy)
    assert statistics.utilization() == pytest.approx(np.array([np.array(row) / sum(row) for row in rows]))


GOOD = [1] * 16
REFUSED = {
    "nothing": ("", "its first line names no layer, expert, tokens"),
    "half a JSON": ('{"1": [1, 2', "is not a JSON"),
    "nested": ("[" * 100_000, "is not a JSON"),
    "words": (json.dumps({"1": ["many"] * 16}), "are not numbers"),
    "one number": (json.dumps({"logical_count": 7}), "0 dimensions"),
    "a layer's name": (json.dumps({"first": GOOD}), "is not a JSON"),
    "a dense layer": (json.dumps({"0": GOOD, "1": GOOD, "2": GOOD, "3": GOOD}), "layer 0, which has no experts"),
    "a layer missing": (json.dumps({"1": GOOD, "3": GOOD}), r"no tokens in layers \[2\]"),
    "a layer of zeros": (json.dumps([GOOD, [0] * 16, GOOD]), r"no tokens in layers \[2\]"),
    "other layers": (json.dumps([GOOD] * 5), "5 rows; the checkpoint has 4 layers, 3 of them with experts"),
    "other experts": (json.dumps([[1] * 18] * 3), "18 counts, the checkpoint 16 experts"),
    "ragged": (json.dumps([GOOD, [1], GOOD]), "not numbers in equal rows"),
    "negative": (json.dumps([GOOD, GOOD, [-1] * 16]), "not all counts from 0 on"),
    "no number": (json.dumps([GOOD, GOOD, [float("nan")] * 16]), "not all counts from 0 on"),
    "CSV without a heading": ("1,2,3\n1,3,4", "names no layer, expert, tokens"),
    "CSV with words": ("layer,expert,tokens\n1,two,3", "line 2: .* are no numbers"),
    "CSV cut off": ("layer,expert,tokens\n1,2", "line 2: .* are no numbers"),
    "CSV of another model": ("layer,expert,tokens\n1,16,3", "no expert 16; the checkpoint has 16"),
    "a layer twice": ('{"1": [1],\n "2": [1],\n "1": [2]}', 'the key "1" comes twice, in lines 1 and 3'),
    "a layer in two spellings": (json.dumps({"1": GOOD, "01": GOOD, "2": GOOD, "3": GOOD}), "'01' is no number"),
    "true for a count": (json.dumps({"1": [True] * 16, "2": GOOD, "3": GOOD}), "are not numbers"),
    "text for a count": (json.dumps([GOOD, GOOD, ["1"] * 16]), "are not numbers"),
    "CSV with a column twice": ("layer,expert,tokens,Tokens\n1,2,3,4", "names the column tokens twice"),
    "CSV with another cell": ("layer,expert,tokens\n1,2,3,4", "line 2 has more cells"),
    "CSV with Python's numbers": ("layer,expert,tokens\n1,2,3_0", "line 2: .* are no numbers"),
    "CSV below zero": ("layer,expert,tokens\n1,1,-3", "-3 is no count"),
}


@pytest.mark.parametrize(("text", "says"), REFUSED.values(), ids=REFUSED.keys())
def test_what_does_not_fit_is_refused(text: str, says: str, tiny_deepseek: Subject) -> None:
    with pytest.raises(InputError, match=says) as raised:
        imported(FILE, text, tiny_deepseek.anatomy)
    assert raised.value.exit_code == 3 and "\n" not in str(raised.value) and len(str(raised.value)) < 400
