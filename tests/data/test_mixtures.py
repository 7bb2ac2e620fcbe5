"""data/mixtures.py and what a run makes of a mixture: its rows, evaluation set, records and messages."""

from __future__ import annotations

import json
import re
import signal
from itertools import pairwise

import pytest
import torch

import evaluate
import generate
import train
from checkpoints.storage import checkpoint_steps
from data.evaluation_sets import prepare_sets, read_evaluation_rows
from data.mixtures import join_evenly
from options.errors import UserError
from options.train import parse
from tests.helpers.data_files import to_jsonl, write_file
from tests.helpers.resuming import RUN, Signals, adapter, lines, repeatable_metrics, run
from tests.helpers.runs import train_run
from tests.helpers.small_tokenizers import BYTES
from training.preflight import check_run


def write_set(path, name: str, count: int):
    """Write rows of `qa` whose answers tell their set and number."""
    return write_file(path, to_jsonl({"question": "Q", "answer": f"{name}{i}"} for i in range(1, count + 1)))


@pytest.fixture
def two_sets(tmp_path, monkeypatch):
    """a.jsonl with 20 rows, b.jsonl with 6, in the current folder."""
    monkeypatch.chdir(tmp_path)
    write_set(tmp_path / "a.jsonl", "a", 20)
    write_set(tmp_path / "b.jsonl", "b", 6)


def prepare(checkpoints, dataset: str, *more):
    config, _ = parse(["--model_name", str(checkpoints()), "--dataset", dataset, *more])
    return prepare_sets(config, BYTES)


def answers(rows) -> list[str]:
    texts = [BYTES.decode(rows.tokens[start:end]) for start, end in pairwise(rows.starts.tolist())]
    return [text.partition("### Answer:\n")[2].removesuffix("</s>") for text in texts]


def test_the_sets_of_a_run(two_sets, checkpoints):
    """Weighted, unweighted, and the first rows of each."""
    _, rows, _ = prepare(checkpoints, "a.jsonl*0.7,b.jsonl*0.3")
    assert answers(rows) == [f"a{i}" for i in range(1, 21)] + [f"b{i}" for i in range(1, 7)]
    assert [(each.name, each.size, each.per_epoch) for each in rows.sets] == [
        ("a.jsonl", 20, 20),
        ("b.jsonl", 6, 9),
    ]
    _, rows, _ = prepare(checkpoints, "a.jsonl,b.jsonl")
    assert [(each.size, each.per_epoch) for each in rows.sets] == [(20, 20), (6, 6)]
    _, rows, _ = prepare(checkpoints, "a.jsonl*1,b.jsonl*1", "--dataset_samples", "8")
    assert answers(rows) == [f"a{i}" for i in range(1, 9)] + [f"b{i}" for i in range(1, 7)]
    assert [(each.size, each.per_epoch) for each in rows.sets] == [(8, 8), (6, 8)]
    _, rows, _ = prepare(checkpoints, "b.jsonl")
    assert rows.sets == ()


def test_no_row_that_is_repeated_is_evaluated_on(two_sets, checkpoints):
    """Each set is split like the set alone, before its rows are counted; the first ones are of both sets."""
    shares = ["--eval_share", "0.25"]
    config, rows, evaluation = prepare(checkpoints, "a.jsonl*1,b.jsonl*2", *shares)
    trained, held = answers(rows), answers(evaluation.rows)
    assert not {*trained} & {*held} and len({*trained, *held}) == 26
    alone = [prepare(checkpoints, name, *shares)[2].rows for name in ("a.jsonl", "b.jsonl")]
    assert sorted(held) == sorted(answers(alone[0]) + answers(alone[1]))
    assert [(each.size, each.per_epoch) for each in rows.sets] == [(15, 15), (4, 30)]
    assert [answer[0] for answer in held] == [*"abaaaba"]
    _, _, few = prepare(checkpoints, "a.jsonl*1,b.jsonl*2", *shares, "--eval_samples", "3")
    assert answers(few.rows) == held[:3]
    texts = [rendered.text for rendered in read_evaluation_rows(config, BYTES)[0]]  # evaluate.py, later
    assert [text.partition("### Answer:\n")[2] for text in texts] == held
    with pytest.raises(UserError, match=r"^--eval_share 0.95: of 6 rows of b\.jsonl it leaves none to train"):
        prepare(checkpoints, "a.jsonl,b.jsonl", "--eval_share", "0.95")


def test_rows_are_joined_in_proportion():
    assert join_evenly([["a1", "a2", "a3", "a4"], ["b1", "b2"]]) == ["a1", "b1", "a2", "a3", "b2", "a4"]


REFUSED = {  # options after --dataset: the words of the error
    "a.jsonl,c.jsonl": r"do not fit one prompt template: a\.jsonl is qa, c\.jsonl is alpaca; --data",
    "human.jsonl,user.toml": r"human\.jsonl is guanaco '### Human:' .*, user\.toml is guanaco '### User:'",
    "a.jsonl*1,absent.jsonl*1": r"absent\.jsonl: no such file",
    "a.jsonl*1000,b.jsonl*1": r"the weight of b\.jsonl is too small: an epoch has no row of it",
    "a.jsonl*-1,b.jsonl*2": r"the weight -1 of a\.jsonl is not a positive number",
    "a.jsonl*nan,b.jsonl*2": "the weight nan",
    "a.jsonl --eval_dataset a.jsonl*1,b.jsonl*2": "weights have no effect here, .*: a.jsonl,b.jsonl",
    "a.jsonl --sample_every 1 --sample_prompts a.jsonl*1,b.jsonl*2": "sample_prompts .*weights have no",
}


