"""Packed rows are learned like rows one by one, and each row comes once per epoch.

Tested for every family, for both ways to attend within rows, and for several numbers of ranks.
"""

from __future__ import annotations

from itertools import pairwise
from statistics import fmean

import pytest
import torch

from data.batches import Batch, StepSampler, make_batch
from data.image_sizes import FixedImages
from data.images import ImageRef
from data.packing import PackSampler, make_sampler, mean_row_length, pack_best_fit
from data.rows import IGNORE, TokenizedRows
from models.family import CAUSAL, FUSED, VARLEN
from models.longrope import make_rotary
from models.registry import FAMILIES
from monitoring.messages import describe_data
from monitoring.run_facts import run_facts_json
from tests.helpers.compiled import EXTRA_GRAPHS, compiled_run
from tests.helpers.packing import (
    LENGTHS,
    kernel_by_definition,
    loss_and_gradients,
    packed_batch,
    packing_arguments,
    padded_batch,
    seven_rows,
)
from tests.helpers.parity import arguments, assert_same
from tests.helpers.picture_rows import make_picture_rows
from tests.helpers.report_pages import make_run, metrics, page_of
from tests.helpers.runs import make_job, set_up, train_run
from tests.helpers.tiny import CONFIGS, LONG_ROPE, VARIANTS
from tests.helpers.token_rows import SIZES, assert_target_positions, expected, make_token_rows

SEEN = ("llama", "gemma2", "gemma3", "phi3", "qwen3_moe")


def rows_of(batch: Batch) -> dict[tuple, tuple]:
    """Return {tokens: targets} of a packed batch's rows, found by its positions; its bounds must match."""
    table, edges, line = {}, set(), batch.ids.shape[1]
    for at, (ids, targets, positions) in enumerate(
        zip(batch.ids.tolist(), batch.targets.tolist(), batch.positions.tolist(), strict=True)
    ):
        filled = sum(i != 0 for i in ids)
        assert ids[filled:] == positions[filled:] == [0] * (line - filled)
        assert targets[filled:] == [IGNORE] * (line - filled)
        starts = [i for i in range(filled) if positions[i] == 0] + [filled]
        for start, end in pairwise(starts):
            assert positions[start:end] == list(range(end - start))
            table[tuple(ids[start:end])] = tuple(targets[start:end])
        edges |= {at * line + i for i in starts}
    bounds = batch.bounds.tolist()
    assert bounds[0] == 0 and bounds[-1] == batch.ids.numel() and bounds == sorted(bounds)
    assert edges <= set(bounds)
    assert max(b - a for a, b in pairwise(bounds)) <= batch.longest
    padding = [b for b in bounds if b not in edges]
    assert all(batch.ids.flatten()[b - 1] == 0 for b in padding), "a bound within a row"
    return table


def steps_of(rows: TokenizedRows, size: tuple, capacity: int, epochs: int = 1) -> list[list]:
    """Return [[the step of each rank] for each step]. size: batch_size, accumulation, world."""
    batch_size, accumulation, world = size
    samplers = [PackSampler(rows, batch_size, accumulation, r, world, 42, capacity) for r in range(world)]
    steps = list(zip(*(s.steps(epochs) for s in samplers), strict=True))
    assert len(steps) == epochs * samplers[0].steps_per_epoch()
    return steps


def learned_rows(step: list) -> dict[tuple, tuple]:
    """Return {tokens: targets} of all ranks' rows in a step, each once, but of batches without targets."""
    batches = [b for part in step for b in part.batches if (b.targets != IGNORE).any()]
    tables = [rows_of(b) for b in batches]
    merged = {ids: targets for table in tables for ids, targets in table.items()}
    assert len(merged) == sum(map(len, tables))
    return merged


def test_the_mean_length_is_over_tokens():
    assert mean_row_length(seven_rows()) == pytest.approx(fmean(n for n in LENGTHS for _ in range(n)))


