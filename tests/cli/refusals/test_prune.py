"""Cuts that cannot be made: counts, criteria, and lists of experts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cli.invoke import refused
from tests.cli.refusals.places import INPUT, MIXTRAL, USAGE


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--keep", "1"], ("keep at least 2 experts",)),
        (["--keep", "0"], ("keep at least 2 experts",)),
        (["--keep", "-3"], ("keep at least 2 experts",)),
        (["--keep", "9"], ("cannot keep 9 experts", "has 8")),
        (["--keep", "8"], ("nothing to prune", "keep fewer")),
        (["--keep", "six"], ("--keep",)),
        (["--ratio", "0"], ("--ratio 0 is not between 0 and 1", "share")),
        (["--ratio", "1"], ("--ratio 1 is not between 0 and 1", "share")),
        (["--ratio", "-0.5"], ("--ratio -0.5", "share")),
        (["--ratio", "nan"], ("--ratio nan", "no finite number")),
        (["--ratio", "0.1"], ("less than one", "nothing would be removed")),
        (["--ratio", "0.9"], ("keep at least 2 experts",)),
        (["--ratio", "a lot"], ("--ratio",)),
        (["--keep", "6", "--ratio", "0.25"], ("--keep N, --ratio R or --below S", "one of them")),
        ([], ("--keep N, --ratio R or --below S", "one of them")),
        (["--keep", "6", "--criterion", "luck"], ("--criterion luck", "reap")),
        (["--keep", "6", "--criterion", "random", "--seed", "-1"], ("--seed",)),
        (["--keep", "6", "--no-such-option"], ("--no-such-option",)),
    ],
    ids=" ".join,
)  # fmt: skip
def test_prune_arguments(arguments: list[str], says: tuple[str, ...], out: Path, profiles: dict[str, Path]) -> None:
    refused(USAGE, "prune", MIXTRAL, out, "--profile", profiles[MIXTRAL], *arguments, says=says)


def test_prune_without_a_profile(out: Path) -> None:
    refused(USAGE, "prune", MIXTRAL, out, "--keep", "6", says=("--profile", "--keep-experts"))


LAYERS = {str(layer): [0, 1, 2, 3, 4, 5] for layer in range(4)}


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("{", ("not of the form", '{"LAYER": [expert, ...]}')),
        ("", ("not of the form",)),
        ("[" * 100_000, ("not of the form",)),
        (b"\xff\xfe", ("not of the form",)),
        ("[]", ("not of the form", "a list")),
        ("{}", ("must map each layer",)),
        ("7", ("not of the form",)),
        ({**LAYERS, "3": 5}, ("must map each layer",)),
        ({**LAYERS, "three": [1, 2]}, ("not of the form", "three")),
        ({**LAYERS, "3": []}, ("not empty",)),
        ({**LAYERS, "3": ["a", "b"]}, ("expert numbers",)),
        ({**LAYERS, "3": [True, 1, 2, 3, 4, 5]}, ("expert numbers",)),
        ({**LAYERS, "3": [0.0, 1, 2, 3, 4, 5]}, ("expert numbers",)),
        ({**LAYERS, "3": "012345"}, ("expert numbers",)),
        ({**LAYERS, "3": [0, 1, 2, 3, 4]}, ("different counts", "same in every layer")),
        ({**LAYERS, "3": [0, 1, 2, 3, 4, 8]}, ("layer 3 has no expert 8", "0 to 7")),
        ({**LAYERS, "3": [-1, 1, 2, 3, 4, 5]}, ("layer 3 has no expert -1", "0 to 7")),
        ({**LAYERS, "3": [0, 1, 2, 3, 4, 4]}, ("layer 3 lists an expert twice", "once")),
        ({**LAYERS, "4": [0, 1, 2, 3, 4, 5]}, ("layer 4 has no routed experts", "0, 1, 2, 3")),
        ({layer: [0] for layer in LAYERS}, ("keep at least 2 experts",)),
        ({layer: LAYERS[layer] for layer in "012"}, ("no experts are given for layer 3", "list every one")),
        ('{"0": [0, 1], "00": [1, 2], "1": [0, 1], "2": [0, 1], "3": [0, 1]}', ("'00' is no number", "correct it")),
        ('{"0": [0, 1], "0": [1, 2], "1": [0, 1], "2": [0, 1], "3": [0, 1]}', ('the key "0" comes twice', "line 1")),
    ],
    ids=str,
)
def test_list_of_experts(content: object, says: tuple[str, ...], out: Path, tmp_path: Path) -> None:
    path = tmp_path / "kept.json"
    text = content if isinstance(content, (str, bytes)) else json.dumps(content)
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    refused(INPUT, "prune", MIXTRAL, out, "--keep-experts", path, says=(str(path), *says))


def test_list_of_experts_is_missing_or_not_alone(out: Path, tmp_path: Path) -> None:
    refused(INPUT, "prune", MIXTRAL, out, "--keep-experts", tmp_path / "nowhere.json", says=("cannot be read", "give"))
    refused(INPUT, "prune", MIXTRAL, out, "--keep-experts", tmp_path, says=("cannot be read", "give"))
    path = tmp_path / "kept.json"
    path.write_text(json.dumps(LAYERS))
    for other in (["--keep", "6"], ["--keep", "0"], ["--ratio", "0.5"], ["--criterion", "reap"]):
        refused(USAGE, "prune", MIXTRAL, out, "--keep-experts", path, *other, says=("leave",))
