"""The control of ``recover_quality.py``: a LoRA on the routers with the language-model loss, as people do it by peft.

Nothing of moesurgeon trains here: no estimator, no teacher, no balance, no state that is chosen. The choice is hard and
the gate is the model's own, so where it renormalises a single weight the routers hear rounding noise.
"""

from __future__ import annotations

import argparse
import warnings
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import PreTrainedModel

from moesurgeon.engine.model import moe_blocks
from moesurgeon.recovery.schedule import endless
from moesurgeon.surgery.anatomy import Anatomy
from moesurgeon.traces.windows import Corpus


def control(
    model: PreTrainedModel, anatomy: Anatomy, text: Corpus, length: int, given: argparse.Namespace, seed: int
) -> PreTrainedModel:
    """Train the routers of ``model`` on ``text`` and return it with the adapters merged; ``model`` is consumed."""
    torch.manual_seed(seed)
    names = [f"{block.name}.{anatomy.family.router_module}.weight" for block in moe_blocks(model, anatomy)]
    config = LoraConfig(
        r=8, lora_alpha=16, target_modules=[], target_parameters=names, bias="none", task_type="CAUSAL_LM"
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that no module is targeted
        adapted: Any = get_peft_model(model, config)
    trained = [weight for weight in adapted.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=given.control_rate)
    batches = endless(text, max(1, given.tokens_per_step // length), seed, model.device)
    for _ in range(given.steps):
        batch = next(batches)
        labels = batch.tokens.masked_fill(~batch.is_text, -100)
        logits = adapted(input_ids=batch.tokens, attention_mask=batch.mask, use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    merged: PreTrainedModel = adapted.merge_and_unload()
    return merged
