"""Rules that name experts by number are of the same experts after a prune, or the prune is refused."""

import json
from pathlib import Path
from typing import Any

import pytest

from moesurgeon.errors import CheckpointError, OutputError, UsageError
from moesurgeon.pipeline.inspect import inspect
from moesurgeon.pipeline.options import HealSpec, Writing
from moesurgeon.pipeline.prune import prune
from moesurgeon.pipeline.prune_spec import PruneSpec
from moesurgeon.pipeline.subject import Subject, open_subject
from moesurgeon.pipeline.verify import verify
from moesurgeon.surgery.anatomy import examine
from moesurgeon.surgery.apply import apply
from moesurgeon.surgery.layouts import plan_layout
from moesurgeon.surgery.prune import plan_prune
from tests.families.factory import config_of, save_checkpoint

# Of eight experts the first four keep their numbers, 6 and 7 become 4 and 5.
KEPT = {layer: [0, 1, 2, 3, 6, 7] for layer in range(4)}
E = "model.layers.1.mlp.experts"


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Subject:
    return open_subject(str(save_checkpoint(tmp_path_factory.mktemp("plain"), "qwen3_moe")))


def _prune(plain: Subject, quantisation: dict[str, Any]) -> None:
    config = {**plain.anatomy.config, "quantization_config": quantisation}
    plan_prune(examine(config, plain.checkpoint.tensors), KEPT)


MOVED = [
    {"ignore": ["lm_head", f"{E}.7.down_proj"]},
    {"ignore": ["mlp.experts.7.down_proj"]},
    {"ignore": [f"{E.removeprefix('model.')}.6"]},
    {"ignore": [f"{E}.4.up_proj"]},  # of one that goes: its number is another's afterwards
    {"ignore": [f"re:{E}.7.*".replace(".", "\\.")]},
    {"ignore": [r"re:.*experts\.7\..*"]},
    {"ignore": [r"re:.*layers\.[01]\.mlp\.experts\.(4|7)\.down_proj$"]},
    {"ignore": [r"re:.*experts\.[5-7]\.(gate|up)_proj"]},
    {"ignore": [r"re:.*\.7\.(gate|up)_proj"]},
    {"ignore": [r"re:^(?!.*experts\.[0-5]\.).*experts.*"]},
    {"ignore": ["model.layers.*.mlp.experts.7.*"]},
    {"ignore": ["*.experts.[67].*"]},
    {"modules_to_not_convert": [f"{E}.6.gate_proj", f"{E}.6.up_proj"]},
    {"llm_int8_skip_modules": [f"{E}.7"]},
    {"exclude_modules": [f"{E}.7*"]},
    {"modules_in_block_to_quantize": [["self_attn.q_proj"], ["mlp.experts.7.down_proj"]]},
    {"dynamic": {f"-:{E}.7.*": {}}},
    {"dynamic": {f"+:{E}.{e}.down_proj": {"bits": 8 if e == 6 else 4} for e in range(8)}},
    {"quantized_layers": {f"{E}.{e}.down_proj": {"quant_algo": "FP8" if e < 5 else "NVFP4"} for e in range(8)}},
    {"config_groups": {"g": {"targets": [r"re:.*layers.1.mlp.experts.7.(gate|up)_proj"], "weights": {"bits": 8}}}},
    {"modules": [{"name": f"{E}.{e}.down_proj", "bits": 8 if e == 7 else 4} for e in range(8)]},
    {"only": f"{E}.7.down_proj"},
    {"ignore": ["block_sparse_moe.experts.7.w2"]},  # whatever the experts' block is called in memory
    {"ignore": [r"re:.*((experts\.7)+)+$"]},  # of which nobody can tell in time what it matches
    {"expert_bits": [8, 8, 4, 4, 4, 4, 8, 8]},
    {"expert_bits": {str(e): 4 for e in range(8)}},
    {"bits_by_expert": {"layers": [[4] * 8] * 4}},
]


