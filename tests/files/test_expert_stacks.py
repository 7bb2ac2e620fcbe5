"""Stacked experts in files: split, read and joined again; MXFP4 as transformers reads it."""

from __future__ import annotations

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from checkpoints.model_writer import file_entries, with_stored_names
from files.expert_stacks import STACKS, ExpertTensor, StreamedExpert, dequantize_mxfp4
from files.model_folder import CheckpointFiles
from files.names import CONFIG, SINGLE_FILE
from models.registry import open_weights, read_config
from options.errors import UserError
from tests.helpers.expansion import all_tensors, edit_config, read_config_json
from tests.helpers.stacks import EXPERTS, dequantized_tensors, quantize_to_mxfp4, save_mxfp4, stack_experts

LAYER = "model.layers.1.mlp.experts"


@pytest.fixture
def folder(checkpoints, tmp_path):
    """Return a folder like the hub's: experts in MXFP4."""
    return save_mxfp4(checkpoints("gpt_oss"), tmp_path / "tiny-mxfp4")


def opened(folder) -> CheckpointFiles:
    return open_weights(folder, *read_config(folder))[0]


# MXFP4


def test_every_code_and_scale_is_dequantized_as_in_transformers():
    """Scales from 2^-127, whose weights are denormal numbers, to 2^128, which is no number of bf16."""
    scales = torch.arange(256, dtype=torch.uint8).view(1, 64, 4)
    codes = torch.arange(16, dtype=torch.uint8)
    block = codes + 16 * codes.flip(0)  # each code in the low half and in the high half
    blocks = block.expand(1, 64, 4, 16).contiguous()
    expected = convert_moe_packed_tensors(blocks, scales)[0].T
    found = dequantize_mxfp4(blocks[0], scales[0])
    assert found.dtype == expected.dtype == torch.bfloat16
    # Versions of torch differ in whether 2^128 times a code is a number.
    known = ~expected.isnan()
    assert torch.equal(known, ~found.isnan()) and expected[known].isinf().any()
    assert torch.equal(found[known].view(torch.int16), expected[known].view(torch.int16))


def test_random_blocks_are_dequantized_as_in_transformers():
    blocks = torch.randint(0, 256, (3, 10, 5, 16), dtype=torch.uint8)
    scales = torch.randint(100, 140, (3, 10, 5), dtype=torch.uint8)
    expected = convert_moe_packed_tensors(blocks, scales)  # [E, I, O]
    for i in range(3):
        assert torch.equal(dequantize_mxfp4(blocks[i], scales[i]), expected[i].T)


def test_experts_in_mxfp4_are_read_as_in_transformers(folder):
    files, stored = opened(folder), load_file(folder / SINGLE_FILE)
    for stack, parameters in STACKS.items():
        name = f"{LAYER}.{stack}"
        is_packed = f"{name}_blocks" in stored
        assert is_packed != stack.endswith("_bias")
        whole = (
            stored[name]
            if not is_packed
            else convert_moe_packed_tensors(stored[f"{name}_blocks"], stored[f"{name}_scales"])
        )
        for e in range(EXPERTS):
            for part, parameter in enumerate(parameters):
                expected = (
                    whole[e, ..., part :: len(parameters)].T
                    if is_packed
                    else (whole[e, part :: len(parameters)])
                )
                found = files.read(f"{LAYER}.{e}.{parameter}")
                assert torch.equal(found, expected) and found.is_contiguous()
    assert not any(name.endswith(("_blocks", "_scales")) for name in files.tensors)


def test_a_streamed_expert_is_the_expert(folder):
    """On a GPU the bytes pass through pinned memory; here they are already in memory."""
    files = opened(folder)
    for parameter in ("up_proj.weight", "up_proj.bias"):
        stored = files.tensors[f"{LAYER}.3.{parameter}"]
        assert isinstance(stored, ExpertTensor)
        sources = [
            torch.from_file(str(folder / t.file), size=t.begin + t.nbytes, dtype=torch.uint8)[t.begin :]
            for t in stored.sources()
        ]
        contents = [
            b.clone().view(t.torch_dtype).view(t.shape)
            for b, t in zip(sources, stored.sources(), strict=True)
        ]
        found = StreamedExpert(stored, *contents).to(torch.device("cpu"))
        assert torch.equal(found, files.read(f"{LAYER}.3.{parameter}"))


def test_quantizing_keeps_what_mxfp4_can_hold():
    """The tests' own quantizer: twice is once."""
    weight = torch.randn(2, 64, 6)
    once = convert_moe_packed_tensors(*quantize_to_mxfp4(weight))
    assert (once - weight).abs().max() < 1
    assert torch.equal(convert_moe_packed_tensors(*quantize_to_mxfp4(once)), once)


