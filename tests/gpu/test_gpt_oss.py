"""GPT-OSS on a GPU: the variable-length kernel with sinks, and experts streamed through pinned memory."""

from __future__ import annotations

import pytest
import torch

from files.expert_stacks import ExpertTensor, StreamedExpert
from files.tensors import PinnedBuffers
from models.attention import attend_fused, attend_within_rows
from models.registry import open_weights, read_config
from models.varlen import has_varlen
from tests.helpers.packing import packed_batch
from tests.helpers.stacks import save_mxfp4

# Relative error of a whole tensor, as in test_packing.py.
ROUNDING = {torch.bfloat16: 1.5e-2, torch.float16: 3e-3}
HEADS, GROUPS, FEATURES = 8, 2, 64


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    found, expected = found.detach().double().cpu(), expected.detach().double().cpu()
    return ((found - expected).norm() / expected.norm()).item()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("window", [None, 16])
def test_the_kernel_with_sinks_computes_the_definition(window, dtype):
    """Result and all gradients, against the sink as a key in float64 on the CPU."""
    if not has_varlen():
        pytest.skip("needs a GPU that has variable-length attention")
    batch = packed_batch()
    lines, length = batch.ids.shape
    torch.manual_seed(0)
    shapes = [*[(lines, heads, length, FEATURES) for heads in (HEADS, GROUPS, GROUPS)], (HEADS,)]
    made = [torch.randn(shape).to(dtype) for shape in shapes]
    inputs = [tensor.cuda().requires_grad_() for tensor in made]
    exact = [tensor.double().requires_grad_() for tensor in made]
    upstream = torch.randn(lines, length, HEADS, FEATURES).to(dtype)
    given = {"scaling": FEATURES**-0.5, "sliding_window": window, "max_length_q": batch.longest}
    bounds = batch.bounds.cuda()
    got, _ = attend_within_rows(
        torch.nn.Identity(), *inputs[:3], None, s_aux=inputs[3], cu_seq_lens_q=bounds, **given
    )
    got.backward(upstream.cuda())
    module = torch.nn.Module()
    module.num_key_value_groups, module.is_causal = HEADS // GROUPS, True
    age = torch.arange(length)[:, None] - torch.arange(length)
    mask = ((age >= 0) & (age < (window or length)))[None, None]
    expected, _ = attend_fused(
        module, *exact[:3], mask, s_aux=exact[3], cu_seq_lens_q=batch.bounds, scaling=FEATURES**-0.5
    )
    expected.backward(upstream.double())
    assert relative_error(got, expected) < ROUNDING[dtype]
    for ours, theirs in zip(inputs, exact, strict=True):
        assert relative_error(ours.grad, theirs.grad) < ROUNDING[dtype]


@pytest.mark.gpu
@pytest.mark.parametrize("is_packed", [False, True])
def test_experts_are_streamed(is_packed, checkpoints, tmp_path):
    folder = checkpoints("gpt_oss")
    if is_packed:
        folder = save_mxfp4(folder, tmp_path / "tiny-mxfp4")
    files, _, _ = open_weights(folder, *read_config(folder))
    buffers, device = PinnedBuffers("cuda"), torch.device("cuda")
    experts = [name for name, stored in files.tensors.items() if isinstance(stored, ExpertTensor)]
    assert len(experts) > 100
    for name in experts:
        streamed = files.read(name, buffers)
        assert isinstance(streamed, StreamedExpert)
        assert torch.equal(streamed.to(device).cpu(), files.read(name))
