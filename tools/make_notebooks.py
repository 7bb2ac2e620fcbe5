"""Write notebooks/kaggle_2xT4.ipynb and notebooks/colab.ipynb from one list of cells.

python -m tools.make_notebooks

The same cells give the same files, byte for byte, without outputs. tests/notebooks/test_notebooks.py asserts
that the committed files are these. Cells call notebooks/session.py and notebooks/run_folders.py.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent.parent / "notebooks"
KAGGLE, COLAB = "kaggle_2xT4", "colab"  # names of the files


@dataclass(frozen=True)
class Cell:
    """A cell.

    Attributes:
        name: its id in the file.
        text: Python, or Markdown if it begins with #, a heading.
        only: the one notebook that has it; None = both.
    """

    name: str
    text: str
    only: str | None = None

    @property
    def is_markdown(self) -> bool:
        """Whether the cell is text."""
        return self.text.lstrip().startswith("#")


METADATA: dict[str, dict[str, Any]] = {
    # The accelerator's name means two T4s.
    KAGGLE: {
        "kaggle": {
            "accelerator": "nvidiaTeslaT4",
            "dataSources": [],
            "isGpuEnabled": True,
            "isInternetEnabled": True,
            "language": "python",
            "sourceType": "notebook",
        }
    },
    COLAB: {"accelerator": "GPU", "colab": {"gpuType": "T4", "name": "colab.ipynb", "provenance": []}},
}

# papermill reads one assignment per line, and no line whose comment has an equals sign.
COMMON_PARAMETERS = """
TRAIN_TYPE = "bnb_dora"  # QDoRA; "qlora" is QLoRA
CONTEXT_LENGTH = 2048  # longest row, in tokens
ROWS_PER_STEP = 8  # rows of an optimizer step, on all GPUs together
BATCH_SIZE = 1  # rows per GPU at a time
NUM_EPOCHS = 1  # passes over the data
MAX_STEPS = -1  # stop after this many optimizer steps; -1: no limit
SAVE_MINUTES = 20  # minutes between checkpoints
KEEP = 2  # newest checkpoints that stay; -1: all
GPUS = "auto"  # all GPUs, or a number of processes
SCRATCH = "/tmp"  # downloads and caches: there is more room than in the working folder
CODE = "/tmp/fsdp-finetune"  # where the code is copied to
PROMPT = "How is uncomplicated malaria treated in adults?"  # asked after training
MAX_NEW_TOKENS = 128  # longest answer
PUSH_TO = ""  # hub repository for the result, "owner/name"; empty: none
"""

# ADVICE: what to do if there is no internet.
FETCH_CODE = '''
import os
import shutil
import subprocess
import sys
import time


class NoCode(Exception):
    """The code cannot be fetched."""

    def _render_traceback_(self):  # what Jupyter shows: this line, without a traceback
        return [f"{type(self).__name__}: {self}"]


STARTED = globals().get("STARTED", time.time())
STAGING, RECORD = f"{CODE}.tmp", ".fetched_from"
fetched_from = None
if os.path.isdir(CODE):
    if not os.path.isfile(f"{CODE}/{RECORD}"):
        raise NoCode(f"CODE = {CODE}: is a folder of yours; choose the name of a new one")
    with open(f"{CODE}/{RECORD}") as record:
        fetched_from = record.read()
if fetched_from != REPO:
    shutil.rmtree(STAGING, ignore_errors=True)
    if os.path.isfile(f"{REPO}/train.py"):
        hidden = shutil.ignore_patterns(".*", "runs")
        shutil.copytree(REPO, STAGING, ignore=hidden, copy_function=shutil.copyfile)
    else:
        clone = ["git", "clone", "--quiet", "--depth", "1", REPO, STAGING]
        no_prompt = {**os.environ, "GIT_TERMINAL_PROMPT": "0"}
        git = subprocess.run(clone, env=no_prompt, stderr=subprocess.PIPE, text=True)
        if git.returncode:
            reason = next((line for line in git.stderr.splitlines() if line.startswith("fatal:")), "")
            advice = "correct it, or ADVICE"
            raise NoCode(f"no code from REPO = {REPO} ({reason}): {advice}")
    with open(f"{STAGING}/{RECORD}", "w") as record:
        record.write(REPO)
    shutil.rmtree(CODE, ignore_errors=True)  # of another REPO
    os.rename(STAGING, CODE)  # the code gets its name when it is complete
    for module in ("session", "run_options", "run_folders"):
        sys.modules.pop(module, None)
sys.path.insert(0, f"{CODE}/notebooks")
'''

# WANTED: the number of GPUs that the platform has.
MACHINE = """
import run_folders
import run_options
import session

