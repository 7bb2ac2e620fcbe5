"""A run's results can be loaded by other programs: adapters by PEFT, full models by transformers."""

from __future__ import annotations

import json
import shutil
from itertools import product

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from checkpoints import trained_model
from files.names import INDEX, RUN_FILES
from files.output_folder import check_output, clear_output, holds_run
from options.errors import UserError
from tests.helpers import tiny
from tests.helpers.adapters import args_for
from tests.helpers.expansion import all_tensors
from tests.helpers.finished_runs import save_and_get_logits
from tests.helpers.layers import ALPHA
from tests.helpers.logits import IDS
from tests.helpers.products import slow
from tests.helpers.runs import dense_state, transformers_model


@pytest.mark.parametrize(
    ("kind", "train_type"),
    [
        *slow(product(["llama_bias"], ["lora", "dora", "qlora"])),
        *slow(product(["qwen3"], ["lora", "dora", "qlora", "bnb_dora"])),
        *(("llama_bias", "bnb_dora"), ("qwen3_moe", "bnb_dora")),
    ],
)
def test_peft_loads_the_adapter(train_type, kind, checkpoints, alpaca_file, two_ranks, tmp_path):
    """With PEFT's from_pretrained, on a base with the dequantized weights."""
    args = args_for(checkpoints(kind), alpaca_file, train_type, "--lora_dropout", "0.1")
    ours = two_ranks(save_and_get_logits, args, tmp_path)[0]
    base = transformers_model(checkpoints(kind), two_ranks(dense_state, args)[0])
    model = peft.PeftModel.from_pretrained(base, tmp_path).eval()
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=IDS).logits, ours, rtol=1e-4, atol=1e-4)
        with model.disable_adapter():
            assert (model(input_ids=IDS).logits - ours).abs().max() > 0.1
    described = peft.PeftConfig.from_pretrained(tmp_path)
    assert (described.r, described.lora_alpha, described.lora_dropout) == (8, ALPHA, 0.1)
    assert described.base_model_name_or_path == str(checkpoints(kind))


FOUR_BITS = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}


@torch.no_grad()
def over_four_bits(base, adapter) -> torch.Tensor:
    """Logits of PEFT's model over a base that transformers packs by bitsandbytes."""
    model = AutoModelForCausalLM.from_pretrained(
        base,
        quantization_config=BitsAndBytesConfig(**FOUR_BITS, bnb_4bit_compute_dtype=torch.float32),
        dtype=torch.float32,
        attn_implementation="eager",
    )
    # In evaluation mode bitsandbytes rounds the scales to bf16 on CPUs that multiply it. There is no dropout.
    return peft.PeftModel.from_pretrained(model, adapter).train()(input_ids=IDS).logits


@pytest.fixture
def in_blocks(tmp_path):
    """in_blocks(kind) -> a checkpoint whose rows are multiples of a quantization block.

    With other rows bitsandbytes computes something else on a CPU.
    """
    return lambda kind: tiny.save_checkpoint(
        kind, tmp_path / "model", intermediate_size=128, hidden_size=128 if kind == "gemma2" else 64
    )


@pytest.mark.parametrize(
    "kind, train_type", [("llama_bias", "bnb_dora"), ("gemma2", "bnb_dora"), ("phi3", "qlora")]
)
def test_an_adapter_over_a_4_bit_base_gives_the_trained_logits(
    kind, train_type, in_blocks, alpaca_file, one_rank, tmp_path
):
    base, run = in_blocks(kind), tmp_path / "run"
    run.mkdir()
    ours = one_rank(save_and_get_logits, args_for(base, alpaca_file, train_type), run)[0]
    torch.testing.assert_close(over_four_bits(base, run), ours, rtol=1e-4, atol=1e-4)


def test_transformers_leaves_routed_experts_in_16_bits(in_blocks, alpaca_file, one_rank, tmp_path):
    """An adapter then needs files with dequantized experts to give the trained logits.

    For export.py's merge see test_every_family in tests/finished/test_export.py.
    """
    base, run, other = in_blocks("qwen3_moe"), tmp_path / "run", tmp_path / "other"
    run.mkdir()
    args = args_for(base, alpaca_file, "bnb_dora")
    ours = one_rank(save_and_get_logits, args, run)[0]
    assert (over_four_bits(base, run) - ours).abs().max() > 0.1
    dequantized = one_rank(dense_state, args)[0]
    stored = {n: dequantized[n] if ".experts." in n else t for n, t in all_tensors(base).items()}
    other.mkdir()
    shutil.copy(base / "config.json", other)
    save_file(stored, other / "model.safetensors", metadata={"format": "pt"})
    torch.testing.assert_close(over_four_bits(other, run), ours, rtol=1e-4, atol=1e-4)


