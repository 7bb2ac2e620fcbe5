"""A session on Kaggle or Colab: its machine, packages, token, and the commands that cells run.

The cells of kaggle_2xT4.ipynb and colab.ipynb call this module, run_options.py and run_folders.py, so that no
logic is hidden in a notebook's JSON. They insert this folder into sys.path, and then `import session`.
Importing needs only Python's standard library, because the requirements are installed later. torch is never
imported: the notebook's own process must hold no GPU memory while train.py runs.
"""

from __future__ import annotations

import contextlib
import csv
import importlib.metadata
import math
import os
import platform
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
GB = 10**9
HUB, PACKAGE_INDEX, HTTPS = "huggingface.co", "pypi.org", 443
TOKEN = "HF_TOKEN"  # environment variable, and the name of Kaggle's and Colab's secret
OLDEST_GPU = 7.5  # compute capability: T4
# Lines come at once. Progress bars would be saved in the notebook, each state of them as a line.
CHILD_ENVIRONMENT = {
    "PYTHONUNBUFFERED": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
}


class SessionError(Exception):
    """A problem that the user can solve. The notebook shows its message alone, without a traceback."""

    def _render_traceback_(self) -> list[str]:
        return [f"{type(self).__name__}: {self}"]


class CommandFailed(SessionError):
    """A command ended with another exit status than 0."""


class Interrupted(SessionError):
    """The user interrupted a cell, and its command has ended."""


def on_kaggle() -> bool:
    """Return whether this is Kaggle."""
    return "KAGGLE_KERNEL_RUN_TYPE" in os.environ


def on_colab() -> bool:
    """Return whether this is Colab."""
    return "COLAB_RELEASE_TAG" in os.environ


def read_whole_number(parameter: str, value: object, least: int, alternative: str = "") -> int:
    """Return the value of a parameter as an int. Raises SessionError unless it is one, at least `least`.

    alternative: another value that is allowed, for the message.
    """
    try:
        number = int(str(value))
    except ValueError:
        number = least - 1
    if number < least:
        allowed = f"a whole number, at least {least}" + f", or {alternative}" * bool(alternative)
        raise SessionError(f"{parameter} = {value!r}: has to be {allowed}")
    return number


# Commands


def run(argv: list) -> None:
    """Run a command of this repository, such as ["train.py", "--max_steps", 3], and print its lines.

    An interrupt of the cell is sent to the command as SIGINT, and this function waits until the command has
    ended: train.py finishes its step and saves a checkpoint. A second interrupt ends it at once. The command
    gets its own process group: Jupyter interrupts the kernel's whole group, and a second SIGINT, if late,
    would count as a second interrupt. If the kernel dies, the command ends when it prints its next line.

    Raises CommandFailed with the exit status and the command's last error line, and Interrupted.
    """
    script, *options = map(str, argv)
    _stream([sys.executable, str(ROOT / script), *options], script)


def _stream(command: list[str], name: str) -> None:
    """Run a command as `run` does. name: of the command, for messages."""
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=os.environ | CHILD_ENVIRONMENT,
        encoding="utf-8",
        errors="replace",
        start_new_session=True,
    )
    error, interrupts = "", 0
    while True:
        try:
            for line in process.stdout or ():
                print(line, end="", flush=True)
                error = line.strip() if line.startswith("error: ") else error
            status = process.wait()
            break
        except KeyboardInterrupt:
            interrupts += 1
            process.send_signal(signal.SIGINT)
            print(f"\ninterrupted: waiting for {name} to end", flush=True)
    if interrupts:
        raise Interrupted(f"{name} was interrupted and ended with exit status {status}")
    if status:
        raise CommandFailed(f"{name} ended with exit status {status}" + f": {error}" * bool(error))


# The machine


def list_gpus() -> list[tuple[str, float]]:
    """Return (name and memory, compute capability) of each NVIDIA GPU, as nvidia-smi reports them.

    The capability is NaN if nvidia-smi does not know it ("[N/A]").
    """
    query = ["nvidia-smi", "--query-gpu=name,memory.total,compute_cap", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):  # no driver
        return []
    rows = [[cell.strip() for cell in row] for row in csv.reader(done.stdout.splitlines())]
    if done.returncode:
        return []
    return [(f"{row[0]}, {row[1]}", _read_capability(row[2])) for row in rows if len(row) == 3]


