"""Every command, for people and for scripts, where all goes well."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from moesurgeon.pipeline import run as pipeline_run
from tests.cli.conftest import TEXT
from tests.cli.invoke import finished, succeeded, without_amounts
from tests.conftest import BUILTIN

both = pytest.mark.parametrize("name", BUILTIN)


def keeps(report: dict[str, Any], **expected: Any) -> None:
    """Check that ``report`` has these fields, each of the type or with the fields given."""
    for field, kind in expected.items():
        assert field in report, f"{field} is missing"
        if isinstance(kind, dict):
            keeps(report[field], **kind)
        else:
            assert isinstance(report[field], kind), (field, report[field])


@both
def test_inspect(name: str) -> None:
    report = succeeded("inspect", name, "--json").json
    keeps(
        report, family=str, layers=int, moe_layers=list, experts=int, top_k=int, shared_experts=int,
        parameters={"total": int, "active": int, "experts": int},
        flops_per_token=dict.fromkeys(
            ("total", "attention", "router", "routed_experts", "shared_experts", "head"), int
        ),
        bytes=int, dtype=str, layout=str, problems=list,
    )  # fmt: skip
    assert report["problems"] == []
    assert report["experts"] == {"builtin:tiny-mixtral": 8, "builtin:tiny-deepseek": 16}[name]
    assert succeeded("inspect", name, "--json").json == report
    shown = succeeded("inspect", name).out
    assert shown.startswith(f"{name}: ")
    assert f"top-{report['top_k']}" in shown and report["layout"] in shown and report["dtype"] in shown


def test_inspect_lists_problems_and_reads_on(tmp_path: Path, top1: dict[str, Path]) -> None:
    source = top1["builtin:tiny-mixtral"]
    for path in source.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    config = json.loads((source / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_local_experts": 7}))
    report = succeeded("inspect", tmp_path, "--json").json
    assert report["problems"] and "7" in report["problems"][0]
    assert f"problem: {report['problems'][0]}" in succeeded("inspect", tmp_path).out


@both
def test_retop(name: str, out: Path) -> None:
    shown = succeeded("retop", name, out)
    assert "-> top-1" in shown.out and f"wrote {out}" in shown.out
    report = succeeded("retop", name, out, "--overwrite", "--json").json
    keeps(report, top_k={"before": int, "after": int}, flops_per_token={"before": int, "after": int}, shards=int,
          linked_shards=int, bytes_before=int, bytes_after=int, plan=dict, output=str)  # fmt: skip
    assert report["bytes_before"] == report["bytes_after"]
    assert report["flops_per_token"]["after"] < report["flops_per_token"]["before"]
    assert succeeded("inspect", out, "--json").json["top_k"] == 1


@both
def test_profile(name: str, out: Path, profiles: dict[str, Path]) -> None:
    report = succeeded("profile", name, "-o", out, *TEXT, "--json").json
    keeps(report, tokens=int, domains={"arithmetic": int, "js": int}, layers=dict, path=str)
    assert report["tokens"] == 512 == sum(report["domains"].values())
    assert list(report["layers"]) == [str(layer) for layer in succeeded("inspect", name, "--json").json["moe_layers"]]
    for layer in report["layers"].values():
        keeps(layer, utilization=list, entropy=float, max_over_mean=float)
        assert sum(layer["utilization"]) == pytest.approx(1)
    # The same text gives the same profile, byte by byte.
    for file in ("stats.safetensors", "profile.json"):
        assert (out / file).read_bytes() == (profiles[name] / file).read_bytes()
    shown = succeeded("profile", name, "-o", out, "--overwrite", *TEXT)
    assert shown.err == ""
    assert "512 tokens: arithmetic 256, js 256" in shown.out and f"wrote {out}" in shown.out
    for heading in ("layer", "utilization", "entropy", "max/mean", "coldest", "unused"):
        assert heading in shown.out  # a table that is redirected is not cut


@both
def test_prune(name: str, out: Path, profiles: dict[str, Path]) -> None:
    report = succeeded("prune", name, out, "--profile", profiles[name], "--ratio", "0.25", "--json").json
    keeps(report, kept=dict, dropped=dict, experts_before=int, experts_after=int, bytes_before=int, bytes_after=int,
          stages=list, healing=list, criterion=str)  # fmt: skip
    assert report["experts_after"] == report["experts_before"] * 3 // 4
    assert report["bytes_after"] < report["bytes_before"]
    for layer, kept in report["kept"].items():
        assert sorted(kept + report["dropped"][layer]) == list(range(report["experts_before"]))
    assert succeeded("inspect", out, "--json").json["experts"] == report["experts_after"]
    choice = out.with_name("kept.json")
    choice.write_text(json.dumps(report["kept"]))
    shown = succeeded("prune", name, out, "--keep-experts", choice, "--overwrite").out
    assert f"{report['experts_before']} -> {report['experts_after']} experts" in shown and "loses" in shown


@both
def test_evaluate(name: str, top1: dict[str, Path]) -> None:
    report = succeeded("evaluate", top1[name], "--against", name, *TEXT, "--json").json
    keeps(
        report, tokens=int, loss=float, perplexity=float, lengths=dict, domains={"arithmetic": dict, "js": dict},
        against={"kl": float, "agreement": float, "esap": float, "perplexity_ratio": float, "domains": dict},
    )  # fmt: skip
    for domain in report["domains"].values():
        keeps(domain, tokens=int, loss=float, perplexity=float, interval=list)
    assert report["splits"] == {"arithmetic": "report", "js": "report"}
    shown = succeeded("evaluate", top1[name], "--against", name, *TEXT).out
    for heading in ("domain", "tokens", "perplexity", "95 % interval", "ratio", "KL", "agreement", "ESAP"):
        assert heading in shown
    assert "tokens/s" in shown


def test_evaluate_alone() -> None:
    report = succeeded("evaluate", "builtin:tiny-mixtral", *TEXT, "--json").json
    assert "against" not in report and report["compared_with"] is None
    assert "KL" not in succeeded("evaluate", "builtin:tiny-mixtral", *TEXT).out


@both
def test_recover(name: str, out: Path, top1: dict[str, Path]) -> None:
    few = (*TEXT, "--steps", "2", "--tokens-per-step", "64", "--heldout-tokens", "128", "--allow-noop")
    report = succeeded("recover", top1[name], out, "--teacher", name, *few, "--json").json
    keeps(
        report, teacher=str, tokens=int, heldout_tokens=int, domains=dict, loss_before=float, loss_after=float,
        teacher_loss=float, gradient_norm=float, log=list, bytes_after=int, shares_weights=bool, adapt=list,
        domains_closed=dict, parts=dict, usage=dict, steps=int, trained_parameters=int, healed_before=list,
    )  # fmt: skip
    assert report["loss_after"] <= report["loss_before"]
    assert len(report["log"]) == 1 and report["log"][0]["step"] == 2
    assert succeeded("verify", out, "--source", top1[name], "--json").json["tensors_dropped"] == 0
    shown = succeeded("recover", top1[name], out, "--teacher", name, *few, "--overwrite")
    assert "held-out loss" in shown.out and f"wrote {out}" in shown.out
    assert without_amounts(shown.err) == []


@both
def test_recover_of_routers_and_experts(name: str, out: Path, top1: dict[str, Path]) -> None:
    few = (*TEXT, "--steps", "2", "--tokens-per-step", "64", "--heldout-tokens", "128", "--judge-every", "1")
    every = ("--adapt", "full-routers", "--adapt", "experts-all", "--lm", "0.1", "--router-distill", "0.1")
    more = ("--hidden", "0.1", "--z-loss", "0.01", "--capacity", "2", "--patience", "5", "--recompute")
    log = out.with_name("log.json")
    report = succeeded(
        "recover", top1[name], out, "--teacher", name, *few, *every, *more, "--expert-rate", "0.001", "--warmup", "0.5",
        "--clip", "0.5", "--log", log, "--allow-noop", "--json",
    ).json  # fmt: skip
    assert report["shares_weights"] is True and report["adapt"] == ["full-routers", "experts-all"]
    assert json.loads(log.read_text()) == report["log"]
    assert {"kl", "lm", "router", "hidden", "z", "balance", "loss", "heldout", "usage", "step"} == set(report["log"][0])
    assert set(report["usage"]["after"]) == set(report["log"][0]["usage"])
    log.unlink()
    shown = succeeded(
        "recover", top1[name], out, "--teacher", name, *few, *every, *more, "--overwrite", "--allow-noop"
    ).out
    assert "entropy of use" in shown and "over a capacity of 1.25" in shown


@both
def test_recover_with_ranks_that_are_dealt_out(name: str, out: Path, top1: dict[str, Path]) -> None:
    few = (*TEXT, "--steps", "10", "--tokens-per-step", "64", "--heldout-tokens", "128", "--allow-noop")
    command = (
        "recover",
        top1[name],
        out,
        "--teacher",
        name,
        *few,
        "--adapt",
        "routers",
        "--adapter",
        "adalora",
        "--rank",
        "2",
    )
    report = succeeded(*command, "--json").json
    assert report["adapter"] == "adalora" and set(report["ranks"]) == {"last", "written"}
    assert set(report["ranks"]["last"]) == set(report["usage"]["after"])
    assert max(report["ranks"]["last"].values()) <= 3
    assert "  layer 1: rank " in succeeded(*command, "--overwrite").out
    adapter = out.with_name("adapter")
    report = succeeded(*command, "--overwrite", "--save-adapter", adapter, "--json").json
    assert report["saved_adapter"] == (str(adapter) if report["ranks"]["written"] else None)
    assert adapter.exists() == (report["ranks"]["written"] is not None)


@both
def test_recover_beyond_memory(name: str, out: Path, top1: dict[str, Path]) -> None:
    few = (*TEXT, "--steps", "2", "--tokens-per-step", "64", "--heldout-tokens", "128", "--allow-noop", "--streamed")
    report = succeeded("recover", top1[name], out, "--teacher", name, *few, "--json").json
    assert report["resident"] is False
    assert report["bytes_before"] < report["bytes_read_per_step"] < 2 * report["bytes_before"]
    shown = succeeded("recover", top1[name], out, "--teacher", name, *few, "--overwrite").out
    assert "layers were streamed: 0.01 GB read at every step" in shown


@both
def test_verify(name: str, top1: dict[str, Path]) -> None:
    report = succeeded("verify", top1[name], "--source", name, "--json").json
    keeps(report, tensors=int, bytes=int, fingerprint=str, history=list, source=str, tensors_equal=int)
    assert report["tensors_equal"] == report["tensors"]
    assert report["history"][0][0]["operation"] == "retop"
    shown = succeeded("verify", top1[name], "--source", name).out
    assert "whole" in shown and "retop" in shown and "equal byte by byte" in shown
    assert succeeded("verify", name, "--json").json["history"] == []


def test_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline_run, "_ENTROPY_TOKENS", 256)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "checkpoint: builtin:tiny-mixtral\ntext: {traces: ['builtin:json'], length: 64}\nreport_tokens: 256\n"
        "steps:\n  - retop:\n"
    )
    report = succeeded("run", recipe, "-o", tmp_path / "run", "--json").json
    keeps(report, stages=list, checkpoint=str, output=str, seconds=float)
    assert [stage["stage"] for stage in report["stages"]] == ["original", "retop"]
    shown = succeeded("run", recipe, "-o", tmp_path / "run", "--overwrite")
    assert "step 1 of 1: retop" in shown.err
    assert "perplexity" in shown.out and "figures.json" in shown.out


def test_as_a_process(out: Path) -> None:
    """What the tests above do in one process, twice as the user does it."""
    first = finished("inspect", "builtin:tiny-deepseek", "--json")
    assert first.code == 0 and first.err == ""
    assert first.json["family"] == "deepseek_v1"
    second = finished("profile", "builtin:tiny-deepseek", "-o", out, *TEXT)
    assert (second.code, second.err) == (0, "")
    assert f"wrote {out}" in second.out
