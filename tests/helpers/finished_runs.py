"""RUN folders that several tests ask."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import load_file, save_file

from files.names import ADAPTER
from tests.data.test_formats import chat_tokenizer
from tests.finished.test_finished_run import saved_run
from tests.helpers import chat_templates
from tests.models.test_adapters import args_for


def adapters_of_one_base(one_rank, folder: Path, base: Path, data: Path) -> list[Path]:
    """Three over a 4-bit base: DoRA, the same with other weights, LoRA on some linears."""
    one, two, three = runs = [folder / name for name in ("one", "two", "three")]
    saved_run(one_rank, one, args_for(base, data, "bnb_dora"))
    shutil.copytree(one, two)
    with safe_open(two / ADAPTER, framework="pt") as f:
        metadata = f.metadata()
    tensors = {n: t * (-1 if n.endswith("lora_B.weight") else 1) for n, t in load_file(two / ADAPTER).items()}
    save_file(tensors, two / ADAPTER, metadata=metadata)
    some = ["--lora_rank", "4", "--lora_target_modules", "o_proj,mlp.up_proj"]
    saved_run(one_rank, three, args_for(base, data, "qlora", *some))
    return runs


def run_in_chat_format(one_rank, folder: Path, base: Path) -> Path:
    """Of a copy of `base` whose tokenizer writes ChatML, on one conversation."""
    model = shutil.copytree(base, folder / "model")
    tokenizer = chat_tokenizer(chat_templates.CHATML, "</s>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_end|>"]})
    tokenizer.save_pretrained(model)
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]
    (folder / "rows.jsonl").write_text(json.dumps({"messages": turns}) + "\n")
    saved_run(one_rank, folder / "run", args_for(model, folder / "rows.jsonl", "bnb_dora"))
    return folder / "run"
