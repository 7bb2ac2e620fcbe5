"""What a run leaves: the adapter in PEFT's format, or a Hugging Face model folder.

Formats: https://huggingface.co/docs/peft/developer_guides/checkpoint (adapter_config.json,
adapter_model.safetensors), and safetensors shards with an index (see model_files). Files are written under
a temporary name and renamed when whole, the one that makes the folder loadable last.
"""

from __future__ import annotations

import contextlib
from pathlib import Path

from files.disk_room import check_writable
from files.model_folder import INDEX
from options.config import CHECKPOINTS
from options.errors import UserError

ADAPTER, BLOCKS = "adapter_model.safetensors", "new_blocks.safetensors"
BEST, SCORE = "best", "evaluation.json"  # the folder of the best step, and the file in it that names the step
RUN_FILES = ("config.yaml", "run.json", "metrics.jsonl", "bad_steps.jsonl", "samples.jsonl", "loss.png", "report.html", "memory*.html",
             "memory*.png", "memory_snapshot*.pickle", "adapter_config.json", ADAPTER, BLOCKS)  # fmt: skip
MODEL_FILES = ("config.json", INDEX, "model.safetensors", "model-*.safetensors")
TOKENIZER = ("tokenizer*", "special_tokens_map.json", "vocab.*", "merges.txt", "added_tokens.json",
             "chat_template.*")  # fmt: skip
# A model folder's small files that go along with retrained weights, as they are.
COMPANIONS = ("config.json", "generation_config.json", *TOKENIZER)


def holds_run(folder: Path) -> bool:
    return any(True for pattern in RUN_FILES + MODEL_FILES for _ in folder.glob(pattern))


def check_output(folder: Path, overwrite: bool) -> None:
    """Raises UserError if the folder holds a run and may not be replaced, or cannot be written, or has a link where a run
    writes and removes files."""
    check_writable(folder, "--output_dir")
    for name in (CHECKPOINTS, "wandb"):
        if (folder / name).is_symlink():
            raise UserError(
                f"--output_dir {folder}: its {name} is a link; a run writes in folders of its own"
            )
    if holds_run(folder) and not overwrite:
        raise UserError(
            f"--output_dir {folder}: holds a run already; choose another folder, or add --overwrite"
        )


def clear_output(folder: Path) -> None:
    """Makes the folder, and removes from it the files of an earlier run, whole or cut, and nothing else."""
    folder.mkdir(parents=True, exist_ok=True)
    for pattern in RUN_FILES + MODEL_FILES:
        for path in (*folder.glob(pattern), *folder.glob(f"{pattern}.tmp")):
            path.unlink()
    for name in (BEST, f"{BEST}.tmp", f"{BEST}.old"):
        if (folder / name).is_symlink():  # what it leads to is not ours
            (folder / name).unlink()
        for pattern in (*RUN_FILES, *MODEL_FILES, *COMPANIONS, SCORE, "*.tmp"):
            for path in (folder / name).glob(pattern):
                path.unlink()
        with contextlib.suppress(OSError):  # there is none, or it holds files of others
            (folder / name).rmdir()
