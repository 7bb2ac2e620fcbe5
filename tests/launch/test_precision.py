"""Every --precision follows fp32 within its rounding; fp16's loss scaling works on all ranks."""

from __future__ import annotations

import json

import pytest
import torch

import train
from data.batches import Batch
from launch import precision
from launch.precision import Precision, choose_precision, detect_precision
from models.family import unwrapped_name
from monitoring.loggers import NoLogger
from monitoring.metrics import Metrics
from monitoring.progress import ProgressLines
from monitoring.tracking import Tracker
from options.config import FIELDS
from parallel.shards import full_tensor
from tests.helpers.parity import arguments, biased_checkpoint
from tests.helpers.products import products, slow
from tests.helpers.runs import set_up, train_run, trained_tensors

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
MODES = ["fp32", "bf16", "fp16_autocast", "bf16_autocast", "bf16_buffers_autocast"]


def test_what_each_mode_is():
    assert set(FIELDS["precision"].metadata["choices"]) == {"auto", *MODES}
    assert choose_precision("auto", has_gpu=True, has_bf16_gpu=True) == Precision(BF16, FP32)
    assert choose_precision("auto", has_gpu=True, has_bf16_gpu=False) == choose_precision(
        "fp16_autocast", True, False
    )
    assert choose_precision("auto", has_gpu=False, has_bf16_gpu=False) == Precision(FP32, FP32)
    matmuls = {mode: choose_precision(mode, True, True).matmul_dtype for mode in MODES}
    assert matmuls == dict(zip(MODES, [FP32, BF16, FP16, BF16, BF16], strict=True))
    gathered = {mode: choose_precision(mode, True, True).gather_dtype for mode in ["auto", *MODES]}
    assert gathered == {"auto": BF16} | dict.fromkeys(MODES)
    scaled = [mode for mode in MODES if choose_precision(mode, True, True).scaler("cpu").is_enabled()]
    assert scaled == ["fp16_autocast"]


@pytest.fixture
def plain(checkpoints, short_rows, plain_run):
    """plain(train_type) -> (arguments, results of the plain run in fp32)."""

    def get(train_type: str):
        args = arguments(checkpoints(biased_checkpoint(train_type)), short_rows, train_type)
        return args, plain_run([*args, "--batch_size", "4", "--use_gradient_checkpointing", "false"])

    return get


@pytest.mark.parametrize(
    ("train_type", "mode"),
    products(
        ["full", "bnb_dora", "hqq_lora", "bnb_llama_pro"],
        ["auto", *MODES[1:]],
        always=[
            *(("full", mode) for mode in ("auto", "bf16")),
            ("bnb_dora", "fp16_autocast"),
            ("hqq_lora", "bf16_buffers_autocast"),
            ("bnb_llama_pro", "bf16_autocast"),
        ],
    ),
)
def test_follows_fp32(train_type, mode, plain, two_ranks):
    args, expected = plain(train_type)  # two of its steps: 16-bit matmuls are slow on a CPU
    args = [*args, "--max_steps", "2", "--batch_size", "2", "--precision", mode]
    losses, tensors, norms = two_ranks(
        train_run_as_on_a_gpu, [*args, "--batch_size", "2", "--precision", mode]
    )[0]
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(expected[0][:2]), rtol=2e-2, atol=0)
    torch.testing.assert_close(torch.tensor(norms), torch.tensor(expected[2][:2]), rtol=5e-2, atol=0)
    assert losses != expected[0][:2]
    trained = BF16 if mode in ("bf16", "bf16_buffers_autocast") else FP32
    assert {t.dtype for t in tensors.values()} == {trained}


def train_run_as_on_a_gpu(rank_info, args):
    """Train with the precision that --precision chooses on a GPU with bf16."""
    original, precision.has_bf16_gpu = precision.has_bf16_gpu, lambda: True
    try:
        return train_run(rank_info, args)
    finally:
        precision.has_bf16_gpu = original


@pytest.mark.parametrize("mode", ["fp16_autocast", "bf16_autocast"])
def test_autocast_reaches_every_linear(mode, checkpoints, short_rows, one_rank):
    args = arguments(checkpoints("llama_bias"), short_rows, "bnb_dora", "--precision", mode)
    dtypes = one_rank(dtypes_in_forward, args)[0]
    linears = {v for k, v in dtypes.items() if k.endswith("_proj") or k == "lm_head"}
    assert linears == {FP16 if mode == "fp16_autocast" else BF16}
    assert dtypes["model.norm"] == FP32  # the residual stream is not rounded


