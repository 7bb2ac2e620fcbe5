"""Write the tables of docs/migrate.md from options/foreign_rules.py, so that the page and the program agree.

python -m tools.make_migrate_doc
"""

from __future__ import annotations

from pathlib import Path

from options.foreign import TOOLS
from options.foreign_rules import FOREIGN, LOST, NEEDLESS, SUBJECTS

PAGE = Path(__file__).parent.parent / "docs" / "migrate.md"
BEGIN, END = "<!-- computed: python -m tools.make_migrate_doc -->", "<!-- end -->"

# Settings of several GPUs and of memory, in the order of the table.
PARALLEL = (
    ("DeepSpeed", {"zero_optimization.stage": "0"}),
    ("DeepSpeed", {"zero_optimization.stage": "1"}),
    ("DeepSpeed", {"zero_optimization.stage": "2"}),
    ("DeepSpeed", {"zero_optimization.stage": "3"}),
    ("DeepSpeed", {"zero_optimization.offload_optimizer.device": "cpu"}),
    ("DeepSpeed", {"zero_optimization.offload_param.device": "cpu"}),
    ("DeepSpeed", {"zero_optimization.offload_param.device": "nvme"}),
    ("DeepSpeed", {"zero_optimization.zero_hpz_partition_size": "8"}),
    ("DeepSpeed", {"activation_checkpointing.cpu_checkpointing": "true"}),
    ("accelerate", {"distributed_type": "MULTI_GPU"}),
    ("accelerate", {"distributed_type": "FSDP"}),
    ("FSDP 1", {"fsdp_sharding_strategy": "FULL_SHARD"}),
    ("FSDP 1", {"fsdp_sharding_strategy": "SHARD_GRAD_OP"}),
    ("FSDP 1", {"fsdp_sharding_strategy": "NO_SHARD"}),
    ("FSDP 1", {"fsdp_sharding_strategy": "HYBRID_SHARD"}),
    ("FSDP 1", {"fsdp_sharding_strategy": "HYBRID_SHARD_ZERO2"}),
    ("FSDP 2", {"fsdp_reshard_after_forward": "true"}),
    ("FSDP 2", {"fsdp_reshard_after_forward": "false"}),
    ("FSDP 1 and 2", {"fsdp_offload_params": "true"}),
    ("FSDP 1 and 2", {"fsdp_activation_checkpointing": "true"}),
    ("FSDP 1 and 2", {"fsdp_state_dict_type": "FULL_STATE_DICT"}),
    ("FSDP 1 and 2", {"fsdp_cpu_ram_efficient_loading": "true"}),
    ("FSDP 1 and 2", {"fsdp_transformer_layer_cls_to_wrap": "LlamaDecoderLayer"}),
    ("transformers", {"fsdp": "full_shard auto_wrap offload"}),
)


def _code(names: tuple[str, ...]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def make_tables() -> str:
    """Return all computed tables in Markdown."""
    lines: list[str] = []
    for subject, rows in SUBJECTS.items():
        lines += [f"\n## {subject}\n", f"| {' | '.join(TOOLS)} | here | |", "|---" * (len(TOOLS) + 2) + "|"]
        for row in rows:
            here = _code(tuple(row.here.split(", "))) if row.here else "-"
            lines.append(f"| {' | '.join(map(_code, row.names))} | {here} | {row.note} |")
    lines += ["\n## ZeRO and FSDP\n", "| from | setting | here | |", "|---|---|---|---|"]
    for program, settings in PARALLEL:
        ((name, value),) = settings.items()
        found = FOREIGN.by_name[name].apply(settings)
        assert found is not None
        here = " ".join(f"--{option} {text}" for option, text in found.options.items())
        lines.append(f"| {program} | `{name}: {value}` | {f'`{here}`' if here else '-'} | {found.note} |")
    for title, reasons in (("What has no equal", LOST), ("What is not needed", NEEDLESS)):
        lines += [f"\n## {title}\n", "| options | why |", "|---|---|"]
        lines += [f"| {_code(tuple(names.split()))} | {reason} |" for reason, names in reasons.items()]
    return "\n".join(lines) + "\n\n"


def replace_tables(page: str, tables: str) -> str:
    """Return the page with `tables` between its two marks."""
    before, _, rest = page.partition(BEGIN)
    return f"{before}{BEGIN}\n{tables}{END}{rest.partition(END)[2]}"


if __name__ == "__main__":
    PAGE.write_text(replace_tables(PAGE.read_text("utf-8"), make_tables()), "utf-8")