@pytest.mark.parametrize("given", REFUSED)
def test_mixtures_that_are_refused(given, two_sets, checkpoints, tmp_path, capfd):
    """One line, status 2, and nothing written."""
    write_file(tmp_path / "c.jsonl", to_jsonl([{"instruction": "Q", "output": "A"}]))
    write_file(tmp_path / "human.jsonl", to_jsonl([{"text": "### Human: Q ### Assistant: A"}]))
    write_file(tmp_path / "user.jsonl", to_jsonl([{"text": "### User: Q ### Bot: A"}]))
    write_file(tmp_path / "user.toml", 'source = "user.jsonl"\nmarkers = ["### User:", "### Bot:"]\n')
    model = ["--model_name", str(checkpoints())]
    assert train.main([*model, "--output_dir", "out", "--dataset", *given.split()]) == 2
    assert re.fullmatch(rf"error: --.*{REFUSED[given]}.*\n", capfd.readouterr().err)
    assert not (tmp_path / "out").exists()


def test_a_run_of_a_mixture(two_sets, checkpoints, one_rank, tmp_path, capfd):
    """Its line of data, run.json, rows to look at, and config.yaml, which repeats it from elsewhere."""
    given = ["--model_name", str(checkpoints()), "--dataset", "a.jsonl*7,b.jsonl*3", "--lora_rank", "2"]
    counts = "; an epoch has 29 rows: 20 of a.jsonl (69.0%; it has 20), 9 of b.jsonl (31.0%; it has 6); "
    assert train.main([*given, "--output_dir", "out", "--show_rows", "1"]) == 0
    shown = capfd.readouterr().out
    assert counts in shown
    assert re.findall("^row (.*?):", shown, re.MULTILINE) == ["1 of a.jsonl", "1 of b.jsonl"]
    out = tmp_path / "out"
    with_options = [*given, "--output_dir", str(out), "--max_steps", "1", "--log_to", "stdout"]
    absolute = f"{tmp_path}/a.jsonl*7,{tmp_path}/b.jsonl*3"
    printed = one_rank(run, [absolute if value == given[3] else value for value in with_options])[0]
    assert re.sub(r"of ([ab])\.", rf"of {tmp_path}/\1.", counts) in printed
    facts = json.loads((out / "run.json").read_text())["data"]
    assert facts["rows_per_epoch"] == facts["steps_per_epoch"] == 29
    assert facts["sets"][1] == {"name": f"{tmp_path}/b.jsonl", "size": 6, "per_epoch": 9}
    job = check_run(parse([*with_options, "--overwrite"])[0])  # with relative names
    assert job.config.dataset == absolute
    again = check_run(parse(["--config", f"{out}/config.yaml", "--overwrite"])[0])
    assert again.run_identity()["data"] == job.run_identity()["data"]
    assert generate.main([str(out), "--prompt", "Q", "--max_new_tokens", "1"]) == 0
    assert evaluate.main([str(out), "--dataset", "a.jsonl,b.jsonl", "--metrics", "perplexity"]) == 0
    assert "on 26 rows of a.jsonl,b.jsonl" in capfd.readouterr().out


PACKING = ["--packing", "--context_length", "150"]


@pytest.fixture
def mixture(checkpoints, tmp_path) -> list[str]:
    """Options of a run of three epochs, each of 10 rows of one set and 7 of the 4 rows of another."""
    paths = [write_set(tmp_path / f"{name}.jsonl", name, count) for name, count in (("a", 10), ("b", 4))]
    dataset = f"{paths[0]}*3,{paths[1]}*2"
    return [*RUN, "--model_name", str(checkpoints()), "--dataset", dataset, "--num_epochs", "3"]


# tests/checkpoints/test_resume.py resumes a run of one set in `make test`.
@pytest.mark.slow
@pytest.mark.parametrize("packing", [[], PACKING])
def test_a_mixture_that_resumes_is_bitwise_equal(packing, mixture, two_ranks, tmp_path):
    """It is stopped in the middle of its second epoch. Other shares are another run."""
    argv, whole, folder = [*mixture, *packing], tmp_path / "whole", tmp_path / "run"
    two_ranks(run, [*argv, "--output_dir", str(whole)])
    again = [*argv, "--output_dir", str(folder), "--resume", "auto"]
    epochs = [line["epoch"] for line in lines(whole)]
    stop = next(i for i, epoch in enumerate(epochs, 1) if 1 < epoch < 2)
    two_ranks(run, again, Signals({stop: signal.SIGTERM}))
    assert checkpoint_steps(folder) == [stop]
    other = [*(value.replace("*2", "*5") for value in argv), *again[-4:]]
    with pytest.raises(UserError, match=r"no longer gives the rows .*; the run has --dataset .*\*3,.*\*2$"):
        check_run(parse([*other, "--world_size", "2"])[0])
    two_ranks(run, again)
    assert repeatable_metrics(folder) == repeatable_metrics(whole)
    ours, theirs = adapter(folder), adapter(whole)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.slow
@pytest.mark.parametrize("packing", [[], PACKING])
def test_two_ranks_learn_what_one_does(packing, mixture, one_rank, two_ranks):
    argv = [*mixture, *packing, "--precision", "fp32", "--max_steps", "7"]
    (single, _, norms) = one_rank(train_run, [*argv, "--batch_size", "2"])[0]
    for losses, _, others in two_ranks(train_run, argv):
        torch.testing.assert_close(torch.tensor(losses), torch.tensor(single), rtol=2e-5, atol=0)
        torch.testing.assert_close(torch.tensor(others), torch.tensor(norms), rtol=2e-4, atol=0)
