"""Small random checkpoints of every family, and text for them: tests need no learnt values."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from moesurgeon.engine import deepseek_v1
from moesurgeon.engine.batches import Batch, batches_of, rows_for
from moesurgeon.engine.device import Placement
from moesurgeon.engine.streams import Overlay, Source, Stream
from moesurgeon.engine.whole import load_model
from moesurgeon.pipeline.subject import Subject, open_subject
from moesurgeon.traces.windows import Corpus, Window

deepseek_v1.register()

VOCABULARY = 96
CPU_FLOAT32 = Placement(torch.device("cpu"), torch.float32)

_COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
    "pad_token_id": None,
    "num_experts_per_tok": 2,
    # Ten times the usual spread: routers have preferences, as those of trained models do.
    "initializer_range": 0.2,
}
_DENSE_AND_MOE = {"intermediate_size": 48, "moe_intermediate_size": 16}
_LATENT = {"kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}

# By name: model_type, then what its config has beside the common keys.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("mixtral", {"num_local_experts": 8, "intermediate_size": 24, "num_key_value_heads": 2}),
    "deepseek_v1": ("deepseek", {**_DENSE_AND_MOE, "n_routed_experts": 8, "n_shared_experts": 2}),
    "deepseek_v2": (
        "deepseek_v2",
        {
            **(_DENSE_AND_MOE | _LATENT),
            "n_routed_experts": 8,
            "n_shared_experts": 1,
            "first_k_dense_replace": 1,
            "topk_method": "group_limited_greedy",
            "n_group": 4,
            "topk_group": 2,
            "routed_scaling_factor": 1.5,
            "num_experts_per_tok": 3,
        },
    ),
    "deepseek_v3": (
        "deepseek_v3",
        {
            **(_DENSE_AND_MOE | _LATENT),
            "n_routed_experts": 8,
            "n_shared_experts": 1,
            "first_k_dense_replace": 1,
            "n_group": 4,
            "topk_group": 2,
            "routed_scaling_factor": 2.5,
            "num_experts_per_tok": 3,
        },
    ),
    "qwen2_moe": (
        "qwen2_moe",
        {**_DENSE_AND_MOE, "num_experts": 8, "shared_expert_intermediate_size": 24, "decoder_sparse_step": 1},
    ),
}


def small_model(family: str, *, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """Return a random model of ``family`` in float32, with ``changes`` to its config."""
    model_type, own = FAMILIES[family]
    config = AutoConfig.for_model(model_type, **{**_COMMON, **own, **changes})
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.normal_(0.0, 0.2)
    return model


def saved(model: PreTrainedModel, folder: Path) -> Subject:
    """Write ``model`` to ``folder`` as transformers does and open it as a checkpoint."""
    model.save_pretrained(folder)
    return open_subject(str(folder))


def running(subject: Subject, placement: Placement = CPU_FLOAT32) -> PreTrainedModel:
    """Load the checkpoint as every command does."""
    return load_model(subject.checkpoint, subject.anatomy, placement)


def source_of(subject: Subject, placement: Placement = CPU_FLOAT32) -> Source:
    """Return the checkpoint ready to walk; its files are closed when nobody has it any more."""
    source = Source.of_checkpoint(subject.checkpoint, subject.anatomy, placement)
    files = source._files
    assert files is not None
    weakref.finalize(source, files[1].__exit__, None, None, None)
    return source


def stream_of(subject: Subject, placement: Placement = CPU_FLOAT32, overlay: Overlay | None = None) -> Stream:
    """Return the only stream of the checkpoint."""
    return Stream(source_of(subject, placement), overlay)


def batches_for(corpus: Corpus, length: int, rows: int | None = None) -> Sequence[Batch]:
    """Return the batches of windows of up to ``length`` tokens that every command makes."""
    return list(batches_of(corpus, rows=rows or rows_for(length), device=torch.device("cpu")))


def random_windows(
    domain: str, *, count: int, vocabulary: int, longest: int = 40, shortest: int = 8, seed: int = 0
) -> list[Window]:
    """Return windows of random tokens and lengths; two windows make a document."""
    rng = np.random.default_rng([seed, *domain.encode()])
    return [
        Window(domain, number // 2, 0, rng.integers(0, vocabulary, int(size)).astype(np.int32))
        for number, size in enumerate(rng.integers(shortest, longest + 1, count))
    ]


def corpus_of(*domains: list[Window]) -> Corpus:
    """Put windows together, one list for each domain."""
    windows = [window for domain in domains for window in domain]
    tokens: dict[str, int] = {}
    for window in windows:
        tokens[window.domain] = tokens.get(window.domain, 0) + len(window.tokens)
    return Corpus(windows=windows, tokens=tokens)
