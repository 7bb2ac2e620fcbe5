"""Peer of benchmarks.vision: transformers + PEFT + bitsandbytes in a plain loop, under autocast."""

import torch
from peft import get_peft_model
from stopwatch import Stopwatch, select_device
from vision_work import load_model, lora_config, make_batch, read_vision_work

work, device = read_vision_work(), select_device()
gpu = device.type == "cuda"
model = load_model(work, device)
batch = make_batch(work, model, device)
model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
model.enable_input_require_grads()
model = get_peft_model(model, lora_config(work))
model.train()
trained = [p for p in model.parameters() if p.requires_grad]
optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=gpu)
watch = Stopwatch(model)
for _ in range(work.steps):
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=gpu):
        loss = model(**batch, use_cache=False).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(trained, 1.0)
    optimizer.step()
    optimizer.zero_grad()
    loss.item()
    watch.end_step()
watch.print_result()
