"""GPUs by name, and the description of this machine's."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from launch.gpus import ALIASES, GPUS, detect_gpu, find_gpu, forbids_peers
from options.errors import UserError


@pytest.mark.parametrize(
    ("spelling", "key"),
    [
        *((key, key) for key in GPUS),
        ("RTX 4090", "4090"),
        ("NVIDIA GeForce RTX 4090", "4090"),
        ("rtx4060ti-16gb", "4060ti-16gb"),
        ("RTX 4060 Ti 16 GB", "4060ti-16gb"),
        ("a100-80gb", "a100"),
        ("A100 80GB", "a100"),
        ("a100_40gb", "a100-40gb"),
        ("A100-40G", "a100-40gb"),
        (" A10G ", "a10g"),
        ("RTX A6000", "a6000"),
        ("rtx6000ada", "6000ada"),
        ("RTX 6000 Ada", "6000ada"),
        ("Tesla T4", "t4"),
        ("H100-80GB", "h100"),
        # As nvidia-smi names them, also cut short or with the memory on the box.
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA A100 80GB PCIe", "a100"),
        ("NVIDIA A100-PCIE-40GB", "a100-40gb"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("H100 PCIe", "h100"),
        ("NVIDIA H100 NVL", "h100-nvl"),
        ("Tesla V100-SXM2-16GB", "v100"),
        ("V100-PCIE-32GB", "v100-32gb"),
        ("NVIDIA RTX 6000 Ada Generation", "6000ada"),
        ("NVIDIA RTX PRO 6000 Blackwell Max-Q Workstation Edition", "pro6000"),
        ("NVIDIA GeForce RTX 3090 Ti", "3090ti"),
        ("A10G 24GB", "a10g"),
        ("T4 15GB", "t4"),
        ("T4 16 GB", "t4"),
        ("H200 141GB", "h200"),
    ],
)
def test_spellings(spelling, key):
    assert find_gpu(spelling) is GPUS[key]


def test_aliases_name_gpus():
    assert set(ALIASES.values()) <= GPUS.keys()


def test_an_unknown_name():
    known = f"{', '.join(GPUS)}; for another kind, give --gib and the name of a similar one"
    with pytest.raises(UserError) as wrong:
        find_gpu("4091")
    assert str(wrong.value).startswith("--gpu 4091: unknown; did you mean 4090")
    assert str(wrong.value).endswith(f"? known are {known}")
    with pytest.raises(UserError) as wrong:
        find_gpu("potato\n")
    assert str(wrong.value) == f"--gpu 'potato\\n': unknown; known are {known}"


@pytest.mark.parametrize(
    ("name", "near"),
    [("RTX 4060 Ti", "4060ti-16gb"), ("A100 20GB", "a100-40gb or a100"), ("H100 94GB", "h100")],
)
def test_a_name_that_does_not_tell_the_memory(name, near):
    """A 4060 Ti has 8 or 16 GB; there is no A100 of 20."""
    with pytest.raises(UserError, match=rf"^--gpu {name}: unknown; did you mean {near}\? known are"):
        find_gpu(name)


def test_facts():
    """Cards whose limits the plans depend on: no bf16 and no Triton before Ampere; no peers among GeForce."""
    assert [name for name, gpu in GPUS.items() if not gpu.has_bf16] == ["t4", "2080ti", "v100", "v100-32gb"]
    assert [name for name, gpu in GPUS.items() if gpu.reads_peers] == [
        "v100", "v100-32gb", "a100-40gb", "a100", "h100", "h100-nvl", "h200", "b200"
    ]  # fmt: skip
    assert not find_gpu("t4").runs_triton and find_gpu("3060").runs_triton


@pytest.mark.parametrize(
    ("gpus", "peers", "expected"),
    [(2, True, True), (2, False, False), (1, False, True)],
)
def test_detection(gpus, peers, expected, monkeypatch):
    """The driver says whether a visible GPU can be read; alone, the kind does."""
    properties = SimpleNamespace(name="NVIDIA H100 80GB HBM3", major=9, minor=0, total_memory=79 * 2**30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda own, other: own != other and peers)
    gpu = detect_gpu(torch.device("cuda", 0))
    assert (gpu.name, gpu.gib, gpu.capability, gpu.reads_peers) == (properties.name, 79, (9, 0), expected)
    properties.name = "NVIDIA L40S"
    assert gpus == 2 or not detect_gpu(torch.device("cuda", 0)).reads_peers
    assert detect_gpu(torch.device("cpu")) is None


@pytest.mark.parametrize(
    ("variable", "value", "expected"),
    [
        ("NCCL_P2P_DISABLE", "1", True),
        ("NCCL_P2P_DISABLE", "0", False),
        ("NCCL_P2P_LEVEL", "LOC", True),
        ("NCCL_P2P_LEVEL", "0", True),
        ("NCCL_P2P_LEVEL", "NVL", True),
        ("NCCL_P2P_LEVEL", "SYS", False),
    ],
)
def test_nccls_settings_apply(variable, value, expected, monkeypatch):
    for name in ("NCCL_P2P_DISABLE", "NCCL_P2P_LEVEL"):
        monkeypatch.delenv(name, raising=False)
    assert not forbids_peers()
    monkeypatch.setenv(variable, value)
    assert forbids_peers() is expected
