"""evaluate.py: every metric against a value computed by hand or by other means, and the whole command."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import shutil
import subprocess
import sys
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM

import evaluate
import export
import finished.evaluate
import train
from data.formats import ALPACA, FORMATS, QA, RenderContext
from data.reading import ReadingOptions
from data.tokenizing import tokenize_dataset
from finished import scoring
from finished.finished_run import load_model, open_run
from finished.prompt_template import MarkerCriterion
from models.lora import adapters_off
from options.errors import UserError
from options.evaluate import Options
from options.train import parse
from tests.helpers import chat_templates
from tests.helpers.adapters import args_for
from tests.helpers.finished_runs import write_random_run
from tests.helpers.here import SINGLE_RANK, context
from tests.helpers.logits import IDS
from tests.helpers.products import slow
from tests.helpers.resuming import fill
from tests.helpers.runs import dense_tensors, transformers_model
from tests.helpers.small_tokenizers import BYTES, chat_tokenizer
from training.evaluation import generate_greedily


def row_by_row(model, rows) -> float:
    """Compute the perplexity one row at a time, in float64."""
    total = torch.zeros((), dtype=torch.float64)
    for i in range(len(rows)):
        span = slice(int(rows.starts[i]), int(rows.starts[i + 1]))
        ids, learned = rows.tokens[span].long(), rows.learned[span].clone()
        learned[0] = False
        with torch.no_grad():
            logits = model(input_ids=ids[None]).logits[0].double().log_softmax(-1)
        total -= logits[:-1].gather(1, ids[1:, None])[:, 0][learned[1:]].sum()
    return (total / int(rows.targets().sum())).exp().item()


def test_columns_of_the_rows_to_score(tmp_path):
    """Those of the run where the rows have them; its own option names others, which must be there."""
    config, _ = parse(["--dataset_format", "qa", "--columns", "question=ask,answer=reply"])
    asked = {"ask": "Why?", "reply": "So.", "say": "No."}
    for name, row in (("same", asked), ("own", {"question": "Why?", "answer": "So."})):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(row))

    def read(name: str, **more) -> str:
        chosen = Options(run="", dataset=str(tmp_path / f"{name}.jsonl"), **more)
        _, (rendered,), _ = finished.evaluate.read_rows(SimpleNamespace(config=config), chosen, BYTES)
        return rendered.text

    why = QA.format(question="Why?")
    assert read("same") == read("own") == read("same", dataset_format="qa") == why + "So."
    for dataset_format in (None, "qa"):
        more = {"columns": "question=ask,answer=say", "dataset_format": dataset_format}
        assert read("same", **more) == why + "No."
        with pytest.raises(
            UserError, match=r"own\.jsonl: --columns question=ask: the data has no column ask"
        ):
            read("own", **more)
    assert read("same", text_column="say") == "No."


# Models


@pytest.mark.parametrize("train_type", ["lora", "bnb_dora"])
def test_adapters_off_is_the_base(train_type, checkpoints, alpaca_file, one_rank, tmp_path):
    """The base has the weights that training used, with biases, which DoRA moves."""
    folder = checkpoints("llama_bias")
    write_random_run(one_rank, tmp_path / "run", args_for(folder, alpaca_file, train_type))
    model = load_model(open_run(tmp_path / "run"), SINGLE_RANK.device, torch.float32)
    base = transformers_model(folder, dense_tensors(model))
    with torch.no_grad():
        tuned = model(input_ids=IDS).logits
        with adapters_off(model):
            torch.testing.assert_close(
                model(input_ids=IDS).logits, base(input_ids=IDS).logits, rtol=1e-5, atol=1e-5
            )
        assert torch.equal(model(input_ids=IDS).logits, tuned)
        assert (tuned - base(input_ids=IDS).logits).abs().max() > 0.1


@pytest.mark.parametrize("kind", ["gemma2", *slow(["llama", "phi3"])])
def test_answers_in_batches_are_those_alone(kind, checkpoints, alpaca_file, one_rank, tmp_path):
    """Cache and padding against a plain loop without either; one answer hits a stop token.

    Phi-3's passes the length where the rotation of all rows changes.
    """
    write_random_run(one_rank, tmp_path / "run", args_for(checkpoints(kind), alpaca_file, "bnb_dora"))
    model = load_model(open_run(tmp_path / "run"), SINGLE_RANK.device, torch.float32)
    prompts = [[65], list(range(70, 99)), list(range(100, 103))]
    alone = [generate_greedily(model, [p], 6, [], SINGLE_RANK, context)[0] for p in prompts]
    assert scoring.generate_answers(model, prompts, 6, [], 2) == alone
    stop = alone[1][3]
    cut = [a[: a.index(stop)] if stop in a else a for a in alone]
    assert scoring.generate_answers(model, prompts, 6, [stop], 2) == cut != alone
    cut = [a[: a.index(stop) + 1] if stop in a else a for a in alone]
    spelled = SimpleNamespace(decode=lambda ids: "".join(f"<{i}>" for i in ids.tolist()))
    make_criterion = partial(MarkerCriterion, spelled, f"<{stop}>")
    made = scoring.generate_answers(model, prompts, 6, [], 3, make_criterion)
    assert [m[: len(c)] for m, c in zip(made, cut, strict=True)] == cut != alone
    assert all(set(m[len(c) :]) <= {0} for m, c in zip(made, cut, strict=True))  # padding


def test_a_marker_ends_the_answer_that_has_it():
    """A marker in the prompt does not count."""
    ids = torch.tensor(
        [BYTES(text, add_special_tokens=False)["input_ids"] for text in ("q##a##", "##ab #", "q#a# #")]
    )
    assert MarkerCriterion(BYTES, "##", 2)(ids, None).tolist() == [True, False, False]


def test_a_model_that_says_what_the_data_say(monkeypatch):
    """Qwen3's template has an end of turn and an empty thought, in answers and references. One answer is cut.

    Wrong answers share no word with the right ones.
    """
    tokenizer = chat_tokenizer(chat_templates.QWEN3, "<|im_end|>")
    said = ["Paris is the capital.", "It is four, not 5.", "No, never."]
    turns = [[{"role": "user", "content": "So?"}, {"role": "assistant", "content": text}] for text in said]
    rendered = [FORMATS["chat"].render({"messages": m}, RenderContext(tokenizer)) for m in turns]
    names, run = ("exact_match", "bleu", "rouge"), SimpleNamespace(config=SimpleNamespace(context_length=999))
    asked = finished.evaluate.prepare_inputs(
        names, run, rendered, "here", tokenizer, [tokenizer.eos_token_id]
    )
    assert [p.answer for p in asked.prompts] == said

    def scores(*answers):
        made = [
            tokenizer(f"<think>\n\n</think>\n\n{a}", add_special_tokens=False)["input_ids"] for a in answers
        ]
        monkeypatch.setattr(scoring, "generate_answers", lambda *_: made)
        options = Options("RUN", max_new_tokens=len(made[0]))
        return scoring.score_model(
            torch.nn.Linear(1, 1), names, asked, options, tokenizer, [tokenizer.eos_token_id]
        )

    right = scores(*said)
    assert right.values == pytest.approx(dict.fromkeys(right.values, 100.0)) and len(right.values) == 5
    assert right.truncated == 1 and right.answers == said
    assert scores("No.", *said[1:]).values["exact_match"] == pytest.approx(100 * 2 / 3)
    wrong = scores("Rome", "Seven", "Yes")
    assert wrong.values["exact_match"] == wrong.values["rouge1"] == 0


@pytest.fixture
def command(monkeypatch, tmp_path, capsys):
    """command(*argv) -> (the results in --out, stdout)."""

    def run(*argv):
        out = tmp_path / "results" / "a.json"
        assert evaluate.main([*map(str, argv), "--out", str(out)]) == 0, capsys.readouterr().err
        return json.loads(out.read_text()), capsys.readouterr().out

    monkeypatch.chdir(tmp_path)
    return run


@pytest.mark.parametrize("train_type", ["bnb_dora", "full"])
def test_the_command(train_type, checkpoints, alpaca_file, one_rank, tmp_path, command):
    """Perplexities of base and tuned model against transformers, row by row.

    The references are the tuned model's own answers: it matches all of them, and the base matches none.
    """
    folder = checkpoints()
    write_random_run(one_rank, tmp_path / "run", args_for(folder, alpaca_file, train_type))
    run = open_run(tmp_path / "run")
    model = load_model(run, SINGLE_RANK.device, torch.float32)
    questions = ["Say red.", "Say blue now.", "Say nothing at all, and say it slowly."]
    prompts = [ALPACA.format(instruction=q) for q in questions]
    answers = [
        generate_greedily(model, [BYTES(p)["input_ids"]], 5, [257], SINGLE_RANK, context)[0] for p in prompts
    ]
    texts = [BYTES.decode(a, skip_special_tokens=True) for a in answers]
    data = tmp_path / "rows.jsonl"
    rows = [{"instruction": q, "output": a} for q, a in zip(questions, texts, strict=True)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))

    wanted = ["--metrics", "perplexity,exact_match", "--max_new_tokens", "5", "--batch_size", "2"]
    results, printed = command(tmp_path / "run", "--dataset", data, *wanted)
    tokens = tokenize_dataset(str(data), ReadingOptions(BYTES))
    if run.adapter:
        base = transformers_model(folder, dense_tensors(model))
    else:
        base = AutoModelForCausalLM.from_pretrained(folder)
    found = results["metrics"]
    assert found["perplexity"]["base"] == pytest.approx(row_by_row(base, tokens), rel=1e-4)
    assert found["perplexity"]["tuned"] == pytest.approx(row_by_row(model, tokens), rel=1e-4)
    assert abs(found["perplexity"]["base"] - found["perplexity"]["tuned"]) > 0.01
    assert found["exact_match"]["tuned"] == 100
    assert [a["tuned"] for a in results["answers"]] == [t.strip() for t in texts]
    assert [a["prompt"] for a in results["answers"]] == prompts
    if run.adapter:  # the full model's weights have changed by 1% only
        assert found["exact_match"]["base"] == 0
    assert f"exact_match  {found['exact_match']['base']:12,.2f} {100:12.2f}" in printed
    assert results["rows"] == results["answered"] == 3 and results["dtype"] == "float32"
    assert results["scored_with"] == {}

    less, _ = command(tmp_path / "run", "--dataset", data, "--samples", "1", "--metrics", "perplexity")
    first = row_by_row(model, tokenize_dataset(str(data), ReadingOptions(BYTES, samples=1)))
    assert less["metrics"]["perplexity"]["tuned"] == pytest.approx(first, rel=1e-4)
    assert less["answers"] == [] and list(less["metrics"]) == ["perplexity"]


def test_what_is_told_of_the_scores(checkpoints, alpaca_file, one_rank, tmp_path, command):
    """Chinese answers of three characters: BLEU is null, and its tokenizer is Chinese."""
    args = args_for(checkpoints(), alpaca_file, "qlora")
    write_random_run(one_rank, tmp_path / "run", args)
    data = tmp_path / "rows.jsonl"
    data.write_text('{"instruction": "Say it.", "output": "\u5317\u4eac\u5e02"}\n' * 2)
    results, printed = command(tmp_path / "run", "--dataset", data, "--max_new_tokens", "2")
    assert "|tok:zh|" in results["scored_with"]["bleu"] and results["scored_with"]["bleu"] in printed
    assert results["metrics"]["bleu"] == {"base": None, "tuned": None}
    assert f"bleu         {'undefined':>12} {'undefined':>12}\n" in printed
    assert "bleu is undefined where no answer, or no reference, has four tokens\n" in printed
    assert results["cut"] == {"base": 2, "tuned": 2}
    assert "of 2 answers 2 of the base and 2 of the tuned model were cut at --max_new_tokens 2\n" in printed


def test_rows_without_an_answer_are_counted(checkpoints, alpaca_file, one_rank, tmp_path, command):
    """No metric has them: SQuAD 2's unanswerable questions, for example."""
    args = args_for(checkpoints(), alpaca_file, "qlora")
    write_random_run(one_rank, tmp_path / "run", args)
    data = tmp_path / "rows.jsonl"
    answers = ("yes", "", "  ", "")
    data.write_text("".join(json.dumps({"instruction": "Say it.", "output": a}) + "\n" for a in answers))
    results, printed = command(tmp_path / "run", "--dataset", data, "--max_new_tokens", "2")
    assert (results["rows"], results["answered"], results["unscored"]) == (4, 1, 3)
    left_out = "of 4 rows 3 are left out, without a question or an answer to compare with\n"
    assert f"exact_match, bleu, rouge1, rouge2, rougeL: {left_out}" in printed
    assert "perplexity: 3 rows dropped: no answer has any text to learn (rows 2, 3, 4)\n" in printed


