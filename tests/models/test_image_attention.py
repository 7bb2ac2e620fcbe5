"""Attention in which the tokens of an image see each other: masks, and two calls of torch's kernel as one.

Stand-ins by the definition replace the kernel, which a CPU lacks. tests/gpu/test_image_attention.py has it.
"""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention.varlen import AuxRequest
from transformers.models.gemma3.modeling_gemma3 import (
    Gemma3TextModel,
    create_masks_for_vision_model,
    get_block_sequence_ids_for_mask,
)
from transformers.models.qwen3_vl import Qwen3VLTextConfig, Qwen3VLTextModel

from models import attention, varlen
from models.attention import attend_causally, attend_within_rows
from models.family import CAUSAL, CAUSAL_VARLEN, FUSED, VARLEN
from models.image_attention import FULL, SLIDING, attention_masks, image_attention_inputs
from parallel.activation_checkpointing import CheckpointedModule, SavedActivations, compile_run_layer
from tests.helpers.image_masks import (
    PACKS,
    ROWS,
    dense_attention,
    expected_mask,
    image_batch,
    reference_backward,
    row_length,
)
from tests.helpers.packing import reference_attention
from tests.helpers.syncs import SyncRecorder
from tests.helpers.tiny import CONFIGS

PADDED = [[row] for row in ROWS]
LENGTH = 46  # of the packs, with two tokens of padding or more
SINGLE = [(3, -6, 2, -20, 4), (-18, 5), (20, -3), (2, -1, 3, -4, 2, -5, 6)]  # for transformers' masks


@pytest.fixture
def stand_ins(monkeypatch) -> None:
    """Replace torch's kernel and its backward by their definition."""
    monkeypatch.setattr(attention, "varlen_attn", reference_attention)
    monkeypatch.setattr(varlen, "varlen_attn", reference_attention)
    monkeypatch.setattr(varlen, "varlen_backward", reference_backward)


def gemma3_config(implementation: str = "sdpa"):
    config = CONFIGS["gemma3_wrapper"]().text_config
    config._attn_implementation = implementation
    return config


def transformers_masks(config, row) -> dict[str, torch.Tensor]:
    """Return transformers' masks of one row by itself, whose images are not side by side."""
    types = torch.cat([torch.full((abs(part),), int(part < 0)) for part in row])[None]
    return create_masks_for_vision_model(
        config,
        torch.zeros(*types.shape, config.hidden_size),
        None,
        None,
        torch.arange(types.shape[1])[None],
        get_block_sequence_ids_for_mask(types),
    )


@pytest.mark.parametrize("row", SINGLE)
def test_masks_of_a_row_are_those_of_transformers(row):
    """Also of images longer than the window: their tokens see no token that is a window before them."""
    config = gemma3_config()
    images, _, _ = image_batch([[row]])
    ours, theirs = attention_masks(config, images.owners), transformers_masks(config, row)
    assert ours.keys() == {FULL, SLIDING}
    for kind, mask in ours.items():
        assert torch.equal(mask, theirs[kind])


@pytest.mark.parametrize("packs", [PADDED, PACKS])
def test_masks_of_a_batch_follow_the_definition(packs):
    config = gemma3_config()
    images, bounds, _ = image_batch(packs, LENGTH)
    masks = attention_masks(config, images.owners, bounds)
    for kind, window in {FULL: None, SLIDING: config.sliding_window}.items():
        assert torch.equal(masks[kind][:, 0], expected_mask(packs, LENGTH, window))
    within_window = attention_masks(config, image_batch([[(9, -5)]], 16)[0].owners)
    assert within_window[FULL] is within_window[SLIDING]
    del config.layer_types  # as of Mistral, whose layers are alike
    assert torch.equal(attention_masks(config, images.owners, bounds), masks[SLIDING])


def random_heads(n_sequences: int, length: int) -> list[torch.Tensor]:
    """Return query, key and value like transformers, [B, heads, T, D], in float64."""
    torch.manual_seed(0)
    shapes = [(n_sequences, heads, length, 8) for heads in (4, 2, 2)]
    return [torch.randn(shape, dtype=torch.float64).requires_grad_() for shape in shapes]


def row_inputs(bounds: torch.Tensor, longest: int) -> dict:
    """Return the arguments with which Batch.model_inputs says the bounds of packed rows."""
    return {f"cu_seq_lens_{x}": bounds for x in "qk"} | {f"max_length_{x}": longest for x in "qk"}


