"""Tiny real checkpoints of every family, and small data files."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import (
    Cohere2Config,
    CohereConfig,
    Ernie4_5Config,
    Exaone4Config,
    Gemma2Config,
    Gemma3Config,
    Gemma3TextConfig,
    Glm4Config,
    Glm4MoeLiteConfig,
    GptOssConfig,
    GraniteConfig,
    HeliumConfig,
    HunYuanDenseV1Config,
    LlamaConfig,
    Ministral3Config,
    Mistral3Config,
    MistralConfig,
    MixtralConfig,
    NemotronConfig,
    Olmo2Config,
    Olmo3Config,
    OlmoConfig,
    Phi3Config,
    PhiConfig,
    Qwen2_5_VLConfig,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3MoeConfig,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    SeedOssConfig,
    SmolLM3Config,
    StableLmConfig,
    Starcoder2Config,
)

import block_expansion
from benchmarks.make_checkpoint import byte_tokenizer
from models.llama_pro import new_layers
from models.registry import open_weights, read_config
from tests.helpers.auto_classes import auto_class
from tests.helpers.products import slow

_COMMON = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 256,
    "eos_token_id": 257,
    "dtype": "float32",
}
_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
# 96 hidden units: their square root, which scales the embedding, is rounded in bf16, and 4-bit blocks cross
# rows. Caps and scaling are large enough to change the logits.
_GEMMA = _COMMON | {
    "hidden_size": 96,
    "head_dim": 32,
    "pad_token_id": 0,
    "query_pre_attn_scalar": 24,
    "sliding_window": 16,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    "final_logit_softcapping": 5.0,
}
GEMMA3_ROPE = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
    "full_attention": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
}
# 12 of the 16 units of a head are rotated (Phi-4-mini); the long factors apply to more than 32 tokens.
LONG_ROPE = {
    "rope_type": "longrope",
    "rope_theta": 1000.0,
    "partial_rotary_factor": 0.75,
    "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5],
    "long_factor": [1.0, 2.0, 3.0, 4.0, 5.0, 6.0],
    "original_max_position_embeddings": 32,
}
# HunYuan's: the base of the frequencies is stretched once, whatever the row's length.
ALPHA_ROPE = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 1.0, "alpha": 1000.0}
# All features of a head are rotated, for families whose default is half of them.
FULL_ROPE = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 1.0}
# Layer 0 has a plain MLP.
_EXPERTS = {
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 48,
    "norm_topk_prob": True,
    "mlp_only_layers": [0],
}
# GLM-4.7-Flash: heads of 24 features, of which 8 are rotated, and values of 16 or, in a variant, 32. Tokens
# choose among two of four groups of experts. Layer 0 has a plain MLP.
_LATENT = {
    "num_key_value_heads": 4,
    "pad_token_id": 0,
    "q_lora_rank": 48,
    "kv_lora_rank": 40,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "n_routed_experts": 8,
    "n_group": 4,
    "topk_group": 2,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 48,
    "n_shared_experts": 2,
}
# Large enough to change the logits. Division by a power of two would be exact.
MULTIPLIERS = {
    "embedding_multiplier": 5.0,
    "residual_multiplier": 0.6,
    "attention_multiplier": 0.6,
    "logits_scaling": 3.0,
}
# Rows of more than 16 tokens have scaled frequencies.
YARN = {
    "rope_type": "yarn",
    "rope_theta": 1000.0,
    "factor": 32.0,
    "original_max_position_embeddings": 16,
    "beta_fast": 4.0,
    "beta_slow": 1.0,
}
OLMO3_ROPE = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 1000.0},
    "full_attention": YARN,
}
_WINDOWS = {
    "sliding_window": 16,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
}
# Queries of tokens beyond the first 16 are scaled.
SCALED_QUERIES = YARN | {"mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.5}
# A vision tower of the wrappers, which text alone does not need.
_VISION = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "patch_size": 4,
}
# The towers of Qwen-VL; that of Qwen3-VL has learned positions of 6 x 6 patches.
_PATCHES = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "depth": 3,
    "num_heads": 2,
    "patch_size": 4,
    "temporal_patch_size": 2,
    "spatial_merge_size": 2,
    "out_hidden_size": 64,
}
_DEEPSTACK = {"num_position_embeddings": 36, "deepstack_visual_indexes": [0, 1]}
MROPE = {
    "rope_type": "default",
    "rope_theta": 100.0,
    "mrope_section": [4, 2, 2],
    "mrope_interleaved": True,
}
QWEN_TOKENS = ("vision_start_token_id", "vision_end_token_id", "video_token_id", "image_token_id")
CONFIGS = {
    "llama": lambda: LlamaConfig(**_COMMON),
    "llama3": lambda: LlamaConfig(**_COMMON, rope_parameters=_LLAMA3_ROPE),
    "llama_bias": lambda: LlamaConfig(**_COMMON, attention_bias=True, mlp_bias=True),
    "mistral": lambda: MistralConfig(**_COMMON, sliding_window=16),
    "qwen2": lambda: Qwen2Config(**_COMMON, tie_word_embeddings=True),
    "qwen3": lambda: Qwen3Config(**_COMMON, head_dim=32),
    "qwen3_moe": lambda: Qwen3MoeConfig(**_COMMON, head_dim=32, **_EXPERTS),
    "gemma2": lambda: Gemma2Config(**_GEMMA, attn_logit_softcapping=2.0),
    "gemma3": lambda: Gemma3TextConfig(**_GEMMA, rope_parameters=GEMMA3_ROPE),
    "gemma3_wrapper": lambda: Gemma3Config(
        text_config=Gemma3TextConfig(**_GEMMA, rope_parameters=GEMMA3_ROPE),
        vision_config=_VISION
        | {"model_type": "siglip_vision_model", "image_size": 16, "vision_use_head": False},
        mm_tokens_per_image=4,
        image_token_index=299,
    ),
    "mistral3": lambda: Mistral3Config(
        text_config=MistralConfig(**_COMMON, sliding_window=None, head_dim=16),
        vision_config=_VISION | {"model_type": "pixtral", "image_size": 16, "head_dim": 8},
        image_token_index=299,
        tie_word_embeddings=False,
    ),
    "qwen2_5_vl": lambda: Qwen2_5_VLConfig(
        text_config=_COMMON | {"model_type": "qwen2_5_vl_text", "rope_parameters": dict(MROPE)},
        vision_config=_PATCHES
        | {"model_type": "qwen2_5_vl_vision", "fullatt_block_indexes": [1], "window_size": 16},
        **dict(zip(QWEN_TOKENS, range(296, 300), strict=True)),
    ),
    "qwen3_vl": lambda: Qwen3VLConfig(
        text_config=_COMMON | {"model_type": "qwen3_vl_text", "head_dim": 16, "rope_parameters": dict(MROPE)},
        vision_config=_PATCHES | _DEEPSTACK | {"model_type": "qwen3_vl_vision"},
        **dict(zip(QWEN_TOKENS, range(296, 300), strict=True)),
        tie_word_embeddings=False,
    ),
    "phi3": lambda: Phi3Config(
        **_COMMON, pad_token_id=0, original_max_position_embeddings=32, rope_parameters=LONG_ROPE
    ),
    "exaone4": lambda: Exaone4Config(**_COMMON, **_WINDOWS),
    "exaone4_small": lambda: Exaone4Config(
        **_COMMON, sliding_window=None, layer_types=["full_attention"] * 3, tie_word_embeddings=True
    ),
    "granite": lambda: GraniteConfig(**_COMMON, **MULTIPLIERS, tie_word_embeddings=True),
    "ministral3": lambda: Ministral3Config(
        **_COMMON, pad_token_id=0, head_dim=32, rope_parameters=dict(SCALED_QUERIES)
    ),
    "olmo2": lambda: Olmo2Config(**_COMMON, pad_token_id=0),
    "olmo3": lambda: Olmo3Config(**_COMMON, **_WINDOWS, pad_token_id=0, rope_parameters=OLMO3_ROPE),
    "seed_oss": lambda: SeedOssConfig(
        **_COMMON, pad_token_id=0, head_dim=32, attention_dropout=0.0, residual_dropout=0.0
    ),
    "smollm3": lambda: SmolLM3Config(
        **_COMMON, pad_token_id=0, no_rope_layers=[1, 0, 1], tie_word_embeddings=True
    ),
    "starcoder2": lambda: Starcoder2Config(**_COMMON, sliding_window=16),
    "glm4": lambda: Glm4Config(**_COMMON, head_dim=32, pad_token_id=0),
    "glm4_moe_lite": lambda: Glm4MoeLiteConfig(**_COMMON | _LATENT),
    "cohere2": lambda: Cohere2Config(
        **_COMMON, pad_token_id=0, sliding_window=16, layer_types=_GEMMA["layer_types"], logit_scale=2.0
    ),
    # A narrow MLP: the squares of a wide one would hide what attention adds.
    "nemotron": lambda: NemotronConfig(**_COMMON | {"intermediate_size": 32}, head_dim=32),
    "phi": lambda: PhiConfig(**_COMMON),
    "qwen2_moe": lambda: Qwen2MoeConfig(**_COMMON, **_EXPERTS, shared_expert_intermediate_size=96),
    "mixtral": lambda: MixtralConfig(**_COMMON | {"intermediate_size": 48}, num_local_experts=6),
    "helium": lambda: HeliumConfig(**_COMMON, head_dim=16, attention_bias=True, mlp_bias=True),
    "hunyuan_v1_dense": lambda: HunYuanDenseV1Config(
        **_COMMON,
        pad_token_id=0,
        head_dim=32,
        attention_bias=True,
        tie_word_embeddings=True,
        rope_parameters=dict(ALPHA_ROPE),
    ),
    "ernie4_5": lambda: Ernie4_5Config(
        **_COMMON, pad_token_id=0, head_dim=32, use_bias=True, tie_word_embeddings=True
    ),
    "olmo": lambda: OlmoConfig(**_COMMON, pad_token_id=1, clip_qkv=0.5),
    "stablelm": lambda: StableLmConfig(
        **_COMMON, use_qkv_bias=True, qk_layernorm=True, use_parallel_residual=True
    ),
    "cohere": lambda: CohereConfig(**_COMMON, pad_token_id=0, logit_scale=2.0, use_qk_norm=True),
    # MXFP4 needs multiples of 32 features. The limit is small enough to clamp.
    "gpt_oss": lambda: GptOssConfig(
        **_COMMON | {"intermediate_size": 32},
        **_WINDOWS,
        pad_token_id=0,
        head_dim=16,
        num_local_experts=6,
        num_experts_per_tok=2,
        swiglu_limit=1.0,
        rope_parameters=YARN | {"truncate": False},
    ),
}
# Settings of released or plausible configs that CONFIGS has not; their tests are slow. {kind: config}.
VARIANTS = {
    "cohere2_longrope": lambda: Cohere2Config(
        **_COMMON,
        **_WINDOWS,
        pad_token_id=0,
        rope_parameters=LONG_ROPE
        | {
            "partial_rotary_factor": 1.0,
            "short_factor": [1.0 + i / 10 for i in range(8)],
            "long_factor": [1.0 + i for i in range(8)],
        },
    ),
    "glm4_moe_lite_wide_values": lambda: Glm4MoeLiteConfig(
        **_COMMON
        | _LATENT
        | {"v_head_dim": 32, "n_group": 1, "topk_group": 1, "norm_topk_prob": False, "n_shared_experts": 1},
        attention_bias=True,
        rope_interleave=False,
        mlp_layer_types=["dense", "sparse", "dense"],
    ),
    "granite_bias": lambda: GraniteConfig(**_COMMON, **MULTIPLIERS, attention_bias=True, mlp_bias=True),
    "mistral3_of_ministral3": lambda: Mistral3Config(
        text_config=Ministral3Config(
            **_COMMON, pad_token_id=0, head_dim=32, rope_parameters=dict(SCALED_QUERIES)
        ),
        vision_config=_VISION | {"model_type": "pixtral", "image_size": 16, "head_dim": 8},
        image_token_index=299,
        tie_word_embeddings=False,
    ),
    "nemotron_bias": lambda: NemotronConfig(
        **_COMMON | {"intermediate_size": 32}, head_dim=32, attention_bias=True, mlp_bias=True
    ),
    "phi_head_norms": lambda: PhiConfig(**_COMMON, qk_layernorm=True),
    "phi_tied": lambda: PhiConfig(**_COMMON, tie_word_embeddings=True),
    "qwen2_moe_window": lambda: Qwen2MoeConfig(
        **_COMMON,
        **_EXPERTS,
        **_WINDOWS,
        shared_expert_intermediate_size=96,
        use_sliding_window=True,
        qkv_bias=False,
    ),
    "seed_oss_bias": lambda: SeedOssConfig(
        **_COMMON,
        pad_token_id=0,
        head_dim=32,
        attention_dropout=0.0,
        residual_dropout=0.0,
        attention_bias=False,
        attention_out_bias=True,
        mlp_bias=True,
    ),
    # A bias of keys has a gradient only where they are rotated.
    "smollm3_bias": lambda: SmolLM3Config(
        **_COMMON, pad_token_id=0, no_rope_layers=[1, 1, 1], attention_bias=True, mlp_bias=True
    ),
    "starcoder2_no_bias": lambda: Starcoder2Config(**_COMMON, sliding_window=16, use_bias=False),
}
# The kinds of which `make test` runs many tests. Each other kind has one quick test, in
# tests/models/test_equal_to_peft.py; its further tests are slow.
QUICK = (
    *("llama", "llama3", "llama_bias", "mistral", "qwen2", "qwen3", "qwen3_moe"),
    *("gemma2", "gemma3", "phi3"),
)
OTHERS = [kind for kind in CONFIGS if kind not in QUICK]
KINDS = [*QUICK, *slow(OTHERS)]  # for parametrize


def save_checkpoint(
    kind: str, folder: Path, dtype: torch.dtype = torch.float32, shard: str = "200KB", **changes
) -> Path:
    """Write a sharded checkpoint with random weights, biases and norms.

    The weights are large enough for attention and rotary positions to matter, so a tensor that is forgotten
    or mixed up changes the logits.

    Args:
        kind: a key of CONFIGS or VARIANTS; with the suffix _pro for an expanded model (`save_expanded`).
        folder: the folder to write.
        dtype: dtype of the weights.
        shard: maximum size of a shard.
        changes: changes to the config.
    """
    if kind.endswith("_pro"):
        base = save_checkpoint(kind.removesuffix("_pro"), folder.with_name(f"{folder.name}_base"), dtype)
        return save_expanded(base, folder)
    torch.manual_seed(0)
    config = (CONFIGS | VARIANTS)[kind]()
    for name, value in changes.items():
        part = config if hasattr(config, name) else config.get_text_config()
        assert hasattr(part, name)
        setattr(part, name, value)
    model = auto_class(config).from_config(config)
    # Gemma and Nemotron multiply by 1 + weight.
    norm = 0.0 if model.config.model_type.startswith(("gemma", "nemotron")) else 1.0
    for name, parameter in model.named_parameters():
        is_norm = "norm" in name and name.endswith("weight")  # of two dimensions in Cohere
        if parameter.dim() < 2 or is_norm:
            torch.nn.init.normal_(parameter, mean=norm if is_norm else 0.0, std=0.1)
        else:  # 3 dimensions where transformers stacks experts; the files hold one tensor for each
            torch.nn.init.normal_(parameter, std=0.15)
    model.to(dtype)
    buffers = dict(model.named_buffers())
    for name in model.state_dict().keys() & buffers.keys():  # routers' biases, in fp32 in any model
        generator = torch.Generator().manual_seed(sum(map(ord, name)))
        path, _, last = name.rpartition(".")
        bias = torch.randn(buffers[name].shape, generator=generator) * 0.2
        setattr(model.get_submodule(path), last, bias)
    model.save_pretrained(folder, max_shard_size=shard)
    byte_tokenizer().save_pretrained(folder)
    return folder


def save_expanded(base: Path, folder: Path) -> Path:
    """Expand `base` by new layers after layers 0 and 2, or 1 and 2 where layer 1 takes features of images.

    Random values replace the zeros that would make the new layers do nothing.
    """
    family = read_config(base)[1]
    after = "1,2" if family.model_class is Qwen3VLForConditionalGeneration else "0,2"
    arguments = ["--model_name", str(base), "--output_dir", str(folder), "--after", after]
    assert block_expansion.main(arguments) == 0
    config, family = read_config(folder)
    files, _, _ = open_weights(folder, config, family)
    parameters = {files.stored_name(name): name for name in files.tensors}
    generator = torch.Generator().manual_seed(1)
    for path in folder.glob("*.safetensors"):
        tensors = load_file(path)
        for name, tensor in tensors.items():
            layer, rest = family.locate_layer(parameters.get(name, name))
            if layer in new_layers(config) and family.identity_value(rest) is not None:
                tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.1)
        save_file(tensors, path, metadata={"format": "pt"})
    return folder


def write_alpaca(path: Path, rows: int = 40) -> Path:
    """Write Alpaca rows with and without input, and with answers of 1 to about 60 words."""
    words = "red green blue one two three four five up down left right sun moon star tree".split()
    with path.open("w") as file:
        for i in range(rows):
            answer = " ".join(words[(i * 7 + j) % len(words)] for j in range(1 + (i * i) % 61))
            row = {"instruction": f"Say {words[i % len(words)]}.", "input": "now" * (i % 3), "output": answer}
            file.write(json.dumps(row) + "\n")
    return path


def write_questions(path: Path, even: bool, rows: int = 40) -> Path:
    """Write questions with answers of 1 to 13 numbers; with `even`, all rows have the same number of tokens.

    Without Alpaca's long prompts a row has 50 to 90 tokens. Tests that only need to learn something then take
    half of the time, or a third in 16 bits, which many CPUs emulate. No gradient is so close to zero that
    AdamW turns its rounding into a step (see parity.py).
    """
    with path.open("w") as file:
        for i in range(rows):
            question = f"Count from {i} to {i * 5 % 40}."
            answer = " ".join(str((i + j * 5) % 100) for j in range(1 + (i * i) % 13))
            if even:
                question, answer = f"Count from {i % 4}.", " ".join(str(i % 4 + j) for j in range(6))
            file.write(json.dumps({"question": question, "answer": answer}) + "\n")
    return path