def test_the_runs_own_evaluation_set(checkpoints, alpaca_file, one_rank, tmp_path, command):
    args = args_for(checkpoints(), alpaca_file, "qlora", "--eval_share", "0.2")
    write_random_run(one_rank, tmp_path / "run", args)
    results, printed = command(tmp_path / "run", "--metrics", "perplexity")
    assert results["rows"] == 8 and "does not record the rows" in printed


def test_the_runs_own_rows_are_those_of_training(checkpoints, alpaca_file, tmp_path, command, capsys):
    """A file that has grown is split otherwise: rows of the training would be scored as held out."""
    data = shutil.copy(alpaca_file, tmp_path / "rows.jsonl")
    run = tmp_path / "run"
    argv = ["--model_name", checkpoints(), "--dataset", data, "--eval_share", "0.2", "--eval_every", "1"]
    argv += ["--max_steps", "1", "--world_size", "1", "--output_dir", run]
    assert train.main(list(map(str, argv))) == 0
    for folder in (run, run / "best"):
        results, printed = command(folder, "--metrics", "perplexity")
        assert results["rows"] == 8 and "data: " not in printed
    with data.open("a") as file:
        file.write('{"instruction": "a", "output": "b"}\n' * 10)
    for folder in (run, run / "best"):
        assert evaluate.main([str(folder), "--metrics", "perplexity"]) == 2
        error = capsys.readouterr().err
        assert error == (
            f"error: --dataset: is needed; {data} no longer gives the rows that {folder} was evaluated on\n"
        )