def test_weights_beyond_bf16_are_refused(folder):
    tensors = load_file(folder / SINGLE_FILE)
    tensors[f"{LAYER}.down_proj_scales"][4, 7, 0] = 255
    save_file(tensors, folder / SINGLE_FILE)
    with pytest.raises(UserError, match=rf"{LAYER}\.down_proj .*NaN"):
        for entry in file_entries(opened(folder)).values():
            list(entry.chunks())


# Stacks


def test_16_bit_stacks_are_split(checkpoints):
    folder = checkpoints("gpt_oss")
    files, stored = opened(folder), all_tensors(folder)
    experts = {name: files.read(name) for name in files.tensors if ".experts." in name}
    assert len(experts) == 3 * EXPERTS * 6
    joined = stack_experts(experts)
    assert joined.keys() == {name for name in stored if ".experts." in name}
    assert all(torch.equal(tensor, stored[name]) for name, tensor in joined.items())
    assert {files.stored_name(name) for name in files.tensors} == stored.keys()
    shapes = files.written_shapes(files.tensors)
    assert {name: (tuple(t.shape), t.dtype) for name, t in stored.items()} == shapes


def test_written_experts_are_stacked_again(checkpoints, folder):
    """A copy of 16-bit files is the same; of MXFP4 it holds what transformers dequantizes."""
    for source in (checkpoints("gpt_oss"), folder):
        files, expected = opened(source), dequantized_tensors(source)
        entries = with_stored_names(files, file_entries(files))
        assert entries.keys() == expected.keys()
        for name, entry in entries.items():
            content = torch.frombuffer(bytearray().join(entry.chunks()), dtype=entry.dtype)
            assert entry.shape == tuple(expected[name].shape) and entry.nbytes == content.nbytes
            assert torch.equal(content.view(entry.shape), expected[name])


# Bad input


def test_mxfp4_of_another_family(checkpoints, tmp_path):
    folder = shutil.copytree(checkpoints("mixtral"), tmp_path / "Tiny-mxfp4")
    edit_config(folder, quantization_config={"quant_method": "mxfp4"})
    with pytest.raises(UserError, match=r"quantized already \(mxfp4\).*take the original, by the name Tiny$"):
        read_config(folder)


def test_other_formats_of_gpt_oss(checkpoints, tmp_path):
    folder = shutil.copytree(checkpoints("gpt_oss"), tmp_path / "tiny-awq")
    edit_config(folder, quantization_config={"quant_method": "awq"})
    with pytest.raises(UserError, match=r"quantized already \(awq\)"):
        read_config(folder)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop(f"{LAYER}.down_proj_scales"), "down_proj_blocks has no .*down_proj_scales"),
        (
            lambda t: t.update({f"{LAYER}.down_proj_scales": torch.zeros(6, 64, 2, dtype=torch.uint8)}),
            r"\[6, 64, 1, 16\] and .*_scales of shape \[6, 64, 2\] are no weights in MXFP4",
        ),
        (
            lambda t: t.update({f"{LAYER}.down_proj_blocks": torch.zeros(6, 64, 1, 8, dtype=torch.uint8)}),
            r"\[6, 64, 1, 8\] and .* are no weights in MXFP4",
        ),
        (
            lambda t: t.update({f"{LAYER}.down_proj": torch.zeros(6, 32, 64)}),
            r"\[6, 64, 1, 16\] and .* are no weights in MXFP4",
        ),
        (
            lambda t: t.update({f"{LAYER}.down_proj_bias": torch.zeros(64)}),
            r"down_proj_bias has shape \[64\]; expected the down_proj_bias of all experts",
        ),
        (
            lambda t: t.update({f"{LAYER}.down_proj_bias": torch.zeros(5, 64)}),
            "experts.5.down_proj.bias is missing from the weights",
        ),
        (
            lambda t: t.update({f"{LAYER}.down_proj_bias": torch.zeros(7, 64)}),
            "down_proj_bias belongs to no parameter",
        ),
        (
            lambda t: t.update({f"{LAYER}.gate_up_proj_bias": torch.zeros(6, 63)}),
            r"gate_up_proj_bias has shape \[31\] for each expert, but config.json says \[32\]",
        ),
        (lambda t: t.update({f"{LAYER}.down_proj_bias": torch.zeros(20_000, 0)}), "holds 20,000 experts"),
        (lambda t: t.update({"down_proj": torch.zeros(6, 32, 64)}), "down_proj has shape .* expected"),
    ],
)
def test_damaged_stacks(change, words, folder):
    tensors = load_file(folder / SINGLE_FILE)
    change(tensors)
    save_file(tensors, folder / SINGLE_FILE)
    with pytest.raises(UserError, match=words) as e:
        opened(folder)
    assert "\n" not in str(e.value)


def test_the_config_that_is_read_is_of_16_bits(folder):
    assert read_config_json(folder)["quantization_config"]["quant_method"] == "mxfp4"
    assert not hasattr(read_config(folder)[0], "quantization_config")
    assert (folder / CONFIG).is_file()
