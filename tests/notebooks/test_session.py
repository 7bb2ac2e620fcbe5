"""notebooks/session.py: commands that are interrupted or fail, and a line for whatever a session lacks."""

from __future__ import annotations

import http.server
import json
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import run_options
import session
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError
from session import SessionError

from tests.helpers.programs import ROOT

T4, P100 = "Tesla T4, 15360 MiB, 7.5", "Tesla P100-PCIE-16GB, 16384 MiB, 6.0"
MODEL = "meta-llama/Llama-3.1-8B"
# Saves for a second after SIGINT, and counts the signals.
SAVES = """
import signal, sys, time
signals = []
signal.signal(signal.SIGINT, lambda number, frame: signals.append(number))
print("started")
while not signals:
    time.sleep(0.01)
time.sleep(1)
print("saved", len(signals))
sys.exit(0)
"""


@pytest.fixture
def commands(tmp_path, monkeypatch):
    """commands(name=source ...) -> scripts that `session.run` finds, in place of this program's."""

    def write(**sources: str) -> Path:
        for name, source in sources.items():
            (tmp_path / f"{name}.py").write_text(source)
        return tmp_path

    monkeypatch.setattr(session, "ROOT", tmp_path)
    return write


def test_lines_arrive_as_they_come(commands, capsys, monkeypatch):
    commands(waits="import sys, time\nprint('one', sys.argv[1:])\ntime.sleep(1)\nprint('two')")
    times = []
    monkeypatch.setattr(session, "print", lambda *a, **k: times.append(time.monotonic()), raising=False)
    session.run(["waits.py", "--max_steps", 3])
    assert len(times) == 2 and times[1] - times[0] > 0.8
    monkeypatch.undo()


def test_a_failed_command_is_told_in_one_line(commands, capsys):
    source = (
        "import sys\nprint('line')\nprint('error: --lr -1: must be at least 0', file=sys.stderr)\nsys.exit(2)"
    )
    commands(fails=source)
    with pytest.raises(session.CommandFailed) as e:
        session.run(["fails.py"])
    assert str(e.value) == "fails.py ended with exit status 2: error: --lr -1: must be at least 0"
    assert capsys.readouterr().out == "line\nerror: --lr -1: must be at least 0\n"
    assert e.value._render_traceback_() == [f"CommandFailed: {e.value}"]  # what IPython shows


def start_kernel(root: Path, argv: list[str]) -> subprocess.Popen:
    """Start a process that calls `session.run`, in a process group of its own, as Jupyter starts kernels."""
    source = f"import pathlib, session; session.ROOT = pathlib.Path({str(root)!r}); session.run({argv!r})"
    env = os.environ | {"PYTHONPATH": str(ROOT / "notebooks"), "PYTHONUNBUFFERED": "1"}
    return subprocess.Popen(
        [sys.executable, "-c", source],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=env,
        start_new_session=True,
    )


def test_an_interrupt_reaches_the_command_once_and_is_waited_for(commands):
    """Jupyter sends SIGINT to the kernel's whole process group."""
    kernel = start_kernel(commands(saves=SAVES), ["saves.py"])
    assert kernel.stdout.readline() == "started\n"
    os.killpg(kernel.pid, signal.SIGINT)
    out, err = kernel.communicate(timeout=60)
    assert out.endswith("interrupted: waiting for saves.py to end\nsaved 1\n")
    assert err.endswith("session.Interrupted: saves.py was interrupted and ended with exit status 0\n")


def test_a_second_interrupt_is_passed_on(commands):
    kernel = start_kernel(commands(saves=SAVES), ["saves.py"])
    assert kernel.stdout.readline() == "started\n"
    for _ in range(2):
        kernel.send_signal(signal.SIGINT)
        time.sleep(0.4)
    assert "saved 2" in kernel.communicate(timeout=60)[0]


@pytest.mark.slow
def test_train_py_saves_a_checkpoint_when_its_cell_is_interrupted(tmp_path):
    options = "--max_steps 100000 --num_epochs 1000 --log_to stdout --log_every 1 --sample_every 0".split()
    kernel = start_kernel(ROOT, ["train.py", *options, "--output_dir", str(tmp_path / "run")])
    while not kernel.stdout.readline().startswith("step 3/"):
        assert kernel.poll() is None
    os.killpg(kernel.pid, signal.SIGINT)
    out, err = kernel.communicate(timeout=120)
    assert "was interrupted and ended with exit status 0" in err, out
    (manifest,) = (tmp_path / "run" / "checkpoints").glob("*/manifest.json")
    steps = len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    assert json.loads(manifest.read_text())["step"] == steps >= 3


