"""Puts new layers between the layers of a model, for the Llama-Pro train types (arXiv 2401.02415).

    python block_expansion.py --model_name meta-llama/Llama-2-7b-hf --output_dir llama-pro --new_blocks 8
    python block_expansion.py --model_name llama-pro --output_dir whole --blocks runs/x/new_blocks.safetensors

The first makes an expanded model: a complete Hugging Face folder with the base model's logits, whose
config.json lists its new layers. The second puts new blocks that were trained and saved alone
(`--llama_pro_save blocks`) into the expanded model. Both copy the weights piece by piece.
"""

from __future__ import annotations

import sys

from launch.program import run_command
from options.block_expansion import Options, parse


def run(options: Options) -> int:
    """Returns the exit status: 0, or 2 for something the user can put right."""
    from checkpoints.block_expansion import run  # takes seconds: wrong options and --help are answered by now

    return run(options)


def main(argv: list[str]) -> int:
    """Options in, exit status out."""
    return run_command(argv, parse, run)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
