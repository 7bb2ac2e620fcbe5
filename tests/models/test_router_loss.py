"""The auxiliary loss of routers is transformers' own: its value, and every gradient."""

from __future__ import annotations

import json
import shutil
import signal
from unittest import mock

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

import train
from data.batches import Batch
from data.packing import make_packed_batch
from data.rows import IGNORE, TokenizedRows
from models.family import unwrapped_name
from models.router_loss import count_tokens, make_router_loss, routing_sums
from monitoring.metrics import Meter
from options.errors import UserError
from options.train import parse
from parallel.shards import full_tensor
from tests.helpers import tiny
from tests.helpers.adapters import args_for, build_peft_model, peft_name
from tests.helpers.bnb_checkpoints import make_single_rank_job
from tests.helpers.compiled import CHECKPOINTED, compiled_run
from tests.helpers.expansion import edit_config, read_config_json
from tests.helpers.logits import IDS
from tests.helpers.parity import PLAIN, arguments, assert_same
from tests.helpers.resuming import Signals, lines, run
from tests.helpers.runs import (
    dense_tensors,
    set_up,
    split_members,
    train_run,
    trained_tensors,
    transformers_model,
)
from tests.helpers.stacks import stack_experts
from tests.helpers.token_rows import make_token_rows

FACTOR = 0.5
LENGTHS = torch.tensor([[IDS.shape[1]], [17]])  # the second row is padded
OTHERS = ("mixtral", "qwen2_moe", "gpt_oss")
KINDS = ["qwen3_moe", *(pytest.param(kind, marks=pytest.mark.slow) for kind in OTHERS)]


@pytest.fixture
def balanced(checkpoints, tmp_path):
    """Return a function: kind -> a checkpoint whose config asks for the loss."""

    def make(kind: str):
        folder = shutil.copytree(checkpoints(kind), tmp_path / kind)
        edit_config(folder, output_router_logits=True, router_aux_loss_coef=FACTOR)
        return folder

    return make


def padded_targets() -> torch.Tensor:
    return IDS.roll(-1, 1).masked_fill(torch.arange(IDS.shape[1]) >= LENGTHS - 1, IGNORE)


def packed_batch() -> Batch:
    """Return both rows as one pack, with padding behind them."""
    lengths = LENGTHS.flatten()
    starts = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    tokens = torch.cat([row[:length] for row, length in zip(IDS, lengths, strict=True)]).int()
    learned = torch.ones(len(tokens), dtype=torch.bool)
    rows = TokenizedRows(tokens, learned, starts, (), (), torch.arange(1, 3))
    return make_packed_batch(rows, [torch.arange(2)], (1, 64), 40, 4)


def backward(rank_info, args, batch: Batch | None = None):
    """Return (gradients, auxiliary loss, dense weights, trained tensors) for IDS, rows dealt to ranks."""
    _, model = set_up(rank_info, args)
    rows, targets = slice(rank_info.rank, None, rank_info.world), padded_targets()
    router_loss = make_router_loss(model)
    batch = batch or Batch(IDS[rows], targets[rows], LENGTHS[rows])
    loss = train.loss_sum(model, batch) / (targets != IGNORE).sum()
    router_loss.add_to(loss, 1).backward()
    value = router_loss.pop_step()
    torch.distributed.all_reduce(value)
    gradients = {
        unwrapped_name(n): full_tensor(p.grad) for n, p in model.named_parameters() if p.requires_grad
    }
    return split_members(model, gradients), value.item(), dense_tensors(model), trained_tensors(model)


def backward_of_transformers(model) -> float:
    """Run transformers' own backward for the same batch; return its auxiliary loss."""
    mask = (torch.arange(IDS.shape[1]) < LENGTHS).long()
    labels = IDS.masked_fill(mask == 0, IGNORE)
    found = model(input_ids=IDS, attention_mask=mask, labels=labels, output_router_logits=True)
    found.loss.backward()
    return found.aux_loss.item()


@pytest.mark.parametrize("kind", KINDS)
def test_every_gradient_of_full(kind, balanced, alpaca_file, two_ranks):
    """Each rank has one row, so the choices of both ranks are in each one's loss."""
    folder = balanced(kind)
    ours, value, state, _ = two_ranks(backward, args_for(folder, alpaca_file, "full"))[0]
    model = transformers_model(folder, state)
    assert value == pytest.approx(backward_of_transformers(model), rel=1e-6)
    ours = stack_experts(ours) if kind == "gpt_oss" else stacked(ours)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(
            ours.pop(name), parameter.grad, rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}"
        )
    assert not ours