@pytest.mark.parametrize("window", [None, 16, 2])
@pytest.mark.parametrize("packed", [True, False])
def test_two_calls_of_the_kernel_are_one_softmax(packed, window, stand_ins):
    """Result and gradients, against attention with the mask of the definition."""
    packs = PACKS if packed else PADDED
    images, bounds, _ = image_batch(packs, LENGTH)
    inputs = random_heads(len(packs), LENGTH)
    given = {"scaling": 0.3, "sliding_window": window}
    if packed:
        given |= row_inputs(bounds, LENGTH)
    given |= image_attention_inputs(gemma3_config(VARLEN), images, bounds if packed else None)
    attend = attend_within_rows if packed else attend_causally
    got, _ = attend(torch.nn.Identity(), *inputs, None, **given)
    mask = expected_mask(packs, LENGTH, window)
    if not packed:  # the padding of a sequence is part of its row
        mask = mask | expected_mask([[(LENGTH,)]] * len(packs), LENGTH, window)
    expected = dense_attention(*inputs, mask, 0.3)
    torch.testing.assert_close(got, expected)
    upstream = torch.randn_like(got)
    mine, theirs = (torch.autograd.grad(x, inputs, upstream) for x in (got, expected))
    torch.testing.assert_close(mine, theirs)


def hidden_states(model, packs, embeds, implementation: str) -> torch.Tensor:
    """Return the model's result of packs of rows [B, T, F], by the attention of this name."""
    model.set_attn_implementation(implementation)
    images, bounds, positions = image_batch(packs, embeds.shape[1])
    packed = any(len(pack) > 1 for pack in packs)
    inputs = image_attention_inputs(model.config, images, bounds if packed else None)
    if packed:
        inputs |= row_inputs(bounds, embeds.shape[1]) | {"position_ids": positions}
    return model(inputs_embeds=embeds, use_cache=False, **inputs).last_hidden_state


@pytest.mark.parametrize(
    "implementation, packed",
    [(CAUSAL, False), (CAUSAL_VARLEN, False), (VARLEN, False), (FUSED, False), (FUSED, True), (VARLEN, True)],
)
def test_gemma3_sees_rows_as_transformers_sees_them_alone(implementation, packed, stand_ins):
    """Sliding and full layers, result and gradients. One row has no image."""
    torch.manual_seed(0)
    model = Gemma3TextModel(gemma3_config()).double().requires_grad_(False)
    rows = [*SINGLE, (9,)]
    embeds = [torch.randn(row_length(row), 96, dtype=torch.float64).requires_grad_() for row in rows]
    expected = []
    for row, one in zip(rows, embeds, strict=True):
        masks = transformers_masks(model.config, row) if min(row) < 0 else None
        expected.append(model(inputs_embeds=one[None], attention_mask=masks).last_hidden_state[0])
    packs = [[0, 4], [1, 2], [3]] if packed else [[i] for i in range(5)]
    pad = torch.nn.utils.rnn.pad_sequence
    batch = pad([torch.cat([embeds[i] for i in pack]) for pack in packs], batch_first=True)
    states = hidden_states(model, [[rows[i] for i in pack] for pack in packs], batch, implementation)
    got: dict[int, torch.Tensor] = {}
    for pack, states_of_pack in zip(packs, states, strict=True):
        for i in pack:
            got[i], states_of_pack = states_of_pack.tensor_split([len(embeds[i])])
    got_rows = [got[i] for i in range(5)]
    torch.testing.assert_close(got_rows, expected)
    upstream = [torch.randn_like(one) for one in expected]
    mine, theirs = (torch.autograd.grad(x, embeds, upstream) for x in (got_rows, expected))
    torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("implementation", [FUSED, VARLEN])
