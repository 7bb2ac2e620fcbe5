"""Peer: TRL's SFTTrainer + PEFT + bitsandbytes.

Several GPUs run under FSDP 1, started by `accelerate launch`.
"""

import os

import torch
from peft import LoraConfig
from stopwatch import select_device
from trainer import make_config, train
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from work import LORA_ALPHA, RANKS, find_linears, read_work

work, device = read_work(), select_device()
full = work.checkpointing == "full"
# Made before the model: it starts the process group that FSDP's low-memory loading needs.
config = make_config(
    work,
    work.context_length,
    gradient_checkpointing=full,
    gradient_checkpointing_kwargs={"use_reentrant": False},
)
dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
four_bits = BitsAndBytesConfig(
    load_in_4bit=True,
    bnb_4bit_quant_type="nf4",
    bnb_4bit_use_double_quant=True,
    bnb_4bit_compute_dtype=dtype,
    bnb_4bit_quant_storage=dtype if RANKS > 1 else torch.uint8,  # FSDP shards tensors of one dtype
)
model = AutoModelForCausalLM.from_pretrained(
    work.model_name,
    quantization_config=four_bits,
    dtype=dtype,
    attn_implementation="sdpa",
    # Under FSDP rank 0 reads the weights, and wrapping broadcasts them.
    **({} if os.environ.get("ACCELERATE_USE_FSDP") == "true" else {"device_map": {"": device}}),
)
lora = LoraConfig(
    r=work.lora_rank,
    lora_alpha=LORA_ALPHA,
    target_modules=find_linears(work.model_name),
    use_dora=work.train_type == "bnb_dora",
    task_type="CAUSAL_LM",
)
tokenizer = AutoTokenizer.from_pretrained(work.model_name)
train(work, model, tokenizer, config, ("input_ids",), peft_config=lora)
