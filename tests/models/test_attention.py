"""Which attention a run computes with, and that no forward waits for the GPU to find out. What it computes is in
tests/data/test_packing.py and tests/gpu/test_packing.py."""

from __future__ import annotations

import traceback

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from models import attention
from models.attention import CAUSAL, VARLEN, choose_attention
from models.causal_lm import loss_sum
from models.registry import FAMILIES, read_config
from tests.helpers.packing import padded_batch
from tests.helpers.parity import arguments
from tests.helpers.runs import set_up
from tests.helpers.tiny import CONFIGS

ops = torch.ops.aten


def chosen(
    folder, dtype: torch.dtype = torch.bfloat16, packing: bool = True, longest: int = 512, **changes
) -> str:
    config, family = read_config(folder)
    for name, value in changes.items():
        setattr(config, name, value)
    return choose_attention(config, family, dtype, packing, longest)


def test_of_packed_rows(checkpoints, monkeypatch):
    assert chosen(checkpoints("llama")) == "sdpa"  # there is no GPU here, or it is asked for below
    monkeypatch.setattr(attention, "has_varlen", lambda: True)
    names = {kind: chosen(checkpoints(kind)) for kind in CONFIGS}
    assert names == dict.fromkeys(CONFIGS, VARLEN) | {"gemma2": "eager"}
    llama = checkpoints("llama")
    assert chosen(llama, torch.float16) == VARLEN
    assert chosen(llama, torch.float32) == "sdpa"
    assert chosen(llama, attention_dropout=0.1) == "sdpa"
    sizes = {256: VARLEN, 192: VARLEN, 200: "sdpa", 320: "sdpa", 20: "sdpa"}
    assert {size: chosen(checkpoints("qwen3"), head_dim=size) for size in sizes} == sizes


@pytest.mark.parametrize("has", [True, False])
def test_of_rows_one_by_one(has, checkpoints, monkeypatch):
    """mistral and gemma3 have windows of 16 tokens."""
    monkeypatch.setattr(attention, "has_varlen", lambda: has)
    names = {kind: chosen(checkpoints(kind), packing=False) for kind in CONFIGS}
    beyond = VARLEN if has else "sdpa"
    windows = {"mistral": beyond, "gemma3": beyond, "gemma2": "eager"}
    assert names == dict.fromkeys(CONFIGS, CAUSAL) | windows
    short = {longest: chosen(checkpoints("mistral"), packing=False, longest=longest) for longest in (16, 17)}
    assert short == {16: CAUSAL, 17: beyond}
    assert chosen(checkpoints("llama"), torch.float32, packing=False, attention_dropout=0.1) == CAUSAL


@pytest.mark.parametrize(
    "capability, built, has", [((8, 0), True, True), ((7, 5), True, False), ((9, 0), False, False)]
)
def test_which_gpus(capability, built, has, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: built)
    assert attention.has_varlen() == has


@pytest.mark.parametrize("packed", [True, False])
def test_it_compiles_without_a_graph_break(packed):
    """On the meta device, where torch's kernel has shapes only. Other bounds are no reason to compile again; lines of
    other lengths, where each is a row, are once, and then stand for all."""
    compiled, made = [], {"device": "meta", "dtype": torch.bfloat16, "requires_grad": True}

    def count(graph, _):
        compiled.append(graph)
        return graph

    torch.compiler.reset()
    attend = torch.compile(attention.attend_within_rows, backend=count, fullgraph=True)
    for length in (64, 64, 64) if packed else (64, 80, 96):
        q, k, v = (torch.empty(2, heads, length, 16, **made) for heads in (4, 2, 2))
        given = {"scaling": 0.25, "sliding_window": 16}
        if packed:
            bounds = torch.empty(9, dtype=torch.int32, device="meta")
            given |= {"cu_seq_lens_q": bounds, "max_length_q": 40}
        result, _ = attend(torch.nn.Identity(), q, k, v, None, **given)
        result.sum().backward()
        assert result.shape == (2, length, 4, 16) and k.grad.shape == k.shape
    assert len(compiled) == (1 if packed else 2)


class Questions(TorchDispatchMode):
    """Where the host asked for a tensor's contents: on a GPU it would wait."""

    def __init__(self):
        super().__init__()
        self.asked = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in (ops._local_scalar_dense.default, ops.nonzero.default, ops.equal.default):
            frames = traceback.extract_stack()[:-2]
            self.asked.append([f"{f.filename}:{f.lineno} {f.name}" for f in frames[-6:]])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", [kind for kind in CONFIGS if kind not in ("qwen3_moe", "gemma2")])
def test_forward_and_backward_wait_for_nothing(kind, checkpoints, alpaca_file, one_rank):
    """But in routed experts, and where transformers makes the masks: that is seen here as well."""
    without, with_masks = one_rank(questions, arguments(checkpoints(kind), alpaca_file, "bnb_dora"))[0]
    # Of Phi's longrope: in transformers 5.17, not in 5.23.
    assert [frames for frames in without if not any("longrope_frequency_update" in f for f in frames)] == []
    assert any("find_packed_sequence_indices" in frame for frame in with_masks[0])


def questions(place, args) -> tuple[list, list]:
    """(by the attention of rows one by one, by the family's own)."""
    job, model = set_up(place, args)
    batch, found = padded_batch(), []
    for name in (CAUSAL, FAMILIES[job.model_config.model_type].attention):
        model.set_attn_implementation(name)
        with Questions() as mode:
            loss_sum(model, batch).backward()
        found.append(mode.asked)
    return tuple(found)
