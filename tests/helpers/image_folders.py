"""Folders of tiny models that take images: config, tokenizer and image processor, without weights."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForImageTextToText,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3Processor,
    Qwen3VLConfig,
)
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from benchmarks.make_checkpoint import byte_tokenizer
from tests.helpers.tiny import CONFIGS

SIDE, TOKENS = 28, 4  # of a Gemma 3 image
GEMMA_TOKENS = {
    "boi_token": "<start_of_image>",
    "image_token": "<image_soft_token>",
    "eoi_token": "<end_of_image>",
}
QWEN_TOKENS = ("<|vision_start|>", "<|image_pad|>", "<|vision_end|>", "<|video_pad|>")
FIRST_ID = 258  # of the special tokens of images; those of bytes, BOS and EOS are below it
OLD_SETTINGS = {  # as files of the hub are, with other numbers
    "do_convert_rgb": None,
    "do_normalize": True,
    "do_pan_and_scan": None,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": [0.5, 0.4, 0.45],
    "image_processor_type": "Gemma3ImageProcessor",
    "image_seq_length": TOKENS,
    "image_std": [0.5, 0.3, 0.25],
    "processor_class": "Gemma3Processor",
    "resample": 2,
    "rescale_factor": 0.00392156862745098,
    "size": {"height": SIDE, "width": SIDE},
}
# Like that of Qwen-VL, without its system prompt.
QWEN_TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.content is string %}{{ m.content }}{% else %}{% for p in m.content %}"
    "{% if p.type == 'image' %}{{ '<|vision_start|><|image_pad|><|vision_end|>' }}"
    "{% else %}{{ p.text }}{% endif %}{% endfor %}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
QWEN_SETTINGS = {
    "size": {"longest_edge": 40_000, "shortest_edge": 2_000},
    "patch_size": 8,
    "temporal_patch_size": 2,
    "merge_size": 2,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "image_processor_type": "Qwen2VLImageProcessorFast",
    "processor_class": "Qwen3VLProcessor",
}


def _tokenizer(tokens: list[str]):
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"extra_special_tokens": tokens})
    return tokenizer


def write_gemma_folder(folder: Path, layout: int = 4) -> tuple[Gemma3Config, Gemma3Processor]:
    """Write a folder, with its settings as transformers 4 or 5 lays them out; return (config, processor)."""
    tokenizer = _tokenizer(list(GEMMA_TOKENS.values()))
    tokenizer._set_model_specific_special_tokens(GEMMA_TOKENS)
    own = {k: v for k, v in OLD_SETTINGS.items() if k not in ("image_seq_length", "processor_class")}
    processor = Gemma3Processor(Gemma3ImageProcessorPil(**own), tokenizer, image_seq_length=TOKENS)
    if layout == 5:
        processor.save_pretrained(folder)
    else:
        tokenizer.save_pretrained(folder)
        (folder / "preprocessor_config.json").write_text(json.dumps(OLD_SETTINGS))
        (folder / "processor_config.json").write_text(json.dumps({"image_seq_length": TOKENS}))
    config = Gemma3Config(
        vision_config={"image_size": SIDE, "patch_size": 7},
        mm_tokens_per_image=TOKENS,
        boi_token_index=FIRST_ID,
        image_token_index=FIRST_ID + 1,
        eoi_token_index=FIRST_ID + 2,
    )
    return config, processor


def write_qwen_folder(folder: Path, **settings) -> tuple[Qwen3VLConfig, Qwen2VLImageProcessorPil]:
    """Write a folder of Qwen3-VL; return (config, its image processor)."""
    _tokenizer(list(QWEN_TOKENS)).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(QWEN_SETTINGS | settings))
    config = Qwen3VLConfig(
        vision_config={"patch_size": 8, "spatial_merge_size": 2, "temporal_patch_size": 2},
        vision_start_token_id=FIRST_ID,
        image_token_id=FIRST_ID + 1,
        vision_end_token_id=FIRST_ID + 2,
        video_token_id=FIRST_ID + 3,
    )
    return config, Qwen2VLImageProcessorPil.from_pretrained(folder)


def write_gemma_model(folder: Path) -> Path:
    """Write a tiny Gemma 3 with random weights, whose processor and tokenizer know images."""
    folder.mkdir()
    write_gemma_folder(folder)
    config = CONFIGS["gemma3_wrapper"]()
    config.vision_config.image_size, config.vision_config.patch_size = SIDE, 7
    config.boi_token_index, config.image_token_index, config.eoi_token_index = range(FIRST_ID, FIRST_ID + 3)
    torch.manual_seed(0)
    model = Gemma3ForConditionalGeneration(config)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.15)
    model.save_pretrained(folder)
    return folder


def write_talkative_gemma(folder: Path, chat_template: str) -> Path:
    """Write a tiny Gemma 3 with a chat template, whose answers depend on all of the prompt.

    The layers outweigh the embedding. Otherwise the head, which is tied to it, repeats the last token.
    """
    write_gemma_model(folder)
    (folder / "chat_template.jinja").write_text(chat_template)
    for path in folder.glob("*.safetensors"):
        tensors = load_file(path)
        for name, tensor in tensors.items():
            if "post_attention_layernorm" in name or "post_feedforward_layernorm" in name:
                tensor += 20
        save_file(tensors, path, metadata={"format": "pt"})
    return folder


def write_qwen_model(folder: Path, kind: str) -> Path:
    """Write a tiny Qwen3-VL or Qwen2.5-VL with random weights, as a whole folder with a chat template.

    Its answers depend on all of the prompt: the layers outweigh the embedding.
    """
    folder.mkdir()
    write_qwen_folder(folder)
    (folder / "chat_template.jinja").write_text(QWEN_TEMPLATE)
    config = CONFIGS[kind]()
    config.vision_config.patch_size = QWEN_SETTINGS["patch_size"]
    if kind == "qwen2_5_vl":
        config.vision_config.window_size = 2 * 2 * QWEN_SETTINGS["patch_size"]  # 2 x 2 tokens
    names = ("vision_start", "image", "vision_end", "video")
    for i, name in enumerate(names):
        setattr(config, f"{name}_token_id", FIRST_ID + i)
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.05 if "embed_tokens" in name else 0.15)
    model.save_pretrained(folder)
    return folder


def write_flat_config(folder: Path) -> None:
    """Rewrite the config.json of a Qwen2.5-VL as the hub's releases have it: without a text_config."""
    raw = json.loads((folder / "config.json").read_text())
    text, vision = raw.pop("text_config"), raw["vision_config"]
    rope = text.pop("rope_parameters")
    for name in ("model_type", "dtype", "layer_types", "pad_token_id"):
        text.pop(name, None)
    for name in ("model_type", "rope_parameters", "initializer_range", "dtype"):
        vision.pop(name, None)
    vision["in_chans"] = vision.pop("in_channels")
    vision["spatial_patch_size"] = vision["patch_size"]
    raw |= text | {"sliding_window": 32768, "torch_dtype": raw.pop("dtype"), "transformers_version": "4.41.2"}
    raw |= {"rope_theta": rope["rope_theta"]}
    raw |= {"rope_scaling": {"type": "mrope", "mrope_section": rope["mrope_section"]}}
    (folder / "config.json").write_text(json.dumps(raw, indent=2) + "\n")
