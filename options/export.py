"""Options of export.py. Errors in them are found before torch and transformers are imported."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from options.command_line import Command
from options.declaration import REQUIRED, argument, option
from options.errors import UserError

EXPORT_KINDS = ("merged", "gguf-ready", "adapter")
DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Options:
    """The options of export.py."""

    # fmt: off
    run: str = argument("RUN", "the --output_dir of a run of train.py")
    to: str = option(REQUIRED, "Result", "kind of result: a merged model folder, one for llama.cpp's"
        " converter, or an adapter for PEFT", choices=EXPORT_KINDS)
    out: Path = option(REQUIRED, "Result", "folder to write")
    base: str | None = option(None, "Result", "weights to merge into: the original ones, or the dequantized"
        " ones that training computed with; unset = dequantized, but original for a Llama-Pro run",
        choices=("original", "dequantized"))
    dtype: str | None = option(None, "Result", "dtype of the weights; unset = the checkpoint's, but 16 bits"
        " for gguf-ready", choices=DTYPES)
    overwrite: bool = option(False, "Result", "replace the model that --out holds")
    base_model: str | None = option(None, "Model", "folder or hub id of the base model, if it is not the one"
        " in config.yaml")
    device: str | None = option(None, "Model", "where to merge; unset = cuda if there is a GPU",
        choices=("cpu", "cuda"))
    check: bool = option(True, "Model", "compare the logits with the trained model's")
    push_to_hub: str | None = option(None, "Upload", "hub repository to upload the folder to (owner/name); a"
        " new one is made private")
    # fmt: on


COMMAND = Command(
    "export.py",
    "RUN --to merged|gguf-ready|adapter --out DIR [--option value ...]",
    "Make a model folder, or an adapter with a model card, from a finished run.",
    Options,
)


def parse(argv: list[str]) -> Options:
    """Return the options in `argv`. Raises UserError if they are wrong or do not go together.

    Exits with status 0 on --help.
    """
    given = COMMAND.read(argv)
    if given["to"] == "adapter":
        for name in ("base", "dtype", "device", "check"):
            if name in given:
                raise UserError(f"--{name} has no effect with --to adapter; leave it out")
    if given["to"] == "gguf-ready" and given.get("dtype") == "float32":
        raise UserError("--dtype float32: gguf-ready is in 16 bits; choose bfloat16 or float16")
    return Options(**given)