def test_positions_of_three_axes_do_not_hide_the_rows(implementation, stand_ins):
    """In Qwen3-VL, where attention is causal: packed rows equal the rows alone."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 8}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    model = Qwen3VLTextModel(Qwen3VLTextConfig(**sizes, **heads)).double().requires_grad_(False)
    model.set_attn_implementation(implementation)
    packs = [[(3, -4, 2), (2, -3)], [(-5, 6), (3,)]]
    embeds = torch.randn(2, 14, 32, dtype=torch.float64)
    axes = torch.randint(0, 9, (3, 2, 14))
    images, bounds, _ = image_batch(packs)
    inputs = image_attention_inputs(model.config, images, bounds, sees_whole_image=False)
    inputs |= row_inputs(bounds, 14)
    got = model(inputs_embeds=embeds, position_ids=axes, use_cache=False, **inputs).last_hidden_state
    model.set_attn_implementation("sdpa")
    for i, lengths in enumerate([(9, 5), (11, 3)]):
        columns = zip(embeds[i].split(lengths), axes[:, i].split(lengths, -1), strict=True)
        alone = [
            model(inputs_embeds=e[None], position_ids=p[:, None]).last_hidden_state[0] for e, p in columns
        ]
        torch.testing.assert_close(got[i], torch.cat(alone))


def test_what_no_image_token_needs():
    """A blank image, or images of one token, leave the attention to the paths of text."""
    blank, bounds, _ = image_batch([[(4,), (3,)]])
    for implementation in (CAUSAL, CAUSAL_VARLEN, VARLEN, FUSED):
        assert image_attention_inputs(gemma3_config(implementation), blank, bounds) == {}
    images, bounds, _ = image_batch([[(4, -1, 1, -1), (3,)]])
    assert image_attention_inputs(gemma3_config(VARLEN), images, bounds) == {}


@pytest.mark.parametrize("implementation", [FUSED, VARLEN])
def test_inputs_are_made_without_a_wait_for_the_gpu(implementation):
    images, bounds, _ = image_batch(PACKS)
    with SyncRecorder() as recorder:
        inputs = image_attention_inputs(gemma3_config(implementation), images, bounds)
    assert inputs and not recorder.syncs


def test_images_of_any_number_compile_to_two_graphs():
    """One of fixed and one of variable sizes; without a break. On the meta device, which has shapes only."""
    compiled = []

    def count(graph, _):
        compiled.append(graph)
        return graph

    torch.compiler.reset()
    attend = torch.compile(attend_causally, backend=count, fullgraph=True)
    options = {"device": "meta", "dtype": torch.bfloat16, "requires_grad": True}
    for n_images in (2, 3, 5, 4):
        q, k, v = (torch.empty(2, heads, 64, 16, **options) for heads in (4, 2, 2))
        images, _, _ = image_batch([[(3,) + (-7,) * n_images], [(2, -7)]], 64)
        given = image_attention_inputs(gemma3_config(CAUSAL_VARLEN), images)
        given = {name: x.to("meta") if isinstance(x, torch.Tensor) else x for name, x in given.items()}
        result, _ = attend(torch.nn.Identity(), q, k, v, None, scaling=0.25, sliding_window=16, **given)
        result.sum().backward()
        assert result.shape == (2, 64, 4, 16) and k.grad.shape == k.shape
    assert len(compiled) == 2


@pytest.mark.slow
@pytest.mark.parametrize("kept", [SavedActivations.ATTENTION, SavedActivations.MATMULS])
def test_compiled_layers_learn_what_plain_ones_learn(kept, stand_ins, monkeypatch):
    """With kept results of attention (--activation_budget), which backward does not compute again."""
    calls = []

    def counted(*args, **options):
        calls.append(options["return_aux"] == AuxRequest(lse=True))
        return reference_attention(*args, **options)

    monkeypatch.setattr(varlen, "varlen_attn", counted)
    torch.compiler.reset()
    torch.manual_seed(0)
    plain, compiled = (Gemma3TextModel(gemma3_config(CAUSAL_VARLEN)) for _ in range(2))
    compiled.load_state_dict(plain.state_dict())
    run = compile_run_layer("aot_eager")
    compiled.layers = torch.nn.ModuleList([CheckpointedModule(x, kept, run) for x in compiled.layers])
    for n_images in (1, 3):
        images, _, _ = image_batch([[(3, *[-6, 2] * n_images, 5)], [(4, -6)]], 32)
        given = image_attention_inputs(plain.config, images)
        embeds, direction, found = torch.randn(2, 32, 96), torch.randn(2, 32, 96), []
        for model in (compiled, plain):
            calls.clear()
            inputs = embeds.clone().requires_grad_()
            states = model(inputs_embeds=inputs, use_cache=False, **given).last_hidden_state
            gradients = torch.autograd.grad((states * direction).sum(), [inputs, *model.layers.parameters()])
            found.append((states, *gradients))
            assert calls == [True, True] * len(model.layers)
        torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)
