"""What a run's memory depends on in a GPU, and the GPUs that people have, by name.

`python plan.py --gpu t4` plans for one of GPUS; a run describes its own by `detect_gpu`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from launch.memory import GIB


@dataclass(frozen=True)
class Gpu:
    """A kind of GPU.

    Attributes:
        name: as people call it.
        gib: memory, as torch reports it: less than on the box.
        capability: CUDA compute capability (major, minor).
        reads_peers: whether such GPUs read one another's memory fast (NVLink), so that their copy engines
            gather the weights (parallel/copy_engines.py).
    """

    name: str
    gib: float
    capability: tuple[int, int]
    reads_peers: bool = False

    @property
    def has_bf16(self) -> bool:
        """Whether it computes in bf16."""
        return self.capability >= (8, 0)

    @property
    def runs_triton(self) -> bool:
        """Whether Triton, and so torch.compile, supports it (launch/devices.py)."""
        return self.capability >= (8, 0)


GPUS = {
    "t4": Gpu("T4", 14.6, (7, 5)),
    "l4": Gpu("L4", 22.0, (8, 9)),
    "3090": Gpu("RTX 3090", 23.6, (8, 6)),
    "4090": Gpu("RTX 4090", 23.6, (8, 9)),
    "a100-40gb": Gpu("A100 40 GB", 39.4, (8, 0), reads_peers=True),
    "h100": Gpu("H100 80 GB", 79.1, (9, 0), reads_peers=True),
    "h200": Gpu("H200", 139.8, (9, 0), reads_peers=True),
}


def detect_gpu(device: torch.device) -> Gpu | None:
    """Return the description of this process's GPU; None for a CPU. It asks no other GPU."""
    if device.type != "cuda":
        return None
    properties = torch.cuda.get_device_properties(device)
    # Peers are asked where collectives are made (parallel/copy_engines.py); GPUs of data centers have them.
    known = [gpu for gpu in GPUS.values() if gpu.name.split()[0] in properties.name.split()]
    capability = (properties.major, properties.minor)
    reads_peers = bool(known) and known[0].reads_peers
    return Gpu(properties.name, properties.total_memory / GIB, capability, reads_peers)