def test_an_adapter_of_hqq_over_a_4_bit_base(in_blocks, alpaca_file, one_rank, tmp_path):
    """The 4-bit base is NF4, so the logits are not the trained ones."""
    base, run = in_blocks("llama"), tmp_path / "run"
    run.mkdir()
    ours = one_rank(save_and_get_logits, args_for(base, alpaca_file, "hqq_dora"), run)[0]
    assert (over_four_bits(base, run) - ours).abs().max() > 0.1


def test_adapter_on_some_linears_only(checkpoints, alpaca_file, one_rank, tmp_path):
    """target_modules must name exactly the trained linears; otherwise PEFT builds too many layers."""
    args = args_for(checkpoints(), alpaca_file, "bnb_dora", "--lora_target_modules", "o_proj,mlp.up_proj")
    ours = one_rank(save_and_get_logits, args, tmp_path)[0]
    base = transformers_model(checkpoints(), one_rank(dense_state, args)[0])
    model = peft.PeftModel.from_pretrained(base, tmp_path).eval()
    stored = load_file(tmp_path / "adapter_model.safetensors")
    assert len(stored) == 3 * 2 * 3 == len(peft.get_peft_model_state_dict(model))
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=IDS).logits, ours, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("kind", "shard_bytes"),
    [(kind, size) for kind in ("llama_bias", "qwen2") for size in (trained_model.SHARD_BYTES, 150_000)]
    + [("gemma2", trained_model.SHARD_BYTES), ("qwen3_moe", 150_000)],
)
def test_transformers_loads_the_full_model(kind, shard_bytes, checkpoints, alpaca_file, two_ranks, tmp_path):
    args = args_for(checkpoints(kind), alpaca_file, "full")
    ours = two_ranks(save_in_shards, args, tmp_path, shard_bytes)[0]
    model, report = AutoModelForCausalLM.from_pretrained(
        tmp_path, attn_implementation="eager", output_loading_info=True
    )
    assert not report["missing_keys"] and not report["unexpected_keys"]
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(input_ids=IDS).logits, ours, rtol=1e-5, atol=1e-5)
    assert AutoTokenizer.from_pretrained(tmp_path)("abc").input_ids
    shards = list(tmp_path.glob("model*.safetensors"))
    assert (len(shards) > 1) == (shard_bytes < 10**6) == (tmp_path / INDEX).exists()
    assert not list(tmp_path.glob("*.tmp"))


def save_in_shards(rank_info, args, folder, shard_bytes):
    original, trained_model.SHARD_BYTES = trained_model.SHARD_BYTES, shard_bytes
    try:
        return save_and_get_logits(rank_info, args, folder)
    finally:
        trained_model.SHARD_BYTES = original


def test_full_model_keeps_the_checkpoints_dtype(alpaca_file, one_rank, tmp_path):
    folder = tiny.save_checkpoint("llama", tmp_path / "bf16", torch.bfloat16)
    (tmp_path / "out").mkdir()
    one_rank(save_and_get_logits, args_for(folder, alpaca_file, "full"), tmp_path / "out")
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert {t.dtype for t in stored.values()} == {torch.bfloat16}


def test_output_folder_is_protected(tmp_path):
    folder = tmp_path / "a" / "run"
    check_output(folder, overwrite=False)
    assert not (tmp_path / "a").exists(), "checking must leave nothing behind"
    folder.mkdir(parents=True)
    (folder / "notes.txt").write_text("mine")
    check_output(folder, overwrite=False)  # other files are no run
    for name in (*RUN_FILES, "config.json", "model-00001-of-00002.safetensors"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("{}")
        assert holds_run(folder)
        with pytest.raises(UserError, match="overwrite"):
            check_output(folder, overwrite=False)
        check_output(folder, overwrite=True)
        clear_output(folder)
        assert [p.name for p in folder.iterdir()] == ["notes.txt"]


def test_adapter_file_is_in_pefts_names(checkpoints, alpaca_file, one_rank, tmp_path):
    one_rank(save_and_get_logits, args_for(checkpoints(), alpaca_file, "bnb_dora"), tmp_path)
    names = set(load_file(tmp_path / "adapter_model.safetensors"))
    layer = "base_model.model.model.layers.2.mlp.down_proj."
    assert {n for n in names if n.startswith(layer)} == {
        layer + last for last in ("lora_A.weight", "lora_B.weight", "lora_magnitude_vector")
    }
    assert json.loads((tmp_path / "adapter_config.json").read_text())["use_dora"] is True
    modes = {p.stat().st_mode & 0o777 for p in tmp_path.iterdir()}
    assert len(modes) == 1, "readable by those who can read the rest, so that another user can serve it"
