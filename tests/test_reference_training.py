"""Five steps of ours follow five steps of transformers + PEFT + torch.optim on the same batches."""

from __future__ import annotations

import peft
import pytest
import torch
from peft.optimizers import create_loraplus_optimizer
from transformers import AutoModelForCausalLM

from data.batches import StepSampler
from data.rows import IGNORE
from options.methods import METHODS
from tests.helpers.adapters import (
    args_for,
    build_peft_model,
    peft_name,
    save_peft_adapter,
    set_up_adapters,
)
from tests.helpers.parity import biased_checkpoint
from tests.helpers.products import slow
from tests.helpers.programs import metrics, run_here
from tests.helpers.runs import (
    dense_state,
    make_job,
    set_up,
    train_run,
    trained_tensors,
    transformers_model,
)

STEPS, LR = 5, 2e-3


def batches_of(rank_info, args) -> list:
    """Return the run's own batches as plain tensors: [(ids, targets) of each micro-batch] of each step."""
    job = make_job(rank_info, args)
    c = job.config
    sampler = StepSampler(job.rows, c.batch_size, c.gradient_accumulation_steps, 0, 1, c.seed)
    steps = zip(range(STEPS), sampler.steps(1), strict=False)
    return [[(b.ids, b.targets) for b in step.batches] for _, step in steps]


def reference_steps(model, batches, optimizer, schedule=None) -> tuple[list[float], list[float]]:
    """Run the textbook loop; return (losses, gradient norms), as means over each step's targets.

    Padding is masked from attention. schedule: one of torch's learning-rate schedulers.
    """
    losses, norms = [], []
    for step in batches:
        count = sum(int((targets != IGNORE).sum()) for _, targets in step)
        total = 0.0
        for ids, targets in step:
            longest = (targets != IGNORE).cumsum(1).argmax(1)  # attention up to the last target's input
            mask = torch.arange(ids.shape[1])[None] <= longest[:, None]
            logits = model(input_ids=ids, attention_mask=mask.long()).logits
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
            (loss / count).backward()
            total += loss.item() / count
        norms.append(
            torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0).item()
        )
        optimizer.step()
        optimizer.zero_grad()
        if schedule:
            schedule.step()
        losses.append(total)
    return losses, norms


# Slow: other quantizers of the same adapters.
@pytest.mark.parametrize(
    "train_type",
    [
        *("full", "lora", "bnb_dora", "hqq_llama_pro"),
        *slow(("dora", "qlora", "hqq_dora")),
    ],
)
def test_losses_follow_the_reference(train_type, checkpoints, short_rows, one_rank):
    folder = checkpoints(biased_checkpoint(train_type))
    more = f"--lr {LR} --max_steps {STEPS} --batch_size 4 --gradient_accumulation_steps 2".split()
    args = args_for(folder, short_rows, train_type, *more)
    ours, _, our_norms = one_rank(train_run, args)[0]
    if METHODS[train_type].adapter:
        state, adapters = one_rank(dense_state, args)[0], one_rank(set_up_adapters, args)[0]
        model = build_peft_model(folder, state, adapters, METHODS[train_type].adapter == "dora")
    else:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        if METHODS[train_type].expansion:
            model.load_state_dict(one_rank(dense_state, args)[0])
            model.requires_grad_(False)
            for i in model.config.llama_pro_new_layers:
                model.model.layers[i].requires_grad_(True)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=LR, weight_decay=0.0)
    theirs, norms = reference_steps(model, one_rank(batches_of, args)[0], optimizer)
    torch.testing.assert_close(torch.tensor(ours), torch.tensor(theirs), rtol=1e-4, atol=0)
    torch.testing.assert_close(torch.tensor(our_norms), torch.tensor(norms), rtol=1e-3, atol=0)
    assert ours[-1] < 0.95 * ours[0]


# PEFT also decays DoRA's magnitudes, which never decay here.
@pytest.mark.parametrize(("train_type", "decay"), [("lora", 0.1), *slow([("bnb_dora", 0.0)])])
def test_lora_plus_and_rslora_follow_peft(train_type, decay, checkpoints, short_rows, one_rank, two_ranks):
    """On one and two ranks, against PEFT's parameter groups and scale, with clipping and a schedule."""
    folder, lr, ratio = checkpoints("llama_bias"), 5e-4, 8
    more = f"--use_rslora true --lora_plus_ratio {ratio} --lr {lr} --wd {decay} --max_steps {STEPS}"
    more += " --lr_scheduler linear --lr_warmup 0 --gradient_accumulation_steps 2"
    args = args_for(folder, short_rows, train_type, *more.split())
    ours = one_rank(train_run, [*args, "--batch_size", "4"])[0]
    sharded = two_ranks(train_run, [*args, "--batch_size", "2"])[0]
    args += ["--batch_size", "4"]
    state, adapters = one_rank(dense_state, args)[0], one_rank(set_up_adapters, args)[0]
    is_dora = METHODS[train_type].adapter == "dora"
    model = build_peft_model(folder, state, adapters, is_dora, use_rslora=True)
    optimizer = create_loraplus_optimizer(
        model, torch.optim.AdamW, lr=lr, loraplus_lr_ratio=ratio, loraplus_weight_decay=decay
    )
    linear = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / STEPS)
    theirs, norms = reference_steps(model, one_rank(batches_of, args)[0], optimizer, linear)
    trained = {peft_name(name): name for name in adapters}
    after = {trained[n]: p.detach() for n, p in model.named_parameters() if n in trained}
    for losses, tensors, our_norms in (ours, sharded):
        torch.testing.assert_close(torch.tensor(losses), torch.tensor(theirs), rtol=1e-4, atol=0)
        torch.testing.assert_close(torch.tensor(our_norms), torch.tensor(norms), rtol=1e-3, atol=0)
        for name in after:
            if name.rpartition(".")[2] in ("lora_A", "lora_B"):
                torch.testing.assert_close(tensors[name], after[name], rtol=0, atol=lr / 10)
    assert theirs[-1] < 0.95 * theirs[0]


