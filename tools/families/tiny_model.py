"""A tiny random model of any model_type, from transformers' own config class.

Every size is cut, and every value that would have no effect at its default gets another one: multipliers,
biases, windows shorter than a row. Otherwise a family could leave it out, and the comparisons would pass.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING, PretrainedConfig, PreTrainedModel

from benchmarks.make_checkpoint import byte_tokenizer
from models.registry import CONFIG_ERRORS
from options.errors import UserError, describe
from tests.helpers.auto_classes import auto_class
from tools.families.calls import MAX_REASON

# Pattern of a value's name: its tiny size. The first pattern that fits the whole name decides.
SIZES = {
    r"vocab_size": 300,
    r"hidden_size|n_embd|d_model|dim|n_embed": 64,
    r"num_hidden_layers|n_layers?|num_layers": 4,
    r"num_attention_heads|n_heads?|num_heads": 4,
    r"num_key_value_heads|num_kv_heads|n_head_kv": 2,
    r"intermediate_size|ffn_hidden_size|ffn_dim|n_inner|d_ff|intermediate_size_mlp": 160,
    r"(shared|moe|expert)\w*_intermediate_size|shared_expert_intermediate_size|\w*_ffn_hidden_size": 48,
    r"num_experts|num_local_experts|n_routed_experts|moe_num_experts": 8,
    r"num_experts_per_tok\w*|moe_topk|moe_k|top_k_experts|num_selected_experts": 2,
    r"n_shared_experts|num_shared_experts|n_group|topk_group|moe_num_shared_experts|first_k_dense_replace": 1,
    r"q_lora_rank|kv_lora_rank": 32,
    r"qk_nope_head_dim|qk_rope_head_dim|v_head_dim|rotary_dim": 16,
    r"qk_head_dim": 32,
    r"max_position_embeddings|n_positions|max_sequence_length|n_ctx|max_seq_len|seq_length": 512,
    r"original_max_position_embeddings": 32,
    r"(\w+_)?(sliding_window|attention_chunk_size|window_size)": 16,
    r"\w+_(pattern|interval|period|step)": 2,
    r"query_pre_attn_scalar": 24,
    r"bos_token_id": 256,
    r"eos_token_id": 257,
    r"\w+_token_(id|index)": 0,
}
# Values of floating point: what they become if they have this name, whatever their default.
FLOATS = {
    r"final_logit_softcapping|logits_soft_cap": 5.0,
    r"attn_logit_softcapping": 2.0,
    r"clip_qkv": 0.5,
    r"attention_multiplier": 0.3,
    r"logits_scaling": 4.4,
    r"\w*multiplier|scale_emb|scale_depth|logit_scale|embedding_scale|residual_scale": 1.5,
    r"\w*(dropout|pdrop|drop)\w*": 0.0,
}
SWITCHES = r"(\w+_)?bias|use_\w+_bias|\w+_bias"
HEADS = 4


def tiny_config(model_type: str, changes: dict[str, Any] | None = None) -> PretrainedConfig:
    """Return a config of this type with tiny sizes, of which transformers makes a model that computes.

    Args:
        model_type: a key of transformers' CONFIG_MAPPING.
        changes: values of the config that are to be other ones; a dictionary is merged with the config's.

    Raises UserError for a change of a value that the config does not have, or if no model can be made.
    """
    error, default = "", CONFIG_MAPPING[model_type]()
    for name in changes or {}:
        if name not in default.to_dict():
            raise UserError(f"--set {name}: {type(default).__name__} of transformers has no such value")
    for values in _candidates(default):
        try:
            config = CONFIG_MAPPING[model_type](**_merge(values, _with_defaults(changes or {}, default)))
            with torch.no_grad():
                make_tiny_model(config)(input_ids=torch.arange(40)[None], use_cache=False)
            return config
        except CONFIG_ERRORS as e:
            error = describe(e)[:MAX_REASON]
    raise UserError(f"model_type {model_type!r}: transformers makes no tiny model of it ({error})")


def _with_defaults(changes: dict[str, Any], config: PretrainedConfig) -> dict[str, Any]:
    """Return the changes; dictionaries, such as those of RoPE, with the config's values that stay."""
    defaults = config.to_dict()
    return {
        name: (defaults[name] or {}) | value if isinstance(value, dict) else value
        for name, value in changes.items()
    }


def _candidates(config: PretrainedConfig) -> Iterator[dict[str, Any]]:
    """Yield the arguments of smaller and smaller changes: all, then without one group of them, then sizes."""
    sizes = _sizes(config) | {"dtype": "float32"}
    groups: list[dict[str, Any]] = [_head_size(config), _windows(config), _switches(config), _floats(config)]
    yield _merge(sizes, *groups)
    for left_out in groups:
        yield _merge(sizes, *(group for group in groups if group is not left_out))
    yield sizes


