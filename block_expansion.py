"""Insert new layers between the layers of a model, for the Llama-Pro train types (arXiv 2401.02415).

    python block_expansion.py --model_name meta-llama/Llama-2-7b-hf --output_dir llama-pro --new_blocks 8
    python block_expansion.py --model_name llama-pro --output_dir whole --blocks runs/x/new_blocks.safetensors

The first command writes an expanded model: a complete Hugging Face folder with the base model's logits, whose
config.json lists its new layers. The second puts trained new blocks, which a run saved alone
(`--llama_pro_save blocks`), into the expanded model. Both copy the weights chunk by chunk.
"""

from __future__ import annotations

import sys

from launch.program import run_command
from options.block_expansion import Options, parse


def run(options: Options) -> int:
    """Write an expanded model to --output_dir. Return 0, or 2 for an error that the user can fix."""
    from checkpoints.block_expansion import run  # takes seconds, so after the options are parsed

    return run(options)


def main(argv: list[str]) -> int:
    """Parse the options and run the command. Return the exit status."""
    return run_command(argv, parse, run)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