EMBEDDINGS = {"modules_to_save": ["embed_tokens", "lm_head"]}


@pytest.mark.parametrize(
    ("train_type", "kind", "more", "ratio"),
    [
        *slow([("lora", "llama_bias", {}, 1)]),
        ("bnb_dora", "llama_bias", {}, 1),
        *slow([("qlora", "llama", {"use_rslora": True}, 1), ("qlora", "llama", EMBEDDINGS, 4)]),
        ("dora", "qwen2", EMBEDDINGS | {"ensure_weight_tying": True}, 1),
    ],
    ids=["lora", "bnb_dora", "rslora", "untied embeddings", "tied embeddings"],
)
def test_a_saved_adapter_is_trained_further(
    train_type, kind, more, ratio, checkpoints, short_rows, one_rank, two_ranks, tmp_path
):
    """--adapter on one and two ranks, and PEFT's trainable adapter from that folder, over the same base.

    With LoRA+ embedding and head learn as fast as A.
    """
    folder, is_dora = checkpoints(kind), METHODS[train_type].adapter == "dora"
    saved = save_peft_adapter(folder, tmp_path / "adapter", use_dora=is_dora, **more)
    args = ["--model_name", folder, "--dataset", short_rows, "--train_type", train_type, "--adapter", saved]
    args += f"--lr {LR} --max_steps {STEPS} --gradient_accumulation_steps 2".split()
    args += ["--lora_plus_ratio", str(ratio)]
    ours = one_rank(train_run, [*args, "--batch_size", "4"])[0]
    sharded = two_ranks(train_run, [*args, "--batch_size", "2"])[0]
    without = [*args[:6], "--lora_target_modules", "q_proj,down_proj"]  # the base's own embedding
    base = transformers_model(folder, one_rank(dense_state, without)[0])
    model = peft.PeftModel.from_pretrained(base, saved, is_trainable=True)
    optimizer = create_loraplus_optimizer(model, torch.optim.AdamW, lr=LR, loraplus_lr_ratio=ratio)
    batches = one_rank(batches_of, [*args, "--batch_size", "4"])[0]
    theirs, norms = reference_steps(model, batches, optimizer)
    for losses, _, our_norms in (ours, sharded):
        torch.testing.assert_close(torch.tensor(losses), torch.tensor(theirs), rtol=1e-4, atol=0)
        torch.testing.assert_close(torch.tensor(our_norms), torch.tensor(norms), rtol=1e-3, atol=0)
    assert theirs[-1] < 0.97 * theirs[0]


def test_weight_decay_spares_vectors(checkpoints, short_rows, one_rank):
    """A learning rate and a decay that would erase everything: only matrices shrink."""
    common = args_for(
        checkpoints("llama_bias"), short_rows, "bnb_dora", "--optimizer", "sgd", "--max_steps", "1"
    )
    before = one_rank(tensors_before, common)[0]
    after = one_rank(train_run, [*common, "--lr", "1e-6", "--wd", "5e5"])[0][1]
    for name, tensor in after.items():
        share = 0.5 if tensor.dim() >= 2 else 1.0  # 1 - lr * wd
        torch.testing.assert_close(tensor, share * before[name], rtol=1e-3, atol=1e-4)


def tensors_before(rank_info, args):
    return trained_tensors(set_up(rank_info, args)[1])


def test_the_demo_has_the_same_losses_with_every_version(tmp_path):
    """As torch 2.13 and 2.10, transformers 5.23 and 5.17 compute them; `make test-oldest` runs this."""
    options = ["--max_steps", 5, "--sample_every", 0, "--save_model", "false", "--world_size", 2]
    status, _, err = run_here([*options, "--output_dir", tmp_path / "run"])
    assert status == 0, err
    losses = [step["loss"] for step in metrics(tmp_path / "run")]
    assert losses == pytest.approx([7.495554, 5.025924, 4.847889, 4.935172, 4.618863], rel=1e-5)