@pytest.fixture
def gpus(tmp_path, monkeypatch):
    """gpus(line ...) -> nvidia-smi is a program that prints these lines; without lines there is none."""

    def install(*lines: str) -> None:
        monkeypatch.setenv("PATH", str(tmp_path))
        if lines:
            program = tmp_path / "nvidia-smi"
            program.write_text("#!/bin/sh\n" + "".join(f"echo '{line}'\n" for line in lines))
            program.chmod(0o755)

    return install


def test_two_gpus(gpus, capsys):
    gpus(T4, T4)
    assert session.choose_world_size("auto", 2) == 2 and capsys.readouterr().out == ""
    session.describe_machine()
    assert "GPUs: Tesla T4, 15360 MiB; Tesla T4, 15360 MiB\n" in capsys.readouterr().out


def test_one_t4_instead_of_two_is_told_and_goes_on(gpus, capsys):
    gpus(T4)
    assert session.choose_world_size("auto", 2) == 1
    assert "1 GPU instead of 2 (Tesla T4, 15360 MiB): the run goes on" in capsys.readouterr().out
    assert run_options.accumulation_steps(8, 1, 1) == 2 * run_options.accumulation_steps(8, 2, 1)
    with pytest.raises(SessionError, match="ROWS_PER_STEP = 7 is no multiple of 2 processes"):
        run_options.accumulation_steps(7, 2, 1)


def test_a_gpu_of_unknown_capability_counts(gpus):
    gpus(T4.replace("7.5", "[N/A]"), T4)
    assert session.choose_world_size("auto", 2) == 2
    session.describe_machine()


@pytest.mark.parametrize("value", ["two", 0, -1, 1.5, "", None, True])
def test_a_value_that_is_no_number_is_told(value):
    with pytest.raises(SessionError, match=r'^GPUS = .*: has to be a whole number, at least 1, or "auto"$'):
        session.choose_world_size(value, 2)
    for name, values in (("ROWS_PER_STEP", (value, 1, 1)), ("BATCH_SIZE", (8, 1, value))):
        with pytest.raises(SessionError, match=rf"^{name} = .*: has to be a whole number, at least 1$"):
            run_options.accumulation_steps(*values)


@pytest.mark.parametrize(
    ("lines", "message"), [([], "has no GPU: choose .* GPU T4 x2"), ([P100], "P100.* is older than a T4")]
)
def test_no_gpu_that_can_be_used(gpus, lines, message):
    gpus(*lines)
    with pytest.raises(SessionError, match=message):
        session.choose_world_size("auto", 2)
    assert session.choose_world_size("2", 2) == 2  # as on a CPU


def test_the_time_that_is_left():
    assert run_options.minutes_left(time.time() - 3600, 660) == pytest.approx(600, abs=0.2)
    assert run_options.minutes_left(0, 660) == 1 and run_options.minutes_left(0, 0) == 0
    for value in (-1, "660", math.nan):
        with pytest.raises(SessionError, match=r"^MAX_MINUTES = .*: has to be a number of minutes; 0: no"):
            run_options.minutes_left(0, value)


def test_a_full_working_folder_is_told_with_what_fills_it(tmp_path, monkeypatch):
    (tmp_path / "merged").mkdir()
    (tmp_path / "merged" / "model.safetensors").write_bytes(bytes(50_000_000))
    usage = SimpleNamespace(total=20e9, used=19e9, free=1e9)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    session.check_room(str(tmp_path / "run"), 0.5)
    with pytest.raises(SessionError, match=r"has 1.0 GB free, and 8.0 are needed: .*merged \(0.1 GB\)"):
        session.check_room(str(tmp_path / "new" / "run"), 8)


def test_a_file_that_vanishes_is_not_counted(tmp_path, monkeypatch):
    for name in ("gone", "kept"):
        (tmp_path / name).write_bytes(bytes(100))
    lstat = os.lstat

    def remove_first(path):
        (tmp_path / "gone").unlink(missing_ok=True)
        return lstat(path)

    monkeypatch.setattr(os, "lstat", remove_first)
    assert session._folder_bytes(tmp_path) == 100
    assert session._folder_bytes(tmp_path / "kept") == 100 and session._folder_bytes(tmp_path / "gone") == 0


@pytest.fixture
def platform(monkeypatch):
    """platform(name) -> this is Kaggle, Colab, or neither."""

    def choose(name: str) -> None:
        for each, variable in (("kaggle", "KAGGLE_KERNEL_RUN_TYPE"), ("colab", "COLAB_RELEASE_TAG")):
            if each == name:
                monkeypatch.setenv(variable, "x")
            else:
                monkeypatch.delenv(variable, raising=False)

    monkeypatch.delenv("HF_TOKEN", raising=False)
    return choose


def disconnect(monkeypatch) -> None:
    def refuse(*_, **__):
        raise OSError("Temporary failure in name resolution")

    monkeypatch.setattr(session.socket, "create_connection", refuse)


