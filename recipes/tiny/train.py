"""Train one of the two tiny checkpoints that come with moesurgeon, or the larger one that benchmarks use.

    python recipes/tiny/train.py recipes/tiny/mixtral.yaml  OUT
    python recipes/tiny/train.py recipes/tiny/deepseek.yaml OUT
    python recipes/tiny/train.py recipes/small/mixtral.yaml OUT --corpora FOLDER

Text of the tiny ones: the train split of the builtin traces and nothing else, so that any machine with Python
can repeat it. About 45 minutes on one core each. Of the larger one: the train split of FOLDER/DOMAIN/train.jsonl.gz
for each domain of the recipe, one {"text": ...} a line. Writes a bf16 checkpoint in the hub's layout in several
shards, its tokenizer, and a model card with data, seed and held-out losses.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import time
from pathlib import Path

import numpy as np
import torch
import transformers
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from moesurgeon.engine import deepseek_v1  # noqa: F401 - registers the architecture
from moesurgeon.traces.sources import read_documents
from moesurgeon.traces.spec import TraceSpec

BOS, EOS = "<s>", "</s>"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--corpora", type=Path, help="text by domain, instead of the builtin traces")
    parser.add_argument("--steps", type=int, help="instead of the recipe's")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    recipe = yaml.safe_load(arguments.recipe.read_text())
    steps = arguments.steps or recipe["steps"]
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(recipe["seed"])

    traces = {domain: trace_of(domain, arguments.corpora) for domain in recipe["mixture"]}
    tokenizer = train_tokenizer(recipe["config"]["vocab_size"], recipe["mixture"], traces)
    train = {domain: encode(tokenizer, trace, "train") for domain, trace in traces.items()}
    heldout = {domain: encode(tokenizer, trace, "validation") for domain, trace in traces.items()}
    report = {domain: encode(tokenizer, trace, "report") for domain, trace in traces.items()}
    print({domain: len(ids) for domain, ids in train.items()}, flush=True)

    config = AutoConfig.for_model(
        recipe["model_type"], **recipe["config"], bos_token_id=0, eos_token_id=1, use_cache=True
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    initialise(model)
    log = train_model(model, train, heldout, recipe, steps)

    model.to(torch.bfloat16)
    model.save_pretrained(arguments.out, max_shard_size=recipe["max_shard_size"])
    tokenizer.save_pretrained(arguments.out)
    as_on_the_hub(arguments.out)
    losses = {domain: loss_of(model.float(), ids, rows=64) for domain, ids in report.items()}
    unigram = unigram_losses(train, report, recipe["mixture"], config.vocab_size)
    write_card(arguments.out, recipe, model, steps, losses, unigram, log, arguments)


def trace_of(domain: str, corpora: Path | None) -> TraceSpec:
    if corpora is None:
        return TraceSpec(domain=domain, location=f"builtin:{domain}")
    return TraceSpec(domain=domain, location=str(corpora / domain / "train.jsonl.gz"))


def train_tokenizer(
    vocab_size: int, mixture: dict[str, float], traces: dict[str, TraceSpec]
) -> PreTrainedTokenizerFast:
    """A byte-level BPE; digits stand alone, so that arithmetic can be learnt."""

    def texts():
        for domain, share in mixture.items():
            budget = int(4_000_000 * share)
            for document in whole(read_documents(traces[domain], "train")):
                yield document.text
                budget -= len(document.text)
                if budget < 0:
                    break

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    core.decoder = decoders.ByteLevel()
    core.train_from_iterator(
        texts(),
        trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[BOS, EOS],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    core.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, 0)])
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token=BOS, eos_token=EOS)


def encode(tokenizer: PreTrainedTokenizerFast, trace: TraceSpec, split: str) -> np.ndarray:
    """All documents of a domain's split as one stream ``<s> text </s> <s> text </s> ...``."""
    texts = [document.text for document in whole(read_documents(trace, split))]
    rows = tokenizer(texts)["input_ids"]
    return np.concatenate([np.asarray([*row, 1], dtype=np.int16) for row in rows])