session.use_caches(SCRATCH)
session.describe_machine(os.path.dirname(OUTPUT), SCRATCH)
session.check_internet(MODEL, DATASET)
session.check_room(OUTPUT, NEEDED_GB)
WORLD_SIZE = session.choose_world_size(GPUS, wanted=WANTED)
"""

CELLS = (
    Cell(
        "title",
        """
# Fine-tune Llama-3.1-8B with QDoRA on two T4s

*Run All* fetches the code, shows that two GPUs train as one does, fine-tunes on Uganda's clinical guidelines
with both, asks the base and the tuned model the same question, and exports the adapter in PEFT's format. The
run saves checkpoints and stops before the session's 12 hours end. The last section continues it in a later
session.
""",
        KAGGLE,
    ),
    Cell(
        "title",
        """
# Fine-tune Llama-3.1-8B with QDoRA on one T4

*Run all* fetches the code, fine-tunes on Uganda's clinical guidelines, asks the base and the tuned model the
same question, and exports the adapter in PEFT's format. The run saves checkpoints. With Google Drive, a later
session continues it.
""",
        COLAB,
    ),
    Cell(
        "settings",
        """
## Settings

1. **Settings > Accelerator > GPU T4 x2**. With one GPU everything works too, in about twice the time.
2. **Settings > Internet** on. Kaggle asks for a verified phone number once.
3. Llama is gated: accept its licence on https://huggingface.co/meta-llama/Llama-3.1-8B, and put a token of
   that account into **Add-ons > Secrets** as `HF_TOKEN`, attached to this notebook. For a model without a
   licence change `MODEL`.
4. `REPO`, in the next cell: where the code comes from. Change the other values as you like.
""",
        KAGGLE,
    ),
    Cell(
        "settings",
        """
## Settings

1. **Runtime > Change runtime type > T4 GPU**.
2. Llama is gated: accept its licence on https://huggingface.co/meta-llama/Llama-3.1-8B, and put a token of
   that account into the secrets (the key symbol at the left) as `HF_TOKEN`, with access for this notebook.
   For a model without a licence change `MODEL`.
3. `REPO`, in the next cell: where the code comes from. Change the other values as you like.
""",
        COLAB,
    ),
    Cell(
        "parameters",
        """
REPO = "https://github.com/OWNER/REPO.git"  # git URL of the code, or its folder: "/kaggle/input/..."
MODEL = "meta-llama/Llama-3.1-8B"  # hub id, or a folder: "/kaggle/input/..."
DATASET = "uganda_clinical_guidelines"  # name in datasets/, hub id, or a file: "/kaggle/input/.../rows.jsonl"
LORA_RANK = 64  # rank of the adapter, if TRAIN_TYPE has one
PREVIOUS = ""  # folder of an earlier run to continue: "/kaggle/input/..."; empty: none
OUTPUT = "/kaggle/working/run"  # folder of the run
MAX_MINUTES = 660  # this notebook's time for training, from its first cell on; an hour is left for the rest
NEEDED_GB = 8.0  # room in the working folder: three checkpoints (12 bytes per trained parameter), the adapter
PARITY_STEPS = 3  # steps that are compared on one GPU and on all; 0: none
PARITY_TOLERANCE = 2e-3  # largest relative difference of their losses
"""
        + COMMON_PARAMETERS,
        KAGGLE,
    ),
    Cell(
        "parameters",
        """
