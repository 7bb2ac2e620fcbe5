"""RUN folders as training writes them, and changes to them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import train
from files.names import ADAPTER
from options import config as options
from tests.helpers import chat_templates
from tests.helpers.adapters import args_for
from tests.helpers.logits import IDS
from tests.helpers.runs import make_job, randomize, set_up
from tests.helpers.small_tokenizers import chat_tokenizer
from training.saved_result import save


def save_and_get_logits(rank_info, args, folder) -> torch.Tensor:
    """Set up a run and save its result; return the logits of the training model."""
    return _save(rank_info, *set_up(rank_info, args), folder)


def save_job(rank_info, job, folder) -> torch.Tensor:
    """Save the result of a run that was checked elsewhere; return the logits of the training model."""
    model, _ = train.set_up(job, rank_info)
    randomize(model)
    return _save(rank_info, job, model, folder)


def _save(rank_info, job, model, folder) -> torch.Tensor:
    """Save the result of a run; return the logits of the model."""
    if job.config.method.saves == "model":
        with torch.no_grad():  # so that the saved weights differ from the loaded ones
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.mul_(1.01)
    save(job, model, folder)
    with torch.no_grad():
        return model.eval()(input_ids=IDS.to(rank_info.device), use_cache=False).logits.cpu()


def write_random_run(one_rank, folder, args) -> torch.Tensor:
    """Write a RUN with random adapters (or weights); return the logits of the model that saved it."""
    folder.mkdir()
    return one_rank(save_run, args, folder)[0]


def save_run(rank_info, args, folder):
    """Write config.yaml and the result of a run; return the logits of the training model."""
    (folder / "config.yaml").write_text(options.dump_yaml(make_job(rank_info, args).config))
    return save_and_get_logits(rank_info, args, folder)


def write_runs_of_one_base(one_rank, folder: Path, base: Path, data: Path) -> list[Path]:
    """Write three RUNs over a 4-bit base: DoRA, the same with other weights, LoRA on some linears."""
    one, two, three = runs = [folder / name for name in ("one", "two", "three")]
    write_random_run(one_rank, one, args_for(base, data, "bnb_dora"))
    shutil.copytree(one, two)
    with safe_open(two / ADAPTER, framework="pt") as f:
        metadata = f.metadata()
    tensors = {n: t * (-1 if n.endswith("lora_B.weight") else 1) for n, t in load_file(two / ADAPTER).items()}
    save_file(tensors, two / ADAPTER, metadata=metadata)
    some = ["--lora_rank", "4", "--lora_target_modules", "o_proj,mlp.up_proj"]
    write_random_run(one_rank, three, args_for(base, data, "qlora", *some))
    return runs


def write_chat_run(one_rank, folder: Path, base: Path) -> Path:
    """Write a RUN of a copy of `base` whose tokenizer writes ChatML, on one conversation."""
    model = shutil.copytree(base, folder / "model")
    tokenizer = chat_tokenizer(chat_templates.CHATML, "</s>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_end|>"]})
    tokenizer.save_pretrained(model)
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]
    (folder / "rows.jsonl").write_text(json.dumps({"messages": turns}) + "\n")
    write_random_run(one_rank, folder / "run", args_for(model, folder / "rows.jsonl", "bnb_dora"))
    return folder / "run"


def edit_base_metadata(file: Path, **digests: str | None) -> None:
    """Change the record of the base in the header of a result's file; None removes an entry."""
    with safe_open(file, framework="pt") as f:
        metadata = f.metadata() | digests
    save_file(load_file(file), file, metadata={k: v for k, v in metadata.items() if v is not None})


def damage_adapter(run, change: str) -> None:
    """Damage a RUN's adapter: "shape", "dtype", "nan", "missing", or else one tensor too many."""
    tensors = load_file(run / ADAPTER)
    with safe_open(run / ADAPTER, framework="pt") as f:
        metadata = f.metadata()
    name = next(n for n in tensors if n.endswith("layers.1.mlp.up_proj.lora_B.weight"))
    if change == "shape":
        tensors[name] = tensors[name][:, :1].contiguous()
    elif change == "dtype":
        tensors[name] = tensors[name].to(torch.int8)
    elif change == "nan":
        tensors[name][3, 1] = float("nan")
    elif change == "missing":
        del tensors[name]
    else:
        tensors[name.replace("layers.1", "layers.7")] = tensors[name].clone()
    save_file(tensors, run / ADAPTER, metadata=metadata)
