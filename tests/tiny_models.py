"""Causal LMs of every kind that transformers knows, small, with biases, soft-caps and scales that matter."""

from __future__ import annotations

import warnings

import torch
import transformers
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

VOCABULARY = 97
KINDS = tuple(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
# transformers 5.23 itself cannot build these from a configuration of their own.
UNBUILDABLE = {
    "gemma3n": "its vision tower needs the timm package",
    "gemma4_assistant": "it drafts for another model, whose caches it reads",
    "gemma4_unified_assistant": "it drafts for another model, whose caches it reads",
    "musicgen": "the composite configuration has no field dropout, which its decoder reads",
    "musicgen_melody": "the composite configuration has no field dropout, which its decoder reads",
}

# Fields by name, whatever the kind: one size for all that count the same thing.
SIZES = {
    VOCABULARY: "vocab_size decoder_vocab_size vocab_size_per_layer_input audio_vocab_size",
    16: """hidden_size d_model n_embd embedding_size input_embedding_size output_embedding_size word_embed_proj_dim
        lru_width attention_hidden_size hidden_size_per_layer_input backbone_hidden_size ple_embed_dim
        adapter_in_dim adapter_out_dim adapter_input_size""",
    32: """intermediate_size ffn_dim decoder_ffn_dim encoder_ffn_dim ffn_hidden_size expert_ffn_hidden_size n_inner dff
        dim_ff feed_forward_size intermediate_size_mlp dense_intermediate_size prefix_dense_intermediate_size
        shared_expert_intermediate_size shared_intermediate_size moe_intermediate_size output_channels
        moe_shared_expert_intermediate_size shared_experts_intermediate_size mlp_dim""",
    2: """num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers num_encoder_layers
        num_decoder_layers num_attention_heads n_head n_heads num_heads decoder_attention_heads encoder_attention_heads
        num_encoder_attention_heads num_decoder_attention_heads num_key_value_heads num_kv_heads num_experts_per_tok
        num_experts_per_token moe_topk moe_k swa_num_attention_heads swa_num_key_value_heads linear_num_key_heads
        linear_num_value_heads linear_num_heads index_n_heads num_layers_per_stack""",
    8: """head_dim attention_head_dim attention_head_size kv_channels swa_head_dim qk_nope_head_dim qk_rope_head_dim
        v_head_dim q_lora_rank kv_lora_rank linear_key_head_dim linear_value_head_dim linear_head_dim dim_head
        rotary_dim index_head_dim query_pre_attn_scalar o_lora_rank""",
    4: "num_experts n_routed_experts num_local_experts moe_num_experts",
    1: "num_shared_experts n_shared_experts moe_num_shared_experts n_group topk_group num_expert_group",
    64: "max_position_embeddings n_positions n_ctx max_seq_len model_max_length context_length",
}
FIELDS = {name: size for size, names in SIZES.items() for name in names.split()}
FIELDS |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
FIELDS |= {"initializer_range": 0.3, "init_std": 0.3}
# What models do to logits beside the product: values that are no default and change the distribution.
FIELDS |= {
    "final_logit_softcapping": 3.0,
    "logits_soft_cap": 0.5,
    "output_logit_soft_cap": 2.0,
    "logit_scale": 0.25,
    "logits_scaling": 4.0,
    "lm_head_multiplier": 3.0,
    "logits_mup_width_multiplier": 4.0,
    "dim_model_base": 4,
    "unpadded_vocab_size": 90,
    "lm_head_bias": True,
}

ROPE = {"rope_type": "default", "rope_theta": 10000.0}
NO_SHARING = {"num_kv_shared_layers": 0, "layer_types": ["sliding_attention", "full_attention"]}
# What a kind needs besides: numbers that must fit each other.
NEEDS = {
    "bamba": {"mamba_n_heads": 4, "mamba_d_head": 8},
    "blt": {
        "encoder_hash_byte_group_vocab": 50,
        "global_config": {"hidden_size": 32},
        "decoder_config": {"hidden_size_global": 32},
    },
    "codegen": {"n_head": 4, "rotary_dim": 4},
    "cohere_compass_text": {"rope_parameters": {"full_attention": ROPE, "sliding_attention": ROPE}},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 32},
    },
    "dots3_note": {"vision_config": {"mlp_layer_types": ["dense", "sparse"]}},
    "falcon_h1": {"mamba_d_ssm": 16, "mamba_n_heads": 2, "mamba_d_head": 8},
    "gemma3n_text": {**NO_SHARING, "activation_sparsity_pattern": [0.0, 0.0], "laurel_rank": 4},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {"mamba_n_heads": 4, "mamba_d_head": 8, "layer_types": ["mamba", "attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "longcat_flash": {"qk_head_dim": 16, "zero_expert_num": 2},
    "mamba2": {"num_heads": 4, "head_dim": 8, "n_groups": 2},
    "mimo_v2_flash": {"num_key_value_heads": 1},
    "reformer": {
        "is_decoder": True,
        "attn_layers": ["local", "local"],
        "local_attn_chunk_length": 4,
        "axial_pos_shape": [8, 8],
        "axial_pos_embds_dim": [8, 8],
    },
    "roc_bert": {"pronunciation_vocab_size": 9, "shape_vocab_size": 9},
    "xlm": {"emb_dim": 16},
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "num_hidden_layers": 3,
        "layers_block_type": ["linear_attention", "hybrid", "hybrid"],
        "mamba_dt_rank": 4,
        "attention_hidden_size": 32,
    },
    "zamba2": {"layers_block_type": ["linear_attention", "hybrid"]},
    "zaya": {"num_experts_per_tok": 1},
}


def options(config_class: type[PreTrainedConfig], needs: dict) -> dict:
    """The arguments that make a small configuration: those of FIELDS it has, its parts' likewise, then its needs."""
    try:
        default = vars(config_class())
    except Exception:  # some defaults contradict each other
        default = {}
    known = {name for each in config_class.__mro__ for name in getattr(each, "__annotations__", {})}
    chosen = {name: value for name, value in FIELDS.items() if name in known}
    for name, part in default.items():
        if isinstance(part, PreTrainedConfig) and name in known:
            chosen[name] = {**options(type(part), {}), "model_type": part.model_type}
    for name, value in needs.items():
        inside = chosen.get(name)
        chosen[name] = {**inside, **value} if isinstance(inside, dict) and isinstance(value, dict) else value
    return chosen


def tiny(kind: str, auto=AutoModelForCausalLM, **needs):
    """The model, in evaluation mode, with biases that are not zero."""
    config_class = CONFIG_MAPPING[kind]
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = config_class(**options(config_class, NEEDS.get(kind, {}) | needs))
        model = auto.from_config(config).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.3)
    return model


transformers.logging.set_verbosity_error()
