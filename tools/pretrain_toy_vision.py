"""Pretrain models/toy_vision, the embedded model that takes images, on the captions of tools/toy_captions.py.

    python -m tools.pretrain_toy_vision [--out FOLDER] [--tower_steps N] [--steps N] [--seed N]

The model is a Gemma 3 with a SigLIP tower, trained in fp32 and saved in bf16. First the tower alone learns to
tell the figures apart; then all of the model learns captions, and the tower goes on with its task. Tokenizer,
chat template and image processor have Gemma 3's form.
"""

import argparse
import itertools
import random
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from transformers import (
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3Processor,
    PreTrainedTokenizerFast,
)
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil

from tools.toy_captions import IMAGE, Document, documents, draw_any
from tools.toy_drawings import COLORS, SHAPES, Drawing
from tools.toy_pretraining import run_steps
from tools.toy_tokenizer import train_bpe

SPECIAL = ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"]
IMAGE_TOKENS = {"boi_token": IMAGE, "image_token": "<image_soft_token>", "eoi_token": "<end_of_image>"}
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<start_of_turn>' + ('model' if message.role == 'assistant' else message.role) + '\\n' }}"
    "{% if message.content is string %}{{ message.content | trim }}"
    "{% else %}{% for part in message.content %}"
    "{% if part.type == 'image' %}{{ '<start_of_image>' }}{% else %}{{ part.text | trim }}{% endif %}"
    "{% endfor %}{% endif %}{{ '<end_of_turn>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"
)
VOCABULARY = 1024  # the most tokens of the tokenizer; the text has 512
HIDDEN = 128
TEXT = {
    "hidden_size": HIDDEN,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "query_pre_attn_scalar": 32,
    "sliding_window": 64,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "max_position_embeddings": 2048,
}
SIDE, TOKENS = 32, 4  # pixels and tokens of an image
VISION = {
    "model_type": "siglip_vision_model",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": SIDE,
    "patch_size": 4,
    "vision_use_head": False,
}
ROWS, IMAGES = 16, 32  # of a batch of captions, and of the tower alone
PEAK_LR, WARMUP_STEPS = 2e-3, 50
IGNORE = -100  # transformers' mark of a token that is not learned


def train_tokenizer(seed: int) -> PreTrainedTokenizerFast:
    """Return a BPE tokenizer that puts <bos> before each text, with Gemma's chat template."""
    special = [*SPECIAL, *IMAGE_TOKENS.values()]
    texts = [document.text for document in itertools.islice(documents(seed), 2_000)]
    for token in special:
        texts = [text.replace(token, " ") for text in texts]
    backend = train_bpe(texts, special, unknown="<unk>", begin="<bos>", size=VOCABULARY)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token="<unk>",
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        extra_special_tokens=special[4:],
        add_prefix_space=False,
    )
    tokenizer._set_model_specific_special_tokens({**IMAGE_TOKENS})
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def make_processor(tokenizer: PreTrainedTokenizerFast) -> Gemma3Processor:
    """Return the processor of texts and images. Its images are squares of SIDE pixels, from -1 to 1."""
    images = Gemma3ImageProcessorPil(
        size={"height": SIDE, "width": SIDE}, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
    return Gemma3Processor(images, tokenizer, chat_template=CHAT_TEMPLATE, image_seq_length=TOKENS)


def make_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> Gemma3ForConditionalGeneration:
    """Return the model with random weights, in fp32."""
    begin, token, end = (tokenizer.get_vocab()[token] for token in IMAGE_TOKENS.values())
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("pad", "eos", "bos")}
    torch.manual_seed(seed)
    model = Gemma3ForConditionalGeneration(
        Gemma3Config(
            text_config=TEXT | ids | {"vocab_size": len(tokenizer)},
            vision_config=dict(VISION),
            mm_tokens_per_image=TOKENS,
            boi_token_index=begin,
            image_token_index=token,
            eoi_token_index=end,
            dtype="float32",
            **ids,
        )
    )
    # transformers starts with zeros, with which the tower learns nothing in the first step.
    torch.nn.init.normal_(model.model.multi_modal_projector.mm_input_projection_weight, std=0.02)
    end_of_turn = tokenizer.get_vocab()["<end_of_turn>"]
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, end_of_turn]
    return model