def whole(documents):
    """The pieces of one module together, in the order in which the modules first come."""
    by_key: dict[str, list] = {}
    for document in documents:
        by_key.setdefault(document.key, []).append(document)
    return [document for pieces in by_key.values() for document in pieces]


@torch.no_grad()
def initialise(model: torch.nn.Module) -> None:
    """Normal(0, 0.02); what writes into the residual stream is divided by sqrt(2 x layers)."""
    scale = math.sqrt(2 * model.config.num_hidden_layers)
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            parameter.normal_(0.0, 0.02)
        if name.endswith(("o_proj.weight", "down_proj.weight", "down_proj")):
            parameter.div_(scale)


def train_model(model, train, heldout, recipe, steps) -> list[dict]:
    rng = np.random.default_rng(recipe["seed"])
    domains, shares = list(recipe["mixture"]), list(recipe["mixture"].values())
    decayed = [p for p in model.parameters() if p.dim() > 1]
    plain = [p for p in model.parameters() if p.dim() == 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}],
        lr=recipe["learning_rate"],
        betas=(0.9, 0.95),
        fused=True,
    )
    router_logits: list[torch.Tensor] = []
    for module in model.modules():
        if type(module).__name__.endswith("TopKRouter"):
            module.register_forward_hook(lambda _module, _inputs, output: router_logits.append(output[0]))
    length, log, started = recipe["sequence_length"], [], time.time()
    for step in range(steps):
        rows = [window(train[d], length, rng) for d in rng.choice(domains, recipe["batch"], p=shares)]
        batch = torch.from_numpy(np.stack(rows).astype(np.int64))
        for group in optimizer.param_groups:
            group["lr"] = recipe["learning_rate"] * schedule(step, steps)
        router_logits.clear()
        with torch.autocast("cpu", torch.bfloat16, enabled=recipe.get("autocast", False)):
            logits = model(input_ids=batch, use_cache=False).logits
        language_loss = torch.nn.functional.cross_entropy(
            logits[:, :-1].reshape(-1, logits.shape[-1]).float(), batch[:, 1:].reshape(-1)
        )
        balance = balance_loss(router_logits, model.config.num_experts_per_tok)
        (language_loss + recipe["balance_coefficient"] * balance).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 100 == 0 or step == steps - 1:
            entry = {"step": step, "loss": round(language_loss.item(), 3), "balance": round(balance.item(), 3),
                     "minutes": round((time.time() - started) / 60, 1)}  # fmt: skip
            if step % 500 == 0 or step == steps - 1:
                entry["heldout"] = {d: round(loss_of(model, ids, rows=12), 3) for d, ids in heldout.items()}
            log.append(entry)
            print(json.dumps(entry), flush=True)
    return log


def window(stream: np.ndarray, length: int, rng: np.random.Generator) -> np.ndarray:
    start = int(rng.integers(0, len(stream) - length))
    return stream[start : start + length]


def schedule(step: int, steps: int) -> float:
    """Warm up over 100 steps, hold to 40 % of the run, then fall linearly to 2 %."""
    rest = (steps - step) / (0.6 * steps)
    return min(1.0, (step + 1) / 100, max(0.02, rest))


def balance_loss(router_logits: list[torch.Tensor], top_k: int) -> torch.Tensor:
    """Mean over layers of E x sum_e (share of selections) x (mean probability); 1 when even."""
    losses = []
    for logits_TE in router_logits:
        p_TE = logits_TE.float().softmax(-1)
        chosen = p_TE.topk(top_k, dim=-1).indices.flatten().bincount(minlength=p_TE.shape[1])
        losses.append(p_TE.shape[1] * (chosen / chosen.sum() * p_TE.mean(0)).sum())
    return torch.stack(losses).mean()


