"""export.py's command line: what can be wrong with it is found here, before torch and transformers are imported."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from options.command_line import command_parser, suggest, with_underscores
from options.errors import UserError

KINDS = ("merged", "gguf-ready", "adapter")
DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Options:
    """The command line; None where an option was not given."""

    run: str
    to: str
    out: Path
    base: str | None
    base_model: str | None
    dtype: str | None
    device: str | None
    check: bool
    overwrite: bool
    push_to_hub: str | None


def parse(argv: list[str]) -> Options:
    """Raises UserError; exits 0 on --help."""
    parser = command_parser(
        "export.py",
        "RUN --to merged|gguf-ready|adapter --out DIR [--option value ...]",
        "Make a model folder, or an adapter with a model card, of a finished run.",
    )
    parser.add_argument("run", metavar="RUN", nargs="?", help="the --output_dir of train.py")
    for name, metavar, text, choices in (
        ("to", "KIND", "merged, gguf-ready (for llama.cpp's converter) or adapter (PEFT)", KINDS),
        ("out", "DIR", "folder to write", None),
        ("base", "NAME", "merge into the original weights, or into the dequantized ones that training computed"
         " with [dequantized; original for a Llama-Pro run]", ("original", "dequantized")),
        ("base_model", "TEXT", "folder or hub id of the base, where it is not the one that config.yaml names", None),
        ("dtype", "NAME", "of the weights: float32, bfloat16 or float16 [the checkpoint's; for gguf-ready 16 bits]",
         DTYPES),
        ("device", "NAME", "cpu or cuda, to merge on [cuda where there is one]", ("cpu", "cuda")),
        ("push_to_hub", "REPO", "upload the folder to this repository (owner/name), made private if it is new", None),
    ):  # fmt: skip
        parser.add_argument(f"--{name}", metavar=metavar, help=text, choices=choices)
    for name, default, text in (
        ("check", None, "compare the logits with the trained model's [true]"),
        ("overwrite", "false", "replace the model that DIR holds [false]"),
    ):
        flag = {"nargs": "?", "const": "true", "choices": ("true", "false"), "metavar": "BOOL"}
        parser.add_argument(f"--{name}", default=default, help=text, **flag)
    args, rest = parser.parse_known_args(with_underscores(argv))
    if rest:
        known = suggest(rest[0].split("=")[0], vars(args)) if rest[0].startswith("-") else "; give one RUN"
        raise UserError(f"unknown option {rest[0]}{known}")
    for name, shown in (("run", "RUN"), ("to", "--to"), ("out", "--out")):
        if not getattr(args, name):
            raise UserError(f"{shown} is missing; see --help")
    given = vars(args)
    if args.to == "adapter":
        for name in ("base", "dtype", "device", "check"):
            if given[name] is not None:
                raise UserError(f"--{name} has no effect with --to adapter; leave it out")
    if args.to == "gguf-ready" and args.dtype == "float32":
        raise UserError("--dtype float32: gguf-ready is in 16 bits; choose bfloat16 or float16")
    given |= {"check": args.check != "false", "overwrite": args.overwrite == "true"}
    return Options(**given | {"out": Path(args.out).expanduser()})
