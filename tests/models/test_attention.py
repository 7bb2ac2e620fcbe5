"""The choice of a run's attention, and that no forward waits for the GPU to prepare it.

Its results are tested in tests/data/test_packing.py and tests/gpu/test_packing.py.
"""

from __future__ import annotations

import math

import pytest
import torch
from transformers import AutoModelForCausalLM

from models import attention, varlen
from models.attention import attend_fused, attend_within_rows, choose_attention
from models.causal_lm import loss_sum
from models.family import CAUSAL, CAUSAL_VARLEN, FUSED, VARLEN
from models.registry import FAMILIES, read_config
from tests.helpers.logits import IDS
from tests.helpers.packing import padded_batch, reference_attention
from tests.helpers.parity import arguments
from tests.helpers.runs import set_up
from tests.helpers.syncs import SyncRecorder
from tests.helpers.tiny import CONFIGS, KINDS


def chosen_attention(
    folder, dtype: torch.dtype = torch.bfloat16, packing: bool = True, max_tokens: int = 512, **changes
) -> str:
    """Return the choice for a model folder, with changes to its config."""
    config, family = read_config(folder)
    for name, value in changes.items():
        setattr(config, name, value)
    return choose_attention(config, family, dtype, packing, max_tokens)


def test_attention_of_packed_rows(checkpoints, monkeypatch):
    assert chosen_attention(checkpoints("llama")) == FUSED  # without a GPU; has_varlen is patched below
    monkeypatch.setattr(attention, "has_varlen", lambda: True)
    names = {kind: chosen_attention(checkpoints(kind)) for kind in CONFIGS}
    assert names == dict.fromkeys(CONFIGS, VARLEN) | {"gemma2": "eager", "nemotron": FUSED, "stablelm": FUSED}
    # Only masks apply Qwen2-MoE's window, to packed rows and to any others.
    assert chosen_attention(checkpoints("qwen2_moe_window")) == FUSED
    llama = checkpoints("llama")
    assert chosen_attention(llama, torch.float16) == VARLEN
    assert chosen_attention(llama, torch.float32) == FUSED
    assert chosen_attention(llama, attention_dropout=0.1) == FUSED
    sizes = {256: VARLEN, 192: VARLEN, 200: FUSED, 320: FUSED, 20: FUSED}
    assert {size: chosen_attention(checkpoints("qwen3"), head_dim=size) for size in sizes} == sizes


@pytest.mark.parametrize("has_varlen", [True, False])
def test_attention_of_single_rows(has_varlen, checkpoints, monkeypatch):
    """Some have windows of 16 tokens."""
    monkeypatch.setattr(attention, "has_varlen", lambda: has_varlen)
    names = {kind: chosen_attention(checkpoints(kind), packing=False) for kind in CONFIGS}
    beyond = VARLEN if has_varlen else FUSED
    windows = dict.fromkeys(
        ("mistral", "gemma3", "gemma3_wrapper", "olmo3", "exaone4", "starcoder2", "cohere2", "gpt_oss"),
        beyond,
    )
    windows["gemma2"] = "eager"
    lost = {
        n: chosen_attention(checkpoints("qwen2_moe_window"), packing=False, max_tokens=n) for n in (16, 17)
    }
    assert lost == {16: FUSED, 17: FUSED}
    within = CAUSAL_VARLEN if has_varlen else CAUSAL
    assert names == dict.fromkeys(CONFIGS, CAUSAL) | windows
    mistral = checkpoints("mistral")
    short = {n: chosen_attention(mistral, packing=False, max_tokens=n) for n in (16, 17)}
    assert short == {16: CAUSAL, 17: beyond}
    wrapper = checkpoints("gemma3_wrapper")  # which takes images
    images = {n: chosen_attention(wrapper, packing=False, max_tokens=n) for n in (16, 17)}
    assert images == {16: within, 17: beyond}
    assert chosen_attention(wrapper, torch.float32, packing=False, max_tokens=16) == CAUSAL
    assert (
        chosen_attention(checkpoints("llama"), torch.float32, packing=False, attention_dropout=0.1) == CAUSAL
    )


