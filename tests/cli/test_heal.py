"""``prune --heal`` and ``retop --calibrate``: what is printed, planned, refused, and left behind when stopped."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from moesurgeon.errors import EXIT_INTERRUPTED
from tests.cli.invoke import contents, refused, succeeded
from tests.cli.test_interrupt import _interrupt as interrupt
from tests.conftest import BUILTIN

MIXTRAL = "builtin:tiny-mixtral"
LITTLE = ("--heal-tokens", "2048", "--heal-heldout", "2048")
FEW = ("--heal-steps", "3")
LAYER = re.compile(
    r"  layer \d: error 0\.\d{4} -> 0\.\d{4} \(ridge 0\.\d{4}( \(left\))?(, distill 0\.\d{4}( \(left\))?)?\)"
)


@pytest.mark.parametrize("name", BUILTIN)
def test_prune(name: str, out: Path, profiles: dict[str, Path]) -> None:
    heal = ("--heal", "builtin:json", "--heal", "l=builtin:logs", *LITTLE, *FEW)
    arguments = ("prune", name, out, "--profile", profiles[name], "--ratio", "0.25", *heal)
    planned = succeeded(*arguments, "--dry-run", "--json").json
    assert planned["healed"]["planned"]["traces"] == ["builtin:json", "l=builtin:logs"]
    assert planned["healed"]["planned"]["pace"]["steps"] == 3
    shown = succeeded(*arguments, "--dry-run").out
    assert "would heal on builtin:json, l=builtin:logs by distill, up to 2,048 tokens" in shown
    assert contents(out.parent) == {}
    written = succeeded(*arguments, "--json").json
    healing = written["healed"]
    assert set(healing["traces"]) == set(healing["heldout_traces"]) == {"json", "l"}
    assert healing["traces"] != healing["heldout_traces"]
    assert healing["kept"] and healing["tokens"] == 2048 and healing["heldout_tokens"] > 0
    assert [step["step"] for step in written["healing"][0]["steps"]] == ["ridge", "distill"]
    report = succeeded("verify", out, "--source", name, "--json").json
    assert [step["operation"] for step in report["history"][0]] == ["prune", "heal"]
    assert "heal" in succeeded("verify", out).out


def test_chosen_by_what_healing_leaves(out: Path, profiles: dict[str, Path]) -> None:
    heal = ("--criterion", "healed", "--heal", "builtin:json", "--heal-method", "ridge", *LITTLE)
    arguments = ("prune", MIXTRAL, out, "--profile", profiles[MIXTRAL], "--keep", "7", *heal)
    planned = succeeded(*arguments, "--dry-run")
    assert contents(out.parent) == {} and "would heal on builtin:json" in planned.out
    line = re.compile(
        r"  layer \d: a refit leaves 0\.\d{4} of 0\.\d{4}, with the choice of [a-z-]+ 0\.\d{4} "
        r"\(8 subsets refitted, all\)"
    )
    assert len([each for each in planned.out.splitlines() if line.fullmatch(each)]) == 4, planned.out
    written = succeeded(*arguments, "--json").json
    assert written["criterion"] == "healed" and [each["layer"] for each in written["choice"]["layers"]] == [0, 1, 2, 3]
    assert written["choice"]["choice_tokens"] == 2048
    for layer in written["choice"]["layers"]:
        assert layer["healed_error"] <= min(each["healed_error"] for each in layer["criteria"].values())
        loses = f"  layer {layer['layer']} loses {written['dropped'][str(layer['layer'])][0]}"
        assert any(line.startswith(f"{loses} (") for line in planned.out.splitlines())
    history = succeeded("verify", out, "--source", MIXTRAL, "--json").json["history"]
    assert history[0][0]["criterion"] == "healed"


def test_chosen_by_what_healing_leaves_needs_healing(out: Path, profiles: dict[str, Path]) -> None:
    prune = ("prune", MIXTRAL, out, "--profile", profiles[MIXTRAL], "--keep", "6", "--criterion", "healed")
    refused(2, *prune, says=("--criterion healed", "add --heal TRACES"))
    refused(2, *prune, "--heal", "builtin:json", "--heal-method", "none", says=("--heal-method none heals nothing",))
    refused(3, *prune, "--heal", "nowhere.jsonl", says=("nowhere.jsonl",))
    refused(2, *prune, "--heal", "builtin:json", "--max-memory", "1MB", says=("--max-memory",))
    assert contents(out.parent) == {}


def test_retop(out: Path) -> None:
    arguments = ("retop", MIXTRAL, out, "--calibrate", "builtin:json", *LITTLE, *FEW)
    shown = succeeded(*arguments).out
    assert len([line for line in shown.splitlines() if LAYER.fullmatch(line)]) == 4, shown
    assert re.search(
        r"held-out loss \d\.\d{4} before the cut, \d\.\d{4} bare, \d\.\d{4} healed \(\d+% of the gap closed\)", shown
    )
    assert "replace" in shown


def test_routers_and_ranks_on_request(out: Path, tmp_path: Path) -> None:
    kept = tmp_path / "kept.json"
    kept.write_text('{"0": [0,1,2,3,4,5,6], "1": [0,1,2,3,4,5,6], "2": [0,1,2,3,4,5,6], "3": [0,1,2,3,4,5,6]}')
    heal = ("--heal", "builtin:json", "--heal-method", "ridge", "--heal-router", "--heal-rank", "16", *LITTLE)
    shown = succeeded("prune", MIXTRAL, out, "--keep-experts", kept, *heal).out
    assert re.search(r"layer 1: error .* \(ridge 0\.\d{4}.*, router 0\.\d{4}", shown)
    line = (
        r"    expert 7: [\d,]+ held-out tokens, error \d\.\d{4} -> \d\.\d{4}, now with \d \(\d+%\)(, \d \(\d+%\)){,3}"
    )
    assert len([each for each in shown.splitlines() if re.fullmatch(line, each)]) >= 1, shown
    report = succeeded("prune", MIXTRAL, out, "--overwrite", "--json", "--keep-experts", kept, *heal).json
    for layer in report["healing"]:
        assert [step["step"] for step in layer["steps"]] == ["ridge", "router"]
        (gone,) = layer["dropped"]
        assert gone["expert"] == 7 and all(each["expert"] < 7 for each in gone["now"])
    (record,) = (step for step in report["plan"]["operations"] if step["operation"] == "heal")
    assert record["pace"]["rank"] == 16 and record["pace"]["router"] is True


def test_a_sample_of_the_documents_heals_on_request(out: Path) -> None:
    def hashes(*options: str) -> tuple[str, str]:
        arguments = ("--calibrate", "builtin:json", "--heal-method", "scale", *LITTLE, *options)
        report = succeeded("retop", MIXTRAL, out, "--overwrite", "--json", *arguments).json
        (record,) = (step for step in report["plan"]["operations"] if step["operation"] == "heal")
        return record["traces"]["json"], record["heldout_traces"]["json"]

    first, judged = hashes()
    sampled = {hashes("--heal-sample", seed) for seed in ("1", "2")}
    assert len({first, *(learnt for learnt, _ in sampled)}) == 3
    assert {by for _, by in sampled} == {judged}


def test_a_budget_is_what_a_domain_heals_on(out: Path) -> None:
    def healed(*options: str) -> dict[str, object]:
        traces = ("--calibrate", "builtin:json", "--calibrate", "builtin:logs", "--heal-method", "scale")
        found = succeeded("retop", MIXTRAL, out, "--overwrite", "--json", *traces, *LITTLE, *options).json["healed"]
        assert isinstance(found, dict)
        return found

    even, less = healed(), healed("--heal-budget", "json=100")
    assert (even["tokens"], less["tokens"]) == (2048, 2048 + 100)
    assert even["heldout_tokens"] == less["heldout_tokens"] and even["heldout"] != less["heldout"]
    planned = succeeded("retop", MIXTRAL, out, "--calibrate", "builtin:json", "--heal-budget", "json=1k", "--dry-run",
                        "--overwrite")  # fmt: skip
    assert "distill, up to 1k of json" in planned.out
    for budget, says in (("jsn=1k", "a budget is for 'jsn'"), ("json", "--heal-budget json is not of the form")):
        arguments = ("retop", MIXTRAL, out, "--calibrate", "builtin:json", "--overwrite", "--heal-budget", budget)
        refused(2, *arguments, says=(says,))


@pytest.mark.parametrize(
    "command",
    [
        ("retop", MIXTRAL, "OUT", "--heal-budget", "json=1k"),
        ("retop", MIXTRAL, "OUT", "--heal-sample", "1"),
        ("prune", MIXTRAL, "OUT", "--keep", "6", "--heal-budget", "json=1k"),
        ("recover", MIXTRAL, "OUT", "--teacher", MIXTRAL, "--heal-budget", "json=1k"),
    ],
)
def test_what_is_said_of_healing_that_there_is_not_is_refused(command: tuple[str, ...], out: Path) -> None:
    arguments = [out if argument == "OUT" else argument for argument in command]
    refused(2, *arguments, says=("is about healing", "nothing heals", "leave --heal-"))


def test_none_and_nothing_to_heal(out: Path) -> None:
    shown = succeeded("retop", MIXTRAL, out, "--calibrate", "builtin:json", "--heal-method", "none", *LITTLE).out
    assert "bare" in shown and "replace" not in shown and "left out" not in shown and "of the gap" not in shown
    copied = succeeded(
        "retop", MIXTRAL, out, "--top-k", "2", "--calibrate", "builtin:json", "--allow-noop", "--overwrite"
    )
    assert "held-out" not in copied.out and "would heal" not in copied.out


def test_a_teacher_can_be_named(out: Path, top1: dict[str, Path], tmp_path: Path) -> None:
    kept = tmp_path / "kept.json"
    kept.write_text(str({str(layer): [0, 1, 2, 3, 4, 5] for layer in range(4)}).replace("'", '"'))
    heal = ("--heal", "builtin:json", "--heal-method", "scale", "--heal-teacher", MIXTRAL, *LITTLE)
    succeeded("prune", top1[MIXTRAL], out, "--keep-experts", kept, *heal)
    record = succeeded("verify", out, "--source", MIXTRAL, "--json").json
    assert [step["operation"] for steps in record["history"] for step in steps] == ["retop", "prune", "heal"]


@pytest.mark.parametrize(
    ("options", "code", "says"),
    [
        (("--calibrate", "nowhere.jsonl"), 3, "nowhere.jsonl"),
        (("--calibrate", "builtin:nothing"), 2, "'nothing'"),
        (("--calibrate", "builtin:json", "--heal-method", "magic"), 2, "magic"),
        (("--calibrate", "builtin:json", "--heal-tokens", "7"), 2, "--heal-tokens"),
        (("--calibrate", "builtin:json", "--heal-steps", "0"), 2, "--heal-steps"),
        (("--calibrate", "builtin:json", "--heal-rank", "0"), 2, "--heal-rank"),
        (("--calibrate", "builtin:json", "--heal-teacher", "nowhere"), 3, "nowhere"),
        (("--calibrate", "builtin:json", "--dtype", "int8"), 2, "int8"),
        (("--calibrate", "builtin:json", "--max-memory", "1MB"), 2, "--heal-method ridge takes"),
        (("--calibrate", "builtin:json", "--layout", "qwen2-moe"), 2, "not for Mixtral"),
    ],
)
def test_what_cannot_be_is_refused(options: tuple[str, ...], code: int, says: str, out: Path) -> None:
    refused(code, "retop", MIXTRAL, out, *options, says=(says,))
    assert contents(out.parent) == {}


@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGTERM])
def test_stopped_while_it_heals(
    sign: signal.Signals, out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    heal = ("--calibrate", "builtin:json", "--heal-tokens", "1024", "--heal-heldout", "1024", "--heal-steps", "1000000")
    code, said, err = interrupt(("retop", MIXTRAL, out, *heal), b"healing", sign)
    assert said == b"" and b"Traceback" not in err
    assert code == (EXIT_INTERRUPTED if sign == signal.SIGINT else -sign)
    assert contents(tmp_path) == {}


def test_killed_with_states_in_files(out: Path, tmp_path: Path) -> None:
    """What is left is in TMPDIR alone."""
    script = (
        "from moesurgeon.pipeline import heal_budget\n"
        "from tests.engine.tight import tight\n"
        "heal_budget.share_out = tight\n"
        "from moesurgeon.cli import main\n"
        "main()\n"
    )
    spare = tmp_path / "spare"
    spare.mkdir()
    arguments = (
        "retop",
        MIXTRAL,
        out,
        "--calibrate",
        "builtin:json",
        "--heal-tokens",
        "1024",
        "--heal-heldout",
        "1024",
        "--heal-steps",
        "10000",
    )
    environment = {**os.environ, "TMPDIR": str(spare), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    running = subprocess.Popen([sys.executable, "-c", script, *map(str, arguments)], env=environment)
    deadline = time.monotonic() + 90
    while not list(spare.rglob("heldout.target")) and time.monotonic() < deadline and running.poll() is None:
        time.sleep(0.05)
    assert running.poll() is None
    running.kill()
    running.wait()
    assert list(spare.rglob("*.hidden")) and not out.exists()
    assert list(tmp_path.iterdir()) == [spare]