def make_batch(processor: Gemma3Processor, rows: list[Document]) -> dict[str, torch.Tensor]:
    """Return the arguments of CaptionWriter's forward. All tokens are learned but images and padding."""
    tokenizer = processor.tokenizer
    texts = [row.text.replace(IMAGE, processor.full_image_sequence) + tokenizer.eos_token for row in rows]
    batch = tokenizer(texts, return_tensors="pt", padding=True, padding_side="right")
    ids = batch["input_ids"]
    # Not processor.image_token_id: that is <start_of_image>, which takes the place of an image in a text.
    begin, token, end = (tokenizer.get_vocab()[token] for token in IMAGE_TOKENS.values())
    is_image = torch.isin(ids, torch.tensor([begin, token, end]))
    labels = ids.masked_fill(is_image | (batch["attention_mask"] == 0), IGNORE)
    drawings = [row.drawing for row in rows if row.drawing]
    images = [drawing.image for drawing in drawings]
    pixels = processor.image_processor(images, return_tensors="pt")["pixel_values"]
    return {
        "input_ids": ids,
        "attention_mask": batch["attention_mask"],
        "token_type_ids": (ids == token).long(),
        "labels": labels,
        "pixel_values": pixels,
        **number_figures(drawings),
    }


def caption_batches(processor: Gemma3Processor, seed: int) -> Iterator[dict[str, torch.Tensor]]:
    """Yield batches of ROWS documents."""
    rows = documents(seed)
    while True:
        yield make_batch(processor, list(itertools.islice(rows, ROWS)))


class FigureReader(torch.nn.Module):
    """Tower and projector with a linear head that reads the color and the shape from each token of an image.

    Captions alone teach the tower little: of a caption, two words depend on the image.
    """

    def __init__(self, model: Gemma3ForConditionalGeneration):
        super().__init__()
        self.tower, self.projector = model.model.vision_tower, model.model.multi_modal_projector
        self.head = torch.nn.Linear(HIDDEN, len(COLORS) + len(SHAPES))

    def forward(self, pixel_values: torch.Tensor, colors: torch.Tensor, shapes: torch.Tensor):
        """Return an object with the loss, in nats per image: that of the color and that of the shape.

        pixel_values: [I, 3, SIDE, SIDE]; colors, shapes: [I], numbers. The loss is the mean over the tokens.
        """
        tokens = self.projector(self.tower(pixel_values=pixel_values).last_hidden_state)
        of_color, of_shape = self.head(tokens).split((len(COLORS), len(SHAPES)), dim=-1)  # [I, TOKENS, ...]
        losses = (
            F.cross_entropy(logits.flatten(0, 1), targets.repeat_interleave(TOKENS))
            for logits, targets in ((of_color, colors), (of_shape, shapes))
        )
        return SimpleNamespace(loss=sum(losses))


class CaptionWriter(torch.nn.Module):
    """The model and the FigureReader of its tower: the sum of their losses."""

    def __init__(self, model: Gemma3ForConditionalGeneration, reader: FigureReader):
        super().__init__()
        self.model, self.reader = model, reader

    def forward(self, colors: torch.Tensor, shapes: torch.Tensor, **batch: torch.Tensor):
        """Return an object with the loss. colors, shapes: as for the reader; batch: the model's arguments."""
        read = self.reader(batch["pixel_values"], colors, shapes)
        return SimpleNamespace(loss=self.model(**batch).loss + read.loss)


def number_figures(drawings: list[Drawing]) -> dict[str, torch.Tensor]:
    """Return the numbers of the drawings' colors and shapes, [I] each."""
    names = list(COLORS)
    return {
        "colors": torch.tensor([names.index(drawing.color) for drawing in drawings]),
        "shapes": torch.tensor([SHAPES.index(drawing.shape) for drawing in drawings]),
    }


def drawing_batches(processor: Gemma3Processor, seed: int) -> Iterator[dict[str, torch.Tensor]]:
    """Yield the arguments of FigureReader's forward for IMAGES drawings."""
    rng = random.Random(seed)
    while True:
        drawings = [draw_any(rng) for _ in range(IMAGES)]
        images = [drawing.image for drawing in drawings]
        pixels = processor.image_processor(images, return_tensors="pt")["pixel_values"]
        yield {"pixel_values": pixels, **number_figures(drawings)}


def main() -> None:
    """Make tokenizer, processor and model, pretrain the model, and save all."""
    parser = argparse.ArgumentParser(description="Pretrain the embedded model that takes images.")
    parser.add_argument("--out", type=Path, default=Path("models/toy_vision"))
    parser.add_argument("--tower_steps", type=int, default=1500)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    processor = make_processor(train_tokenizer(options.seed))
    processor.save_pretrained(options.out)  # before it pads batches: tokenizer.json would record the padding
    model = make_model(processor.tokenizer, options.seed)
    reader = FigureReader(model)
    drawings = drawing_batches(processor, options.seed + 2)
    run_steps(reader, drawings, options.tower_steps, PEAK_LR, WARMUP_STEPS)
    captions = caption_batches(processor, options.seed + 1)
    loss = run_steps(CaptionWriter(model, reader), captions, options.steps, PEAK_LR, WARMUP_STEPS)
    model.to(torch.bfloat16)  # type: ignore[arg-type]
    model.save_pretrained(options.out, max_shard_size="500KB")
    print(f"{options.out}: loss {loss:.4f} over the last steps")


if __name__ == "__main__":
    main()
