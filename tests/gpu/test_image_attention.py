"""Attention of images by torch's kernel: against its definition and the masks, compiled, packed as alone.

tests/models/test_image_attention.py tests the arithmetic with stand-ins for the kernel.
"""

from __future__ import annotations

import pytest
import torch
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextModel

from models.attention import attend_causally, attend_within_rows
from models.family import CAUSAL, CAUSAL_VARLEN, FUSED, VARLEN
from models.image_attention import image_attention_inputs
from models.varlen import has_varlen
from tests.helpers.image_masks import PACKS, ROWS, dense_attention, expected_mask, image_batch, row_length
from tests.helpers.tiny import CONFIGS

# Relative error of a whole tensor. Two results are rounded to 16 bits before they are added.
ROUNDING = {torch.bfloat16: 2e-2, torch.float16: 4e-3}
LENGTH = 46  # of the packs, with padding

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def kernel():
    """Skip the tests on GPUs before Ampere, which lack variable-length attention."""
    if not has_varlen():
        pytest.skip("needs a GPU that has variable-length attention")


def apart(a: torch.Tensor, b: torch.Tensor) -> float:
    a, b = a.detach().double().cpu(), b.detach().double().cpu()
    return ((a - b).norm() / b.norm()).item()


def gemma3_config(implementation: str):
    config = CONFIGS["gemma3_wrapper"]().text_config
    config._attn_implementation = implementation
    return config


def image_inputs(packs, config) -> tuple[dict, torch.Tensor]:
    """Return (the arguments of rows and images on the GPU, positions) of packs of rows.

    Sequences of one row each have no bounds, as in padded batches.
    """
    images, bounds, positions = image_batch(packs, LENGTH)
    images.positions, images.owners = images.positions.cuda(), images.owners.cuda()
    if all(len(pack) == 1 for pack in packs):
        return image_attention_inputs(config, images), positions.cuda()
    bounds = bounds.cuda()
    inputs = {f"cu_seq_lens_{x}": bounds for x in "qk"} | {f"max_length_{x}": LENGTH for x in "qk"}
    return inputs | image_attention_inputs(config, images, bounds), positions.cuda()


