"""What a run's memory depends on in a GPU, and the GPUs that people have, by name.

`python plan.py --gpu t4` plans for one of GPUS (`find_gpu`); a run describes its own by `detect_gpu`.
"""

from __future__ import annotations

import difflib
import os
import re
from dataclasses import dataclass

import torch

from launch.memory import GIB
from options.errors import UserError, join_names


@dataclass(frozen=True)
class Gpu:
    """A kind of GPU.

    Attributes:
        name: as people call it.
        gib: memory, as torch reports it: less than on the box.
        capability: CUDA compute capability (major, minor).
        reads_peers: whether such GPUs read one another's memory (NVLink), so that their copy engines gather
            the weights (parallel/copy_engines.py).
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


# Memory: torch's total_memory on Linux, the least of public reports: (A) "GPU 0 has a total capacity of ...",
# (B) _CudaDeviceProperties(total_memory=...MB), (C) unsloth's "Max memory: ... GB", which are GiB.
# Capability: https://developer.nvidia.com/cuda-gpus.
# Peers: kinds that are sold with NVLink or NVSwitch between them. NVIDIA's driver gives GeForce cards no
# access to peers, except 3090s with a bridge. Other cards on PCIe often have none in rented machines.
GPUS = {
    # Turing and Volta, without bf16. A: T4, 2080 Ti; B: V100 (16,160 MB)
    "t4": Gpu("T4", 14.56, (7, 5)),
    "2080ti": Gpu("RTX 2080 Ti", 10.57, (7, 5)),
    "v100": Gpu("V100 16 GB", 15.77, (7, 0), reads_peers=True),
    "v100-32gb": Gpu("V100 32 GB", 31.73, (7, 0), reads_peers=True),
    # Ampere. A: 3060, 3080, A6000 (44.4 with ECC), A100; B: A5000, 3090 Ti (24,114 MB), A40 (45,416);
    # C: A4000, A10G
    "3060": Gpu("RTX 3060 12 GB", 11.62, (8, 6)),
    "3080": Gpu("RTX 3080", 9.62, (8, 6)),
    "3090": Gpu("RTX 3090", 23.55, (8, 6)),
    "3090ti": Gpu("RTX 3090 Ti", 23.55, (8, 6)),
    "a4000": Gpu("RTX A4000", 15.59, (8, 6)),
    "a5000": Gpu("RTX A5000", 23.54, (8, 6)),
    "a6000": Gpu("RTX A6000", 47.4, (8, 6)),
    "a10": Gpu("A10", 21.98, (8, 6)),
    "a10g": Gpu("A10G", 21.98, (8, 6)),
    "a40": Gpu("A40", 44.35, (8, 6)),
    "a100-40gb": Gpu("A100 40 GB", 39.38, (8, 0), reads_peers=True),
    "a100": Gpu("A100 80 GB", 79.1, (8, 0), reads_peers=True),
    # Ada. A: 4090, 4080 Super (15.60), L4, L40S, 6000 Ada (44.4 with ECC); C: 4060 Ti; 4070 Ti and 4080s as
    # other 12 and 16 GB
    "l4": Gpu("L4", 22.0, (8, 9)),
    "l40": Gpu("L40", 44.39, (8, 9)),
    "l40s": Gpu("L40S", 44.39, (8, 9)),
    "4060ti-16gb": Gpu("RTX 4060 Ti 16 GB", 15.57, (8, 9)),
    "4070ti": Gpu("RTX 4070 Ti", 11.6, (8, 9)),
    "4080": Gpu("RTX 4080", 15.57, (8, 9)),
    "4080super": Gpu("RTX 4080 SUPER", 15.57, (8, 9)),
    "4090": Gpu("RTX 4090", 23.52, (8, 9)),
    "6000ada": Gpu("RTX 6000 Ada", 47.4, (8, 9)),
    # Hopper. A: H100, H100 NVL; H200: measured
    "h100": Gpu("H100 80 GB", 79.1, (9, 0), reads_peers=True),
    "h100-nvl": Gpu("H100 NVL", 93.0, (9, 0), reads_peers=True),
    "h200": Gpu("H200", 139.8, (9, 0), reads_peers=True),
    # Blackwell. A: 5080, 5090, B200; B: PRO 6000 (97,250 MB)
    "5080": Gpu("RTX 5080", 15.47, (12, 0)),
    "5090": Gpu("RTX 5090", 31.36, (12, 0)),
    "pro6000": Gpu("RTX PRO 6000 Blackwell", 94.97, (12, 0)),
    "b200": Gpu("B200", 178.35, (10, 0), reads_peers=True),
}
# Other names that people type, as `_split_name` returns them.
ALIASES = {"6000pro": "pro6000"}
# Words of nvidia-smi's names that do not tell kinds apart: makers, plugs, kinds of memory, editions.
SHARED_WORDS = re.compile(
    r"nvidia|tesla|geforce|rtx|sxm\d?|pcie|hbm\d?e?|generation|blackwell|server|workstation|max-?q|edition"
)
SIZE = re.compile(r"[-_ ](\d+) ?g(?:i?b)?\b|(?<=[a-z])(\d+) ?gi?b\b")  # A100-40G, 4060ti16gb; but A10G
LEAST_REPORTED = 0.9  # of the memory on the box: a T4 has 16 GB there, and torch reports 14.56 GiB


def _split_name(name: str) -> tuple[str, int | None]:
    """Return (a GPU's name without what kinds share, GB in it or None): NVIDIA A100-SXM4-80GB is a100, 80."""
    short = name.lower().strip()
    size = SIZE.search(short)
    short = SHARED_WORDS.sub("", SIZE.sub(" ", short))
    return re.sub(r"[^0-9a-z]", "", short), int(size[1] or size[2]) if size else None


def find_gpu(name: str) -> Gpu:
    """Return the GPU of that name, in any usual spelling or nvidia-smi's.

    Raises UserError with the names that are known.
    """
    wanted, size = _split_name(name)
    known = {key: _split_name(key) for key in GPUS}
    same = [key for key, (short, _) in known.items() if short == ALIASES.get(wanted, wanted)]
    for key in same:
        gib = GPUS[key].gib
        if known[key][1] is None if size is None else LEAST_REPORTED * size <= gib <= size:
            return GPUS[key]
    names = {short for short, _ in known.values()}
    near = same or [
        key
        for close in difflib.get_close_matches(wanted, names, n=3, cutoff=0.6)
        for key, (short, _) in known.items()
        if short == close
    ]
    hint = f"; did you mean {' or '.join(near[:3])}?" if near else ";"
    raise UserError(
        f"--gpu {join_names([name])}: unknown{hint} known are {', '.join(GPUS)}; for another kind, give --gib"
        " and the name of a similar one"
    )


def forbids_peers() -> bool:
    """Return whether NCCL's settings forbid GPUs to read the memory of all others."""
    disabled, level = os.environ.get("NCCL_P2P_DISABLE", ""), os.environ.get("NCCL_P2P_LEVEL", "")
    return disabled not in ("", "0") or level not in ("", "5", "SYS")


def detect_gpu(device: torch.device) -> Gpu | None:
    """Return the description of this process's GPU; None for a CPU.

    It reads peers if it can read every other GPU that this process sees, and NCCL's settings do not forbid
    it. If it sees no other, its kind tells.
    """
    if device.type != "cuda":
        return None
    properties = torch.cuda.get_device_properties(device)
    own = torch.cuda.current_device() if device.index is None else device.index
    others = [i for i in range(torch.cuda.device_count()) if i != own]
    if others:  # the driver knows; no other GPU is touched
        reads_peers = all(torch.cuda.can_device_access_peer(own, i) for i in others)
    else:
        words = properties.name.replace("-", " ").split()
        reads_peers = any(gpu.reads_peers and gpu.name.split()[0] in words for gpu in GPUS.values())
    reads_peers = reads_peers and not forbids_peers()
    capability = (properties.major, properties.minor)
    return Gpu(properties.name, properties.total_memory / GIB, capability, reads_peers)
