"""Evaluation while training: its loss is correct, and training is the same with and without it."""

from __future__ import annotations

import dataclasses
import html
import json
import math
import re
import types
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, LlamaConfig

import generate
import train
from data.batches import StepSampler, make_batch
from data.evaluation_data import EvaluationData, Prompt
from data.formats import FORMATS
from data.rows import IGNORE
from data.tokenizing import tokenize
from files.names import ADAPTER
from finished.finished_run import load_model, open_run
from launch.signals import NO_STOP_REQUESTS
from monitoring.profiling import NO_PROFILER
from monitoring.tracking import NoTracker
from options.train import parse
from tests.helpers.adapters import build_peft_model
from tests.helpers.evaluation import options
from tests.helpers.here import SINGLE_RANK, context
from tests.helpers.runs import dense_tensors, full_run, make_job, randomize, trained_tensors
from tests.helpers.small_tokenizers import BYTES
from tests.helpers.tiny import write_alpaca
from training import evaluator as evaluation
from training.evaluation import generate_greedily, group_rows, mean_loss, perplexity
from training.loop_components import make_loop_components


class Recorder(NoTracker):
    """Records the weights of some steps, on every rank."""

    def __init__(self, model, steps):
        self.model, self.steps, self.weights = model, steps, {}

    def log(self, metrics):
        if metrics.step in self.steps:
            self.weights[metrics.step] = trained_tensors(self.model)


def run(rank_info, args, scripted=None, steps=()):
    """(metrics of every step, weights after `steps`, dense weights and weights at the end) of a run.

    It begins with random adapters. scripted: losses of the evaluations, instead of their own.
    """
    job = make_job(rank_info, args)
    model, _ = train.set_up(job, rank_info)
    randomize(model)
    c, recorder = job.config, Recorder(model, steps)
    sampler = StepSampler(
        job.rows, c.batch_size, c.gradient_accumulation_steps, rank_info.rank, rank_info.world, c.seed
    )
    original, values = evaluation.mean_loss, iter(scripted or ())
    if scripted:
        evaluation.mean_loss = lambda *_: next(values)
    try:
        history = train.train(job, model, rank_info, sampler, recorder)
    finally:
        evaluation.mean_loss = original
    sharded = all(isinstance(p, DTensor) for p in model.parameters())
    assert sharded or rank_info.world == 1, "a parameter is still gathered"
    return (
        [dataclasses.asdict(m) for m in history],
        recorder.weights,
        dense_tensors(model),
        trained_tensors(model),
    )


# The loss


def test_the_loss_equals_transformers(checkpoints, short_rows, one_rank, two_ranks):
    """12 rows in batches of 5, 5 and 2: the same on one rank, on two, and row by row with transformers and
    PEFT on the dequantized weights."""
    args = options(checkpoints, short_rows, "--eval_share", "0.3", "--max_steps", "1", "--lr", "0")
    rows = make_job(SINGLE_RANK, args).evaluation.rows
    assert len(rows) == 12
    (one, _, dense, adapters), two = one_rank(run, args)[0], two_ranks(run, args)
    model = build_peft_model(checkpoints(), dense, adapters, use_dora=True, alpha=16).eval()
    total = torch.zeros((), dtype=torch.float64)
    for i in range(len(rows)):
        batch = make_batch(rows, torch.tensor([i]), (1, int(rows.lengths()[i])))
        with torch.no_grad():
            logits = model(input_ids=batch.ids).logits[0].double()
        learned = batch.targets[0] != IGNORE
        total -= logits.log_softmax(-1)[learned].gather(1, batch.targets[0][learned, None]).sum()
    expected = total.item() / int(rows.targets().sum())
    assert one[0]["eval_loss"] == pytest.approx(expected, rel=1e-5)
    assert [t[0][0]["eval_loss"] for t in two] == [pytest.approx(one[0]["eval_loss"], rel=1e-6)] * 2
    assert one[0]["eval_perplexity"] == math.exp(one[0]["eval_loss"])


