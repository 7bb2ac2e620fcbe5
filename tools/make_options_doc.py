"""Write docs/options.md from options/config.py, so that the page and the program agree.

python -m tools.make_options_doc
"""

from __future__ import annotations

from pathlib import Path

from launch import precision
from options.config import FIELDS, TOY_DEFAULTS
from options.declaration import format_value
from options.methods import METHODS, NEEDS

PAGE = Path(__file__).parent.parent / "docs" / "options.md"

INTRODUCTION = """# Options

Made by `python -m tools.make_options_doc` from options/config.py; `python train.py --help` shows the same.

Options may be written with `-` for `_`, and switches without `true`. `--config run.yaml` reads them from a
file (`option: value` lines; the command line wins); every run writes its own as `<output_dir>/config.yaml`.
There a value means what it means on the command line, whatever YAML would make of it: `name: 007` is the text
007. A plain `null` or `~` leaves an option unset, and a list may stand where values are comma-separated.
An option that has no effect with the chosen train type is an error. Options of TRL, axolotl, LLaMA-Factory,
accelerate and DeepSpeed are answered with what they are here: [coming from another program](migrate.md).
"""

DIFFERENCES = """
## Where the defaults differ from fsdp_qlora's

Names, choices and meanings are fsdp_qlora's. These defaults are not:

| option | fsdp_qlora | here | why |
|---|---|---|---|
| train_type | qlora | bnb_dora | its paper finds it ahead of LoRA at equal rank; what it costs here: \
[benchmarks](benchmarks.md) |
| model_name, dataset | Llama-2-7b, alpaca_sample | toy, toy | a first run needs no download |
| lr | 1e-5 | 2e-4, 1e-5 for full | 1e-5 hardly moves an adapter |
| lora_dropout | 0.1 | 0 | |
| lora_target_modules all | without o_proj | with o_proj | all means all |
| wd | 0.1 | 0 | and never on vectors: norms, biases, DoRA magnitudes |
| apply_gradient_clipping, grad_norm | false, 0.3 | true, 1.0 | the norm is logged either way |
| sharding_strategy | full_shard | auto | the same on one node; on several it shards within each |
| precision | bf16 | auto | adapters updated in bf16 lose small steps |
| save_model | false | true | |
| output_dir | output | runs/&lt;date-time&gt;-&lt;train_type&gt; | a run never replaces another |
| log_to | tqdm | tqdm | metrics.jsonl is written always; `tensorboard` is new |
| master_port | 12355 | a free one | two runs on one machine do not collide |
| dataset_format | Alpaca's answer right behind "### Response:" | on the next line | as most later programs; \
theirs is [`alpaca_stanford`](data.md#the-two-prompts-of-alpaca) |
| dataset_samples | 512 | all rows; 512 for alpaca_sample and dummy | it limits any dataset |
| max_steps | per epoch | of the whole run | |
| AdamW | betas 0.9, 0.95, eps 1e-5 | torch's: 0.9, 0.999, 1e-8 | |

`--llama_pro_path` is the folder that `python block_expansion.py` writes. Which of its layers are new is read
from its config.json (fsdp_qlora: from the folder's name); weights and config come from there, and
`--model_name` may be left out, or name that folder in its place. `--expansion_rate` is rounded to the nearest
number of layers.

`lora` and `custom_lora` are the same here, and so are `qlora` and `custom_qlora`: one implementation, ours.

Accepted, because older commands have them, and without effect: `low_memory` (loading always streams),
`reentrant_checkpointing` (non-reentrant needs no more memory here). `no_sync true` reduces gradients once per
optimizer step.
"""


def make_table(group: str) -> list[str]:
    """Return the heading and the Markdown table of the options in a group, as lines."""
    lines = [f"\n## {group}\n", "| option | default | |", "|---|---|---|"]
    for name, field in FIELDS.items():
        meta = field.metadata
        if meta["group"] != group:
            continue
        text = meta["help"]
        text += f": {', '.join(map(str, meta['choices']))}" if meta["choices"] else ""
        text += f" ({meta['within']})" if meta["within"] and meta["within"].has_upper_bound else ""
        text += f" *(only for {NEEDS[meta['needs']]})*" if meta["needs"] else ""
        lines.append(f"| `{name}` | {format_value(field.default)} | {text} |")
    return lines


def make_page() -> str:
    """Return the text of docs/options.md."""
    lines = [INTRODUCTION]
    for group in dict.fromkeys(f.metadata["group"] for f in FIELDS.values()):
        lines += make_table(group)
    lines += [
        "\n## Train types\n",
        "| train_type | frozen linears | adapter | what is saved |",
        "|---|---|---|---|",
    ]
    stored = {None: "16 or 32 bits", "bnb": "NF4, 4 bits", "hqq": "HQQ"}
    for name, m in METHODS.items():
        adapter = m.adapter or ("new blocks" if m.expansion else "-")
        frozen = "none: all is trained" if not (m.adapter or m.expansion) else stored[m.quantizer]
        lines.append(f"| {name} | {frozen} | {adapter} | {m.saves} |")
    _, modes, note = precision.__doc__.strip().split("\n\n")
    lines += ["\n## Precisions\n", *[f"    {line}" for line in modes.splitlines()], f"\n{note}"]
    toy = ", ".join(f"`{k}` {format_value(v)}" for k, v in TOY_DEFAULTS.items())
    lines.append(f"\nWith an embedded model (`--model_name toy` or `toy_vision`) other defaults hold: {toy}.")
    return "\n".join(lines) + "\n" + DIFFERENCES


if __name__ == "__main__":
    PAGE.write_text(make_page(), encoding="utf-8")
