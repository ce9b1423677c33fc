"""Every family has a fixture and a row in the documentation."""

import re
from pathlib import Path

from moesurgeon.families import FAMILIES
from tests.families.factory import MODEL_TYPES

ROOT = Path(__file__).parents[2]
BY_TYPE = {model_type: family for family in FAMILIES for model_type in family.model_types}


def test_every_family_has_a_fixture() -> None:
    assert set(BY_TYPE) - set(MODEL_TYPES) == {"llama4"}  # its own test below: no causal language model


def test_the_documentation_has_every_family_and_a_whole_example() -> None:
    page = (ROOT / "docs/families.md").read_text()
    rows = {row.split("|")[1].strip(): row for row in page.splitlines() if row.startswith("| ")}
    for family in FAMILIES:
        row = rows[family.title.removesuffix(" (text)")]
        assert all(f"`{model_type}`" in row for model_type in family.model_types)
        assert ("| no: " in row) is (family.not_run is not None)
        assert ("no `retop`" in row) is (family.fixed_top_k is not None)
    assert f"```python\n{(ROOT / 'moesurgeon/families/qwen3_moe.py').read_text()}```" in page
    example = re.search(r'"qwen3_moe": (\{.*\}),\n', page)
    assert example is not None and example[0] in (ROOT / "tests/families/factory.py").read_text()
