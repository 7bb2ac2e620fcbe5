"""Seed-OSS: Llama with biases on queries, keys and values, and dropout that its config turns on.

Published configs have attention_dropout and residual_dropout 0.1. Both act in training, and not in
evaluation, as in transformers. PyTorch's variable-length kernel has no dropout of scores, so packed rows get
masks unless attention_dropout in config.json is 0. PEFT has no default targets for this family; ours are
Llama's.
"""

from transformers.models.seed_oss.modeling_seed_oss import SeedOssForCausalLM, SeedOssRotaryEmbedding

from models.family import Family

FAMILY = Family(model_class=SeedOssForCausalLM, rotary_class=SeedOssRotaryEmbedding)
