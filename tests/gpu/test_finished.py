"""evaluate.py and generate.py on a GPU."""

from __future__ import annotations

import json
import shutil
from unittest import mock

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import evaluate
import finished.evaluate
import generate
from files.names import ADAPTER


@pytest.mark.gpu
def test_scores_are_those_of_the_cpu(runs, alpaca_file, tmp_path, capsys):
    """The adapter is made large enough to be seen in the scores."""
    run = shutil.copytree(runs[0], tmp_path / "run")
    with safe_open(run / ADAPTER, framework="pt") as f:
        metadata = f.metadata()
    tensors = {name: t * (10 if "lora_B" in name else 1) for name, t in load_file(run / ADAPTER).items()}
    save_file(tensors, run / ADAPTER, metadata=metadata)

    def score(name: str) -> dict[str, float]:
        words = [run, "--dataset", alpaca_file, "--samples", 8, "--metrics", "perplexity,exact_match"]
        words += ["--max_new_tokens", 4]
        assert evaluate.main([*map(str, words), "--out", str(tmp_path / name)]) == 0, capsys.readouterr().err
        return json.loads((tmp_path / name).read_text())["metrics"]["perplexity"]

    found = score("gpu")
    with mock.patch.object(finished.evaluate, "choose_device", lambda: torch.device("cpu")):
        expected = score("cpu")
    assert found == pytest.approx(expected, rel=0.02)
    assert abs(found["base"] / found["tuned"] - 1) > 0.05


@pytest.mark.gpu
def test_a_gpu_needs_no_number(runs, capsys):
    def answers(*options: str) -> list[str]:
        assert generate.main([str(runs[0]), "--prompt", "Say red.", "--json", *options]) == 0
        return [a["text"] for a in json.loads(capsys.readouterr().out.splitlines()[-1])["answers"]]

    first = answers("--device", "cuda:0")
    assert answers() == answers("--device", "cuda") == first
    assert first[0] != first[1]
