"""The processes of a run: under torchrun, killed, failing, and stopped by signals."""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import psutil
import pytest
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, Std
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

import train
from checkpoints.storage import find_newest_checkpoint
from launch import processes as launch
from launch import torchrun
from options.errors import UserError
from options.train import parse
from tests.helpers.distributed import process_context
from tests.helpers.programs import (
    ROOT,
    losses,
    metrics,
    ranks_of,
    run,
    run_here,
    small,
    start,
    started_by,
    wait_for,
    wait_for_steps,
)
from tests.helpers.resuming import fill
from tests.helpers.runs import full_run
from tests.helpers.trials import main_with_limit


@pytest.fixture(scope="module")
def losses_of_two(checkpoints, short_rows, two_ranks, tmp_path_factory) -> list[float]:
    """Losses of the run `small` in two ranks of the test pool."""
    out = tmp_path_factory.mktemp("two") / "out"
    config, _ = parse(list(map(str, small(checkpoints, short_rows, out, "--world_size", "2"))))
    two_ranks(full_run, train.check_run(config))
    return losses(out)


@pytest.fixture
def agent():
    """agent(argv, log folder) -> exit statuses of train.py in two ranks under torchrun's own agent.

    main: what the ranks run.

    The ranks are forks of the tests' server. torchrun, and each of its ranks, would spend ten seconds on
    imports.
    """

    def run_agent(argv: list[str], logs: Path, main=train.main) -> dict[int, int]:
        process_context()
        specs = DefaultLogsSpecs(log_dir=str(logs), redirects=Std.ALL)
        where = {"rdzv_backend": "c10d", "rdzv_endpoint": "localhost:0", "run_id": "test"}
        config = LaunchConfig(1, 1, 2, **where, logs_specs=specs, max_restarts=0, start_method="forkserver")
        return elastic_launch(config, main)(argv)

    signals = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
    before = [signal.getsignal(each) for each in signals]
    yield run_agent
    for each, handler in zip(signals, before, strict=True):
        signal.signal(each, handler)


def test_torchruns_agent_gives_the_same_run(checkpoints, short_rows, tmp_path, losses_of_two, agent):
    args = small(checkpoints, short_rows, tmp_path / "out", "--log_to", "stdout", "--world_size", "2")
    assert agent(list(map(str, args)), tmp_path / "logs") == {0: 0, 1: 0}
    (shown,) = (tmp_path / "logs").rglob("0/stdout.log")
    assert "step 4/4: loss" in shown.read_text()
    assert losses(tmp_path / "out") == losses_of_two


@pytest.mark.slow
def test_torchruns_ranks_find_a_batch_together(checkpoints, short_rows, tmp_path, losses_of_two, agent):
    """Each starts a rank of the trials. One rank is out of memory; torchrun's store ends the other."""
    args = small(checkpoints, short_rows, tmp_path / "out", "--log_to", "stdout", "--world_size", "2")
    args += ["--batch_size", "auto", "--effective_batch_size", "4"]
    one_row_fits = ["100", *map(str, args)]
    assert agent(one_row_fits, tmp_path / "logs", main_with_limit) == {0: 0, 1: 0}
    (shown,) = (tmp_path / "logs").rglob("0/stdout.log")
    assert (
        "--batch_size auto: 1 (tried: 2 does not fit, 1 fits), at most 8 without a GPU; a step has 4 rows"
        in shown.read_text()
    )
    assert losses(tmp_path / "out") == pytest.approx(losses_of_two, rel=1e-5)  # of batches of two rows