REPO = "https://github.com/OWNER/REPO.git"  # git URL of the code, or its folder
MODEL = "meta-llama/Llama-3.1-8B"  # hub id, or a folder
DATASET = "uganda_clinical_guidelines"  # name in datasets/, hub id, or a file: "/content/rows.jsonl"
LORA_RANK = 16  # rank of the adapter, if TRAIN_TYPE has one
USE_DRIVE = False  # mount Google Drive, for an OUTPUT that outlives the session
OUTPUT = "/content/run"  # folder of the run; with USE_DRIVE: "/content/drive/MyDrive/run"
MAX_MINUTES = 600  # this notebook's time for training, from its first cell on
NEEDED_GB = 3.0  # room for OUTPUT: three checkpoints (12 bytes per trained parameter) and the adapter
"""
        + COMMON_PARAMETERS,
        COLAB,
    ),
    Cell("code-title", "## Code and machine"),
    Cell(
        "fetch-code",
        FETCH_CODE.replace("ADVICE", "turn on Settings > Internet, and run all cells again"),
        KAGGLE,
    ),
    Cell(
        "fetch-code",
        FETCH_CODE.replace("ADVICE", "start a new session if this one has no internet"),
        COLAB,
    ),
    Cell(
        "drive",
        """
if USE_DRIVE:
    from google.colab import drive

    drive.mount("/content/drive")
""",
        COLAB,
    ),
    Cell("machine", MACHINE.replace("WANTED", "2"), KAGGLE),
    Cell("machine", MACHINE.replace("WANTED", "1"), COLAB),
    Cell("install-title", "## Packages\n\npip installs what is missing, and keeps this session's torch."),
    Cell("install", "session.install_requirements()"),
    Cell(
        "token-title",
        """
## Token

It is read from the secret `HF_TOKEN`, and never printed. The first command below that needs the model
downloads it, which takes some minutes without a line.
""",
    ),
    Cell(
        "token",
        """
session.use_hub_token()
session.check_model_access(MODEL)
""",
    ),
    Cell(
        "data-title",
        """
## Data

`DATASET` is used unless there are rows of your own: write them here, one dictionary per row. For many rows
attach a .jsonl, .csv or .parquet file, and name it as `DATASET`. docs/data.md explains the formats.
""",
    ),
    Cell(
        "data",
        """
OWN_ROWS = [
    # {"instruction": "What is the capital of Uganda?", "input": "", "output": "Kampala."},
    # {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]},
]
if OWN_ROWS:
    DATASET = run_folders.write_rows(OWN_ROWS, f"{SCRATCH}/own_rows.jsonl")
MODEL_OPTIONS = [
    *run_options.method_options(TRAIN_TYPE, LORA_RANK, f"{SCRATCH}/quantized"),
    *("--model_name", MODEL),
    *("--dataset", DATASET),
    *("--batch_size", BATCH_SIZE),
    *("--log_to", "stdout"),
]
print("rows:", DATASET)
""",
    ),
    Cell(
        "parity-title",
        """
## Two GPUs train as one

The same rows are trained on with one GPU, which accumulates gradients, and with all GPUs. Each micro-batch is
the same, so in step 1 only the order of sums differs. From step 2 on, AdamW has turned rounding of the
gradients into slightly different weights. `PARITY_TOLERANCE` is four times fp16's rounding (2^-11, relative):
the losses stay within it, while a step that misses a rank's rows differs by percents. On a CPU, where the
tests run this cell, 1e-4 holds.
""",
        KAGGLE,
    ),
    Cell(
        "parity",
        """
if PREVIOUS or not PARITY_STEPS:
    print("not compared: a run goes on, or PARITY_STEPS is 0")
elif WORLD_SIZE == 1:
    print("not compared: there is one GPU")
else:
    PARITY_RUNS = {}
    for processes in (1, WORLD_SIZE):
        folder = PARITY_RUNS[f"{processes} GPU" + "s" * (processes > 1)] = f"{SCRATCH}/parity-{processes}"
        accumulation = run_options.accumulation_steps(ROWS_PER_STEP, processes, BATCH_SIZE)
        options = [
            *("--world_size", processes),
            *("--gradient_accumulation_steps", accumulation),
            *("--context_length", min(512, CONTEXT_LENGTH)),
            *("--max_steps", PARITY_STEPS),
            *("--save_model", "false"),
            *("--overwrite", "true"),
            *("--output_dir", folder),
        ]
        session.run(["train.py", *MODEL_OPTIONS, *options])
    run_folders.compare_losses(PARITY_RUNS, PARITY_TOLERANCE)
""",
        KAGGLE,
    ),
    Cell(
        "train-title",
        """
