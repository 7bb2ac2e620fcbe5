"""The embedded demo model: a tiny Llama made on the spot - real config, tokenizer, sharded safetensors.

Random weights know nothing, so all that a demo run learns, it learned from its data. The tokenizer is a
byte-level BPE trained on the demo data; the embedding and head, which adapters leave frozen, are drawn
wide enough that the layers can pick any token.
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

VERSION = "3"  # part of the folder's name: raise it when what is made here changes
VOCABULARY, HIDDEN, LAYERS = 1024, 128, 3


def toy_model(texts: list[str]) -> Path:
    """The folder of the demo model in the user's cache folder, made at the first call (about a second). Raises UserError
    if it cannot be written.

    texts: what its tokenizer is trained on.
    """
    cache = user_cache()
    folder = cache / f"toy-llama-{VERSION}"
    if not (folder / CONFIG).is_file():
        temporary = cache / f"{folder.name}.{os.getpid()}.tmp"
        _write(temporary, *_make(texts))
        try:
            temporary.rename(folder)
        except OSError:  # another process was faster
            shutil.rmtree(temporary)
    return folder


def _write(folder: Path, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        model.save_pretrained(folder, max_shard_size="500KB")
        tokenizer.save_pretrained(folder)
    except Exception as e:  # tokenizers has no narrower one, and safetensors' is none of the system's
        shutil.rmtree(folder, ignore_errors=True)
        if not isinstance(e, OSError) and "os error" not in str(e):
            raise
        told = f"{folder.parent}: the demo's model cannot be written there ({describe(e)})"
        raise UserError(f"{told}; set XDG_CACHE_HOME to another folder") from e


def _make(texts: list[str]) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    tokenizer = _tokenizer(texts)
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
                std = (
                    1.0
                    if "embed_tokens" in name
                    else 4.0 / HIDDEN**0.5
                    if "lm_head" in name
                    else parameter.shape[1] ** -0.5
                )
                torch.nn.init.normal_(parameter, std=std)
    return model, tokenizer


def _tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
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