def test_the_loss_does_not_depend_on_the_batches(checkpoints):
    """Phi-3 rotates all rows of a batch by other frequencies if one has more than 32 tokens."""
    model = AutoModelForCausalLM.from_pretrained(checkpoints("phi3")).eval()
    texts = [FORMATS["completion"].render({"text": "abc" * n}) for n in (4, 8, 9, 10, 11, 12, 20)]
    rows = tokenize(texts, BYTES, 100, "here")

    def loss_sum(model, batch):
        logits = model(input_ids=batch.ids).logits
        return nn.functional.cross_entropy(logits.flatten(0, 1), batch.targets.flatten(), reduction="sum")

    losses = [
        mean_loss(model, rows, size, loss_sum, SINGLE_RANK, context, most_tokens)
        for size, most_tokens in ((1, math.inf), (2, math.inf), (5, 60))
    ]
    assert losses[1:] == [pytest.approx(losses[0], rel=1e-6)] * 2


def test_groups_of_rows():
    """Longest first; in other groups where the rotation differs, alone where growth may change it."""
    lengths = torch.tensor([3, 9, 5, 6, 8, 1])

    def groups(switch, growth=0, size=4, most_tokens=math.inf):
        found = group_rows(lengths, size, switch, growth, most_tokens)
        return [[b.tolist() for b in group] for group in found]

    assert groups(math.inf) == [[[1, 4, 3, 2], [0, 5]]]
    assert groups(6) == [[[1, 4]], [[3, 2, 0, 5]]]
    assert groups(6, growth=2) == [[[1, 4]], [[3], [2]], [[0, 5]]]
    # Half as many rows where four would have more than 20 tokens; one has at least a batch of its own.
    assert groups(math.inf, most_tokens=20) == [[[1, 4], [3]], [[2, 0, 5]]]
    assert groups(math.inf, size=5, most_tokens=17) == [[[1]], [[4, 3], [2]], [[0, 5]]]
    assert groups(math.inf, most_tokens=7) == [[[1], [4], [3], [2]], [[0]], [[5]]]


def test_an_evaluation_takes_no_more_tokens_than_a_batch_of_training(
    alpaca_file, source, one_rank, two_ranks
):
    """Its rows may be much longer. The batches, and so the loss, are those of any number of ranks."""
    argv = [*source, "--eval_dataset", alpaca_file, "--context_length", "512", "--batch_size", "6"]
    alone, two = one_rank(evaluate_before_training, argv)[0], two_ranks(evaluate_before_training, argv)
    job = make_job(SINGLE_RANK, argv)
    most = 6 * int(job.rows.lengths().max())
    assert 6 * int(job.evaluation.rows.lengths().max()) > most
    assert max(alone[1]) <= most and all(max(shapes) <= most for _, shapes in two)
    assert [loss for loss, _ in two] == [pytest.approx(alone[0], rel=1e-6)] * 2


def evaluate_before_training(rank_info, argv: list) -> tuple[float, list[int]]:
    """Return (the loss of the untrained model, tokens of each batch) of the evaluator that the loop uses."""
    job = make_job(rank_info, argv)
    model, _ = train.set_up(job, rank_info)
    loop = make_loop_components(job, model, rank_info, 1, NoTracker(), NO_PROFILER, NO_STOP_REQUESTS, None)
    tokens: list[int] = []

    def loss_sum(model, batch):
        tokens.append(batch.ids.numel())
        return train.loss_sum(model, batch)

    loop.evaluator.loss_sum = loss_sum
    return loop.evaluator._compute_loss(), tokens


def test_perplexity():
    assert perplexity(0.0) == 1 and perplexity(1e4) == math.inf and math.isnan(perplexity(math.nan))


# Training is the same with evaluation

VARIANTS = {
    "shard_grad_op": ["--sharding_strategy", "shard_grad_op", "--use_gradient_checkpointing", "false"],
    "ddp": ["--sharding_strategy", "ddp", "--wrap_policy", "sublayer"],
    "offload": ["--use_cpu_offload", "--use_activation_cpu_offload", "--no_sync"],
    "full_shard": ["--precision", "bf16_autocast", "--train_type", "qlora"],
}


