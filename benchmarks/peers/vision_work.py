"""Shared by the peers of benchmarks.vision: their options, the model in 4 bits, and the batch.

As their guides recommend: NF4 with double quantization, all linears of the text model, bf16, SDPA, gradient
checkpointing that is not reentrant. The tower stays in 16 bits, frozen. The batch is made before the clock
starts, pixels included; ours decodes its images.
"""

from __future__ import annotations

import argparse

import torch
from peft import LoraConfig
from transformers import AutoModelForImageTextToText, BitsAndBytesConfig, PreTrainedModel
from work import LINEARS, LORA_ALPHA


def read_vision_work() -> argparse.Namespace:
    """Parse a script's command line."""
    parser = argparse.ArgumentParser()
    for name in ("model_name", "train_type"):
        parser.add_argument(f"--{name}", required=True)
    for name in ("batch_size", "text_tokens", "lora_rank", "steps"):
        parser.add_argument(f"--{name}", type=int, required=True)
    return parser.parse_args()


def load_model(work: argparse.Namespace, device: torch.device) -> PreTrainedModel:
    """Load the model, with its text linears in 4 bits."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    four_bits = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=["vision_tower", "multi_modal_projector", "lm_head"],
    )
    return AutoModelForImageTextToText.from_pretrained(
        work.model_name,
        quantization_config=four_bits,
        dtype=dtype,
        device_map={"": device},
        attn_implementation="sdpa",
    )


def lora_config(work: argparse.Namespace) -> LoraConfig:
    """Return PEFT's options of the work."""
    return LoraConfig(
        r=work.lora_rank,
        lora_alpha=LORA_ALPHA,
        target_modules=LINEARS,
        exclude_modules=r".*(vision_tower|multi_modal_projector).*",
        use_dora=work.train_type == "bnb_dora",
        task_type="CAUSAL_LM",
    )


def make_batch(work: argparse.Namespace, model: PreTrainedModel, device: torch.device) -> dict:
    """Return a batch of rows with an image each; all tokens of text are learned."""
    config, n = model.config, work.batch_size
    side, image_id = config.vision_config.image_size, config.image_token_id
    generator = torch.Generator().manual_seed(0)
    text = torch.randint(256, (n, work.text_tokens), generator=generator)
    ids = torch.cat([torch.full((n, config.mm_tokens_per_image), image_id), text], 1).to(device)
    is_image = ids == image_id
    pixels = torch.randn(n, 3, side, side, generator=generator)
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "token_type_ids": is_image.long(),
        "labels": ids.masked_fill(is_image, -100),
        "pixel_values": pixels.to(device, model.dtype),
    }