def _merge(*groups: dict[str, Any]) -> dict[str, Any]:
    """Merge dictionaries; those of nested configs are merged too."""
    merged: dict[str, Any] = {}
    for group in groups:
        for name, value in group.items():
            nested = isinstance(value, dict) and isinstance(merged.get(name), dict)
            merged[name] = _merge(merged[name], value) if nested else value
    return merged


def _parts(config: PretrainedConfig) -> dict[str, PretrainedConfig]:
    return {
        name: getattr(config, name) for name in getattr(config, "sub_configs", {}) if getattr(config, name)
    }


def _sizes(config: PretrainedConfig) -> dict[str, Any]:
    values: dict[str, Any] = {name: _sizes(part) for name, part in _parts(config).items()}
    defaults = {k: v for k, v in config.to_dict().items() if k not in values}
    for name, default in defaults.items():
        is_list_of_ids = isinstance(default, list) and name.endswith("_token_id")
        size = _first(SIZES, name)
        is_unset = default is None and "expert" in name
        if size is not None and (type(default) is int or is_unset or is_list_of_ids) and default != -1:
            values[name] = size
    if "num_key_value_heads" in defaults:  # latent attention (MLA) has no groups of heads
        values["num_key_value_heads"] = HEADS if "kv_lora_rank" in defaults else HEADS // 2
    if "head_dim" in defaults:
        values["head_dim"] = 64 // HEADS
    if "original_max_position_embeddings" in (rope := defaults.get("rope_parameters") or {}):
        values["rope_parameters"] = rope | {"original_max_position_embeddings": 64, "factor": 8.0}
    return values


def _floats(config: PretrainedConfig) -> dict[str, Any]:
    values = {name: _floats(part) for name, part in _parts(config).items()}
    for name, default in config.to_dict().items():
        value = _first(FLOATS, name)
        is_bound = ("cap" in name or "clip" in name) and default is None
        if value is not None and (is_bound or type(default) in (float, int)):
            values[name] = value
    return values


def _head_size(config: PretrainedConfig) -> dict[str, Any]:
    """Return a size of heads that does not follow from the hidden size, if the config has one of its own."""
    values = {name: _head_size(part) for name, part in _parts(config).items()}
    names = config.to_dict().keys()
    return values | ({"head_dim": 32} if "head_dim" in names and "kv_lora_rank" not in names else {})


def _switches(config: PretrainedConfig) -> dict[str, Any]:
    values = {name: _switches(part) for name, part in _parts(config).items()}
    flags = {name: True for name, value in config.to_dict().items() if value is False}
    return values | {name: on for name, on in flags.items() if re.fullmatch(SWITCHES, name)}


def _windows(config: PretrainedConfig) -> dict[str, Any]:
    """Return a window for a config that has none by default, or one that a switch turns off."""
    values: dict[str, Any] = {name: _windows(part) for name, part in _parts(config).items()}
    if getattr(config, "sliding_window", 0) is None:
        values["sliding_window"] = 16
    if getattr(config, "use_sliding_window", None) is False:
        values |= {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 2}
    return values


def _first(table: dict[str, Any], name: str) -> Any:
    return next((value for pattern, value in table.items() if re.fullmatch(pattern, name)), None)


def find_untried_switches(config: PretrainedConfig) -> list[str]:
    """Return NAME=VALUE of each switch of a config whose other value the tiny model does not have.

    Only switches of the type's own config class count, and tied embeddings.
    """
    default = type(config)()
    names = [f.name for f in fields(config)]
    common = {f.name for f in fields(PretrainedConfig)} - {"tie_word_embeddings"} | {"use_cache"}
    return [
        f"{name}={json.dumps(not value)}"
        for name in names
        if name not in common
        and not name.startswith("is_")
        and type(value := getattr(config, name)) is bool
        and value is getattr(default, name)
    ]


def make_tiny_model(config: PretrainedConfig) -> PreTrainedModel:
    """Return a model with random weights, biases and norms, in fp32, with eager attention.

    The weights are large enough for attention, positions and rows behind one another to change the logits.
    Norms vary around the value that transformers gives them: 1, or 0 where a norm multiplies by 1 + weight.
    """
    torch.manual_seed(0)
    config._attn_implementation = "eager"
    model = auto_class(config).from_config(config).float()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() >= 2 and "norm" not in name:
                torch.nn.init.normal_(parameter, std=0.15)
            else:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


def save_tiny_model(model: PreTrainedModel, folder: Path) -> Path:
    """Write a model folder in several shards, with a tokenizer of bytes."""
    model.save_pretrained(folder, max_shard_size="200KB")
    byte_tokenizer().save_pretrained(folder)
    return folder