# Slow: strategies that gather each time, like offload, or never.
@pytest.mark.parametrize(
    "variant",
    ["shard_grad_op", *(pytest.param(v, marks=pytest.mark.slow) for v in ("offload", "full_shard", "ddp"))],
)
def test_training_is_the_same_with_evaluation(variant, checkpoints, short_rows, two_ranks, tmp_path):
    """The same losses and weights, bit for bit, with dropout, which draws random numbers."""
    out = [
        "--output_dir",
        tmp_path,
        "--max_steps",
        "2",
        "--num_epochs",
        "2",
        "--lora_dropout",
        "0.2",
        *VARIANTS[variant],
    ]
    args = options(checkpoints, short_rows, *out, "--dataset_samples", "10", "--lr", "1e-2")
    evaluated = ["--eval_dataset", short_rows, "--eval_samples", "6", "--eval_every", "1"]
    sampled = ["--sample_every", "1", "--sample_tokens", "2"]
    plain = two_ranks(run, args)
    with_evaluation = two_ranks(run, [*args, *map(str, evaluated), *sampled])
    for (before, *_, weights), (after, *_, same) in zip(plain, with_evaluation, strict=True):
        assert [m["loss"] for m in after] == [m["loss"] for m in before]
        assert [m["grad_norm"] for m in after] == [m["grad_norm"] for m in before]
        assert all(torch.equal(same[name], weights[name]) for name in weights)
        assert len({m["eval_loss"] for m in after}) == 2 and {m["eval_loss"] for m in before} == {None}
    steps = [json.loads(line)["step"] for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert steps == [s for s in (0, 1, 2) for _ in range(3)]


# The best step and early stopping


def test_early_stopping_and_the_best_step(checkpoints, short_rows, two_ranks, tmp_path):
    """Scripted losses at steps 2, 4, ...: a NaN and an equal value are no improvement. best/ has the weights
    of the best step, not of the last."""
    (tmp_path / "best").mkdir()  # from an earlier evaluation
    (tmp_path / "best" / "old.txt").write_text("old")
    script = [3.0, 2.0, 2.5, 1.9, math.nan, 1.9, 1.0, 1.0]
    more = ["--output_dir", tmp_path, "--max_steps", "20", "--num_epochs", "20", "--eval_share", "0.2"]
    stopping = ["--eval_every", "2", "--early_stopping_patience", "2", "--save_model", "true", "--lr", "1e-2"]
    done = two_ranks(run, options(checkpoints, short_rows, *more, *stopping), script, (8, 12))
    for history, *_ in done:
        assert [m["step"] for m in history] == list(range(1, 13))
        found = [m["eval_loss"] for m in history]
        assert found[1::2] == pytest.approx(script[:6], nan_ok=True) and found[::2] == [None] * 6
    score = json.loads((tmp_path / "best" / "evaluation.json").read_text())
    assert score == {"step": 8, "eval_loss": 1.9, "eval_perplexity": math.exp(1.9)}
    assert {p.name for p in tmp_path.iterdir()} == {"best"}, "no incomplete or older folder"
    files = {"adapter_config.json", ADAPTER, "config.yaml", "evaluation.json"}
    assert {p.name for p in (tmp_path / "best").iterdir()} == files
    stored, weights = load_file(tmp_path / "best" / ADAPTER), done[0][1]
    name = "model.layers.1.mlp.up_proj.lora_B"
    assert torch.equal(stored[f"base_model.model.{name}.weight"], weights[8][name])
    assert not torch.equal(weights[8][name], weights[12][name])


@pytest.fixture(scope="module")
def overfitted(checkpoints, two_ranks, tmp_path_factory):
    """(RUN, output, arguments) of a run on two ranks that overfits a few rows until others get worse."""
    root = tmp_path_factory.mktemp("overfitted")
    data = write_alpaca(root / "rows.jsonl", rows=24)
    (root / "ask.txt").write_text("Say red.\n\nSay something else, please.\n")
    more = ["--output_dir", root / "out", "--max_steps", "30", "--num_epochs", "30", "--eval_share", "0.4"]
    more += ["--eval_every", "1", "--early_stopping_patience", "2", "--lr", "5e-2", "--save_model", "true"]
    more += ["--sample_every", "100", "--sample_tokens", "6", "--sample_prompts", root / "ask.txt"]
    args = options(checkpoints, data, *more, "--world_size", "2")
    return root / "out", two_ranks(full_run, train.check_run(parse(args)[0]))[0], args


def metrics(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_run_that_stops_early_ends_as_usual(overfitted):
    folder, printed, _ = overfitted
    found = [m["eval_loss"] for m in metrics(folder)]
    stop = next(i for i in range(2, len(found)) if min(found[i - 1 : i + 1]) >= min(found[: i - 1])) + 1
    assert len(found) == stop < 30
    best = found.index(min(found)) + 1
    assert best == stop - 2
    assert f"stopped at step {stop} of 30" in printed and f"at step {best}, in {folder}/best" in printed
    assert f"eval_loss {found[-1]:.4f}" in printed
    names = {
        ADAPTER,
        "adapter_config.json",
        "config.yaml",
        "loss.png",
        "metrics.jsonl",
        "samples.jsonl",
        "report.html",
        "run.json",
        "best",
    }
    assert {p.name for p in folder.iterdir()} == names


def test_best_has_the_weights_of_the_best_step(overfitted):
    """Opened as runs, best/ and the RUN give the losses that metrics.jsonl has for their steps."""
    folder, _, args = overfitted
    rows, found = make_job(SINGLE_RANK, args).evaluation.rows, [m["eval_loss"] for m in metrics(folder)]
    for path, expected in ((folder / "best", min(found)), (folder, found[-1])):
        model = load_model(open_run(path), SINGLE_RANK.device, torch.float32)
        loss = mean_loss(model, rows, 3, train.loss_sum, SINGLE_RANK, context)
        assert loss == pytest.approx(expected, rel=1e-5)


def test_a_better_step_than_the_last_is_named_first(overfitted, capsys):
    """By the run's last lines, its report, and generate.py, which still opens what was named."""
    folder, printed, _ = overfitted
    found = [m["eval_loss"] for m in metrics(folder)]
    step, last = found.index(min(found)) + 1, len(found)
    *_, best, own, again, ask = printed.splitlines()
    assert best == f"in {folder}/best: {ADAPTER} of step {step}, the best evaluation"
    assert own.startswith(f"in {folder}: {ADAPTER}, ") and again.startswith("next: ")
    assert ask.endswith(f"generate.py {folder}/best")
    page = html.unescape((folder / "report.html").read_text()).partition("<h2>Next</h2>")[2]
    commands = re.findall(r"<pre>\S+ (\w+)\.py ([^\s<]+)", page)
    asked = [("generate", f"{folder}/best"), ("evaluate", f"{folder}/best"), ("export", f"{folder}/best")]
    assert commands[:4] == [*asked, ("generate", str(folder))]
    assert f"--out {folder}-best-merged" in page and f"Ask the base model and the last step, {last}" in page
    line = f"{folder}/best has the best evaluation: loss {min(found):.4f} at step {step}; {folder} has"
    for runs, told in (([folder], [line]), ([folder, folder / "best"], []), ([folder / "best"], [])):
        argv = [*map(str, runs), "--prompt", "Say red.", "--max_new_tokens", "2", "--json"]
        assert generate.main(argv) == 0
        shown = capsys.readouterr()
        assert [text for text in shown.err.splitlines() if "best evaluation" in text] == [
            f"{each} the last step, {last}, with {found[-1]:.4f}" for each in told
        ]
        names = [answer["model"] for answer in json.loads(shown.out)["answers"]]
        assert names == ["base", *map(str, runs)]


def test_best_has_only_the_new_blocks_of_an_expanded_model(checkpoints, alpaca_file, one_rank, tmp_path):
    """The old blocks are gigabytes. Opened as a run, best/ is the model that was evaluated."""
    args = ["--model_name", checkpoints("llama_pro"), "--dataset", alpaca_file, "--train_type", "llama_pro"]
    args += ["--output_dir", tmp_path, "--max_steps", "1", "--eval_share", "0.2", "--eval_every", "1"]
    weights = one_rank(run, list(map(str, args)))[0][3]
    stored = load_file(tmp_path / "best" / "new_blocks.safetensors")
    assert all(torch.equal(stored[name], weights[name]) for name in weights) and set(stored) == set(weights)
    model = load_model(open_run(tmp_path / "best"), SINGLE_RANK.device, torch.float32)
    rows = make_job(SINGLE_RANK, list(map(str, args))).evaluation.rows
    loss = mean_loss(model, rows, 3, train.loss_sum, SINGLE_RANK, context)
    score = json.loads((tmp_path / "best" / "evaluation.json").read_text())
    assert loss == pytest.approx(score["eval_loss"], rel=1e-5)


# Samples


def test_samples_of_two_ranks_equal_those_of_one(overfitted, one_rank, tmp_path):
    folder, printed, args = overfitted
    alone = [*args, "--output_dir", str(tmp_path / "one"), "--world_size", "1", "--batch_size", "10"]
    one_rank(full_run, train.check_run(parse(alone)[0]))
    lines = [(f / "samples.jsonl").read_text().splitlines() for f in (folder, tmp_path / "one")]
    both = [[json.loads(line) for line in file_lines] for file_lines in lines]
    last = len(metrics(folder))
    assert both[0] == both[1] and [s["step"] for s in both[0]] == [0, 0, last, last]
    assert all(list(s) == ["step", "prompt", "text"] and s["text"] for s in both[0])
    assert "### Instruction:\nSay red.\n\n### Response:\n" in both[0][0]["prompt"]
    assert printed.count("sample, step 0") == 2


class Counting(nn.Module):
    """The most likely token after i is i + 1."""

    def forward(self, input_ids, use_cache, logits_to_keep):
        following = (input_ids[:, logits_to_keep] + 1) % 16
        return types.SimpleNamespace(logits=nn.functional.one_hot(following, 16).float())


def test_generate_greedily():
    """Prompts of different lengths; one ends early, one with its first token, one not at all."""
    answers = generate_greedily(
        Counting(), [[1, 2], [5], [3, 3, 7], [9, 1, 9, 10]], 4, [6, 9], SINGLE_RANK, context
    )
    assert answers == [[3, 4, 5], [], [8], [11, 12, 13, 14]]


def test_greedy_answers_equal_transformers(checkpoints, one_rank):
    model = AutoModelForCausalLM.from_pretrained(checkpoints()).eval()
    prompt = list(range(40, 60))
    expected = model.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False)[
        0, len(prompt) :
    ].tolist()
    assert generate_greedily(model, [[7, 8, 9], prompt], 12, [], SINGLE_RANK, context)[1] == expected


def write_samples(prompts, sample_tokens, folder, tracker) -> None:
    """Let an evaluator without a model write its samples."""
    evaluator = types.SimpleNamespace(
        data=EvaluationData(None, prompts, []),
        sample_tokens=sample_tokens,
        model=types.SimpleNamespace(config=LlamaConfig()),
        rank_info=SINGLE_RANK,
        context=context,
        folder=folder,
        tokenizer=BYTES,
        tracker=tracker,
    )
    evaluation.Evaluator._write_samples(evaluator, 0)


def test_a_sample_ends_where_the_next_question_begins(monkeypatch, tmp_path):
    """In a dialogue a marker ends an answer, not a token. Prompts of other formats have no marker."""
    prompts = [Prompt("### Human: a### Assistant:", [1], marker="### Human:"), Prompt("a", [2])]
    answers = [BYTES(" b### Human: c", add_special_tokens=False)["input_ids"]] * 2
    monkeypatch.setattr(evaluation, "generate_greedily", lambda *_: answers)
    write_samples(prompts, 20, tmp_path, NoTracker())
    lines = [json.loads(line)["text"] for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert lines == [" b", " b### Human: c"]


def test_a_repetition_is_cut_in_the_printed_sample_alone(monkeypatch, tmp_path):
    text, printed, tracker = "A" + " goose" * 20, [], NoTracker()
    monkeypatch.setattr(tracker, "print_line", printed.append)
    answers = [BYTES(text, add_special_tokens=False)["input_ids"]]
    monkeypatch.setattr(evaluation, "generate_greedily", lambda *_: answers)
    write_samples([Prompt("a", [2])], 200, tmp_path, tracker)
    assert json.loads((tmp_path / "samples.jsonl").read_text())["text"] == text
    assert len(printed) == 1 and printed[0].endswith("-> 'A goose goose goose ... (repeated)'")


# Bad input


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--eval_share", "1"], "--eval_share 1: must be at least 0 and below 1"),
        (["--eval_share", "0.001"], "--eval_share 0.001: of 40 rows it leaves none to evaluate on"),
        (["--eval_share", "0.999"], "--eval_share 0.999: of 40 rows it leaves none to train on"),
        (["--eval_share", "0.2", "--eval_dataset", "toy"], "--eval_share: has no effect with --eval_dataset"),
        (["--eval_every", "5"], "--eval_every: has no effect without --eval_share, --eval_fold or --eval_"),
        (["--eval_fold", "0/5"], "--eval_fold: '0/5' is not a fold like 1/5, the first of five"),
        (["--eval_fold", "1/41"], "--eval_fold 1/41: 40 rows make at most 40 folds"),
        (["--eval_fold", "1/5", "--eval_share", "0.2"], "--eval_fold: has no effect with --eval_share"),
        (["--eval_samples", "5"], "--eval_samples: has no effect without"),
        (["--early_stopping_patience", "5"], "--early_stopping_patience: has no effect without --eval_share"),
        (
            ["--eval_share", "0.2", "--early_stopping_patience", "5"],
            "--early_stopping_patience: has no effect without --eval_every",
        ),
        (["--eval_share", "0.2", "--eval_every", "-1"], "--eval_every -1: must be 0 or more"),
        (["--eval_share", "0.2", "--eval_samples", "0"], "--eval_samples 0: must be positive, or -1"),
        (["--sample_tokens", "5"], "--sample_tokens: has no effect without --sample_every"),
        (["--sample_every", "5", "--sample_tokens", "0"], "--sample_tokens 0: must be positive"),
        (["--sample_prompts", "a.txt"], "--sample_prompts: has no effect without --sample_every"),
        (["--sample_every", "5", "--sample_prompts", "none.txt"], "--sample_prompts none.txt: No such file"),
        (["--sample_every", "5", "--sample_prompts", "nope"], "--sample_prompts nope: not a recipe"),
        (["--eval_dataset", "nope"], "--eval_dataset nope: not a recipe"),
        (["--eval_dataset", "none.jsonl"], "--eval_dataset none.jsonl: no such file"),
        (["--eval_dataset", "none/x.jsonl.gz"], "--eval_dataset none/x.jsonl.gz: no such file"),
        (
            ["--sample_every", "5", "--sample_prompts", "./none"],
            "--sample_prompts ./none: no such file or folder",
        ),
    ],
)
def test_bad_options(more, words, checkpoints, alpaca_file, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert train.main(options(checkpoints, alpaca_file, *more)) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {words}") and error.count("\n") == 1


def test_an_evaluation_set_without_answers(checkpoints, alpaca_file, tmp_path, capsys):
    (tmp_path / "rows.jsonl").write_text('{"instruction": "Say it.", "output": ""}\n')
    args = options(checkpoints, alpaca_file, "--eval_dataset", tmp_path / "rows.jsonl")
    assert train.main(args) == 2
    assert "error: --eval_dataset" in (error := capsys.readouterr().err) and "none of the 1 rows" in error
