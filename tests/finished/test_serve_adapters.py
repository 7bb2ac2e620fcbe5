"""docs/serve_adapters.py, the server of docs/serving.md: each adapter answers as generate.py does."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import bitsandbytes
import pytest

import generate
from data.chat import ChatTemplate
from finished.finished_run import find_stop_ids, load_tokenizer, open_run
from finished.generation import make_template
from launch import processes as launch
from tests.helpers import chat_templates
from tests.helpers.adapters import args_for
from tests.helpers.chat_templates import CHATML
from tests.helpers.finished_runs import write_random_run
from tests.helpers.products import slow
from tests.helpers.programs import ROOT
from tests.helpers.small_tokenizers import BYTES, chat_tokenizer
from tests.helpers.tiny import save_checkpoint

uvicorn = pytest.importorskip("uvicorn")
pytest.importorskip("fastapi")

PAGE, SERVER = ROOT / "docs" / "serving.md", ROOT / "docs" / "serve_adapters.py"
QUESTIONS, TOKENS = ["What is 2 + 2?", "Say red, then blue."], 12
WRONG_REQUESTS = [
    ({"stream": True}, "stream: is not supported"),
    ({"temperature": 0.5}, "temperature: is not supported"),
    ({"stop": ["x"]}, "stop: is not supported"),
    ({"top_p": 0.5}, "top_p: is not supported"),
    ({"n": 2}, "n: is not supported"),
    ({"tools": [{}]}, "tools: is not supported"),
    ({"logprobs": True}, "logprobs: is not supported"),
    ({"messages": "Hi"}, "messages: must be a list"),
    ({"messages": None}, "messages: must be a list"),
    ({"messages": [{"role": "user"}] * 2}, "the chat template refuses the messages: "),
    ({"messages": [{"role": "user", "content": "x" * 9000}]}, "tokens leave no room"),
    ({"max_tokens": "abc"}, "max_tokens: must be a whole number"),
    ({"max_tokens": -3}, "max_tokens: must be a whole number"),
    ({"max_tokens": 0}, "max_tokens: must be a whole number"),
    ({"chat_template_kwargs": {"chat_template": "{{ 1 }}"}}, "chat_template_kwargs: may have only"),
    ({"chat_template_kwargs": {"tokenize": False}}, "chat_template_kwargs: may have only"),
    ({"chat_template_kwargs": "x"}, "chat_template_kwargs: may have only"),
    ({"model": ["two"]}, "is not served"),
]
# Ends answers with a text that is no token.
SPELLED = (
    "{% for m in messages %}{{ m.role + ': ' + m.content }}{{ 'ENDING' if m.role == 'assistant' }}{{ '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
SECONDS = 90  # for the server to load its libraries and the model
# {kind: (train type of the LoRA, of the DoRA, more options of the DoRA)}
KINDS = {
    "dense": ("lora", "dora"),
    "nf4": ("qlora", "bnb_dora"),
    "embeddings": ("lora", "dora", "--train_embeddings", "true"),
}


@pytest.fixture(scope="module", params=["dense", *slow(["nf4", "embeddings"])])
def adapters(request, one_rank, tmp_path_factory) -> tuple[Path, dict[str, Path], bool]:
    """(base with a chat template, {name: RUN of a LoRA or a DoRA}, whether the base is packed).

    "two", the DoRA, has other linears, another rank, and a --chat_template of its own with its own ending.
    "spelled" has a --chat_template that ends answers with a text, which one of its answers has.
    """
    folder = tmp_path_factory.mktemp("served")
    base, rows = save_checkpoint("llama", folder / "base", intermediate_size=128), folder / "rows.jsonl"
    tokenizer = chat_tokenizer(CHATML, "</s>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_end|>"]})
    tokenizer.save_pretrained(base)
    stops = tokenizer.convert_tokens_to_ids(["</s>", "<|im_end|>"])
    (base / "generation_config.json").write_text(
        json.dumps({"eos_token_id": stops, "repetition_penalty": 9.0})
    )
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]
    rows.write_text(json.dumps({"messages": turns}) + "\n")
    lora, dora, *more = KINDS[request.param]
    some = ["--lora_rank", "4", "--lora_target_modules", "o_proj,up_proj", "--seed", "7"]
    runs = {"one.lora": folder / "one", "two": folder / "two"}
    write_random_run(one_rank, folder / "one", args_for(base, rows, lora))
    write_random_run(
        one_rank, folder / "two", args_for(base, rows, dora, *some, "--chat_template", "gemma", *more)
    )
    runs["spelled"] = write_spelled_run(one_rank, folder, args_for(base, rows, lora, "--seed", "8"))
    assert not (folder / "one" / "generation_config.json").exists()
    assert (folder / "two" / "generation_config.json").exists()
    return base, runs, request.param == "nf4"


def write_spelled_run(one_rank, folder: Path, args: list) -> Path:
    """Write a RUN whose chat template ends answers with a text that is no token.

    The text is taken from an answer of the same model without that ending.
    """
    ending = "@@@"
    for name in ("unended", "spelled"):
        template = folder / f"{name}.jinja"
        template.write_text(SPELLED.replace("ENDING", ending))
        write_random_run(one_rank, folder / name, [*args, "--chat_template", template])
        if name == "unended":
            answers = [a["text"] for _, a in generate_answers(folder / name) if a["model"] != "base"]
            ending = re.search(r".([!-&(-[\]-~]{2})", "\n".join(answers), re.DOTALL)[1]  # no quote, no \\
    return folder / "spelled"


def generate_answers(run: Path) -> list[tuple[str, dict]]:
    """Return (question, answer as --json prints it) of generate.py's answers of a RUN and its base."""
    asked = [word for question in QUESTIONS for word in ("--prompt", question)]
    with contextlib.redirect_stdout(io.StringIO()) as out:
        words = [str(run), *asked, "--max_new_tokens", str(TOKENS), "--device", "cpu", "--json"]
        assert generate.main(words) == 0
    lines = zip(QUESTIONS, out.getvalue().splitlines(), strict=True)
    return [(question, answer) for question, line in lines for answer in json.loads(line)["answers"]]