def test_rows_that_are_cut_are_counted(checkpoints, alpaca_file, one_rank, tmp_path, command):
    args = args_for(checkpoints(), alpaca_file, "qlora")
    write_random_run(one_rank, tmp_path / "run", args)
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps({"instruction": "a", "output": "b" * n}) + "\n" for n in (9, 9999)))
    results, printed = command(tmp_path / "run", "--dataset", data, "--metrics", "perplexity")
    reason = "1 row cut: the end of an answer is beyond --context_length (row 2)"
    assert results["cut_rows"] == 1 and results["row_reasons"] == [reason]
    assert f"perplexity: {reason}\n" in printed


# lm-evaluation-harness

TASK = """task: spelling
dataset_path: json
dataset_kwargs: {data_files: {test: TEST}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: choices
doc_to_target: answer
metric_list: [{metric: acc}]
"""


@pytest.mark.slow
@pytest.mark.skipif(not importlib.util.find_spec("lm_eval"), reason="lm_eval is not installed")
def test_lm_evaluation_harness(checkpoints, alpaca_file, one_rank, tmp_path):
    """The command of docs/evaluation.md on an exported folder and a local task: accuracy is transformers'.

    It runs outside of the repository's folder, where `import evaluate` would find this project's evaluate.py.
    """
    write_random_run(one_rank, tmp_path / "run", args_for(checkpoints(), alpaca_file, "bnb_dora"))
    merged = ["--to", "merged", "--out", str(tmp_path / "model"), "--check", "false"]
    assert export.main([str(tmp_path / "run"), *merged]) == 0
    rows = [{"question": f"{i}:", "choices": ["a", "b"], "answer": i % 2} for i in range(6)]
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "spelling.yaml").write_text(TASK.replace("TEST", f'"{tmp_path}/test.jsonl"'))
    command = [
        sys.executable,
        "-m",
        "lm_eval",
        "--model",
        "hf",
        "--model_args",
        f"pretrained={tmp_path}/model",
    ]
    command += ["--include_path", f"{tmp_path}/tasks", "--tasks", "spelling", "--device", "cpu"]
    command += ["--output_path", f"{tmp_path}/out", "--batch_size", "4"]
    env = os.environ | {"HF_HOME": str(tmp_path / "hf")}
    env.pop("PYTHONPATH", None)
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    (written,) = (tmp_path / "out").rglob("results_*.json")
    model, right = AutoModelForCausalLM.from_pretrained(tmp_path / "model"), 0
    for i in range(6):
        ids = BYTES(f"{i}: ", return_tensors="pt").input_ids
        with torch.no_grad():
            a, b = model(ids).logits[0, -1, BYTES.convert_tokens_to_ids(["a", "b"])].tolist()
        right += (b > a) == i % 2
    assert json.loads(written.read_text())["results"]["spelling"]["acc,none"] == pytest.approx(right / 6)