@pytest.mark.slow
def test_torchrun_gives_the_same_run(checkpoints, short_rows, tmp_path, losses_of_two):
    args = small(checkpoints, short_rows, tmp_path / "out", "--log_to", "stdout", "--world_size", "2")
    out = run(args, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    assert "step 4/4: loss" in out
    assert losses(tmp_path / "out") == losses_of_two


@pytest.mark.slow
def test_torchrun_reports_bad_input_once(checkpoints, short_rows, tmp_path):
    args = small(checkpoints, short_rows, tmp_path / "out", "--lora_target_modules", "nothing")
    process = start(args, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    _, err = process.communicate(timeout=120)
    assert process.returncode != 0 and err.count("error: --lora_target_modules") == 1
    assert not (tmp_path / "out").exists()


def test_a_killed_rank_ends_the_others_with_its_name(checkpoints, short_rows, tmp_path, processes, capsys):
    path, killed = tmp_path / "out" / "metrics.jsonl", []

    def kill_one():
        deadline = time.time() + 90
        while time.time() < deadline and not (path.exists() and path.read_text().count("\n") >= 2):
            time.sleep(0.1)
        killed.append(time.time())
        processes[1].kill()

    thread = threading.Thread(target=kill_one, daemon=True)
    thread.start()
    args = small(checkpoints, short_rows, tmp_path / "out", "--world_size", "2")
    status = train.main([*map(str, args), "--max_steps", "100000", "--num_epochs", "100000"])
    assert time.time() - killed[0] < 30
    assert status == 1 and "error: rank 1 was ended by SIGKILL" in capsys.readouterr().err.splitlines()[-1]
    assert len(metrics(tmp_path / "out")) >= 2 and not any(p.is_alive() for p in processes)


def fail_on_a_full_disk(rank_info, stderr: Path) -> None:
    os.dup2(os.open(stderr, os.O_WRONLY | os.O_CREAT), 2)
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_rank_prints_its_error_if_it_cannot_write_its_report(
    processes, small_disk, monkeypatch, tmp_path, capfd
):
    """Temporary files are on the full disk."""
    monkeypatch.setattr(tempfile, "tempdir", str(small_disk))

    def start(*args):
        fill(small_disk)
        return start_ranks(*args)

    start_ranks = launch._start_ranks
    monkeypatch.setattr(launch, "_start_ranks", start)
    stderr = tmp_path / "stderr"
    status = launch.start(fail_on_a_full_disk, 1, (stderr,), "localhost", None)
    assert status == 2 and capfd.readouterr().err == ""
    assert stderr.read_text() == "error: rank 0: OSError: [Errno 28] No space left on device\n"


def cannot_save(rank_info, launcher: int) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    os.kill(launcher, signal.SIGTERM)
    time.sleep(0.5)
    raise UserError("stopped at step 3, which is not saved")


def test_the_error_of_a_rank_that_stops_but_cannot_save_is_printed(processes, capfd):
    status, err = launch.start(cannot_save, 1, (os.getpid(),), "localhost", None), capfd.readouterr().err
    assert (status, err) == (2, "error: rank 0: stopped at step 3, which is not saved\n")


def raises_in_its_third_step(rank_info, job) -> None:
    original, calls = train.loss_sum, itertools.count(1)

    def loss_sum(*args):
        if next(calls) == 3 and rank_info.rank == 1:
            raise RuntimeError("the disk of rank 1 is on fire")
        return original(*args)

    train.loss_sum = loss_sum
    train.run_rank(rank_info, job)


def test_a_rank_that_raises_ends_the_others_with_its_message(
    checkpoints, short_rows, tmp_path, losses_of_two, processes, monkeypatch, capsys
):
    args = small(checkpoints, short_rows, tmp_path / "out", "--world_size", "2")
    monkeypatch.setattr(train, "run_rank", raises_in_its_third_step)
    begun = time.time()
    assert train.main(list(map(str, args))) == 1
    err = capsys.readouterr().err
    assert err.splitlines()[-1] == "error: rank 1: RuntimeError: the disk of rank 1 is on fire"
    assert losses(tmp_path / "out") == losses_of_two[:1], (
        "both ranks were training until then; the second step was not logged yet"
    )
    assert time.time() - begun < 90 and not any(p.is_alive() for p in processes)


@pytest.mark.slow
def test_ranks_do_not_outlive_a_killed_parent(checkpoints, short_rows, tmp_path):
    """One rank, before training, in a background job of a shell.

    torch would send its ranks SIGINT. A background job ignores it, and a training rank takes it for a
    request. With several ranks the end of one would end the others.
    """
    args = small(checkpoints, short_rows, tmp_path / "out", "--world_size", "1")
    args += ["--max_steps", "100000", "--num_epochs", "100000"]
    previous = signal.signal(signal.SIGINT, signal.SIG_IGN)
    process = start(args)
    signal.signal(signal.SIGINT, previous)
    assert any(line.startswith("data: ") for line in process.stdout), process.stderr.read()
    ranks, server = ranks_of(process), started_by("forkserver", process)
    process.kill()
    _, alive = psutil.wait_procs([*ranks, *server], timeout=15)
    for each in alive:
        each.kill()
    assert len(ranks) == 1 and not alive


def test_signals_save_and_stop(checkpoints, short_rows, tmp_path, processes):
    """SIGUSR1 to the program: a checkpoint, and training goes on. Then Ctrl-C: a checkpoint, and the end.

    A terminal sends Ctrl-C to the whole process group.
    """
    out, killer = tmp_path / "out", threading.Timer(90, lambda: [process.kill() for process in processes])
    args = small(checkpoints, short_rows, out, "--max_steps", "100000", "--num_epochs", "100000")

    def wait_until(condition):
        while killer.is_alive() and not (value := condition()):
            time.sleep(0.05)
        return value

    def send_both():
        wait_until(lambda: (out / "metrics.jsonl").exists() and len(losses(out)) >= 2)
        os.kill(os.getpid(), signal.SIGUSR1)
        saved = wait_until(lambda: list(out.glob("checkpoints/step-????????/manifest.json")))
        steps = len(losses(out))
        wait_until(lambda: len(losses(out)) > steps)
        sent.extend(path.parent.name for path in saved)
        for number in (os.getpid(), *(process.pid for process in processes)):
            os.kill(number, signal.SIGINT)

    sent: list[str] = []
    killer.start()
    threading.Thread(target=send_both, daemon=True).start()
    status, shown, err = run_here(args)
    killer.cancel()
    assert status == 0 and "Traceback" not in err
    step = len(losses(out))
    assert f"stopped at step {step} of 100000 (SIGINT); resume with:" in shown
    assert len(sent) == 1 and {p.name for p in out.glob("checkpoints/*")} == {sent[0], f"step-{step:08d}"}
    assert processes and not any(process.is_alive() for process in processes)


@pytest.mark.slow
def test_the_program_saves_and_stops_on_signals(checkpoints, short_rows, tmp_path):
    """The same of the program as users start it."""
    out = tmp_path / "out"
    args = small(checkpoints, short_rows, out, "--max_steps", "100000", "--num_epochs", "100000")
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
    process = start(args)
    signal.signal(signal.SIGINT, previous)
    wait_for_steps(process, out / "metrics.jsonl")
    process.send_signal(signal.SIGUSR1)
    (saved,) = wait_for(lambda: list(out.glob("checkpoints/step-????????/manifest.json")), process)
    steps = len(losses(out))
    wait_for(lambda: len(losses(out)) > steps, process)
    ranks = ranks_of(process)
    for each in (process, *ranks):
        each.send_signal(signal.SIGINT)
    timer = threading.Timer(40, process.kill)
    timer.start()
    shown, err = process.communicate()
    timer.cancel()
    assert process.returncode == 0 and "Traceback" not in err
    step = len(losses(out))
    assert f"stopped at step {step} of 100000 (SIGINT); resume with:" in shown
    assert {p.name for p in out.glob("checkpoints/*")} == {saved.parent.name, f"step-{step:08d}"}
    assert not any(r.is_running() and r.status() != psutil.STATUS_ZOMBIE for r in ranks)


@pytest.mark.parametrize(
    "stage, ended",
    [
        ("checks", (-signal.SIGINT, "")),
        pytest.param("starts its ranks", (128 + signal.SIGINT, "ended by SIGINT\n"), marks=pytest.mark.slow),
    ],
)
def test_ctrl_c_before_training_leaves_no_traceback(
    stage, ended, checkpoints, short_rows, tmp_path, monkeypatch
):
    """Ctrl-C from a terminal goes to the program and to ranks that may still be importing modules.

    During the checks the signal itself ends the program. Later the program ends by itself and leaves nothing
    behind.
    """
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    process = start_in_a_terminal(small(checkpoints, short_rows, tmp_path / "out", "--world_size", "1"))
    if stage == "checks":  # or later imports, after those that are needed to read options
        wait_for(lambda: "torch" in Path(f"/proc/{process.pid}/maps").read_text(), process)
    else:
        wait_for(lambda: started_by("forkserver", process) or ranks_of(process), process)
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == ended and not list(tmp_path.iterdir())
    wait_for_end_of(process.pid)


def wait_for_end_of(group: int, seconds: float = 15) -> None:
    """Wait until all processes of a process group have ended; fail if they do not."""
    deadline = time.time() + seconds
    with contextlib.suppress(ProcessLookupError):
        while time.time() < deadline:
            os.killpg(group, 0)
            time.sleep(0.1)
        pytest.fail("processes are left")


def start_in_a_terminal(args) -> subprocess.Popen:
    """Start train.py in its own process group, with SIGINT not ignored (a shell's `&` jobs ignore it)."""
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    command = [sys.executable, str(ROOT / "train.py"), *map(str, args)]
    try:
        return subprocess.Popen(
            command,
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
    finally:
        signal.signal(signal.SIGINT, previous)


def sleeps_in_its_third_step(rank_info, job) -> None:
    original, calls = train.loss_sum, itertools.count(1)

    def loss_sum(*args):
        if next(calls) == 3:
            time.sleep(100)
        return original(*args)

    train.loss_sum = loss_sum
    train.run_rank(rank_info, job)


def test_a_second_signal_ends_a_step_that_does_not(
    checkpoints, short_rows, tmp_path, processes, monkeypatch, capfd
):
    """The first signal waits for the end of the step, the second ends it. Complete checkpoints are left."""
    out, running, ended = tmp_path / "out", [], []
    args = small(checkpoints, short_rows, out, "--save_every", "1", "--max_steps", "9", "--num_epochs", "9")
    saved = out / "checkpoints" / "step-00000002" / "manifest.json"

    def stop_twice():
        deadline = time.time() + 90
        while not saved.exists():
            if time.time() > deadline:
                return
            time.sleep(0.1)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(1.5)
        running.extend(p.is_alive() for p in processes)
        ended.append(time.time())
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(train, "run_rank", sleeps_in_its_third_step)
    threading.Thread(target=stop_twice, daemon=True).start()
    status = train.main(list(map(str, args)))
    assert running == [True, True], "they wait for the step"
    assert time.time() - ended[0] < 20 and not any(p.is_alive() for p in processes)
    assert status == 128 + signal.SIGTERM and capfd.readouterr().err.endswith("ended by SIGTERM\n")
    assert find_newest_checkpoint(out, pytest.fail).step == 2


def agent_with_one_rank(pipe) -> None:
    """Act as torchrun's agent: fork a rank, which watches this process, and sleep."""
    if os.fork() == 0:
        threading.Thread(target=torchrun._exit_with_agent, args=(os.getppid(),), daemon=True).start()
        pipe.send("ready")
        time.sleep(100)
        os._exit(0)
    pipe.close()
    time.sleep(100)


def test_ranks_do_not_outlive_an_agent_that_is_killed():
    """If torchrun were started again, they would write into the same folder as the new ranks."""
    ours, theirs = process_context().Pipe(duplex=False)
    agent = process_context().Process(target=agent_with_one_rank, args=(theirs,))
    agent.start()
    theirs.close()
    assert ours.recv() == "ready"
    assert not ours.poll(1.5)
    agent.kill()
    assert ours.poll(10)
    with pytest.raises(EOFError):
        ours.recv()
