"""DeepSeek-MoE v1 (``model_type: deepseek``) on stock Llama blocks, for transformers 5.

transformers has no native class for this architecture, and the modelling file that its authors
published needs interfaces that transformers 5 removed. This one needs no remote code, keeps the
tensor names of the published checkpoints and computes what theirs computes:

- attention, norms and rotary embedding of Llama (multi-head, no biases);
- layer N is a mixture of experts where ``N >= first_k_dense_replace`` and
  ``N % moe_layer_freq == 0``, else a dense MLP of width ``intermediate_size``;
- gate: softmax over all experts **in the model's dtype**, the k largest, divided by their sum only
  if ``norm_topk_prob`` and k > 1 (the released checkpoints do not renormalise);
- the shared experts are one MLP of width ``moe_intermediate_size * n_shared_experts``, added
  with weight 1.

The paper: DeepSeekMoE, https://arxiv.org/abs/2401.06066. Not implemented: the training-time auxiliary
loss (``aux_loss_alpha``) of the published file; recovery brings its own balancing loss.

Importing this module registers the classes with the Auto classes (:func:`register` is idempotent).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, LlamaConfig
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)
from transformers.integrations import use_experts_implementation
from transformers.modeling_utils import PreTrainedModel
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaDecoderLayer,
    LlamaForCausalLM,
    LlamaMLP,
    LlamaModel,
    LlamaPreTrainedModel,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
)
from transformers.utils.output_capturing import OutputRecorder


class DeepseekConfig(LlamaConfig):
    """Configuration of DeepSeek-MoE v1; key names are those of the published ``config.json``."""

    model_type = "deepseek"
    attribute_map = {"num_experts": "n_routed_experts"}
    base_model_tp_plan = None

    n_routed_experts: int | None = 64
    n_shared_experts: int | None = 2
    num_experts_per_tok: int | None = 6
    moe_intermediate_size: int = 1408
    first_k_dense_replace: int = 1
    moe_layer_freq: int = 1
    norm_topk_prob: bool = False
    scoring_func: str = "softmax"
    aux_loss_alpha: float = 0.001
    seq_aux: bool = True


class DeepseekTopKRouter(nn.Module):
    """The gate. Returns logits [T, E], weights [T, K] and expert indices [T, K] of T tokens."""

    def __init__(self, config: DeepseekConfig) -> None:
        super().__init__()
        if config.scoring_func != "softmax":  # as the published file refuses it
            raise ValueError(f"DeepSeek-MoE v1 has a softmax gate, but scoring_func is {config.scoring_func!r}")
        self.top_k = config.num_experts_per_tok
        self.num_experts = config.n_routed_experts
        self.norm_topk_prob = config.norm_topk_prob
        self.hidden_dim = config.hidden_size
        self.weight = nn.Parameter(torch.zeros(self.num_experts, self.hidden_dim))

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        logits_TE = F.linear(hidden_states.reshape(-1, self.hidden_dim), self.weight)
        weights_TK, indices_TK = torch.topk(logits_TE.softmax(dim=-1), self.top_k, dim=-1)
        if self.top_k > 1 and self.norm_topk_prob:
            weights_TK = weights_TK / (weights_TK.sum(dim=-1, keepdim=True) + 1e-20)
        return logits_TE, weights_TK, indices_TK


@use_experts_implementation
class DeepseekExperts(nn.Module):
    """The routed experts as fused tensors: gate_up_proj [E, 2F, H], down_proj [E, H, F].

    ``forward`` is the eager implementation; transformers swaps in ``grouped_mm`` and others.
    """

    def __init__(self, config: DeepseekConfig) -> None:
        super().__init__()
        self.num_experts = config.n_routed_experts
        self.hidden_dim = config.hidden_size
        self.intermediate_dim = config.moe_intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(self.num_experts, 2 * self.intermediate_dim, self.hidden_dim))
        self.down_proj = nn.Parameter(torch.empty(self.num_experts, self.hidden_dim, self.intermediate_dim))
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        output_TH = torch.zeros_like(hidden_states)
        for expert in top_k_index.unique().tolist():
            token, rank = torch.where(top_k_index == expert)
            gate, up = F.linear(hidden_states[token], self.gate_up_proj[expert]).chunk(2, dim=-1)
            expert_out = F.linear(self.act_fn(gate) * up, self.down_proj[expert])
            expert_out = expert_out * top_k_weights[token, rank, None]
            output_TH.index_add_(0, token, expert_out.to(output_TH.dtype))
        return output_TH


class DeepseekSharedExperts(LlamaMLP):
    """The shared experts: one gated MLP as wide as all of them together."""

    def __init__(self, config: DeepseekConfig) -> None:
        nn.Module.__init__(self)
        width = config.moe_intermediate_size * (config.n_shared_experts or 0)
        self.gate_proj = nn.Linear(config.hidden_size, width, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, width, bias=False)
        self.down_proj = nn.Linear(width, config.hidden_size, bias=False)
        self.act_fn = ACT2FN[config.hidden_act]


class DeepseekMoE(nn.Module):
    """The mixture-of-experts block: routed experts plus the shared ones."""

    def __init__(self, config: DeepseekConfig) -> None:
        super().__init__()
        self.gate = DeepseekTopKRouter(config)
        self.experts = DeepseekExperts(config)
        self.shared_experts = DeepseekSharedExperts(config) if config.n_shared_experts else None

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        tokens_TH = hidden_states.reshape(-1, hidden_states.shape[-1])
        _, weights_TK, indices_TK = self.gate(tokens_TH)
        output = self.experts(tokens_TH, indices_TK, weights_TK).view(hidden_states.shape)
        return output if self.shared_experts is None else output + self.shared_experts(hidden_states)


class DeepseekDecoderLayer(LlamaDecoderLayer):
    """A Llama layer whose MLP is a mixture of experts where the config says so."""

    def __init__(self, config: DeepseekConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        is_sparse = layer_idx >= config.first_k_dense_replace and layer_idx % config.moe_layer_freq == 0
        if config.n_routed_experts and is_sparse:
            self.mlp = DeepseekMoE(config)


class DeepseekPreTrainedModel(LlamaPreTrainedModel):
    config: DeepseekConfig
    config_class = DeepseekConfig
    _no_split_modules = ["DeepseekDecoderLayer"]
    _can_record_outputs = {
        "router_logits": OutputRecorder(DeepseekTopKRouter, index=0),
        "hidden_states": DeepseekDecoderLayer,
        "attentions": LlamaAttention,
    }

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        std = self.config.initializer_range
        if isinstance(module, DeepseekExperts):
            init.normal_(module.gate_up_proj, 0.0, std)
            init.normal_(module.down_proj, 0.0, std)
        elif isinstance(module, DeepseekTopKRouter):
            init.normal_(module.weight, 0.0, std)


class DeepseekModel(DeepseekPreTrainedModel, LlamaModel):
    def __init__(self, config: DeepseekConfig) -> None:
        # Not LlamaModel's __init__: it would build, and then throw away, dense layers.
        PreTrainedModel.__init__(self, config)
        self.padding_idx = config.pad_token_id
        self.vocab_size = config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        self.layers = nn.ModuleList([DeepseekDecoderLayer(config, i) for i in range(config.num_hidden_layers)])
        self.norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = LlamaRotaryEmbedding(config=config)
        self.gradient_checkpointing = False
        self.post_init()


class DeepseekForCausalLM(DeepseekPreTrainedModel, LlamaForCausalLM):
    def __init__(self, config: DeepseekConfig) -> None:
        PreTrainedModel.__init__(self, config)
        self.model = DeepseekModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()


def register() -> None:
    """Make the Auto classes know ``model_type: deepseek`` (calling it again does nothing new)."""
    # The names on disk (per expert, separate gate and up) are those of Qwen2-MoE.
    register_checkpoint_conversion_mapping("deepseek", get_checkpoint_conversion_mapping("qwen2_moe"), overwrite=True)
    AutoConfig.register("deepseek", DeepseekConfig, exist_ok=True)
    AutoModel.register(DeepseekConfig, DeepseekModel, exist_ok=True)
    AutoModelForCausalLM.register(DeepseekConfig, DeepseekForCausalLM, exist_ok=True)


register()
