"""The systems to measure: ours and its peers.

Each is a script in peers/ that prints one line of JSON (format: peers/work.py). An interpreter that has the
system's packages runs it.
"""

from __future__ import annotations

import json
import math
import subprocess
from dataclasses import dataclass
from pathlib import Path

PEERS = Path(__file__).parent / "peers"
CHECKPOINTING = ("full", "none", "offload")
TRAIN_TYPES = ("qlora", "bnb_dora")


@dataclass(frozen=True)
class Setting:
    """Work of one run. gpus: number of processes, each with a GPU if there are any."""

    gpus: int
    train_type: str
    checkpointing: str

    def __str__(self) -> str:
        return (
            f"{self.train_type}, {self.gpus} GPU{'s' * (self.gpus > 1)}, {self.checkpointing} checkpointing"
        )


@dataclass(frozen=True)
class System:
    """A system and its limits.

    Attributes:
        script: file in peers/.
        required_packages: packages without which it cannot run.
        other_packages: further packages whose versions matter.
        launcher: key of LAUNCHERS that starts several processes; "" if the script starts them.
        max_gpus: most GPUs that it can use.
        max_processes: most processes that it can use without GPUs.
        checkpointing: kinds of activation checkpointing that it has.
        has_experts: whether it trains mixtures of experts.
    """

    script: str
    required_packages: tuple[str, ...]
    other_packages: tuple[str, ...] = ()
    launcher: str = ""
    max_gpus: float = math.inf
    max_processes: float = math.inf
    checkpointing: tuple[str, ...] = ("full", "none")
    has_experts: bool = True

    def find_obstacle(self, setting: Setting, on_gpus: bool, experts: bool = False) -> str:
        """Return why the system cannot run the setting, "" if it can. Looks at no installed package.

        experts: whether the model is a mixture of experts.
        """
        if experts and not self.has_experts:
            return "has no mixtures of experts"
        limit = self.max_gpus if on_gpus else self.max_processes
        if not limit:
            return "needs a GPU"
        if setting.gpus > limit:
            return f"runs on {limit} {'GPU' if on_gpus else 'CPU process'} only"
        if setting.checkpointing not in self.checkpointing:
            return f"has no {setting.checkpointing} checkpointing"
        return ""

    def command(self, python: str, gpus: int) -> list[str]:
        """Return the command, without options, by which the interpreter `python` starts `gpus` processes."""
        launcher = LAUNCHERS[self.launcher](gpus) if gpus > 1 else []
        return [python, *launcher, str(PEERS / self.script)]


def _torchrun_arguments(processes: int) -> list[str]:
    return ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]


def _accelerate_arguments(processes: int) -> list[str]:
    """Return the arguments of Python that run a script by `accelerate launch`, in bf16 with FSDP 1."""
    options = {
        "num_processes": processes,
        "num_machines": 1,
        "mixed_precision": "bf16",
        "dynamo_backend": "no",
        "fsdp_version": 1,
        "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
        "fsdp_transformer_layer_cls_to_wrap": "LlamaDecoderLayer",
        "fsdp_use_orig_params": "false",
        "fsdp_sync_module_states": "true",
        "fsdp_cpu_ram_efficient_loading": "true",
    }
    return [
        *("-m", "accelerate.commands.launch", "--use_fsdp"),
        *(f"--{name}={value}" for name, value in options.items()),
    ]


LAUNCHERS = {"": lambda processes: [], "torchrun": _torchrun_arguments, "accelerate": _accelerate_arguments}

OURS = "ours"
SYSTEMS = {
    OURS: System("ours.py", ("torch", "transformers", "bitsandbytes"), checkpointing=CHECKPOINTING),
    "peft": System(
        "peft_loop.py", ("peft", "bitsandbytes", "accelerate"), ("torch", "transformers"), launcher="torchrun"
    ),
    "trl": System(
        "trl_sft.py",
        ("trl", "peft", "bitsandbytes"),
        ("torch", "transformers", "accelerate", "liger-kernel"),
        launcher="accelerate",
        max_processes=1,
    ),
    "unsloth": System(
        "unsloth_sft.py",
        ("unsloth", "trl"),
        ("torch", "transformers", "xformers", "flash-attn"),
        max_gpus=1,
        max_processes=0,
        checkpointing=CHECKPOINTING,
    ),
    "torchtune": System(
        "torchtune_step.py",
        ("torchtune", "torchao", "transformers"),
        ("torch",),
        max_gpus=1,
        max_processes=1,
        has_experts=False,
    ),
    "fsdp_qlora": System(
        "fsdp_qlora.py",
        ("torch", "transformers", "bitsandbytes", "fastcore"),
        max_processes=0,
        checkpointing=CHECKPOINTING,
        has_experts=False,
    ),
}


def find_versions(system: System, python: str) -> dict[str, str | None]:
    """Return {package: version or None} of the system's packages in the interpreter `python`, and its own."""
    names = dict.fromkeys((*system.required_packages, *system.other_packages))
    command = [python, str(PEERS / "packages.py"), *names]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
