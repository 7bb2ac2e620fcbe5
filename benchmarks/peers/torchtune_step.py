"""Peer: torchtune's QLoRA model, compiled, in a plain loop on one device.

Its weights are random: it reads only the checkpoint's shape.
"""

import json
from pathlib import Path

import torch
from stopwatch import Stopwatch, select_device, token_ids
from torchtune import training
from torchtune.models.llama3_1 import lora_llama3_1
from torchtune.modules import TransformerSelfAttentionLayer
from torchtune.modules.loss import CEWithChunkedOutputLoss
from torchtune.modules.peft import get_adapter_params, set_trainable_params
from transformers import AutoTokenizer
from work import LORA_ALPHA, read_work

work, device = read_work(), select_device()
shape = json.loads(Path(work.model_name, "config.json").read_text())
with device, training.set_default_dtype(torch.bfloat16):
    model = lora_llama3_1(
        lora_attn_modules=["q_proj", "k_proj", "v_proj", "output_proj"],
        apply_lora_to_mlp=True,
        vocab_size=shape["vocab_size"],
        num_layers=shape["num_hidden_layers"],
        num_heads=shape["num_attention_heads"],
        num_kv_heads=shape["num_key_value_heads"],
        embed_dim=shape["hidden_size"],
        intermediate_dim=shape["intermediate_size"],
        max_seq_len=shape["max_position_embeddings"],
        lora_rank=work.lora_rank,
        lora_alpha=LORA_ALPHA,
        use_dora=work.train_type == "bnb_dora",
        quantize_base=True,
    )
for module in model.modules():
    if hasattr(module, "initialize_dora_magnitude"):
        module.initialize_dora_magnitude()
set_trainable_params(model, get_adapter_params(model))
training.compile_model(model)
if work.checkpointing == "full":
    training.set_activation_checkpointing(model, auto_wrap_policy={TransformerSelfAttentionLayer})
compute_loss = CEWithChunkedOutputLoss()
model.set_num_output_chunks(compute_loss.num_output_chunks)
training.compile_loss(compute_loss)
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, fused=True)
watch = Stopwatch(model)
row = token_ids(AutoTokenizer.from_pretrained(work.model_name), work.context_length)
ids = torch.tensor([row] * work.batch_size, device=device)
for _ in range(work.steps):
    loss = compute_loss(model(ids), ids.roll(-1, 1))
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    loss.item()
    watch.end_step()
watch.print_result()
