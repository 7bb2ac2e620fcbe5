"""--base_matmul: where it is refused, what it leaves in a run, and that sharding changes nothing."""

from __future__ import annotations

import json
from unittest import mock

import pytest
import torch
from peft import PeftConfig

import evaluate
import train
from launch.gpus import GPUS
from launch.precision import choose_precision
from models.family import FUSED
from models.registry import open_weights, read_config
from options.errors import UserError
from options.train import parse
from tests.helpers.packing import loss_and_gradients, packed_batch, padded_batch
from tests.helpers.parity import arguments
from tests.helpers.products import slow
from tests.helpers.runs import set_up, train_run
from training import base_matmul
from training.base_matmul import check_base_matmul, remark_on_matmuls, try_base_matmul

BF16, FP16 = (choose_precision(mode, True, True) for mode in ("bf16", "fp16_autocast"))


def config_of(*words: str):
    return parse(["--train_type", "qlora", *words])[0]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--train_type lora --base_matmul fp8", "--base_matmul has no effect with --train_type lora"),
        ("--train_type full --base_matmul fp8", "--base_matmul has no effect with --train_type full"),
        ("--train_type qlora --base_matmul fp4", "--base_matmul"),
        pytest.param(
            "--train_type qlora --base_matmul fp8",
            "needs GPUs of compute capability 8.9 or more, and there is no GPU here; choose int8 or 16bit",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"),
        ),
    ],
)
def test_what_cannot_be_rounded_ends_with_one_line(words, message, capsys, tmp_path):
    assert train.main([*words.split(), "--output_dir", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("gpu", "way", "allowed"),
    [
        *(("4090", "fp8", True), ("h100", "fp8", True), ("3090", "fp8", False), ("t4", "fp8", False)),
        *(("3090", "int8", True), ("t4", "int8", True), ("v100", "int8", False), (None, "int8", True)),
    ],
)
def test_the_gpu_must_multiply_in_the_format(gpu, way, allowed):
    kind = GPUS[gpu] if gpu else None
    if allowed:
        check_base_matmul(way, kind, BF16)
        return
    with pytest.raises(UserError, match=f"--base_matmul {way}: needs GPUs of compute capability"):
        check_base_matmul(way, kind, BF16)


def test_a_gpu_that_torch_does_not_multiply_so_on_is_refused(monkeypatch):
    """On a rank, where the GPU may be used."""
    used = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: used.append(device))
    monkeypatch.setattr(base_matmul, "multiply", lambda *operands: None)
    gpu = torch.device("meta")
    try_base_matmul("fp8", gpu)
    try_base_matmul("16bit", gpu)
    try_base_matmul("int8", torch.device("cpu"))
    assert used == [gpu]
    monkeypatch.setattr(base_matmul, "multiply", mock.Mock(side_effect=RuntimeError("CUBLAS: no\nat line 1")))
    with pytest.raises(
        UserError, match=r"^--base_matmul fp8: torch .* on this GPU \(CUBLAS: no\); choose 16bit$"
    ):
        try_base_matmul("fp8", gpu)


def test_fp8_needs_bf16():
    with pytest.raises(UserError, match=r"bf16, and the precision here is .*float16"):
        check_base_matmul("fp8", GPUS["h100"], FP16)


def remarks(folder, *words: str) -> tuple[str, ...]:
    model_config, family = read_config(folder)
    files, _, _ = open_weights(folder, model_config, family)
    return remark_on_matmuls(model_config, family, config_of(*words), files)


def test_linears_that_do_not_fit_are_named_once(checkpoints):
    """The tiny model's down projection reads 160 features, which are no whole blocks of 64."""
    (remark,) = remarks(checkpoints("llama"), "--base_matmul", "int8")
    assert "3 of 21 linears multiply in 16 bits" in remark and "mlp.down_proj, 64 x 160" in remark
    assert remarks(checkpoints("llama"), "--base_matmul", "16bit") == ()


def test_routed_experts_are_named_apart(checkpoints):
    """They are stacked, whatever their shape. Layer 0 has a plain MLP."""
    experts, others = remarks(checkpoints("qwen3_moe"), "--base_matmul", "int8")
    assert experts == "--base_matmul int8: routed experts multiply in 16 bits"
    assert "1 of 15 linears" in others and "layers.0.mlp.down_proj" in others