@pytest.mark.parametrize("capacity", [13, 29, 100])
@pytest.mark.parametrize("size", SIZES)
def test_an_epoch_has_every_row_once_with_its_targets(size, capacity):
    rows = make_token_rows(3 * size[0])
    steps = steps_of(rows, size[1:], capacity, epochs=2)
    for epoch in (steps[: len(steps) // 2], steps[len(steps) // 2 :]):
        tables = [learned_rows(step) for step in epoch]
        assert sum(map(len, tables)) == len(rows)
        assert {ids: targets for table in tables for ids, targets in table.items()} == expected(rows)
    for step in steps:
        table = learned_rows(step)
        targets = sum(t != IGNORE for values in table.values() for t in values)
        assert {(part.n_tokens, part.n_targets) for part in step} == {(sum(map(len, table)), targets)}
        assert_target_positions(step)
        # Collectives need all ranks alike.
        assert len({tuple(b.ids.shape for b in part.batches) for part in step}) == 1
    batches = [b for step in steps for part in step for b in part.batches]
    # Compiled layers are compiled for one shape.
    assert len({(b.ids.shape[1], len(b.bounds), b.longest) for b in batches}) == 1
    assert batches[0].ids.shape[1] <= capacity
    assert all(len(b.ids) <= size[1] for b in batches)


def test_a_step_has_the_same_rows_however_it_is_split():
    rows = make_token_rows(60)
    splits = [(8, 1, 1), (1, 8, 1), (1, 1, 8), (2, 2, 2), (4, 1, 2), (1, 2, 4)]
    runs = [[learned_rows(step) for step in steps_of(rows, split, 29, epochs=2)] for split in splits]
    assert all(other == runs[0] for other in runs[1:])


def test_packs_follow_from_seed_and_epoch():
    rows = make_token_rows(90)

    def packs(seed: int) -> list:
        sampler = PackSampler(rows, 4, 1, 0, 1, seed, 29)
        return [tuple(tuple(p.tolist()) for s, _ in sampler.deal(e) for p in s) for e in range(3)]

    first = packs(1)
    assert first == packs(1)
    assert len(set(first + packs(2))) == 6
    # Not only the order of the packs: another epoch puts other rows together.
    assert len({frozenset(map(frozenset, epoch)) for epoch in first}) == 3


def test_best_fit():
    assert pack_best_fit([6, 5, 4, 3, 2], 10) == [[0, 2], [1, 3, 4]]
    assert pack_best_fit([6, 8, 2], 10) == [
        [0],
        [1, 2],
    ]  # where least room is left, not where some is found first
    generator = torch.Generator().manual_seed(0)
    for capacity in (16, 100, 1000):
        for _ in range(20):
            count = int(torch.randint(1, 300, (), generator=generator))
            lengths = torch.randint(1, capacity + 1, (count,), generator=generator).tolist()
            packs = pack_best_fit(lengths, capacity)
            assert sorted(i for pack in packs for i in pack) == list(range(count))
            filled = sorted(sum(lengths[i] for i in pack) for pack in packs)
            assert filled[-1] <= capacity
            # No two packs fit into one, so fewer than twice as many as are needed.
            assert len(packs) == 1 or filled[0] + filled[1] > capacity


def test_padding_share():
    """As counted in the batches of an epoch whose steps are all full."""
    sampler = PackSampler(make_token_rows(90), 1, 1, 0, 1, 42, 29)
    batches = [b for step in sampler.steps(1) for b in step.batches]
    share = sum(int((b.ids == 0).sum()) for b in batches) / sum(b.ids.numel() for b in batches)
    assert sampler.padding_share() == pytest.approx(share, abs=1e-12)
    assert 0 < sampler.padding_share() < 0.1


def learn_all_ways(rank_info, args) -> dict[str, tuple[float, dict]]:
    """Return {way: (loss, {trained parameter: its gradient})} of the seven rows, padded and packed.

    The ways use the family's own attention. If that is PyTorch's, they also use ours, with
    `reference_attention` in the place of the kernel for packed rows.
    """
    job, model = set_up(rank_info, args)
    family = FAMILIES[job.model_config.model_type]
    own = family.attention
    window = getattr(job.model_config.get_text_config(), "sliding_window", None)
    is_lost = bool(window) and not family.passes_window  # Qwen2-MoE's: only masks apply it
    model.set_attn_implementation(own)
    padded, packed = padded_batch(), packed_batch()
    found = {
        "one by one": learn_each(model),
        "padded": loss_and_gradients(model, padded),
        "packed": loss_and_gradients(model, packed),
        "leaking": loss_and_gradients(model, Batch(packed.ids, packed.targets)),
    }
    if own == FUSED and not is_lost:
        model.set_attn_implementation(CAUSAL)
        found["padded, causal"] = loss_and_gradients(model, padded)
        model.set_attn_implementation(VARLEN)
        with kernel_by_definition():
            found["padded, varlen"] = loss_and_gradients(model, padded)
            # Nemotron's layers keep the bounds to themselves: its rows leak into one another.
            name = "packed, varlen" if family.passes_row_bounds else "leaking, varlen"
            found[name] = loss_and_gradients(model, packed)
    return found


def learn_each(model) -> tuple[float, dict[str, torch.Tensor]]:
    """Return the same of each row by itself, as transformers does it, summed."""
    rows, found = seven_rows(), []
    for i, length in enumerate(LENGTHS):
        batch = make_batch(rows, torch.tensor([i]), (1, length))
        found.append(loss_and_gradients(model, Batch(batch.ids, batch.targets)))
    names = found[0][1]
    return sum(loss for loss, _ in found), {n: sum(gradients[n] for _, gradients in found) for n in names}


def assert_equal(got: tuple[float, dict], expected: tuple[float, dict]) -> None:
    assert got[0] == pytest.approx(expected[0], rel=5e-6)
    assert got[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        largest = gradient.abs().max().item()
        torch.testing.assert_close(
            got[1][name], gradient, rtol=1e-4, atol=5e-5 * largest, msg=lambda m, n=name: f"{n}: {m}"
        )


# Those whose attention, positions or experts see the rows' bounds in ways of their own.
@pytest.mark.parametrize(
    "kind", [pytest.param(k, marks=() if k in SEEN else pytest.mark.slow) for k in CONFIGS | VARIANTS]
)
def test_packed_rows_are_learned_as_rows_one_by_one(kind, checkpoints, alpaca_file, one_rank):
    """Every family, all of its parameters, in fp32."""
    found = one_rank(learn_all_ways, arguments(checkpoints(kind), alpaca_file, "full"))[0]
    expected = found.pop("one by one")
    gradients = {n: gradient for n, gradient in expected[1].items() if gradient.any()}  # of experts in use
    for leaking in [found.pop(name) for name in list(found) if name.startswith("leaking")]:
        leaks = [(leaking[1][n] - gradient).norm() / gradient.norm() for n, gradient in gradients.items()]
        assert max(leaks) > 0.1, "rows that see one another would not show"
    own_masks = {"nemotron": 4, "nemotron_bias": 4, "stablelm": 4, "qwen2_moe_window": 2}
    assert len(found) == ({"gemma2": 2} | own_masks).get(kind, 5)
    for result in found.values():
        assert_equal(result, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["phi3", "llama", "qwen2", "gemma2", "cohere2", "glm4", "nemotron"])
def test_longrope_rotates_each_row_as_transformers_does_alone(kind, dtype):
    """In any family whose config has it: rows below, at and above 32 tokens, padded and packed."""
    config = CONFIGS[kind]()
    if kind != "phi3":
        half = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        factors = {
            f"{of}_factor": [base + i / 4 for i in range(half // 2)]
            for of, base in (("short", 1.0), ("long", 2.0))
        }
        config.rope_parameters = LONG_ROPE | factors | {"partial_rotary_factor": 1.0}
    rotary, theirs = make_rotary(FAMILIES[kind], config), FAMILIES[kind].rotary_class
    assert (config.rope_parameters["original_max_position_embeddings"], rotary.row_lengths) == (32, None)
    lengths, x = [5, 31, 32, 33, 60, 0], torch.zeros(1, dtype=dtype)
    alone = [[t[0] for t in theirs(config=config)(x, torch.arange(n)[None])] for n in lengths[:-1]]
    rotary.row_lengths = torch.tensor(lengths)[:, None]
    padded = rotary(x, torch.arange(60)[None])
    rotary.row_lengths = torch.tensor(lengths).repeat_interleave(torch.tensor(lengths))[None]
    packed = rotary(x, torch.cat([torch.arange(n) for n in lengths])[None])
    for ours, rows, line in zip(zip(*alone, strict=True), padded, packed, strict=True):
        assert all(torch.equal(rows[i, : len(row)], row) for i, row in enumerate(ours))
        assert torch.equal(line[0], torch.cat(ours)) and line.dtype == dtype
    assert not torch.equal(padded[0][0], padded[0][4])
    rotary.row_lengths = None
    assert all(map(torch.equal, rotary(x, torch.arange(60)[None]), (t[None] for t in alone[4])))


def test_a_run_learns_what_it_learns_unpacked(checkpoints, alpaca_file, one_rank):
    """Steps of a whole epoch: the same rows in each."""
    args = [*packing_arguments(checkpoints(), alpaca_file, 2), "--gradient_accumulation_steps", "2"]
    packed = one_rank(train_run, [*args, "--batch_size", "4"])[0]
    padded = one_rank(train_run, [*args, "--packing", "false", "--batch_size", "6"])[0]
    assert len(packed[0]) == 2
    assert_same(padded, packed)


@pytest.mark.slow
def test_compiled_layers_are_compiled_for_one_shape(checkpoints, alpaca_file, one_rank):
    """Four micro-batches of different packs, with masks, need two graphs: for the first layer and for others.

    The first layer's input has no gradient. Packs differ in their numbers of learned tokens: two kernels of
    the loss are compiled for any number.
    """
    args = [*packing_arguments(checkpoints(), alpaca_file, 2), "--batch_size", "4"]
    args += ["--gradient_accumulation_steps", "2"]
    compiled, graphs = one_rank(compiled_run, args)[0]
    assert graphs == 2 + EXTRA_GRAPHS + 2
    assert_same(one_rank(train_run, args)[0], compiled)


def test_two_ranks_equal_one(checkpoints, alpaca_file, one_rank, two_ranks):
    """The second step of an epoch leaves the second rank without a pack."""
    args = packing_arguments(checkpoints(), alpaca_file, 3)
    plain = one_rank(train_run, [*args, "--batch_size", "6"])[0]
    assert len(plain[0]) == 3
    assert_same(plain, two_ranks(train_run, [*args, "--batch_size", "3"])[0])


def test_what_packing_brought_and_would_bring():
    rows = make_token_rows(200)
    padded, packed = StepSampler(rows, 8, 1, 0, 1, 42), PackSampler(rows, 8, 1, 0, 1, 42, 64)
    line, remark = describe_data(rows, padded, 64).splitlines()
    assert line.endswith(f"padding {padded.padding_share():.0%} of the batches")
    faster = (1 - packed.padding_share()) / (1 - padded.padding_share())
    assert faster > 1.4
    assert remark.startswith(f"--packing true would train these rows about {faster:.1f} times as fast")
    (line,) = describe_data(rows, packed, 64).splitlines()
    shares = f"padding {packed.padding_share():.0%} of the batches"
    unpacked = f"({padded.padding_share():.0%} without --packing)"
    assert line.endswith(f"{shares} {unpacked}; {packed.items_per_epoch()} packs of up to 64 tokens")


def test_little_padding_is_no_reason_to_pack():
    rows = make_token_rows(200)
    single = StepSampler(rows, 1, 1, 0, 1, 42)
    assert single.padding_share() == 0
    assert "packing" not in describe_data(rows, single, 64)


def test_packs_are_in_the_report(tmp_path):
    rows = make_token_rows(50)
    run = make_run(tmp_path / "run", [metrics(1)])
    for sampler, shown in (
        (PackSampler(rows, 8, 1, 0, 1, 42, 64), True),
        (StepSampler(rows, 8, 1, 0, 1, 42), False),
    ):
        (run / "run.json").write_text(run_facts_json(rows, sampler, torch.nn.Linear(3, 2), {}))
        assert (f"Packs {sampler.items_per_epoch()} " in page_of(run).text) == shown


def test_a_job_is_dealt_as_its_options_say(checkpoints, alpaca_file, one_rank):
    def dealt(*more):
        return one_rank(sampler_of, [*arguments(checkpoints(), alpaca_file, "lora"), *more])[0]

    assert dealt() == ("StepSampler", 40)
    name, count = dealt("--packing", "true", "--context_length", "512", "--dataset_samples", "12")
    assert name == "PackSampler" and count == 8


def sampler_of(rank_info, args) -> tuple[str, int]:
    job = make_job(rank_info, args)
    sampler = make_sampler(job.config, job.rows, rank_info.rank, rank_info.world)
    return type(sampler).__name__, sampler.items_per_epoch()


def test_packs_with_few_enough_images():
    """A pack has more images than the limit only if they are those of one row."""
    assert pack_best_fit([3, 3, 3, 1], 10, [1, 1, 1, 0], 2) == [[0, 1, 3], [2]]
    generator = torch.Generator().manual_seed(0)
    for limit in (1, 2, 5):
        for _ in range(20):
            lengths, images = (
                torch.randint(low, high, (200,), generator=generator).tolist()
                for low, high in ((1, 41), (0, 4))
            )
            packs = pack_best_fit(lengths, 100, images, limit)
            assert sorted(i for pack in packs for i in pack) == list(range(200))
            assert max(sum(lengths[i] for i in pack) for pack in packs) <= 100
            for pack in packs:
                counts = [images[i] for i in pack if images[i]]
                assert sum(counts) <= limit or len(counts) == 1
            # No two packs fit into one.
            totals = sorted((sum(lengths[i] for i in pack), sum(images[i] for i in pack)) for pack in packs)
            assert totals[0][0] + totals[1][0] > 100 or totals[0][1] + totals[1][1] > limit
    assert pack_best_fit(lengths, 100, images, 10**4) == pack_best_fit(lengths, 100, images, 10**5)


@pytest.mark.parametrize("limit", [1, 3, -1])
def test_each_epoch_keeps_to_the_limit_of_images(limit, tmp_path):
    """Rows of equal length with different numbers of images do not stand in for each other."""
    refs = [ImageRef(str(tmp_path), 0, None, 9, 9, "")] * 120
    counts = [i % 3 for i in range(120)]
    rows = make_picture_rows(refs, counts, FixedImages("<i>", 7, (), (0,) * 3, (1,) * 3, "", 4, 8, 2))
    sampler = PackSampler(rows, 2, 1, 0, 1, 42, 64, limit)
    images, epochs = torch.tensor(counts), []
    for epoch in range(3):
        packs = [pack for step, _ in sampler.deal(epoch) for pack in step]
        assert sorted(torch.cat(packs).tolist()) == list(range(120))
        assert max(int(rows.lengths()[pack].sum()) for pack in packs) <= 64
        most = [int(images[pack].sum()) for pack in packs]
        assert max(most) == sampler.most_images
        if limit > 0:
            assert all(
                m <= limit or (images[pack] > 0).sum() == 1 for m, pack in zip(most, packs, strict=True)
            )
        epochs.append({tuple(pack.tolist()) for pack in packs})
    assert sampler.most_images > 3 or limit > 0, "the limit is tested"
    packs = f"packs of up to {sampler.width} tokens and {sampler.most_images} images"
    assert packs in describe_data(rows, sampler, 64)
    assert epochs[0] != epochs[1] != epochs[2]
