"""What is measured: ours and its peers. Each is a script in peers/ that prints one line of JSON (peers/work.py says
what is in it), run by an interpreter that has the system's packages."""

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
    """What one run trains: gpus: processes, each with a GPU if there are any."""

    gpus: int
    train_type: str
    checkpointing: str

    def __str__(self) -> str:
        return (
            f"{self.train_type}, {self.gpus} GPU{'s' * (self.gpus > 1)}, {self.checkpointing} checkpointing"
        )


@dataclass(frozen=True)
class System:
    """script: in peers/; needs: packages without which it cannot run; beside: others whose versions matter;
    launcher: how several processes are started ("" - by the script itself); most_gpus, most_processes: that it can
    use, with GPUs and without; checkpointing: the kinds it has."""

    script: str
    needs: tuple[str, ...]
    beside: tuple[str, ...] = ()
    launcher: str = ""
    most_gpus: float = math.inf
    most_processes: float = math.inf
    checkpointing: tuple[str, ...] = ("full", "none")

    def refusal(self, setting: Setting, on_gpus: bool) -> str:
        """Why it cannot run the setting here; "" if it can."""
        most = self.most_gpus if on_gpus else self.most_processes
        if not most:
            return "needs a GPU"
        if setting.gpus > most:
            return f"runs on {most} {'GPU' if on_gpus else 'CPU process'} only"
        if setting.checkpointing not in self.checkpointing:
            return f"has no {setting.checkpointing} checkpointing"
        return ""

    def command(self, python: str, gpus: int) -> list[str]:
        """What starts the script on so many processes, before its options."""
        start = LAUNCHERS[self.launcher](gpus) if gpus > 1 else []
        return [python, *start, str(PEERS / self.script)]


def _torchrun(processes: int) -> list[str]:
    return ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]


def _accelerate(processes: int) -> list[str]:
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


LAUNCHERS = {"": lambda processes: [], "torchrun": _torchrun, "accelerate": _accelerate}

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
        most_processes=1,
    ),
    "unsloth": System(
        "unsloth_sft.py",
        ("unsloth", "trl"),
        ("torch", "transformers", "xformers", "flash-attn"),
        most_gpus=1,
        most_processes=0,
        checkpointing=CHECKPOINTING,
    ),
    "torchtune": System(
        "torchtune_step.py",
        ("torchtune", "torchao", "transformers"),
        ("torch",),
        most_gpus=1,
        most_processes=1,
    ),
    "fsdp_qlora": System(
        "fsdp_qlora.py",
        ("torch", "transformers", "bitsandbytes", "fastcore"),
        most_processes=0,
        checkpointing=CHECKPOINTING,
    ),
}


def installed(system: System, python: str) -> dict[str, str | None]:
    """{package: version} of what the system needs and of what else matters, under `python`; None: not installed."""
    names = dict.fromkeys((*system.needs, *system.beside))
    asked = [python, str(PEERS / "packages.py"), *names]
    return json.loads(subprocess.run(asked, check=True, capture_output=True, text=True).stdout)
