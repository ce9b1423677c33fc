"""What serving runtimes make of a checkpoint, by family and layout: only what was run, or read in their source. Data.

Tried with transformers 5.23 and 4.57.6, vLLM 0.32, llama.cpp's converter (October 2026) and DeepSpeed 0.19.8, on tiny
trained models, token by token against transformers 5.23; SGLang 0.5.23 was read only.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

_ONLY_HERE = (
    "transformers 5.23 reads these fused experts; no other runtime was tried with them, and released checkpoints of "
    "this family are per-expert (--layout per-expert)"
)


@dataclass(frozen=True, kw_only=True)
class Statement:
    """``says`` what holds for a family in a layout; ``holds`` asks the config and the names of files in the folder."""

    family: str
    layout: str
    says: str
    holds: Callable[[Mapping[str, Any], frozenset[str]], bool] = lambda _config, _files: True


@dataclass(frozen=True, kw_only=True)
class ConfigClass:
    """A class for a config that ``runtime`` has no class of its own for: the text of a file, never run here."""

    family: str
    layout: str
    runtime: str
    file: str
    name: str
    text: str


DEEPSEEK_CONFIG = ConfigClass(
    family="deepseek_v1",
    layout="per-expert",
    runtime="vLLM",
    file="configuration_deepseek.py",
    name="DeepseekConfig",
    text="""\
from transformers import PretrainedConfig


class DeepseekConfig(PretrainedConfig):
    model_type = "deepseek"
""",
)


def _without_biases(config: Mapping[str, Any], _files: frozenset[str]) -> bool:
    return config.get("qkv_bias") is False


def _with_dense_layers(config: Mapping[str, Any], _files: frozenset[str]) -> bool:
    return bool(config.get("mlp_only_layers")) or config.get("decoder_sparse_step", 1) != 1


def _with_config_class(_config: Mapping[str, Any], files: frozenset[str]) -> bool:
    return DEEPSEEK_CONFIG.file in files


def _without_config_class(config: Mapping[str, Any], files: frozenset[str]) -> bool:
    return not _with_config_class(config, files)


STATEMENTS: tuple[Statement, ...] = (
    Statement(
        family="mixtral",
        layout="fused",
        says="transformers 5 alone reads fused Mixtral experts: 4.57 loads random ones with only a warning, vLLM and "
        "llama.cpp's converter refuse; --layout per-expert is what they read",
    ),
    Statement(
        family="deepseek_v1",
        layout="fused",
        says="only moesurgeon's own modelling file was tried with these fused experts; vLLM and llama.cpp read them "
        "per-expert (--layout per-expert)",
    ),
    Statement(
        family="deepseek_v1",
        layout="per-expert",
        says="stock transformers 5 does not know DeepSeek-MoE v1 (--layout qwen2-moe is read there); llama.cpp "
        "computes the same tokens; vLLM needs --trust-remote-code and a configuration_deepseek.py (--vllm-config "
        "writes one)",
        holds=_without_config_class,
    ),
    Statement(
        family="deepseek_v1",
        layout="per-expert",
        says="stock transformers 5 does not know DeepSeek-MoE v1 (--layout qwen2-moe is read there); llama.cpp "
        "computes the same tokens; so does vLLM with --trust-remote-code, which runs configuration_deepseek.py",
        holds=_with_config_class,
    ),
    Statement(
        family="qwen2_moe",
        layout="per-expert",
        says="vLLM computes NaN without a word: its Qwen2-MoE has query, key and value biases whatever qkv_bias says, "
        "and none are stored; a DeepSeek-MoE v1 written with --layout qwen2-moe has them as zeros",
        holds=_without_biases,
    ),
    Statement(
        family="qwen2_moe",
        layout="per-expert",
        says="llama.cpp and SGLang take every layer of a Qwen2-MoE as a mixture: the dense layers cannot be said there "
        "(llama.cpp's converter refuses, SGLang's source drops them); transformers and vLLM read them",
        holds=_with_dense_layers,
    ),
    *(
        Statement(family=name, layout="fused", says=_ONLY_HERE)
        for name in (
            "deepseek_v2", "deepseek_v3", "qwen2_moe", "qwen3_moe", "olmoe", "glm4_moe", "glm4_moe_lite", "dots1",
            "ernie4_5_moe", "minimax_m2", "jamba", "hunyuan_v1_moe", "lfm2_moe", "phimoe",
        )
    ),
)  # fmt: skip
