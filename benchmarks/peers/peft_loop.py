"""Peer: transformers + PEFT + bitsandbytes in a plain loop, on several ranks under DistributedDataParallel.

Follows PEFT's guide to quantized training without prepare_model_for_kbit_training: that copies embedding and
head to fp32, which costs gigabytes and time and is not needed with autocast.
"""

import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from stopwatch import Stopwatch, select_device, token_ids
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from work import LORA_ALPHA, RANKS, find_linears, read_work

work, device = read_work(), select_device()
gpu = device.type == "cuda"
if RANKS > 1:
    dist.init_process_group("nccl" if gpu else "gloo")
dtype = torch.bfloat16 if gpu else torch.float32
four_bits = BitsAndBytesConfig(
    load_in_4bit=True,
    bnb_4bit_quant_type="nf4",
    bnb_4bit_use_double_quant=True,
    bnb_4bit_compute_dtype=dtype,
)
model = AutoModelForCausalLM.from_pretrained(
    work.model_name,
    quantization_config=four_bits,
    dtype=dtype,
    device_map={"": device},
    attn_implementation="sdpa",
)
if work.checkpointing == "full":
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.enable_input_require_grads()
lora = LoraConfig(
    r=work.lora_rank,
    lora_alpha=LORA_ALPHA,
    target_modules=find_linears(work.model_name),
    use_dora=work.train_type == "bnb_dora",
    task_type="CAUSAL_LM",
)
model = get_peft_model(model, lora)
model.train()
trained = [p for p in model.parameters() if p.requires_grad]
optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)
watch = Stopwatch(model)
ddp_model = DistributedDataParallel(model, device_ids=[device] if gpu else None) if RANKS > 1 else model
row = token_ids(AutoTokenizer.from_pretrained(work.model_name), work.context_length)
ids = torch.tensor([row] * work.batch_size, device=device)
for _ in range(work.steps):
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=gpu):
        loss = ddp_model(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(trained, 1.0)
    optimizer.step()
    optimizer.zero_grad()
    loss.item()
    watch.end_step()
watch.print_result()
if RANKS > 1:
    dist.destroy_process_group()