## Train

To stop, interrupt this cell once and wait: the run saves a checkpoint first. Run the cell again to go on.
Options that change what is trained must then be what they were; if not, train.py refuses with a line that
names the option, and the run stays as it is.
""",
    ),
    Cell("attach", "run_folders.attach_run(PREVIOUS, OUTPUT, KEEP)", KAGGLE),
    Cell(
        "train",
        """
accumulation = run_options.accumulation_steps(ROWS_PER_STEP, WORLD_SIZE, BATCH_SIZE)
options = [
    *("--world_size", WORLD_SIZE),
    *("--gradient_accumulation_steps", accumulation),
    *("--context_length", CONTEXT_LENGTH),
    *("--num_epochs", NUM_EPOCHS),
    *("--max_steps", MAX_STEPS),
    *("--max_minutes", run_options.minutes_left(STARTED, MAX_MINUTES)),
    *("--save_minutes", SAVE_MINUTES),
    *("--keep", KEEP),
    *("--resume", "auto"),
    *("--output_dir", OUTPUT),
]
session.run(["train.py", *MODEL_OPTIONS, *options])
""",
    ),
    Cell("report", "run_folders.show_run(OUTPUT)"),
    Cell("answers-title", "## Ask\n\nThe base model's answer and the tuned model's, side by side."),
    Cell(
        "answers",
        """
if run_folders.has_result(OUTPUT):
    session.run(["generate.py", OUTPUT, "--prompt", PROMPT, "--max_new_tokens", MAX_NEW_TOKENS])
""",
    ),
    Cell(
        "export-title",
        """
## Export and publish

The adapter, or the whole model if `TRAIN_TYPE` makes no adapter, gets a model card. With `PUSH_TO` it goes to
the hub, into a private repository if that is new; the token then needs the right to write. For an adapter,
`--to merged --out /tmp/merged` makes a whole model, of 16 GB.
""",
    ),
    Cell(
        "export",
        """
if run_folders.has_result(OUTPUT):
    to = run_folders.export_format(OUTPUT)
    options = ["--to", to, "--out", f"{OUTPUT}-{to}", "--overwrite", "true"]
    session.run(["export.py", OUTPUT, *options, *(["--push_to_hub", PUSH_TO] if PUSH_TO else [])])
""",
    ),
    Cell(
        "later",
        """
## Go on in a later session

1. **Save Version > Save & Run All**. When it has ended, its output holds the run with its checkpoints.
2. In a new session: **Add Input > Your Work > this notebook's output**. Set `PREVIOUS` to its folder in
   `/kaggle/input`, leave the other values as they are, and choose *Run All*. The run is copied, because
   inputs are read-only, and goes on after its newest complete checkpoint.
3. To train for longer than planned, raise `NUM_EPOCHS` or `MAX_STEPS`.
""",
        KAGGLE,
    ),
    Cell(
        "later",
        """
## Go on in a later session

With `USE_DRIVE = True` and an `OUTPUT` on Drive, *Run all* in a new session goes on after the newest complete
checkpoint. To train for longer than planned, raise `NUM_EPOCHS` or `MAX_STEPS`.
""",
        COLAB,
    ),
)


def make_notebook(name: str) -> str:
    """Return the text of a notebook file: nbformat 4.5, without outputs. name: KAGGLE or COLAB."""
    cells: list[dict[str, Any]] = []
    for cell in CELLS:
        if cell.only not in (None, name):
            continue
        lines = cell.text.strip().splitlines(keepends=True)
        tags = ["parameters"] if cell.name == "parameters" else []
        content: dict[str, Any] = {
            "id": cell.name,
            "metadata": {"tags": tags} if tags else {},
            "source": lines,
        }
        if cell.is_markdown:
            cells.append({"cell_type": "markdown", **content})
        else:
            cells.append({"cell_type": "code", "execution_count": None, "outputs": [], **content})
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    metadata = {**METADATA[name], "kernelspec": kernel, "language_info": {"name": "python"}}
    notebook = {"cells": cells, "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}
    return json.dumps(notebook, indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    for notebook_name in METADATA:
        (FOLDER / f"{notebook_name}.ipynb").write_text(make_notebook(notebook_name), encoding="utf-8")