@pytest.mark.parametrize("quantisation", MOVED, ids=lambda value: next(iter(value)))
def test_rules_of_experts_that_get_other_numbers_stop_a_prune(plain: Subject, quantisation: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json: quantization_config\S* (names|has an entry)"):
        _prune(plain, quantisation)


SAME = [
    {"ignore": ["lm_head", "re:.*lm_head", "re:.*mlp.gate$", "model.layers.0.mlp.gate", "*mlp.gate*", "re:visual.*"]},
    {"ignore": [f"{E}.{e}.{part}_proj" for e in range(8) for part in ("gate", "up", "down")]},
    {
        "ignore": [
            E,
            "mlp.experts",
            "re:.*experts.*",
            r"re:.*layers\.[0-9]+\.mlp\.experts\.\d+\..*",
            "*.experts.*",
            "experts",
        ]
    },
    {"ignore": [r"re:.*experts\.[0-3]\..*", r"re:.*experts\.[4-7]\..*"]},
    {"ignore": [r"re:.*experts\.(5|7)\.down_proj$"]},  # 7 becomes 5, and 6 becomes 4
    {"ignore": [r"re:.*layers\.(0|3)\..*", "model.layers.7.mlp", "re:.*layers.[0-9]+.self_attn.*"]},
    {"ignore": [f"{E}.0.down_proj", f"{E}.3"]},  # keep their numbers
    {"dynamic": {f"+:{E}.{e}.down_proj": {"bits": 8} for e in range(8)}},
    {"dynamic": {f"-:{E}.2.*": {}}},
    {"quantized_layers": {f"{E}.{e}.down_proj": {"quant_algo": "FP8"} for e in range(8)}},
    {"config_groups": {"g": {"targets": ["Linear"], "weights": {"num_bits": 8}}}},
    {"ignore": ["model.layers.1.mlp.shared_experts.7.down_proj", "layers.7.mlp.shared_expert"]},
    {"weight_block_size": [128, 128], "scales": [1, 2, 3, 4, 5, 6, 7, 8]},
    {"expert_bits": [4, 8], "expert_dtype": "fp8"},
]


@pytest.mark.parametrize("quantisation", SAME)
def test_rules_that_mean_the_same_afterwards_do_not(plain: Subject, quantisation: dict[str, Any]) -> None:
    _prune(plain, quantisation)


def test_a_number_may_be_the_beginning_of_others(tmp_path: Path) -> None:
    """Some loaders look for the entry in the name: 1 is 10 and 11 as well, and 11 becomes 10."""
    source = open_subject(str(save_checkpoint(tmp_path, "qwen3_moe", num_experts=12)))
    kept = {layer: [*range(10), 11] for layer in range(4)}
    for ignore, moves in ((f"{E}.1", False), (f"{E}.1.down_proj", False), (f"{E}.11", True), (f"{E}.10", True)):
        config = {**source.anatomy.config, "quantization_config": {"ignore": [ignore]}}
        anatomy = examine(config, source.checkpoint.tensors)
        if moves:
            with pytest.raises(CheckpointError, match="names experts by number"):
                plan_prune(anatomy, kept)
        else:
            plan_prune(anatomy, kept)
    config = {**source.anatomy.config, "quantization_config": {"ignore": [f"{E}.1"]}}
    with pytest.raises(CheckpointError, match="names experts by number"):
        plan_prune(examine(config, source.checkpoint.tensors), {n: [0, 1, 2, 3, *range(5, 12)] for n in range(4)})


def _copied(plain: Subject, target: Path, name: str, content: str, **config: Any) -> Path:
    apply(plan_layout(plain.anatomy, "per-expert"), plain.checkpoint, target)
    (target / "moesurgeon.json").unlink()
    (target / name).write_text(content)
    if config:
        (target / "config.json").write_text(json.dumps({**config_of(target), **config}))
    return target


def _keep(folder: Path) -> PruneSpec:
    (folder / "keep.json").write_text(json.dumps(KEPT))
    return PruneSpec(keep_experts=folder / "keep.json")


BESIDE = [
    ("hf_quant_config.json", json.dumps({"quantization": {"exclude_modules": [f"{E}.7*"]}}), "quantization.exclude"),
    ("quantize_config.json", json.dumps({"dynamic": {f"-:{E}.6.*": {}}}), "dynamic"),
    ("quant_config.json", json.dumps({"modules_to_not_convert": [f"{E}.7.down_proj"]}), "modules_to_not_convert"),
    ("importances.json", json.dumps({f"{E}.{e}.down_proj": [e] for e in range(8)}), r"importances\.json names"),
    ("recipe.yaml", f"ignore: [lm_head, {E}.7.down_proj]\n", r"recipe\.yaml names"),
    ("eplb.json", json.dumps({"physical_to_logical_map": [[*range(8), 3, 5]] * 4}), "physical_to_logical_map has an"),
    ("expert_loads.json", json.dumps({"expert_loads": [[1.5] * 8] * 4}), "expert_loads has an entry for each of the 8"),
]


@pytest.mark.parametrize(("name", "content", "says"), BESIDE)
def test_files_beside_the_config_are_asked_as_well(
    plain: Subject, tmp_path: Path, name: str, content: str, says: str
) -> None:
    folder = _copied(plain, tmp_path / "source", name, content)
    assert any(says.split("\\", maxsplit=1)[0] in line for line in inspect(str(folder))["problems"])
    for dry_run in (True, False):
        with pytest.raises(CheckpointError, match=says):
            prune(str(folder), _keep(tmp_path), Writing(output=tmp_path / "out", dry_run=dry_run))
    assert not (tmp_path / "out").exists()


def test_files_that_name_all_experts_or_none_do_not_matter(plain: Subject, tmp_path: Path) -> None:
    folder = _copied(plain, tmp_path / "source", "recipe.yaml", "ignore: ['re:.*mlp.gate$', 're:.*experts.*']\n")
    (folder / "tokenizer_config.json").write_text(json.dumps({"added": [f"{E}.7.down_proj"]}))
    (folder / "notes.json").write_text(json.dumps({"experts": "seven of them", "layers": [1] * 8}))
    prune(str(folder), _keep(tmp_path), Writing(output=tmp_path / "out"))
    verify(str(tmp_path / "out"), str(folder))


def test_healing_is_refused_before_the_work(plain: Subject, tmp_path: Path) -> None:
    """Whom a profile keeps is not known yet, so that anything that tells experts apart is refused at once."""
    folder = _copied(plain, tmp_path / "source", "quant_config.json", json.dumps({"ignore": [f"{E}.0.down_proj"]}))
    spec = PruneSpec(profile=tmp_path / "nowhere", keep=6, heal=HealSpec(traces=("builtin:python",)))
    with pytest.raises(CheckpointError, match=r"quant_config\.json: ignore names experts .* --keep-experts"):
        prune(str(folder), spec, Writing(output=tmp_path / "out"))
    prune(str(folder), _keep(tmp_path), Writing(output=tmp_path / "out"))


def test_a_prune_that_left_its_rules_does_not_verify(plain: Subject, tmp_path: Path) -> None:
    """As versions before did: the tensors renumbered, the rules as they were."""
    apply(plan_prune(plain.anatomy, KEPT), plain.checkpoint, tmp_path / "out")
    record = json.loads((tmp_path / "out" / "moesurgeon.json").read_text())
    record["history"][-1]["result"] = {}
    (tmp_path / "out" / "moesurgeon.json").write_text(json.dumps(record))
    verify(str(tmp_path / "out"))
    for ignore, fails in ((f"{E}.7.down_proj", True), (f"{E}.3.down_proj", False)):
        config = {**config_of(tmp_path / "out"), "quantization_config": {"ignore": [ignore]}}
        (tmp_path / "out" / "config.json").write_text(json.dumps(config))
        if fails:
            with pytest.raises(OutputError, match=r"by their numbers before the prune \('.*experts\.7\.down_proj'\)"):
                verify(str(tmp_path / "out"))
        else:
            verify(str(tmp_path / "out"))


@pytest.mark.parametrize("layout", ["fused", "qwen2-moe"])
def test_a_checkpoint_with_rules_keeps_its_layout(tmp_path: Path, layout: str) -> None:
    source = open_subject(str(save_checkpoint(tmp_path, "deepseek")))
    config = {**source.anatomy.config, "quantization_config": {"ignore": ["re:.*experts.*"]}}
    with pytest.raises(UsageError, match=r"quantization_config in config\.json names modules"):
        plan_layout(examine(config, source.checkpoint.tensors), layout)
