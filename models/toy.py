"""The demo model: a tiny Llama, made at the first use, with a real config, tokenizer and sharded safetensors.

Its weights are random, so a demo run learns everything from its data. The tokenizer is a byte-level BPE
trained on the demo data. The embedding and the head, which adapters keep frozen, get a standard deviation
large enough that the layers can select any token.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from files.names import CONFIG
from options.config import user_cache
from options.errors import UserError, describe

VERSION = "3"  # part of the folder's name; raise it when the model or the tokenizer changes
VOCABULARY, HIDDEN, LAYERS = 1024, 128, 3
INIT_STD = {"embed_tokens": 1.0, "lm_head": 4.0 / HIDDEN**0.5}  # of the other matrices: 1 / sqrt(inputs)


def make_toy_model(texts: list[str]) -> Path:
    """Return the folder of the demo model in the user's cache folder; make it at the first call.

    That takes about a second. texts: train its tokenizer. Raises UserError if the folder cannot be written.
    """
    cache = user_cache()
    folder = cache / f"toy-llama-{VERSION}"
    if not (folder / CONFIG).is_file():
        staging = cache / f"{folder.name}.{os.getpid()}.tmp"
        _write(staging, *_make_model(texts))
        try:
            staging.rename(folder)
        except OSError:  # another process was faster
            shutil.rmtree(staging)
    return folder


def _write(folder: Path, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    """Save model and tokenizer in `folder`; if the file system refuses, remove it and raise UserError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        model.save_pretrained(folder, max_shard_size="500KB")
        tokenizer.save_pretrained(folder)
    except Exception as e:  # tokenizers raises no narrower class, and safetensors' error is no OSError
        shutil.rmtree(folder, ignore_errors=True)
        if not isinstance(e, OSError) and "os error" not in str(e):
            raise
        raise UserError(
            f"{folder.parent}: the demo's model cannot be written there ({describe(e)});"
            " set XDG_CACHE_HOME to another folder"
        ) from e


def _make_model(texts: list[str]) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """Return (a tiny Llama, its random weights always the same; a tokenizer trained on `texts`)."""
    tokenizer = _train_tokenizer(texts)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=HIDDEN,
        intermediate_size=3 * HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        dtype="bfloat16",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(config).to(torch.bfloat16)  # type: ignore[arg-type]
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2:
                std = INIT_STD.get(name.split(".")[-2], parameter.shape[1] ** -0.5)
                torch.nn.init.normal_(parameter, std=std)
    return model, tokenizer


def _train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer, trained on `texts`, that puts <s> before each text."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = ["<s>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", backend.token_to_id("<s>"))]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