@torch.no_grad()
def loss_of(model, stream: np.ndarray, *, rows: int, length: int = 512) -> float:
    """Mean cross-entropy in nats per token over ``rows`` evenly spaced windows."""
    model.eval()
    starts = np.linspace(0, len(stream) - length - 1, rows).astype(int)
    total = 0.0
    for start in starts:
        batch = torch.from_numpy(stream[start : start + length].astype(np.int64))[None]
        logits = model(input_ids=batch, use_cache=False).logits[0, :-1].float()
        total += float(torch.nn.functional.cross_entropy(logits, batch[0, 1:]))
    model.train()
    return total / len(starts)


def as_on_the_hub(out: Path) -> None:
    """Spell the JSON files the way released checkpoints do, which older runtimes read as well."""
    config = json.loads((out / "config.json").read_text())
    config["torch_dtype"] = config.pop("dtype")
    config["rope_theta"] = config.pop("rope_parameters")["rope_theta"]
    del config["transformers_version"]
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    tokenizer = json.loads((out / "tokenizer_config.json").read_text())
    del tokenizer["backend"]
    tokenizer |= {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": config["max_position_embeddings"],
    }
    (out / "tokenizer_config.json").write_text(json.dumps(tokenizer, indent=2) + "\n")
    generation = {"bos_token_id": 0, "eos_token_id": 1}
    (out / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
    for path in out.iterdir():
        path.chmod(0o644)


def unigram_losses(train, report, mixture, vocab_size) -> dict[str, float]:
    """Cross-entropy of the training mixture's token frequencies (add-one) on the report split."""
    frequencies = np.full(vocab_size, 1e-7)
    for domain, share in mixture.items():
        frequencies += share * np.bincount(train[domain], minlength=vocab_size) / len(train[domain])
    logs = np.log(frequencies / frequencies.sum())
    return {domain: float(-logs[ids].mean()) for domain, ids in report.items()}


def write_card(out: Path, recipe, model, steps, losses, unigram, log, arguments) -> None:
    rows = "\n".join(
        f"| {d} | {recipe['mixture'][d]:.2f} | {losses[d]:.3f} | {unigram[d]:.3f} | {unigram[d] - losses[d]:.2f} |"
        for d in losses
    )
    mean = sum(recipe["mixture"][d] * losses[d] for d in losses)
    base = sum(recipe["mixture"][d] * unigram[d] for d in losses)
    seen = steps * recipe["batch"] * recipe["sequence_length"]
    text = "the corpora named below"
    if arguments.corpora is None:
        text = """moesurgeon's builtin traces (the Python standard library's sources, their
  docstrings and comments, `pydoc_data`, character tables; generated arithmetic, JSON and logs)"""
    again = f"python recipes/tiny/train.py {arguments.recipe} OUT"
    again += "" if arguments.corpora is None else " --corpora FOLDER"
    (out / "README.md").write_text(f"""---
license: apache-2.0
tags: [moesurgeon, mixture-of-experts, test-fixture]
---

# {recipe["name"]}

{recipe["description"]} A real, trained model, small enough that surgery on
mixtures of experts can be shown and tested anywhere. Not meant for generating text.

- Parameters: {sum(p.numel() for p in model.parameters()):,}
- Text: the train split of {text}
- {steps} steps of {recipe["batch"]} x {recipe["sequence_length"]} tokens ({seen / 1e6:.1f} M), seed {recipe["seed"]},
  AdamW {recipe["learning_rate"]}, load balancing {recipe["balance_coefficient"]} per layer
- Trained with Python {platform.python_version()}, torch {torch.__version__}, transformers {transformers.__version__},
  {log[-1]["minutes"]} minutes
- Final training loss {log[-1]["loss"]} on the last batch; load balance {log[-1]["balance"]} (1 is even)
- Train it again: `{again}`

Held-out loss (report split, never trained on), nats per token, next to a unigram model of the same mixture:

| domain | share in training | loss | unigram | better by |
|---|---|---|---|---|
{rows}
| **mixture** | 1.00 | **{mean:.3f}** | {base:.3f} | **{base - mean:.2f}** |
""")


if __name__ == "__main__":
    main()
