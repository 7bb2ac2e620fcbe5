"""Peer: unsloth on one GPU.

checkpointing full is PyTorch's; offload is unsloth's own, which keeps the layers' inputs in host memory.
"""

import os

os.environ["UNSLOTH_DISABLE_STATISTICS"] = "1"
from unsloth import FastLanguageModel  # isort: skip  (first: it patches the modules imported below)

import torch
from trainer import make_config, train
from work import LORA_ALPHA, find_linears, read_work

work = read_work()
model, tokenizer = FastLanguageModel.from_pretrained(
    work.model_name,
    max_seq_length=work.context_length,
    dtype=torch.bfloat16,
    load_in_4bit=True,
    local_files_only=True,
)
model = FastLanguageModel.get_peft_model(
    model,
    r=work.lora_rank,
    lora_alpha=LORA_ALPHA,
    lora_dropout=0,
    bias="none",
    target_modules=find_linears(work.model_name),
    target_parameters=[],  # None: unsloth puts adapters on the experts of a mixture, too
    use_gradient_checkpointing={"full": True, "none": False, "offload": "unsloth"}[work.checkpointing],
    **({"use_dora": True} if work.train_type == "bnb_dora" else {}),
)
config = make_config(work, work.context_length, use_liger_kernel=False)  # unsloth has its own kernels
train(work, model, tokenizer, config, ("input_ids", "labels", "attention_mask"))