def stacked(gradients: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Stack the gradients of single experts as transformers' parameters are."""
    found, experts = {}, {}
    for name, gradient in gradients.items():
        layer, is_routed, below = name.partition(".experts.")
        if is_routed:
            expert, linear, _ = below.split(".")
            experts.setdefault(f"{layer}.experts", {})[int(expert), linear] = gradient
        else:
            found[name] = gradient
    for path, parts in experts.items():
        numbers = range(len(parts) // 3)
        gate_up = [torch.cat([parts[i, "gate_proj"], parts[i, "up_proj"]]) for i in numbers]
        found[f"{path}.gate_up_proj"] = torch.stack(gate_up)
        found[f"{path}.down_proj"] = torch.stack([parts[i, "down_proj"] for i in numbers])
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_every_gradient_of_adapters_and_routers(kind, balanced, alpaca_file, one_rank):
    folder = balanced(kind)
    args = args_for(folder, alpaca_file, "lora", "--train_router", "true")
    ours, value, state, trained = one_rank(backward, args)[0]
    adapters = {name: tensor for name, tensor in trained.items() if ".lora_" in name}
    router = "mlp.router" if kind == "gpt_oss" else "mlp.gate"
    model = build_peft_model(folder, state, adapters, use_dora=False, modules_to_save=[router])
    assert value == pytest.approx(backward_of_transformers(model), rel=1e-6)
    theirs = dict(model.named_parameters())
    for name, gradient in ours.items():
        path, _, last = name.rpartition(".")
        saved = f"base_model.model.{path}.modules_to_save.default.{last}"
        expected = theirs[peft_name(name) if name in adapters else saved].grad
        torch.testing.assert_close(
            gradient, expected, rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}"
        )
    assert len(ours) > len(adapters)


def test_packed_rows(balanced, alpaca_file, one_rank):
    """They have the value and the gradients of padded rows, which are transformers'."""
    args = args_for(balanced("qwen3_moe"), alpaca_file, "lora", "--train_router", "true")
    padded, value, *_ = one_rank(backward, args)[0]
    packed, of_packed, *_ = one_rank(backward, [*args, "--packing", "true"], packed_batch())[0]
    assert of_packed == pytest.approx(value, rel=1e-6)
    for name, gradient in padded.items():
        torch.testing.assert_close(packed[name], gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("chosen", ["all", "one", "not one"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_value_with_expert_in_any_use(chosen, dtype):
    """All tokens choose an expert, or none does. Two layers; padding does not count."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 24, 6, generator=generator)
    logits[:, :, 2] += {"all": 0, "one": 20, "not one": -20}[chosen]
    layers = tuple(logits.to(dtype))
    mask = torch.arange(12) < torch.tensor([[12], [5]])
    sums = torch.stack([routing_sums(each, 2, mask.flatten().float()) for each in layers]).sum(0)
    rows = sums[0].sum() / 2
    assert rows == 2 * 17 and (sums[0, 2] == {"one": rows, "not one": 0}.get(chosen, sums[0, 2]))
    found = 6 * (sums[0] * sums[1]).sum() / rows**2
    torch.testing.assert_close(found, load_balancing_loss_func(layers, 6, 2, mask))


def test_padding_of_packed_rows_does_not_count():
    rows = make_token_rows(3)  # no token has the id 0, which padding has
    batch = make_packed_batch(rows, [torch.tensor([0, 1]), torch.tensor([2])], (3, 28), 13, 16)
    assert torch.equal(count_tokens(batch.ids, batch.lengths), batch.ids.flatten().ne(0).float())


def losses(rank_info, args):
    """Return (train_run's result, the auxiliary loss of each step)."""
    found: list[float | None] = []
    original = Meter.measure

    def measure(*args):
        metrics = original(*args)
        found.append(metrics.router_aux_loss)
        return metrics

    with mock.patch.object(Meter, "measure", measure):
        return train_run(rank_info, args), found


SGD = ["--optimizer", "sgd", "--lr", "0.1"]


@pytest.mark.parametrize(
    "train_type, more",
    [
        ("lora", []),
        pytest.param("full", [], marks=pytest.mark.slow),
        pytest.param("qlora", ["--packing", "true"], marks=pytest.mark.slow),
        pytest.param("full", ["--wrap_policy", "sublayer"], marks=pytest.mark.slow),
        pytest.param("qlora", ["--use_activation_cpu_offload", "true"], marks=pytest.mark.slow),
    ],
)
def test_ranks_and_checkpointing_change_nothing(train_type, more, balanced, even_rows, one_rank, two_ranks):
    args = arguments(balanced("qwen3_moe"), even_rows, train_type, *SGD)
    if "--packing" in more:
        args += more
    plain, auxiliary = one_rank(losses, [*args, *PLAIN])[0]
    split, of_split = two_ranks(losses, [*args, *more, *CHECKPOINTED, "--batch_size", "2"])[0]
    assert_same(plain, split)
    assert all(value > 2 for value in auxiliary)  # K, the value of even use
    torch.testing.assert_close(torch.tensor(auxiliary), torch.tensor(of_split), rtol=1e-5, atol=0)


def test_a_rank_without_rows(balanced, one_rank, two_ranks, tmp_path):
    """The second micro-batch has one row, and the loss is the mean of both micro-batches'."""
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps({"text": text}) + "\n" for text in ("abcd", "efghijkl", "mnop")))
    args = arguments(balanced("qwen3_moe"), data, "full", *SGD, "--gradient_accumulation_steps", "2")
    args += ["--num_epochs", "5"]
    plain, auxiliary = one_rank(losses, [*args, "--batch_size", "2"])[0]
    split, of_split = two_ranks(losses, [*args, "--batch_size", "1"])[0]
    assert_same(plain, split)
    torch.testing.assert_close(torch.tensor(auxiliary), torch.tensor(of_split), rtol=1e-5, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["qwen3_moe", *OTHERS])
def test_compiled_layers(kind, balanced, even_rows, one_rank):
    args = arguments(balanced(kind), even_rows, "lora", *SGD)
    plain = one_rank(train_run, [*args, *PLAIN])[0]
    assert_same(plain, one_rank(compiled_run, [*args, *CHECKPOINTED])[0][0])


def test_a_resumed_run_repeats_it(balanced, short_rows, one_rank, tmp_path):
    """And the result's config still asks for the loss."""
    base = balanced("qwen3_moe")
    args = ["--model_name", str(base), "--dataset", str(short_rows), "--log_to", "stdout"]
    args += "--train_type full --max_steps 4 --deterministic --compile false".split()
    one_rank(run, [*args, "--output_dir", str(tmp_path / "whole")])
    again = [*args, "--output_dir", str(tmp_path / "stopped"), "--resume", "auto"]
    one_rank(run, again, Signals({2: signal.SIGTERM}))
    assert len(lines(tmp_path / "stopped")) == 2
    edit_config(base, router_aux_loss_coef=0.25)
    with pytest.raises(UserError, match=r"that of routers times 0\.5, and .* asks for that .* times 0\.25$"):
        train.check_run(parse([*again, "--world_size", "1"])[0])
    edit_config(base, router_aux_loss_coef=FACTOR)
    output = one_rank(run, again)[0]
    whole, stopped = ([m["router_aux_loss"] for m in lines(tmp_path / x)] for x in ("whole", "stopped"))
    assert len(whole) == 4 and whole == stopped
    assert f"router_aux_loss {whole[-1]:.4f}" in output
    assert read_config_json(tmp_path / "whole")["output_router_logits"] is True
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "whole", dtype=torch.float32)
    assert model.config.router_aux_loss_coef == FACTOR


def test_the_loss_is_no_part_of_a_base(balanced, short_rows):
    """An adapter fits its base with and without it. Nodes must agree on it."""
    model = balanced("qwen3_moe")
    before = make_single_rank_job(model, short_rows, "--train_type", "full")
    edit_config(model, output_router_logits=False)
    after = make_single_rank_job(model, short_rows, "--train_type", "full")
    assert before.base == after.base and before.facts_to_compare() != after.facts_to_compare()


def test_a_model_without_routed_layers_has_none(tmp_path, even_rows, one_rank):
    folder = tiny.save_checkpoint("qwen3_moe", tmp_path / "dense", mlp_only_layers=[0, 1, 2])
    edit_config(folder, output_router_logits=True)
    assert one_rank(losses, [*arguments(folder, even_rows, "lora"), *PLAIN])[0][1] == [None] * 5


def test_there_is_no_such_metric_without_it(checkpoints, even_rows, one_rank):
    args = arguments(checkpoints("qwen3_moe"), even_rows, "lora")
    assert one_rank(losses, [*args, *PLAIN])[0][1] == [None] * 5