WINDOW = {
    "sliding_window": 16,
    "use_sliding_window": True,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
}


def test_layers_that_keep_their_window_to_themselves(checkpoints):
    """All families whose config can have a window are looked at. Eager attention has transformers' masks."""
    found = {}
    for kind in CONFIGS:
        config, family = read_config(checkpoints(kind))
        if family.attention != FUSED or family.unused or not hasattr(config, "sliding_window"):
            continue
        changes = {name: value for name, value in WINDOW.items() if hasattr(config, name)}
        eager, causal, without = (
            logits(checkpoints(kind), attn_implementation=name, **options)
            for name, options in (("eager", changes), (CAUSAL, changes), (CAUSAL, {"sliding_window": None}))
        )
        assert (eager - without).abs().max() > 0.05, kind
        found[kind] = torch.allclose(eager, causal, rtol=1e-4, atol=1e-4)
        assert found[kind] == family.passes_window, kind
    assert len(found) >= 14 and [kind for kind in found if not found[kind]] == ["qwen2_moe"]


def logits(folder, **options) -> torch.Tensor:
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(folder, **options)(input_ids=IDS, use_cache=False).logits


@pytest.mark.parametrize("capability, built, parameters, has", [
    ((8, 0), True, ("scale", "window_size"), True), ((7, 5), True, ("scale", "window_size"), False),
    ((9, 0), False, ("scale", "window_size"), False),
    ((9, 0), True, ("scale",), False), ((9, 0), True, (), False),  # as torch 2.10
])  # fmt: skip
def test_gpus_that_run_varlen(capability, built, parameters, has, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: built)
    monkeypatch.setattr(varlen, "_PARAMETERS", parameters)
    assert varlen.has_varlen() == has


@pytest.mark.skipif(not varlen.varlen_takes_window(), reason="needs torch 2.11")
@pytest.mark.parametrize("packed", [True, False])
def test_varlen_attention_compiles_without_a_graph_break(packed):
    """Other bounds never cause a recompilation; the first other line length, with a row per line, causes one.

    On the meta device, where torch's kernel has shapes only.
    """
    compiled, options = [], {"device": "meta", "dtype": torch.bfloat16, "requires_grad": True}

    def count(graph, _):
        compiled.append(graph)
        return graph

    torch.compiler.reset()
    attend = torch.compile(attention.attend_within_rows, backend=count, fullgraph=True)
    for length in (64, 64, 64) if packed else (64, 80, 96):
        q, k, v = (torch.empty(2, heads, length, 16, **options) for heads in (4, 2, 2))
        given = {"scaling": 0.25, "sliding_window": 16}
        if packed:
            bounds = torch.empty(9, dtype=torch.int32, device="meta")
            given |= {"cu_seq_lens_q": bounds, "max_length_q": 40}
        result, _ = attend(torch.nn.Identity(), q, k, v, None, **given)
        result.sum().backward()
        assert result.shape == (2, length, 4, 16) and k.grad.shape == k.shape
    assert len(compiled) == (1 if packed else 2)