def dtypes_in_forward(rank_info, args) -> dict[str, torch.dtype]:
    job, model = set_up(rank_info, args)
    seen, names = {}, {}
    for name, module in model.named_modules():
        if name.endswith("_proj") or name in ("lm_head", "model.norm"):
            names[module] = unwrapped_name(name)
            module.register_forward_hook(lambda m, _, out: seen.__setitem__(names[m], out.dtype))
    with torch.no_grad(), detect_precision(job.config.precision).context("cpu"):
        model(input_ids=torch.ones(1, 8, dtype=torch.long), use_cache=False)
    return seen


def test_scaling_keeps_gradients_that_fp16_would_lose(checkpoints, short_rows, one_rank):
    """A loss made tiny, whose gradients underflow in fp16 unless they are scaled."""
    args = arguments(checkpoints("llama_bias"), short_rows, "qlora", "--precision")
    expected, scaled = (
        one_rank(norm_of_a_small_loss, [*args, m], True)[0] for m in ("fp32", "fp16_autocast")
    )
    assert scaled == pytest.approx(expected, rel=2e-2)
    unscaled = one_rank(norm_of_a_small_loss, [*args, "fp16_autocast"], False)[0]
    assert unscaled < 0.5 * expected


def norm_of_a_small_loss(rank_info, args, scaling: bool) -> float:
    job, model = set_up(rank_info, args)
    chosen = detect_precision(job.config.precision)
    scaler = chosen.scaler("cpu") if scaling else torch.amp.GradScaler("cpu", enabled=False)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained)
    ids = torch.arange(32)[None]
    with chosen.context("cpu"):
        loss = train.loss_sum(model, Batch(ids, ids)) * 1e-9
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    return full_tensor(torch.nn.utils.get_total_norm([p.grad for p in trained])).item()


@pytest.mark.parametrize(
    ("strategy", "where"), [("full_shard", "shard"), *slow([("full_shard", "loss")]), ("ddp", "loss")]
)
def test_overflow_on_one_rank_skips_the_step_on_all(strategy, where, checkpoints, short_rows, two_ranks):
    """Overflow in the loss of one rank, or only in one rank's shard of the gradient."""
    args = arguments(checkpoints("llama_bias"), short_rows, "bnb_dora", "--sharding_strategy", strategy)
    first, second = two_ranks(overflow_on_the_second_rank, [*args, "--precision", "fp16_autocast"], where)
    assert first == second == (True, 2.0**15, True)


def overflow_on_the_second_rank(rank_info, args, where: str) -> tuple[bool, float, bool]:
    """Return (no weight changed in the step that overflowed, scale after it, weights changed in the next)."""
    job, model = set_up(rank_info, args)
    scaler = detect_precision(job.config.precision).scaler("cpu")
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.1)
    moved, scales = [], []
    for spoilt in (True, False):
        before = trained_tensors(model)
        with detect_precision(job.config.precision).context("cpu"):
            loss = train.loss_sum(model, Batch(*[torch.arange(16)[None]] * 2)) / 1000
        spoilt = spoilt and rank_info.rank == 1
        scaler.scale(loss * float("inf") if spoilt and where == "loss" else loss).backward()
        if spoilt and where == "shard":
            trained[0].grad.to_local().fill_(float("inf"))
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        scales.append(scaler.get_scale())
        moved.append(any(not torch.equal(v, before[k]) for k, v in trained_tensors(model).items()))
    return not moved[0], scales[0], moved[1]


def test_clipping_sees_unscaled_gradients(checkpoints, short_rows, one_rank):
    """With plain SGD a step has the length lr * grad_norm; scaled gradients would divide it by 65536."""
    args = arguments(
        checkpoints("llama_bias"), short_rows, "qlora", "--optimizer", "sgd", "--grad_norm", "0.01"
    )
    args[args.index("--max_steps") + 1] = "1"
    length, norm = one_rank(length_of_first_step, [*args, "--precision", "fp16_autocast"])[0]
    assert norm > 0.01
    assert length == pytest.approx(1e-3 * 0.01, rel=1e-2)


def length_of_first_step(rank_info, args) -> tuple[float, float]:
    before = trained_tensors(set_up(rank_info, args)[1])
    _, after, norms = train_run(rank_info, args)
    return sum((after[k] - v).square().sum().item() for k, v in before.items()) ** 0.5, norms[0]


def test_a_skipped_step_is_valid_json(tmp_path):
    metrics = Metrics(1, 0.1, 2.0, 1e-3, float("inf"), 10, 5, 1.0, 10.0, 0.1, 0.1)
    tracker = Tracker(tmp_path, [], ProgressLines(1, None), NoLogger())
    tracker.log(metrics)
    tracker.finish()
    line = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=pytest.fail)
    assert line["grad_norm"] is None and line["loss"] == 2.0