# Bad input


@pytest.fixture(scope="module")
def good_run(checkpoints, alpaca_file, one_rank, tmp_path_factory):
    folder = tmp_path_factory.mktemp("good") / "run"
    write_random_run(one_rank, folder, args_for(checkpoints(), alpaca_file, "qlora"))
    return folder


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], "give a RUN, the --output_dir of a run"),
        (["nowhere", "--dataset", "toy", "--metrics", "perplexity"], "nowhere: is no run of train.py"),
        (
            ["RUN", "--dataset", "toy", "--metrics", "perplexity,blue"],
            "--metrics: 'blue': must be one of perplexity,",
        ),
        (["RUN", "--dataset", "toy", "--metrics", ""], "--metrics: '': must be one of"),
        (
            ["RUN", "--dataset", "toy", "--metrics", "bleu"],
            "--metrics bleu: needs the package sacrebleu: pip",
        ),
        (["RUN", "--metrics", "perplexity"], "--dataset: is needed"),
        (["RUN", "--dataset", "nope", "--metrics", "perplexity"], "--dataset nope: not a recipe"),
        (
            ["RUN", "--dataset", "plain.jsonl", "--metrics", "exact_match"],
            "--dataset plain.jsonl: its rows have",
        ),
        (["RUN", "--dataset", "toy", "--metrics", "perplexity", "--samples", "0"], "--samples 0: must be"),
        (
            ["RUN", "--dataset", "toy", "--metrics", "perplexity", "--max_new_tokens", "0"],
            "--max_new_tokens 0",
        ),
        (
            ["RUN", "--dataset", "toy", "--metrics", "perplexity", "--samples", "x"],
            "--samples: 'x' is not a whole number",
        ),
        (["RUN", "--dataset", "toy", "--metrics", "perplexity", "--out", "."], "--out .: is a folder"),
        (
            ["RUN", "--dataset", "toy", "--metrics", "perplexity", "--dataset_format", "x"],
            "--dataset_format: 'x'",
        ),
        (["RUN", "--metrics", "perplexity", "--dataset_format", "qa"], "--dataset_format: has no effect"),
        (["RUN", "--nope"], "unknown option --nope; see --help"),
        (["RUN", "--base_mode", "x"], "unknown option --base_mode; did you mean --base_model?"),
        (["RUN", "RUN"], "unknown option"),
    ],
)
def test_bad_input(argv, words, good_run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "sacrebleu", None)  # as if it were not installed
    (tmp_path / "plain.jsonl").write_text('{"text": "only a text"}\n')
    assert evaluate.main([str(good_run) if a == "RUN" else a for a in argv]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {words}") and error.count("\n") == 1


def test_results_that_cannot_be_written(small_disk, monkeypatch, capsys):
    """Also the older ones stay whole; what is no number is null there, which JSON has."""
    metrics = {"perplexity": {"base": math.inf, "tuned": math.nan}}
    results = {"run": "r", "rows": 1, "dataset": "d", "metrics": metrics, "answers": []}
    results |= {
        "cut": {"base": 0, "tuned": 0},
        "scored_with": {},
        "answered": 1,
        "unscored": 0,
        "too_long": 0,
        "context_length": 512,
        "cut_rows": 0,
        "row_reasons": [],
        "answers": [],
    }
    monkeypatch.setattr(finished.evaluate, "evaluate", lambda options: results)
    out = small_disk / "e.json"
    assert evaluate.main(["some/run", "--out", str(out)]) == 0
    before = out.read_text()
    assert json.loads(before)["metrics"] == {"perplexity": {"base": None, "tuned": None}}
    fill(small_disk)
    results["answers"] = ["much"] * 10_000
    capsys.readouterr()
    assert evaluate.main(["some/run", "--out", str(out)]) == 2
    assert capsys.readouterr().err == f"error: --out {out}: cannot be written (No space left on device)\n"
    assert out.read_text() == before