@pytest.mark.parametrize("length", [64, 1])
@pytest.mark.parametrize("compiled", [False, True])
def test_grouped_heads_without_a_kernel_for_them(compiled, length, monkeypatch):
    """Result and gradients against the definition, for whole rows and for one token after them (a cache)."""
    asked = []

    def takes_none(*arguments) -> bool:
        asked.append(arguments)
        return False

    monkeypatch.setattr(attention, "takes_grouped_heads", takes_none)
    torch.compiler.reset()
    attend = torch.compile(attend_fused, backend="eager", fullgraph=True) if compiled else attend_fused
    sizes = ((6, length), (2, 64), (2, 64))  # heads, tokens
    q, k, v = inputs = [torch.randn(2, *size, 16, dtype=torch.float64).requires_grad_() for size in sizes]
    module = torch.nn.Module()
    module.num_key_value_groups = 3
    got, _ = attend(module, *inputs, None, scaling=0.3)
    scores = torch.einsum("bkgtd,bksd->bkgts", q.unflatten(1, (2, 3)), k) * 0.3
    scores += torch.full((length, 64), -math.inf).triu(65 - length)
    expected = torch.einsum("bkgts,bksd->bkgtd", scores.softmax(-1), v).flatten(1, 2).transpose(1, 2)
    assert asked == [("cpu", torch.float64, 16)]
    torch.testing.assert_close(got, expected)
    upstream = torch.randn_like(got)
    mine, theirs = (torch.autograd.grad(x, inputs, upstream) for x in (got, expected))
    torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("attend", [attend_fused, attend_within_rows])
def test_values_beyond_fp16(attend, monkeypatch):
    """Result and gradients under autocast to fp16 against fp32, for large values beside small ones.

    The kernels get fp16.
    """
    dtypes = set()

    def takes_none(_, dtype, features) -> bool:
        dtypes.add(dtype)
        return False

    def varlen(q, k, v, *others, **options):
        dtypes.update((q.dtype, k.dtype, v.dtype))
        return reference_attention(q, k, v, *others, **options)

    monkeypatch.setattr(attention, "takes_grouped_heads", takes_none)
    monkeypatch.setattr(attention, "varlen_attn", varlen)
    module = torch.nn.Module()
    module.num_key_value_groups = 3
    inputs = [torch.randn(2, heads, 64, 16) for heads in (6, 2, 2)]
    size = torch.tensor([1.0, 1e7])[:, None, None, None]
    inputs[2] *= size
    upstream, found = torch.randn(2, 64, 6, 16) / size, []  # as small as behind a norm
    for enabled in (False, True):
        leaves = [x.clone().requires_grad_() for x in inputs]
        dtypes.clear()
        with torch.autocast("cpu", dtype=torch.float16, enabled=enabled):
            result, _ = attend(module, *leaves, None, scaling=0.25)
        found.append((result.detach(), *torch.autograd.grad(result, leaves, upstream)))
    assert dtypes == {torch.float16} and found[1][0].dtype == torch.float32
    for expected, got in zip(*found, strict=True):
        errors = (got - expected).flatten(1).norm(dim=1) / expected.flatten(1).norm(dim=1)
        assert errors.max() < 2e-3


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("qwen3_moe", "gemma2")])
def test_forward_and_backward_do_not_sync(kind, checkpoints, alpaca_file, one_rank):
    """Except in routed experts, and where transformers makes the masks; the second part shows that."""
    without, with_masks = one_rank(recorded_syncs, arguments(checkpoints(kind), alpaca_file, "bnb_dora"))[0]
    # Phi's longrope and HunYuan's RoPE of type dynamic sync in transformers 5.17, and not in 5.23.
    old = ("longrope_frequency_update", "dynamic_frequency_update")
    assert [frames for frames in without if not any(name in f for f in frames for name in old)] == []
    if kind in ("qwen2_5_vl", "gpt_oss"):
        return  # transformers looks for packed rows there only if it is given positions, or never
    assert any("find_packed_sequence_indices" in frame for frame in with_masks[0])


def recorded_syncs(rank_info, args) -> tuple[list, list]:
    """Return the syncs with (attention of single rows, the family's own attention)."""
    job, model = set_up(rank_info, args)
    batch, found = padded_batch(), []
    for name in (CAUSAL, FAMILIES[job.model_config.model_type].attention):
        model.set_attn_implementation(name)
        with SyncRecorder() as recorder:
            loss_sum(model, batch).backward()
        found.append(recorder.syncs)
    return tuple(found)