def random_heads(n_sequences: int, features: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """Return query, key, value like transformers, [B, heads, T, D], and a gradient [B, T, heads, D]."""
    generator = torch.Generator("cuda").manual_seed(0)
    options = {"device": "cuda", "dtype": dtype, "generator": generator}
    made = [torch.randn(n_sequences, LENGTH, heads, features, **options) for heads in (4, 2, 2, 4)]
    return [t.transpose(1, 2).requires_grad_() for t in made[:3]] + made[3:]


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("features, window", [(16, None), (64, 16), (128, 2), (256, None), (256, 16)])
@pytest.mark.parametrize("packs", [PACKS, [[row] for row in ROWS]], ids=["packed", "padded"])
def test_the_kernel_computes_its_definition(packs, features, window, dtype):
    """Forward and gradients in float64."""
    *inputs, upstream = random_heads(len(packs), features, dtype)
    given, _ = image_inputs(packs, gemma3_config(VARLEN))
    attend = attend_within_rows if packs is PACKS else attend_causally
    options = {"scaling": features**-0.5, "sliding_window": window, **given}
    got, _ = attend(torch.nn.Identity(), *inputs, None, **options)
    got.backward(upstream)
    mask = expected_mask(packs, LENGTH, window)
    if packs is not PACKS:  # the padding of a sequence is part of its row
        mask = mask | expected_mask([[(LENGTH,)]] * len(packs), LENGTH, window)
    exact = [t.detach().double().cpu().requires_grad_() for t in inputs]
    expected = dense_attention(*exact, mask, features**-0.5)
    expected.backward(upstream.double().cpu())
    assert apart(got, expected) < ROUNDING[dtype]
    for mine, theirs in zip(inputs, exact, strict=True):
        assert apart(mine.grad, theirs.grad) < ROUNDING[dtype]


def test_it_compiles_for_any_images_and_never_waits_for_the_gpu():
    """The third number of images compiles nothing; the result is that without compilation."""
    torch.compiler.reset()
    attend, config = torch.compile(attend_within_rows, fullgraph=True), gemma3_config(VARLEN)
    options = {"scaling": 0.125, "sliding_window": 16}

    def step(function, packs) -> list[torch.Tensor]:
        *inputs, upstream = random_heads(len(packs), 64, torch.bfloat16)
        given, _ = image_inputs(packs, config)
        result, _ = function(torch.nn.Identity(), *inputs, None, **options, **given)
        result.backward(upstream)
        return [result, *(t.grad for t in inputs)]

    # Two rows in each pack, so that the number of bounds is the same, as in the batches of a run.
    few, more, most = ([[(3, *[-6] * n), (5,)], [(4,), (-6, 2)]] for n in (1, 2, 4))
    expected = step(attend_within_rows, most)
    step(attend, few), step(attend, more)
    with torch._dynamo.config.patch(error_on_recompile=True):
        got = step(attend, most)
    for mine, theirs in zip(got, expected, strict=True):
        assert apart(mine, theirs) < 1e-3


def test_inputs_and_attention_do_not_wait_for_the_gpu():
    images, bounds, _ = image_batch(PACKS, LENGTH)
    images.positions, images.owners, bounds = images.positions.cuda(), images.owners.cuda(), bounds.cuda()
    *inputs, upstream = random_heads(len(PACKS), 64, torch.bfloat16)
    options = {"scaling": 0.125, "cu_seq_lens_q": bounds, "max_length_q": LENGTH}

    def step() -> None:
        for implementation in (FUSED, VARLEN):
            given = image_attention_inputs(gemma3_config(implementation), images, bounds)
        attend_within_rows(torch.nn.Identity(), *inputs, None, **options, **given)[0].backward(upstream)

    step()  # loads the kernels
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def states_and_gradient(model, packs, embeds, implementation: str, with_images: bool = True):
    """Return (the model's result, the gradient of its embeddings), both of all rows, without padding."""
    model.set_attn_implementation(implementation)
    inputs, positions = image_inputs(packs, model.config)
    if not with_images:
        inputs = {name: x for name, x in inputs.items() if "image" not in name}
    embeds = embeds.to(model.dtype, copy=True).requires_grad_()
    states = model(inputs_embeds=embeds, position_ids=positions, use_cache=False, **inputs).last_hidden_state
    lengths = [sum(map(row_length, pack)) for pack in packs]

    def without_padding(x: torch.Tensor) -> torch.Tensor:
        return torch.cat([one[:length] for one, length in zip(x, lengths, strict=True)])

    rows = without_padding(states)
    (rows * torch.randn(rows.shape, generator=torch.Generator().manual_seed(1)).cuda()).sum().backward()
    return rows, without_padding(embeds.grad)


def test_gemma3_by_the_kernel_follows_the_masks():
    """Packed and padded, in bf16 against the masks in fp32. Without the images' arguments it does not."""
    torch.manual_seed(0)
    model = Gemma3TextModel(gemma3_config(FUSED)).cuda().requires_grad_(False)
    rows = [row for pack in PACKS for row in pack]
    embeds = [torch.randn(row_length(row), 96, device="cuda") for row in rows]
    packed, padded = (
        torch.stack([torch.nn.functional.pad(x, (0, 0, 0, LENGTH - len(x))) for x in sequences])
        for sequences in ([torch.cat(embeds[i : i + 2]) for i in (0, 2, 4)], embeds)
    )
    exact = states_and_gradient(model, PACKS, packed, FUSED)
    alone = states_and_gradient(model, [[row] for row in rows], padded, CAUSAL)
    model.to(torch.bfloat16)
    by_kernel = states_and_gradient(model, PACKS, packed, VARLEN)
    by_kernel_alone = states_and_gradient(model, [[row] for row in rows], padded, CAUSAL_VARLEN)
    causal = states_and_gradient(model, PACKS, packed, VARLEN, with_images=False)
    for i, limit in enumerate((3e-2, 6e-2)):
        assert apart(alone[i], exact[i]) < 1e-4
        assert apart(by_kernel[i], exact[i]) < limit
        assert apart(by_kernel_alone[i], exact[i]) < limit
        assert apart(causal[i], exact[i]) > 3 * limit