@pytest.mark.parametrize("train_type", [*slow(["qlora"]), "hqq_dora"])
def test_sharding_offload_and_checkpointing_change_nothing(
    train_type, checkpoints, alpaca_file, plain_run, two_ranks
):
    args = [*arguments(checkpoints("llama"), alpaca_file, train_type), "--base_matmul", "int8"]
    alone = plain_run([*args, "--batch_size", "4", "--use_gradient_checkpointing", "false"])
    exact = plain_run(
        [*args, "--base_matmul", "16bit", "--batch_size", "4", "--use_gradient_checkpointing", "false"]
    )
    assert alone[0] != exact[0]
    torch.testing.assert_close(torch.tensor(alone[0]), torch.tensor(exact[0]), rtol=2e-2, atol=0)
    for options in ("", "--use_cpu_offload"):
        sharded = two_ranks(train_run, [*args, "--batch_size", "2", *options.split()])[0]
        torch.testing.assert_close(torch.tensor(sharded[0]), torch.tensor(alone[0]), rtol=1e-3, atol=0)
        # Where a number is near the middle of two, another order of sums rounds it differently. That changes
        # the trained weights by far less than rounding itself does.
        for name, weight in alone[1].items():
            by_rounding = (exact[1][name] - weight).norm()
            assert (sharded[1][name] - weight).norm() < 0.2 * by_rounding, name


def learn_seven_rows(rank_info, argv) -> list[tuple[float, dict[str, torch.Tensor]]]:
    """Return (loss, gradients) of the seven rows, padded and packed."""
    _, model = set_up(rank_info, argv)
    model.train().set_attn_implementation(FUSED)
    return [loss_and_gradients(model, batch) for batch in (padded_batch(), packed_batch())]


@pytest.mark.parametrize("train_type", [*slow(["qlora"]), "hqq_dora"])
def test_packing_changes_nothing(train_type, checkpoints, alpaca_file, one_rank):
    args = [*arguments(checkpoints("llama"), alpaca_file, train_type), "--base_matmul"]
    padded, packed = one_rank(learn_seven_rows, [*args, "int8"])[0]
    plain, _ = one_rank(learn_seven_rows, [*args, "16bit"])[0]
    assert packed[0] == pytest.approx(padded[0], rel=1e-4)

    def error(name: str, other: tuple) -> float:
        """Return the error of a gradient, relative to that of the padded rows."""
        return float((other[1][name] - padded[1][name]).norm() / padded[1][name].norm())

    for name in padded[1]:
        assert error(name, packed) < 1e-3 < error(name, plain), name


def test_a_run_says_what_it_was_trained_against_and_is_evaluated_in_16_bits(
    checkpoints, alpaca_file, tmp_path, capsys
):
    run = tmp_path / "run"
    words = arguments(
        checkpoints("llama"), alpaca_file, "qlora", "--base_matmul", "int8", "--world_size", "1"
    )
    assert train.main([*map(str, words), "--output_dir", str(run), "--save_every", "3"]) == 0
    assert json.loads((run / "adapter_config.json").read_text())["base_matmul"] == "int8"
    with pytest.warns(UserWarning, match="base_matmul"):
        assert PeftConfig.from_pretrained(str(run)).r == 8
    scores = {}
    for way in ("16bit", "int8"):
        out = tmp_path / f"{way}.json"
        evaluation = (
            f"--dataset {alpaca_file} --samples 8 --metrics perplexity --base_matmul {way} --out {out}"
        )
        capsys.readouterr()
        assert evaluate.main([str(run), *evaluation.split()]) == 0
        assert ("3 of 21 linears multiply in 16 bits" in capsys.readouterr().out) == (way == "int8")
        results = json.loads(out.read_text())
        assert results["base_matmul"] == way
        scores[way] = results["metrics"]["perplexity"]["tuned"]
    assert scores["16bit"] != scores["int8"]
    assert abs(scores["int8"] / scores["16bit"] - 1) < 0.05
    capsys.readouterr()
    resumed = [*map(str, words), "--output_dir", str(run), "--resume", "auto", "--base_matmul", "16bit"]
    assert train.main(resumed) == 2
    assert "--base_matmul" in capsys.readouterr().err
