"""Peer of benchmarks.vision: transformers + PEFT + bitsandbytes in a plain loop, on rows with an image each.

As their guides recommend: NF4 with double quantization, all linears of the text model, bf16 under autocast,
SDPA, gradient checkpointing that is not reentrant. The tower stays in 16 bits, frozen. The batch is made
before the clock starts, pixels included; ours decodes its images.
"""

import argparse

import torch
from peft import LoraConfig, get_peft_model
from stopwatch import Stopwatch, select_device
from transformers import AutoModelForImageTextToText, BitsAndBytesConfig
from work import LINEARS, LORA_ALPHA

parser = argparse.ArgumentParser()
for name in ("model_name", "train_type"):
    parser.add_argument(f"--{name}", required=True)
for name in ("batch_size", "text_tokens", "lora_rank", "steps"):
    parser.add_argument(f"--{name}", type=int, required=True)
work, device = parser.parse_args(), select_device()
gpu = device.type == "cuda"
dtype = torch.bfloat16 if gpu else torch.float32
four_bits = BitsAndBytesConfig(
    load_in_4bit=True,
    bnb_4bit_quant_type="nf4",
    bnb_4bit_use_double_quant=True,
    bnb_4bit_compute_dtype=dtype,
    llm_int8_skip_modules=["vision_tower", "multi_modal_projector", "lm_head"],
)
model = AutoModelForImageTextToText.from_pretrained(
    work.model_name,
    quantization_config=four_bits,
    dtype=dtype,
    device_map={"": device},
    attn_implementation="sdpa",
)
model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
model.enable_input_require_grads()
lora = LoraConfig(
    r=work.lora_rank,
    lora_alpha=LORA_ALPHA,
    target_modules=LINEARS,
    exclude_modules=r".*(vision_tower|multi_modal_projector).*",
    use_dora=work.train_type == "bnb_dora",
    task_type="CAUSAL_LM",
)
model = get_peft_model(model, lora)
model.train()
trained = [p for p in model.parameters() if p.requires_grad]
optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=gpu)
config = model.config
side, image_tokens = config.vision_config.image_size, config.mm_tokens_per_image
image_id = config.image_token_id
generator = torch.Generator().manual_seed(0)
text = torch.randint(256, (work.batch_size, work.text_tokens), generator=generator)
ids = torch.cat([torch.full((work.batch_size, image_tokens), image_id), text], 1).to(device)
is_image = ids == image_id
pixels = torch.randn(work.batch_size, 3, side, side, generator=generator).to(device, dtype)
batch = {
    "input_ids": ids,
    "attention_mask": torch.ones_like(ids),
    "token_type_ids": is_image.long(),
    "labels": ids.masked_fill(is_image, -100),
    "pixel_values": pixels,
}
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