def _read_capability(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


def describe_machine(*folders: str) -> None:
    """Print Python, torch, GPUs, CPUs, memory, and the room in folders."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    print(f"Python {platform.python_version()}, torch {_installed('torch') or 'not installed'}")
    print("GPUs:", "; ".join(name for name, _ in list_gpus()) or "none")
    print(f"{len(os.sched_getaffinity(0))} CPUs, {memory / GB:.1f} GB of memory")
    for folder in (*folders, "/dev/shm"):
        if os.path.isdir(folder):
            usage = shutil.disk_usage(folder)
            print(f"{folder}: {usage.free / GB:.1f} of {usage.total / GB:.1f} GB free")


def choose_world_size(gpus: str | int, wanted: int) -> int:
    """Return the number of processes: all GPUs for "auto", else the number that is given.

    A line says if there are fewer GPUs than `wanted`. Raises SessionError for another value, and if "auto"
    finds no GPU, or one that is older than a T4.
    """
    if gpus != "auto":
        return read_whole_number("GPUS", gpus, 1, '"auto"')
    switch = "Settings > Accelerator > GPU T4 x2"
    if on_colab():
        switch = "Runtime > Change runtime type > T4 GPU"
    found = list_gpus()
    if not found:
        raise SessionError(f"this session has no GPU: choose {switch}, and run all cells again")
    for name, capability in found:
        if capability < OLDEST_GPU:
            raise SessionError(f"{name}: is older than a T4; choose {switch}, and run all cells again")
    if len(found) < wanted:
        print(
            f"{len(found)} GPU instead of {wanted} ({found[0][0]}): the run goes on with it. A step keeps its"
            f" rows, and takes about {wanted / len(found):.0f} times as long."
        )
    return len(found)


def check_room(folder: str, needed_gb: float) -> None:
    """Raise SessionError, which names what takes most, if a folder's disk has less than `needed_gb` free."""
    place = Path(folder).absolute()
    while not place.is_dir():
        place = place.parent
    free = shutil.disk_usage(place).free / GB
    if free >= needed_gb:
        return
    sizes = sorted(((_folder_bytes(path), path.name) for path in place.iterdir()), reverse=True)
    largest = ", ".join(f"{name} ({size / GB:.1f} GB)" for size, name in sizes[:3])
    raise SessionError(
        f"{place} has {free:.1f} GB free, and {needed_gb:.1f} are needed: remove what you do not need there"
        f" (largest: {largest or 'nothing'}). Nothing was changed."
    )


def _folder_bytes(path: Path) -> int:
    """Return the bytes of a file, or of all files in a folder. Files that vanish meanwhile do not count."""
    inside = [os.path.join(folder, name) for folder, _, names in os.walk(path) for name in names]
    total = 0
    for file in inside if path.is_dir() else [path]:
        with contextlib.suppress(OSError):
            total += os.lstat(file).st_size
    return total


# Code, hub and token


def install_requirements() -> None:
    """Install what requirements.txt asks for and the session lacks, and never another torch.

    Raises SessionError if that fails, or if torch changed in spite of the constraint.
    """
    file, torch = ROOT / "requirements.txt", _installed("torch")
    missing = _missing_requirements(file)
    if not missing:
        print("all requirements are installed")
        return
    print("to install:", ", ".join(missing))
    with tempfile.TemporaryDirectory() as folder:
        constraint = Path(folder, "constraint.txt")
        constraint.write_text(f"torch=={torch}\n" if torch else "", encoding="utf-8")
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--progress-bar", "off"]
        try:
            _stream([*pip, "-r", str(file), "-c", str(constraint)], "pip install")
        except CommandFailed as e:
            offline = _connection_error(PACKAGE_INDEX)
            raise SessionError(
                f"{e}; {_no_internet(PACKAGE_INDEX, offline)}" if offline else str(e)
            ) from None
    if torch and _installed("torch") != torch:
        raise SessionError(
            f"pip replaced torch {torch} by {_installed('torch')}, which may not fit this machine's driver:"
            " start a new session"
        )


def _missing_requirements(file: Path) -> list[str]:
    """Return the lines of a requirements file that no installed package satisfies."""
    from packaging.requirements import Requirement

    lines = (line.partition("#")[0].strip() for line in file.read_text(encoding="utf-8").splitlines())
    requirements = [Requirement(line) for line in lines if line]
    wanted = [r for r in requirements if r.marker is None or r.marker.evaluate()]
    return [
        str(r)
        for r in wanted
        if (version := _installed(r.name)) is None or not r.specifier.contains(version, prereleases=True)
    ]


def _installed(package: str) -> str | None:
    """Return the version of an installed package, None without it."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def use_caches(folder: str) -> None:
    """Keep downloaded models and data in `folder`, because the working folder is small."""
    os.environ["HF_HOME"] = str(Path(folder, "huggingface"))


def is_hub_name(name: str) -> bool:
    """Return whether a value of MODEL or DATASET is downloaded: no path, and not part of the program."""
    return name not in ("toy", "toy_vision", "dummy") and not os.path.exists(os.path.expanduser(name))


def check_internet(model: str, dataset: str) -> None:
    """Raise SessionError, which names the switch, if MODEL or DATASET needs the hub and it cannot be reached.

    Raises SessionError, too, if one of them is a path and nothing is there.
    """
    _check_path("MODEL", model, "folder")
    _check_path("DATASET", dataset, "file or folder")
    if (is_hub_name(model) or is_hub_name(dataset)) and (error := _connection_error(HUB)):
        raise SessionError(_no_internet(HUB, error))


def _check_path(parameter: str, value: str, kind: str) -> None:
    """Raise SessionError if a value is a path, as train.py tells paths from hub ids, and nothing is there."""
    is_path = value.startswith(("/", ".", "~")) or value.partition("@")[0].count("/") > 1
    if is_path and is_hub_name(value):
        raise no_such_path(parameter, value, kind)


def no_such_path(parameter: str, value: str, kind: str) -> SessionError:
    """Return the error for a path that does not exist. It lists the nearest folder above, unless that is /.

    kind: what is missing, for the message.
    """
    above = Path(value).expanduser().absolute().parent
    while not above.is_dir():
        above = above.parent
    message = f"{parameter} = {value}: no such {kind}"
    if above != above.parent and os.access(above, os.R_OK):
        names = sorted(path.name for path in above.iterdir() if not path.name.startswith("."))
        message += f"; {above} has: {', '.join(names[:20]) or 'nothing'}" + ", ..." * (len(names) > 20)
    return SessionError(message)


def _connection_error(host: str) -> OSError | None:
    """Return why a host cannot be reached, None if it can."""
    try:
        socket.create_connection((host, HTTPS), timeout=10).close()
    except OSError as e:
        return e
    return None


def _no_internet(host: str, reason: object) -> str:
    """Return the line for a host that cannot be reached. It names the switch, which only Kaggle has."""
    advice = "; turn on Settings > Internet, and run all cells again" if on_kaggle() else ""
    return f"no internet: {host} cannot be reached ({reason}){advice}"


def use_hub_token() -> None:
    """Set HF_TOKEN from Kaggle's or Colab's secret of that name, unless it is set; never print it."""
    if not os.environ.get(TOKEN) and (token := _read_secret()):
        os.environ[TOKEN] = token.strip()  # of the line break that was pasted with it
    print(f"{TOKEN}: {'found' if os.environ.get(TOKEN) else 'none; models without a licence need none'}")


def _read_secret() -> str | None:
    """Return Kaggle's or Colab's secret HF_TOKEN, None without it."""
    try:
        if on_kaggle():
            from kaggle_secrets import UserSecretsClient

            return UserSecretsClient().get_secret(TOKEN)
        if on_colab():
            from google.colab import userdata

            return userdata.get(TOKEN)
    # These services' errors have no common base, and other names in other versions. Each of them means that
    # the secret is missing or not attached, which check_model_access tells if the model needs it.
    except Exception as e:
        print(f"secret {TOKEN}: not read ({type(e).__name__})")
    return None


def check_model_access(model: str) -> None:
    """Raise SessionError, which names the model's page and the secret, if the hub does not give the model."""
    _check_path("MODEL", model, "folder")
    if not is_hub_name(model):
        return
    from huggingface_hub import auth_check
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    token = os.environ.get(TOKEN, "").strip()
    if token and not re.fullmatch("[!-~]+", token):  # an HTTP header cannot hold it
        raise SessionError(f"the {_secret()} is not valid: it holds spaces, or other characters than ASCII")
    try:
        auth_check(model.partition("@")[0], token=token or None)
    except HFValidationError:
        raise SessionError(f"MODEL = {model}: is no hub id (owner/name), and no such folder") from None
    except HfHubHTTPError as e:
        raise SessionError(_describe_refusal(model, e, bool(token))) from None
    # A broken connection raises the base class, which is the HTTP client's: httpx.HTTPError or httpx2's.
    except (OSError, *HfHubHTTPError.__bases__) as e:  # type: ignore[misc]
        raise SessionError(f"{model}: {_no_internet(HUB, _first_line(e))}") from None


def _secret() -> str:
    menu = "the key symbol at the left" if on_colab() else "Add-ons > Secrets"
    return f"secret {TOKEN} ({menu})"


def _describe_refusal(model: str, error, has_token: bool) -> str:
    """Return the line for a HfHubHTTPError. has_token: whether a token was sent."""
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    status, secret = error.response.status_code, _secret()
    page = f"https://{HUB}/{model.partition('@')[0]}"
    # The hub answers 401, too, if there is no token and the model is gated, private, or does not exist.
    if status == 401 and has_token:
        return f"the {secret} is not valid: make a new token, and put it there"
    if isinstance(error, GatedRepoError):
        account = f" with the account of the {secret}"
        if not has_token:
            account = f", and put a token of that account into the {secret}"
        return f"{model} is gated: accept its licence at {page}{account}"
    if isinstance(error, RepositoryNotFoundError) or status == 401:
        return f"{model}: {page} does not exist, or is private and needs the {secret}"
    if status == 429 or status >= 500:
        return f"{model}: {HUB} fails (status {status}): wait some minutes, and run this cell again"
    return f"{model}: {HUB} refuses it ({_first_line(error)}): check MODEL, and the rights of the {secret}"


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__