def test_no_internet_names_the_switch(platform, monkeypatch, tmp_path):
    disconnect(monkeypatch)
    session.check_internet("toy", str(tmp_path))  # needs none
    platform("kaggle")
    with pytest.raises(SessionError, match=r"^no internet: huggingface.co .*turn on Settings > Internet"):
        session.check_internet(MODEL, str(tmp_path))
    platform("colab")  # which has no switch
    with pytest.raises(SessionError, match=r"^no internet: huggingface.co .*resolution\)$"):
        session.check_internet("toy", "owner/rows")


@pytest.mark.parametrize("path", ["{}/typo", "./typo", "~/typo", "../typo", "input/model/typo", "{}/a/b@c"])
def test_a_path_where_nothing_is_is_told_before_the_network_is_asked(path, tmp_path, monkeypatch):
    (tmp_path / "llama").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(session.socket, "create_connection", None)
    monkeypatch.setattr(huggingface_hub, "auth_check", None)
    path = path.format(tmp_path)
    for check in (session.check_model_access, lambda model: session.check_internet(model, "toy")):
        with pytest.raises(SessionError, match=rf"^MODEL = {path}: no such folder; {tmp_path.parent}"):
            check(path)
    with pytest.raises(SessionError, match=rf"^DATASET = {path}: no such file or folder"):
        session.check_internet("toy", path)
    session.check_internet("~/llama", "./llama")
    with pytest.raises(SessionError, match=f"{tmp_path} has: llama$"):
        session.check_model_access(f"{tmp_path}/typo")


def test_a_token_is_read_from_each_service_and_never_printed(platform, monkeypatch, capsys):
    secret = "hf_" + "x" * 20
    kaggle = SimpleNamespace(UserSecretsClient=lambda: SimpleNamespace(get_secret={"HF_TOKEN": secret}.get))
    colab = SimpleNamespace(userdata=SimpleNamespace(get={"HF_TOKEN": f"{secret}\n"}.get))
    monkeypatch.setitem(sys.modules, "kaggle_secrets", kaggle)
    monkeypatch.setitem(sys.modules, "google.colab", colab)
    for name in ("kaggle", "colab"):
        platform(name)
        monkeypatch.setenv("HF_TOKEN", "")
        session.use_hub_token()
        assert os.environ["HF_TOKEN"] == secret
    assert capsys.readouterr().out == "HF_TOKEN: found\n" * 2


def test_a_secret_that_is_not_attached_is_told(platform, monkeypatch, capsys):
    def refuse():
        raise RuntimeError(f"no access: {'x' * 20}")

    monkeypatch.setitem(sys.modules, "kaggle_secrets", SimpleNamespace(UserSecretsClient=refuse))
    platform("kaggle")
    session.use_hub_token()
    assert capsys.readouterr().out.startswith("secret HF_TOKEN: not read (RuntimeError)\nHF_TOKEN: none")


@pytest.mark.parametrize(
    ("error", "token", "message"),
    [
        (GatedRepoError, "", "gated: accept its licence at https://huggingface.co/{}, and put a token .*"
         r"secret HF_TOKEN \(Add-ons > Secrets\)"),
        (GatedRepoError, "hf_x", "gated: accept its licence at https://huggingface.co/{} with the account"),
        (RepositoryNotFoundError, "", "https://huggingface.co/{} does not exist, or is private"),
    ],
)  # fmt: skip
def test_a_model_that_the_hub_does_not_give(error, token, message, platform, monkeypatch):
    asked = []

    def refuse(repository, token):
        asked.append((repository, token))
        raise error("", response=SimpleNamespace(headers={}, request=None, status_code=403))

    monkeypatch.setattr(huggingface_hub, "auth_check", refuse)
    platform("kaggle")
    monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(SessionError, match=message.format(MODEL)):
        session.check_model_access(f"{MODEL}@main")
    assert asked == [(MODEL, token or None)]
    session.check_model_access("toy")


@pytest.fixture
def hub(monkeypatch):
    """hub(status, **headers) -> a local server answers so in place of the hub."""
    answer: list = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            status, headers = answer[-1]
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()

        def log_message(self, *_):
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))  # seconds to notice the end
        thread.start()
        ask_at(monkeypatch, server.server_port)
        yield lambda status, **headers: answer.append((status, headers))
        server.shutdown()
        thread.join()


