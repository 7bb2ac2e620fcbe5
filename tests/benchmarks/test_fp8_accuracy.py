"""benchmarks.fp8_accuracy: its texts and tokenizer, its parts and going on, the statistics; a rehearsal."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer

from benchmarks import fp8_accuracy
from benchmarks.accuracy_rows import Series, list_pairs, list_series
from benchmarks.accuracy_texts import (
    HELD_OUT,
    TEXT_A,
    TEXT_B,
    cut_pieces,
    gives_docstrings,
    list_files,
    train_tokenizer,
    write_texts,
)
from benchmarks.paired_losses import T_QUANTILES, compare, mean_difference
from options.errors import UserError
from options.evaluate import parse as parse_evaluation
from options.train import parse as parse_training

SMALL = "--shape tiny --ways 16bit,16bit --seeds 2 --pretraining 0.02 --fine_tuning 0.01 --batch 0.05"


# Texts


def write_packages(root: Path) -> None:
    """Write 40 modules with docstrings, 10 pages of documentation, a licence, and files without text."""
    for i in range(40):
        source = f'"""Module {i}."""\n\n\ndef f{i}():\n    """Return {i}."""\n    return {i}\n'
        (root / f"package{i}").mkdir(parents=True)
        (root / f"package{i}" / "module.py").write_text(source)
        (root / f"package{i}" / "LICENSE.txt").write_text("The same licence.\n")
    for i in range(10):
        (root / f"page{i}.rst").write_text(f"Page {i} explains.\n" * 40)
    (root / "numbers.txt").write_text("1.25 3.5\n" * 40)
    (root / "broken.py").write_text("def broken(:\n")
    (root / "latin.txt").write_bytes("Naïve.\n".encode("latin-1"))
    (root / "program.so").write_bytes(b"text")


def read_texts(folder: Path) -> dict[str, list[str]]:
    names = TEXT_A, TEXT_B, HELD_OUT
    return {n: [json.loads(line)["text"] for line in (folder / n).read_text().splitlines()] for n in names}


def test_texts_of_packages(tmp_path):
    write_packages(tmp_path / "root")
    limits = {HELD_OUT: 1500, TEXT_B: 10**6, TEXT_A: 10**6}
    found = write_texts(tmp_path, [tmp_path / "root"], limits)
    texts = read_texts(tmp_path)
    assert found == {name: sum(map(len, pieces)) for name, pieces in texts.items()}
    modules = [(n, path) for n, path in list_files([tmp_path / "root"]) if path.name == "module.py"]
    of_b = {path.parent.name[7:] for n, path in modules if gives_docstrings(n, path)}
    assert 0 < len(of_b) < 15
    docstrings = [f"Module {i}.\n\nReturn {i}." for i in of_b]
    pages = [f"Page {i} explains.\n" * 40 for i in range(10)]
    assert sorted(texts[TEXT_B] + texts[HELD_OUT]) == sorted(docstrings + pages)
    assert 1500 <= found[HELD_OUT] < 1500 + len(pages[0])
    assert texts[TEXT_A].count("The same licence.\n") == 1
    assert len(texts[TEXT_A]) == 40 - len(of_b) + 1 + (not gives_docstrings(*broken(tmp_path / "root")))
    write_texts(tmp_path, [tmp_path / "root"], limits)
    assert read_texts(tmp_path) == texts
    write_texts(tmp_path, [tmp_path / "root"], limits | {TEXT_A: 200})
    assert read_texts(tmp_path)[TEXT_A] == texts[TEXT_A][: len(read_texts(tmp_path)[TEXT_A])] != texts[TEXT_A]


def broken(root: Path) -> tuple[int, Path]:
    return next((n, path) for n, path in list_files([root]) if path.name == "broken.py")


def test_no_text(tmp_path):
    (tmp_path / "root").mkdir()
    with pytest.raises(UserError, match=f"{HELD_OUT}: the installed packages have no such text"):
        write_texts(tmp_path, [tmp_path / "root"], dict.fromkeys((HELD_OUT, TEXT_B, TEXT_A), 100))


def test_pieces_end_at_the_ends_of_lines():
    text = "".join(f"line {i}\n" * (i % 7) for i in range(900)) + "x" * 5000 + "\nlast"
    pieces = list(cut_pieces(text))
    assert "".join(pieces) == text and len(pieces) > 5
    assert all(piece.endswith("\n") for piece in pieces[:-1])
    assert sorted(map(len, pieces))[-2] <= 3000 < max(map(len, pieces)) == 5001


def test_the_tokenizer_is_one_of_bytes(tmp_path):
    train_tokenizer(["def f(x):\n    return x\n"] * 9, 300).save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    text = "    return naïve ☃ </s"
    ids = tokenizer(text)["input_ids"]
    assert ids[0] == tokenizer.bos_token_id == 0 and tokenizer.eos_token_id == 1
    assert tokenizer.decode(ids[1:]) == text and len(ids) < len(text.encode())
    assert 258 < len(tokenizer) <= 300 and tokenizer.is_fast


# Parts


class FakeRuns:
    """Replaces run_process: writes the metrics of train.py, and the results of evaluate.py.

    Attributes:
        commands: the configs of train.py.
        evaluated: the names of the RUNs of evaluate.py.
        matmuls: {name of a RUN: evaluate.py's --base_matmul}.
        fails: names of RUNs whose next training fails.
    """

    def __init__(self, fails=()):
        self.commands, self.evaluated, self.matmuls, self.fails = [], [], {}, list(fails)

    def __call__(self, command, log, limit_seconds, gpus, folder):
        if command[1] == "evaluate.py":
            self.evaluated.append(Path(command[2]).name)
            given = parse_evaluation(command[2:])
            assert given.metrics == ("perplexity",)
            self.matmuls[Path(command[2]).name] = given.base_matmul
            base = 5.5 if given.base_matmul == "16bit" else 5.75
            results = {"perplexity": {"base": math.exp(base), "tuned": math.exp(4.0)}}
            Path(given.out).write_text(json.dumps({"metrics": results}))
            return ""
        config, _ = parse_training(command[2:])
        self.commands.append(config)
        if Path(config.output_dir).name in self.fails:
            self.fails.remove(Path(config.output_dir).name)
            return "failed: no luck"
        Path(config.output_dir).mkdir(parents=True, exist_ok=True)
        loss = {"full": 5.0, "lora": 3.0, "qlora": 3.5}[config.train_type] + config.seed / 8
        steps = [{"tokens_per_second": speed} for speed in (1.0, 8.0, 9.0)]
        lines = [json.dumps(step) for step in [*steps, {"tokens_per_second": 8.0, "eval_loss": loss}]]
        (Path(config.output_dir) / "metrics.jsonl").write_text("\n".join(lines))
        return ""


@pytest.fixture
def packages(tmp_path, monkeypatch):
    write_packages(tmp_path / "root")
    monkeypatch.setattr(fp8_accuracy, "find_roots", lambda: [tmp_path / "root"])


def started(runs: FakeRuns) -> list[str]:
    return sorted(Path(config.output_dir).name for config in runs.commands)


def test_a_second_start_makes_what_is_missing(packages, tmp_path, monkeypatch, capsys):
    runs = FakeRuns(fails=["qlora-16bit-seed-1", "lora-seed-0"])
    monkeypatch.setattr(fp8_accuracy, "run_process", runs)
    argv = [*SMALL.split(), "--out", str(tmp_path / "out"), "--text", "1e-3"]
    assert fp8_accuracy.main(argv) == 1
    names = [f"{series}-seed-{seed}" for series in fp8_series() for seed in (0, 1)]
    assert started(runs) == sorted(["pretraining", *names])
    shown = capsys.readouterr().out
    missing = ["lora, seed 0", "qlora 16bit, seed 1", "qlora 16bit, evaluated as trained, seed 1"]
    assert f"without a result: {'; '.join(missing)}\n" in shown
    assert "lora, seed 0: 0 s, failed: no luck\n" in shown
    assert "lora, seed 1: 0 s, loss 3.1250, 8 tokens/s\n" in shown
    assert "Held-out loss before fine-tuning: 5.00000 in 16 bits, 5.50000 in NF4." in shown
    assert "| 0 |  | 3.50000 | 3.50000 | 4.00000 | 4.00000 |" in shown and "qlora 16bit - lora" not in shown
    trained = {name for name in names if name.startswith("qlora")}
    assert {*runs.evaluated} == trained - {"qlora-16bit-seed-1"} and len(runs.evaluated) == 3
    runs.commands.clear()
    runs.evaluated.clear()
    assert fp8_accuracy.main(argv) == 0
    assert started(runs) == ["lora-seed-0", "qlora-16bit-seed-1"]
    assert runs.evaluated == ["qlora-16bit-seed-1"]
    results = json.loads((tmp_path / "out" / "accuracy.json").read_text())
    assert results["loss_before"] == 5.0 and results["losses"]["lora"] == {"0": 3.0, "1": 3.125}
    assert [(d["mean"], d["low"], d["high"]) for d in results["differences"]] == [
        (0.0, 0.0, 0.0),
        (0.0, 0.0, 0.0),
        (0.5, 0.5, 0.5),
        (0.125, None, None),
    ]
    assert (
        "| qlora 16bit - lora, same seed | +0.50000 | +0.50000 to +0.50000 | 2 |" in capsys.readouterr().out
    )
    assert fp8_accuracy.main([*argv, "--fine_tuning", "1"]) == 2
    assert "its parts were made with" in capsys.readouterr().err


def fp8_series() -> list[str]:
    return ["lora", "qlora-16bit", "qlora-16bit-again"]


def test_runs_differ_only_in_what_is_compared(packages, tmp_path, monkeypatch):
    runs = FakeRuns()
    monkeypatch.setattr(fp8_accuracy, "run_process", runs)
    assert fp8_accuracy.main([*SMALL.split(), "--out", str(tmp_path / "out"), "--text", "1e-3"]) == 0
    first, *others = runs.commands
    assert (first.train_type, first.model_name) == ("full", str(tmp_path / "out" / "random"))
    assert first.max_steps == round(0.02e6 / (3 * 1024)) and first.batch_size == 3
    free = {"train_type", "output_dir", "seed", "vision_bits", "base_matmul"}  # the last two: None for lora
    settings = [{k: v for k, v in vars(config).items() if k not in free} for config in others]
    assert all(each == settings[0] for each in settings)
    assert settings[0]["model_name"] == str(tmp_path / "out" / "pretraining")
    assert {settings[0][name] for name in ("dataset", "eval_dataset")} == {
        str(tmp_path / "out" / name) for name in (TEXT_B, HELD_OUT)
    }
    options = Series("any", "qlora", "fp8").options()
    assert options == ["--train_type", "qlora", "--base_matmul", "fp8"]


def test_each_run_is_evaluated_as_it_was_trained(packages, tmp_path, monkeypatch, capsys):
    runs = FakeRuns()
    monkeypatch.setattr(fp8_accuracy, "run_process", runs)
    argv = [*SMALL.split(), "--out", str(tmp_path / "out"), "--text", "1e-3", "--seeds", "1", "--ways"]
    assert fp8_accuracy.main([*argv, "int8,16bit"]) == 0
    assert runs.matmuls == {"qlora-int8-seed-0": "int8", "qlora-16bit-seed-0": "16bit"}
    assert "5.50000 in NF4." in capsys.readouterr().out  # not that with int8
    assert fp8_accuracy.main([*argv, "16bit,fp7"]) == 2
    assert capsys.readouterr().err == "error: --ways fp7: must be 16bit or fp8 or int8\n"


def test_without_a_pretrained_model_nothing_else_runs(packages, tmp_path, monkeypatch, capsys):
    runs = FakeRuns(fails=["pretraining"])
    monkeypatch.setattr(fp8_accuracy, "run_process", runs)
    assert fp8_accuracy.main([*SMALL.split(), "--out", str(tmp_path / "out"), "--text", "1e-3"]) == 2
    assert started(runs) == ["pretraining"]
    assert capsys.readouterr().err == "error: pretraining: failed: no luck\n"


def test_no_run_starts_after_the_time(packages, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(fp8_accuracy, "run_process", runs := FakeRuns())
    monkeypatch.setattr(fp8_accuracy.time, "monotonic", iter(range(0, 10**6, 100)).__next__)
    argv = [*SMALL.split(), "--out", str(tmp_path / "out"), "--text", "1e-3", "--stop_after", "50"]
    assert fp8_accuracy.main(argv) == 1
    assert started(runs) == ["pretraining"] and "without a result: lora, seed 0; " in capsys.readouterr().out


# Statistics


def test_the_interval_of_a_mean():
    found = mean_difference("any", [1.0, 2.0, 3.0, 4.0, 5.0])
    margin = 2.776 * math.sqrt(2.5) / math.sqrt(5)
    assert (found.mean, found.low, found.high) == (3.0, 3 - margin, 3 + margin) and found.count == 5
    assert mean_difference("any", [0.5]).low is None


def test_the_quantiles_of_students_t():
    for freedom, quantile in enumerate(T_QUANTILES, 1):
        t = np.linspace(0, quantile, 200_001)
        scale = math.gamma((freedom + 1) / 2) / math.sqrt(freedom * math.pi) / math.gamma(freedom / 2)
        density = scale * (1 + t**2 / freedom) ** (-(freedom + 1) / 2)
        assert np.trapezoid(density, t) == pytest.approx(0.475, abs=2e-5)


def test_only_runs_of_the_same_seed_are_compared():
    losses = {"lora": {0: 1.0, 1: 2.0}, "bf16": {1: 2.5, 2: 3.0}, "fp8": {2: 3.25}, "int8": {0: 9.0}}
    pairs = [("fp8", "bf16"), ("int8", "bf16"), ("bf16", "lora")]
    assert [(d.name, d.mean, d.count) for d in compare(losses, pairs, baseline="bf16")] == [
        ("fp8 - bf16, same seed", 0.25, 1),
        ("bf16 - lora, same seed", 0.5, 1),
        ("bf16, size of the difference between two seeds", 0.5, 1),
    ]


def test_what_is_compared():
    assert list_pairs(list_series(["16bit", "fp8", "int8"])) == [
        ("qlora fp8", "qlora 16bit"),
        ("qlora int8", "qlora 16bit"),
        ("qlora fp8, evaluated as trained", "qlora 16bit, evaluated as trained"),
        ("qlora int8, evaluated as trained", "qlora 16bit, evaluated as trained"),
        ("qlora 16bit", "lora"),
    ]


@pytest.mark.slow
def test_a_rehearsal_on_the_cpu(packages, tmp_path):
    """The same computation twice gives the same losses, and evaluate.py gives that of train.py."""
    argv = [*SMALL.split(), "--out", str(tmp_path / "out"), "--text", "1e-3", "--jobs", "2", "--seeds", "1"]
    assert fp8_accuracy.main(argv) == 0
    results = json.loads((tmp_path / "out" / "accuracy.json").read_text())
    again, evaluated, quantized = results["differences"]
    assert again["mean"] == evaluated["mean"] == 0 and quantized["mean"] != 0
    losses = results["losses"]
    assert losses["qlora 16bit, evaluated as trained"]["0"] == pytest.approx(
        losses["qlora 16bit"]["0"], rel=1e-5
    )
    assert results["nf4_loss_before"] == pytest.approx(results["loss_before"], rel=1e-2)
    assert all(by_seed["0"] < results["loss_before"] for by_seed in losses.values())
