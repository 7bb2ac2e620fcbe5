"""SmolLM3: Llama, in which every fourth layer does not rotate queries and keys (NoPE).

no_rope_layers of the config has a 1 for each layer with RoPE, and a 0 for the others; transformers' layers
read it. Llama-Pro's new layers are of the kind that they copy. PEFT has no default targets for this family;
ours are Llama's.
"""

from transformers.models.smollm3.modeling_smollm3 import SmolLM3ForCausalLM, SmolLM3RotaryEmbedding

from models.family import Family

FAMILY = Family(model_class=SmolLM3ForCausalLM, rotary_class=SmolLM3RotaryEmbedding)