def ask_at(monkeypatch, port: int) -> None:
    """Let huggingface_hub ask a local server."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    api = huggingface_hub.HfApi(endpoint=f"http://127.0.0.1:{port}")
    monkeypatch.setattr(huggingface_hub, "auth_check", api.auth_check)


INVALID = r"^the secret HF_TOKEN \(Add-ons > Secrets\) is not valid"


@pytest.mark.parametrize(
    ("status", "headers", "message"),
    [
        (401, {"X_Error_Message": "Invalid credentials in Authorization header"}, INVALID),
        (401, {"X_Error_Message": 'User Access Token "x" is expired'}, INVALID),
        (401, {"X_Error_Code": "GatedRepo"}, INVALID),
        (403, {"X_Error_Message": "enable access"}, "refuses it .*enable access.*rights of the secret HF_T"),
        (403, {"X_Error_Code": "GatedRepo"}, "is gated: accept its licence at .* with the account of the"),
        (404, {"X_Error_Code": "RepoNotFound"}, "does not exist, or is private"),
        (429, {}, r"huggingface.co fails \(status 429\): wait"),
        (500, {}, r"huggingface.co fails \(status 500\): wait"),
        (418, {}, r"huggingface.co refuses it \(.*418"),
    ],
)
def test_each_answer_of_the_hub_is_one_line(status, headers, message, hub, platform, monkeypatch):
    platform("kaggle")
    monkeypatch.setenv("HF_TOKEN", "hf_x")
    hub(status, **headers)
    with pytest.raises(SessionError, match=message) as e:
        session.check_model_access(MODEL)
    assert "\n" not in str(e.value)
    hub(200)
    session.check_model_access(MODEL)


def test_without_a_token_401_means_that_there_is_no_such_model(hub, platform, monkeypatch):
    platform("kaggle")
    monkeypatch.setattr(huggingface_hub.utils._headers, "get_token", lambda: None)
    hub(401)
    with pytest.raises(SessionError, match="does not exist, or is private and needs the secret HF_TOKEN"):
        session.check_model_access(MODEL)


def test_no_connection_to_the_hub_is_one_line(platform, monkeypatch):
    platform("kaggle")
    with socket.socket() as unused:  # bound, but it does not listen
        unused.bind(("127.0.0.1", 0))
        ask_at(monkeypatch, unused.getsockname()[1])
        with pytest.raises(SessionError, match=r"no internet: huggingface.co .*refused.*Settings > Internet"):
            session.check_model_access(MODEL)


@pytest.mark.parametrize("token", ["hf_x y", "hf_x\nhf_y", "hf_ü"])
def test_a_token_that_no_header_can_hold_is_told(token, platform, monkeypatch):
    platform("kaggle")
    monkeypatch.setenv("HF_TOKEN", token)
    monkeypatch.setattr(huggingface_hub, "auth_check", None)
    with pytest.raises(SessionError, match=INVALID) as e:
        session.check_model_access(MODEL)
    assert token not in str(e.value)


def test_an_unknown_train_type_is_told():
    with pytest.raises(SessionError, match="TRAIN_TYPE = 'qdora': choose one of full, lora, "):
        run_options.method_options("qdora", 8, "quantized")


@pytest.fixture
def pip(tmp_path, monkeypatch):
    """pip(**versions) -> the constraint that pip gets; pip installs these versions, beside torch 2.10.0."""
    installed, constraints = {"torch": "2.10.0+cu128", "fastcore": "1.12.0"}, []
    (tmp_path / "requirements.txt").write_text("torch>=2.9\nfastcore>=1.12,<3 # a comment\nhqq>=0.2.8\n")
    monkeypatch.setattr(session, "ROOT", tmp_path)
    monkeypatch.setattr(session, "_installed", installed.get)

    def install(status: int = 0, **versions: str) -> list[str]:
        def stream(command, name):
            assert command[1:4] == ["-m", "pip", "install"]
            constraints.append(Path(command[command.index("-c") + 1]).read_text())
            installed.update(versions)
            if status:
                raise session.CommandFailed(f"{name} ended with exit status {status}")

        monkeypatch.setattr(session, "_stream", stream)
        session.install_requirements()
        return constraints

    return install


def test_only_what_is_missing_is_installed_and_torch_stays(pip, capsys):
    assert pip(hqq="0.2.8.post1") == ["torch==2.10.0+cu128\n"]
    assert pip() == ["torch==2.10.0+cu128\n"]  # not called a second time
    assert capsys.readouterr().out == "to install: hqq>=0.2.8\nall requirements are installed\n"


def test_another_torch_or_a_failure_of_pip_is_told(pip, platform, monkeypatch):
    platform("kaggle")
    monkeypatch.setattr(session.socket, "create_connection", lambda *_, **__: socket.socket())
    with pytest.raises(SessionError, match=r"^pip install ended with exit status 1$"):
        pip(status=1)
    disconnect(monkeypatch)
    with pytest.raises(SessionError, match=r"^pip install .* 1; no internet: pypi.org .*Settings > Internet"):
        pip(status=1)
    with pytest.raises(SessionError, match=r"replaced torch 2.10.0\+cu128 by 2.14.0, .*start a new session"):
        pip(torch="2.14.0")
