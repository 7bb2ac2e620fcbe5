"""A merged model folder behind transformers' own server: docs/serving.md.

tests/checkpoints/test_model_writer.py and tests/finished/test_export.py load the adapter folders with PEFT.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import export
from launch import processes as launch
from tests.helpers.adapters import args_for
from tests.helpers.chat_templates import CHATML
from tests.helpers.finished_runs import write_random_run

MISSING = [
    p
    for p in ("fastapi", "uvicorn", "pydantic", "openai", "accelerate")
    if importlib.util.find_spec(p) is None
]
PAGE = Path(__file__).parents[2] / "docs" / "serving.md"
QUESTION = [{"role": "user", "content": "What is 2 + 2?"}]
SECONDS = 90  # for the server to load its libraries and the model


@pytest.fixture(scope="module")
def served_folder(checkpoints, alpaca_file, one_rank, tmp_path_factory) -> Path:
    """A merged folder of a run over a base with a chat template, packed to 4 bits, with a random adapter."""
    base = shutil.copytree(checkpoints(), tmp_path_factory.mktemp("chat") / "base")
    (base / "chat_template.jinja").write_text(CHATML)
    run, folder = base.with_name("run"), base.with_name("merged")
    write_random_run(one_rank, run, args_for(base, alpaca_file, "bnb_dora"))
    assert export.main([str(run), "--to", "merged", "--out", str(folder), "--check", "false"]) == 0
    return folder


def greedy(folder: Path, tokens: int) -> str:
    """Generate transformers' own answer to QUESTION, without a server."""
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    asked = tokenizer.apply_chat_template(
        QUESTION, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    with torch.no_grad():
        answer = model.eval().generate(**asked, max_new_tokens=tokens, do_sample=False)
    return tokenizer.decode(answer[0, asked["input_ids"].shape[1] :], skip_special_tokens=True)


def test_the_folder_carries_its_chat_template(served_folder):
    assert AutoTokenizer.from_pretrained(served_folder).chat_template == CHATML
    assert not list(served_folder.glob("adapter*"))


@pytest.mark.slow
@pytest.mark.skipif(bool(MISSING), reason=f"transformers[serving] is not installed ({', '.join(MISSING)})")
def test_transformers_serve_answers_a_chat_request(served_folder, tmp_path):
    """The docs' command, on a free port, gives the answer of the folder's own model."""
    command = re.search(r"^ +(transformers serve .*)$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)[1]
    program, *options = shlex.split(command.replace("my-model", str(served_folder)))
    port, log = launch.find_free_port(), tmp_path / "log"
    assert program == "transformers" and str(served_folder) in options
    if "--port" in options:
        del options[options.index("--port") : options.index("--port") + 2]
    module = [sys.executable, "-m", "transformers.cli.transformers", *options]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    with log.open("wb") as out:
        server = subprocess.Popen([*module, "--port", str(port)], stdout=out, stderr=out, env=environment)
        try:
            answer = ask(f"http://localhost:{port}", server, log, str(served_folder))
        finally:
            server.kill()
            server.wait()
    (choice,) = answer["choices"]
    assert choice["message"]["role"] == "assistant" and answer["usage"]["completion_tokens"] == 12
    assert choice["message"]["content"] == greedy(served_folder, 12) != ""


def ask(address: str, server: subprocess.Popen, log: Path, model: str) -> dict:
    """Return the answer to an OpenAI-style request, as soon as the server listens."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # no proxy for the loopback
    body = {"model": model, "messages": QUESTION, "max_tokens": 12, "temperature": 0, "stream": False}
    request = urllib.request.Request(
        f"{address}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    end = time.monotonic() + SECONDS
    while True:
        assert server.poll() is None and time.monotonic() < end, log.read_text(errors="replace")[-3000:]
        try:
            with opener.open(f"{address}/health", timeout=5):
                break
        except OSError:
            time.sleep(0.2)
    with opener.open(request, timeout=60) as response:
        return json.load(response)