@pytest.fixture(scope="module")
def expected(adapters) -> dict[tuple[str, str], tuple[str, int, str]]:
    """{(name, question): (text, tokens, how it ended)} of generate.py's answers."""
    base, runs, _ = adapters
    found = {}
    for name, run in runs.items():
        for question, answer in generate_answers(run):
            ended = "stop" if answer["ended"] else "length"
            is_base = answer["model"] == "base"
            if is_base and name != "one.lora":
                continue  # generate.py asks the base with the template of the run beside it
            found[str(base) if is_base else name, question] = answer["text"], answer["tokens"], ended
    return found


def load_server() -> ModuleType:
    spec = importlib.util.spec_from_file_location("serve_adapters", SERVER)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@contextlib.contextmanager
def served_here(base: Path, runs: dict[str, Path], load_in_4bit: bool, port: int):
    """Serve in a thread of this process. Compares the tokens that end answers with generate.py's."""
    module = load_server()
    loaded = module.load(str(base), {name: str(run) for name, run in runs.items()}, load_in_4bit)
    for name, run in runs.items():
        _, tokenizer, stops, stop_string = loaded[1][name]
        opened = open_run(run)
        assert sorted(stops) == find_stop_ids(opened, load_tokenizer(opened)) and len(stops) > 1
        assert tokenizer.chat_template == load_tokenizer(opened).chat_template
        assert stop_string == (make_template(opened, "auto").marker or "")
        assert bool(stop_string) == (name == "spelled")
    for layer in loaded[0].modules():
        if isinstance(layer, bitsandbytes.nn.Linear4bit):
            layer.train()  # in evaluation mode bitsandbytes rounds the scales to bf16 on a CPU
    server = uvicorn.Server(uvicorn.Config(module.make_app(*loaded), port=port, log_level="warning"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        yield lambda: server.started
    finally:
        server.should_exit = True
        thread.join()


@contextlib.contextmanager
def served_by_the_command(base: Path, runs: dict[str, Path], load_in_4bit: bool, port: int):
    """Serve by the command of docs/serving.md, in a process of its own, on a CPU."""
    if load_in_4bit:
        pytest.skip("on a CPU bitsandbytes rounds the scales of 4-bit weights to bf16")
    command = re.search(r"^ +python (docs/serve_adapters.py .*)$", PAGE.read_text("utf-8"), re.MULTILINE)[1]
    program, _, *rest = shlex.split(command)
    options = [word for word in rest if "=" not in word and word != "--load_in_4bit"]
    options += ["--cache_dora", *(f"{name}={run}" for name, run in runs.items())]
    words = [sys.executable, program, str(base), *options, "--port", str(port)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen(words, cwd=ROOT, env=environment)
    try:
        yield lambda: process.poll() is None
    finally:
        process.kill()
        process.wait()


def request(port: int, path: str, body: dict | None = None) -> tuple[int, dict]:
    """Return (status, JSON) of a request to the server."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # no proxy for the loopback
    data = None if body is None else json.dumps(body).encode()
    asked = urllib.request.Request(
        f"http://localhost:{port}{path}", data, {"Content-Type": "application/json"}
    )
    try:
        with opener.open(asked, timeout=60) as response:
            return response.status, json.load(response)
    except urllib.error.HTTPError as e:
        return e.code, json.load(e)


def ask(port: int, name: str, question: str, **options) -> tuple[int, dict]:
    messages = [{"role": "user", "content": question}]
    body = {"model": name, "messages": messages, "max_tokens": TOKENS, **options}
    return request(port, "/v1/chat/completions", body)


def read_answer(reply: tuple[int, dict]) -> tuple[str, int, str]:
    (choice,) = reply[1]["choices"]
    tokens = reply[1]["usage"]["completion_tokens"]
    return choice["message"]["content"], tokens, choice["finish_reason"]


@pytest.mark.parametrize(
    "serve",
    [served_here, pytest.param(served_by_the_command, marks=pytest.mark.slow)],
    ids=["here", "command"],
)
def test_each_adapter_answers_as_generate_does(serve, adapters, expected):
    """Token for token, one by one and all at once; LoRA, DoRA and the base over one set of weights.

    An answer of "spelled" ends at the text that ends answers in its template.
    """
    base, runs, load_in_4bit = adapters
    port = launch.find_free_port()
    assert len({text for (_, question), (text, *_) in expected.items() if question == QUESTIONS[0]}) == 4
    ends = [answer for (name, _), answer in expected.items() if name == "spelled" and answer[2] == "stop"]
    assert ends and all(tokens < TOKENS for _, tokens, _ in ends)
    with serve(base, runs, load_in_4bit, port) as is_up:
        wait_for_the_server(port, is_up)
        for (name, question), answer in expected.items():
            assert read_answer(ask(port, name, question)) == answer
        with ThreadPoolExecutor(12) as pool:
            replies = {key: [pool.submit(ask, port, *key) for _ in range(3)] for key in expected}
        for key, futures in replies.items():
            assert {read_answer(future.result()) for future in futures} == {expected[key]}
        listed = [model["id"] for model in request(port, "/v1/models")[1]["data"]]
        assert listed == [str(base), *runs]
        status, error = ask(port, "other", "Hi")
        assert status == 404
        assert error == {"detail": f"model 'other' is not served; these are: {', '.join(listed)}"}
        for wrong, words in WRONG_REQUESTS:
            status, error = ask(port, "two", "Hi", **wrong)
            assert status in (400, 404) and words in error["detail"], (wrong, status, error)
        assert ask(port, "two", "Hi", temperature=0, n=1, stream=False, stop=None)[0] == 200
        reply = ask(port, "two", "Hi", max_tokens=10**6)
        assert reply[0] == 200 and reply[1]["usage"]["total_tokens"] <= 512  # the model's positions


NAMES = (
    "CHATML",
    "LLAMA3",
    "LLAMA2",
    "MISTRAL",
    "GEMMA",
    "QWEN3",
    "R1",
    "FORGETFUL",
    "DEAF",
    "PHI4",
    "ZEPHYR",
)


@pytest.mark.parametrize("name", NAMES)
def test_the_stop_string_is_the_one_of_training(name):
    """The templates end answers with a token, with a text that is none, or with nothing."""
    for eos in ("</s>", "<|im_end|>"):
        tokenizer = chat_tokenizer(getattr(chat_templates, name), eos)
        expected = ChatTemplate(tokenizer).marker or ""
        assert load_server().find_stop_string(tokenizer) == expected
        assert name != "CHATML" or bool(expected) == (eos == "</s>")
    assert load_server().find_stop_string(BYTES) == "", "has no chat template"


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["one=missing"], "missing: holds no adapter (adapter_config.json)"),
        (["one=."], ".: holds no adapter (adapter_config.json)"),
        (["one"], "give each adapter as NAME=RUN, with names of their own"),
        (["one=a", "one=b"], "give each adapter as NAME=RUN, with names of their own"),
        (["base=a"], "give each adapter as NAME=RUN, with names of their own"),
    ],
)
def test_a_command_without_adapters_ends_with_a_line(words, line, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["serve_adapters.py", "base", *words])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(SERVER), run_name="__main__")
    assert ended.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1] == f"serve_adapters.py: error: {line}"


def test_a_line_names_the_base_of_an_adapter_over_another_one(adapters, tmp_path, capsys):
    base, runs, _ = adapters
    other = shutil.copytree(base, tmp_path / "other")
    load_server().load(str(other), {"two": str(runs["two"])}, load_in_4bit=False)
    line = f"WARNING: {runs['two']} was trained on {base}, and is loaded over {other}\n"
    assert line in capsys.readouterr().err


def wait_for_the_server(port: int, is_up) -> None:
    end = time.monotonic() + SECONDS
    while True:
        with contextlib.suppress(OSError):
            request(port, "/v1/models")
            return
        assert time.monotonic() < end and (is_up() or end - time.monotonic() > SECONDS - 5)
        time.sleep(0.2)
