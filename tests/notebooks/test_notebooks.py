"""The two notebooks: what tools/make_notebooks.py makes, and the commands that their cells run."""

from __future__ import annotations

import ast
import importlib
import json
import os
import re
import subprocess
import sys

import nbformat
import papermill
import pytest
import run_folders
import session

from options import evaluate, export, generate
from options.methods import METHODS
from options.train import parse as parse_train_options
from tests.helpers.programs import ROOT
from tools.make_notebooks import COLAB, FOLDER, KAGGLE, METADATA, make_notebook

NOTEBOOKS = tuple(METADATA)
T4 = ("Tesla T4, 15360 MiB", 7.5)
COMMANDS = {"generate.py": generate.COMMAND, "export.py": export.COMMAND, "evaluate.py": evaluate.COMMAND}


def code_cells(name: str) -> dict[str, str]:
    """Return {id: source} of a notebook's code cells."""
    cells = json.loads(make_notebook(name))["cells"]
    return {cell["id"]: "".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"}


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_is_what_the_script_makes(name):
    text = (FOLDER / f"{name}.ipynb").read_text(encoding="utf-8")
    assert text == make_notebook(name), "run: python -m tools.make_notebooks"
    notebook = nbformat.reads(text, as_version=nbformat.NO_CONVERT)
    nbformat.validate(notebook)
    assert (notebook.nbformat, notebook.nbformat_minor) == (4, 5)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert code and all(cell.outputs == [] and cell.execution_count is None for cell in code)


def test_the_metadata_choose_the_machine():
    kaggle, colab = (json.loads(make_notebook(name))["metadata"] for name in (KAGGLE, COLAB))
    assert kaggle["kaggle"]["accelerator"] == "nvidiaTeslaT4" and kaggle["kaggle"]["isInternetEnabled"]
    assert colab["accelerator"] == "GPU" and colab["colab"]["gpuType"] == "T4"


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_papermill_reads_every_parameter(name):
    assigned = [node.targets[0].id for node in ast.parse(code_cells(name)["parameters"]).body]
    assert list(papermill.inspect_notebook(FOLDER / f"{name}.ipynb")) == assigned and len(assigned) > 15


@pytest.fixture
def commands(monkeypatch):
    """commands(notebook, gpus, parameter=value ...) -> the command lines that its cells run.

    The session has these GPUs, the hub answers, and every run ends with a result.
    """

    def collect(name: str, gpus: int, result: bool = True, **values) -> list[list[str]]:
        ran: list[list[str]] = []
        monkeypatch.setattr(session, "run", lambda argv: ran.append([str(word) for word in argv]))
        monkeypatch.setattr(session, "list_gpus", lambda: [T4] * gpus)
        for function in ("use_caches", "check_internet", "check_room", "install_requirements",
                         "use_hub_token", "check_model_access"):  # fmt: skip
            monkeypatch.setattr(session, function, lambda *_: None)
        monkeypatch.setattr(run_folders, "compare_losses", lambda *_: ran.append(["compared"]))
        monkeypatch.setattr(run_folders, "show_run", lambda *_: None)
        monkeypatch.setattr(run_folders, "has_result", lambda _: result)
        cells, variables = code_cells(name), {}
        for cell, source in cells.items():
            if cell not in ("fetch-code", "drive"):
                exec(source, variables)
            if cell == "parameters":
                assert values.keys() <= variables.keys()
                variables |= {**values, "STARTED": 0.0, "os": os}
        return ran

    return collect


def option(argv: list[str], name: str) -> str:
    return argv[argv.index(name) + 1]


@pytest.mark.parametrize("name", NOTEBOOKS)
@pytest.mark.parametrize("gpus", [1, 2])
def test_every_command_is_one_that_its_program_takes(name, gpus, commands):
    ran = commands(name, gpus, PUSH_TO="me/adapter")
    programs = [argv[0] for argv in ran]
    compared = ["train.py", "train.py", "compared"] if (name, gpus) == (KAGGLE, 2) else []
    assert programs == [*compared, "train.py", "generate.py", "export.py"]
    for program, *argv in ran:
        if program == "train.py":
            config, _ = parse_train_options(argv)
            rows = config.world_size * config.batch_size * config.gradient_accumulation_steps
            assert rows == 8 and config.log_to == "stdout"  # a progress bar would bloat the saved notebook
        elif program != "compared":
            COMMANDS[program].read(argv)
    train = [argv for argv in ran if argv[0] == "train.py"][-1]
    assert option(train, "--resume") == "auto" and option(train, "--max_minutes") == "1.0"
    assert option(ran[-1], "--push_to_hub") == "me/adapter"


@pytest.mark.parametrize("train_type", METHODS)
def test_the_options_fit_every_train_type(train_type, commands, tmp_path):
    method = METHODS[train_type]
    (tmp_path / ("adapter_model.safetensors" if method.adapter else "config.json")).touch()
    *_, train, _, export_command = commands(KAGGLE, 1, TRAIN_TYPE=train_type, OUTPUT=str(tmp_path))
    config, _ = parse_train_options(train[1:])
    assert config.train_type == train_type
    assert config.lora_rank == (64 if method.adapter else None)
    to = "adapter" if method.adapter else "merged"
    assert (
        export.COMMAND.read(export_command[1:])["to"] == to == option(export_command, "--out").split("-")[-1]
    )


def test_the_compared_runs_differ_only_in_their_processes(commands):
    one, two = ([*argv] for argv in commands(KAGGLE, 2)[:2])
    differing = {one[i - 1] for i, (a, b) in enumerate(zip(one, two, strict=True)) if a != b}
    assert differing == {"--world_size", "--gradient_accumulation_steps", "--output_dir"}


def test_values_that_change_what_is_run(commands, tmp_path):
    assert ["compared"] not in commands(KAGGLE, 2, PARITY_STEPS=0)
    assert not any("--push_to_hub" in argv for argv in commands(KAGGLE, 2))
    assert {argv[0] for argv in commands(COLAB, 1, result=False)} == {"train.py"}
    train = commands(COLAB, 1, MAX_MINUTES=0)[0]
    assert option(train, "--max_minutes") == "0"


@pytest.fixture
def fetch(tmp_path, monkeypatch):
    """fetch(REPO, notebook) -> the folder of the code, as the cell that fetches it leaves it."""

    def run_cell(repository, name: str = KAGGLE) -> str:
        variables = {"REPO": str(repository), "CODE": str(tmp_path / "code"), "__name__": "__main__"}
        monkeypatch.setattr(sys, "path", [*sys.path])
        monkeypatch.setattr(sys, "modules", {**sys.modules})
        exec(code_cells(name)["fetch-code"], variables)
        return variables["CODE"]

    return run_cell


def test_code_from_a_git_url_or_an_attached_folder(fetch, tmp_path):
    source = tmp_path / "source"
    (source / "notebooks").mkdir(parents=True)
    (source / "train.py").write_text("")
    (source / ".venv").mkdir()
    half = tmp_path / "code.tmp"  # an interrupted copy
    half.mkdir()
    (half / "rubbish").touch()
    copied = tmp_path / "code"
    assert fetch(source) == str(copied)
    names = [".fetched_from", "notebooks", "train.py"]
    assert sorted(path.name for path in copied.iterdir()) == names and not half.exists()
    (copied / "train.py").unlink()
    fetch(source)  # it is there already
    assert not (copied / "train.py").exists()

    git = ["git", "-C", str(source), "-c", "user.name=a", "-c", "user.email=a@b.c"]
    for words in (["init", "-q"], ["add", "train.py"], ["commit", "-qm", "Add code"]):
        subprocess.run([*git, *words], check=True)
    fetch(f"file://{source}")  # another REPO replaces the code
    assert (copied / "train.py").is_file() and not (copied / "notebooks").exists()
    with pytest.raises(Exception, match="no code from REPO"):
        fetch(tmp_path / "none")
    assert (copied / "train.py").is_file()
    fetch(source)
    assert (copied / "notebooks").is_dir()


def test_another_repo_replaces_the_modules_too(fetch, tmp_path):
    for name in ("one", "two"):
        (tmp_path / name / "notebooks").mkdir(parents=True)
        (tmp_path / name / "train.py").touch()
        (tmp_path / name / "notebooks" / "session.py").write_text(f"NAME = '{name}'")
        fetch(tmp_path / name)
        module = importlib.import_module("session")
        assert vars(module)["NAME"] == name


def test_a_folder_of_the_users_is_not_replaced(fetch, tmp_path):
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "mine").touch()
    with pytest.raises(Exception, match="code: is a folder of yours; choose the name of a new one"):
        fetch(ROOT)
    assert (tmp_path / "code" / "mine").exists()


@pytest.mark.parametrize(
    ("name", "advice"),
    [
        (KAGGLE, "turn on Settings > Internet, and run all cells again"),
        (COLAB, "start a new session if this one has no internet"),
    ],
)
def test_code_that_is_not_there_is_told_in_one_line(name, advice, fetch, tmp_path, capfd):
    missing = tmp_path / "none"
    reason = f"fatal: repository '{missing}' does not exist"
    line = f"no code from REPO = {missing} ({reason}): correct it, or {advice}"
    with pytest.raises(Exception, match=re.escape(line)) as e:
        fetch(missing, name)
    assert not (tmp_path / "code").exists() and capfd.readouterr() == ("", "")
    assert str(e.value) == line

    source = f"REPO, CODE = {str(missing)!r}, {str(tmp_path / 'code')!r}\n{code_cells(name)['fetch-code']}"
    shell = [sys.executable, "-m", "IPython", "--colors=NoColor", "-c", source]
    shown = subprocess.run(
        shell, capture_output=True, text=True, env=os.environ | {"IPYTHONDIR": str(tmp_path)}
    )
    assert shown.stdout + shown.stderr == f"NoCode: {line}\n"


def test_the_defaults_need_no_longer_than_kaggle_gives():
    """12 hours and 19.5 GB."""
    values = {}
    exec(code_cells(KAGGLE)["parameters"], values)
    assert (
        values["MAX_MINUTES"] <= 690
        and values["NEEDED_GB"] < 19.5
        and values["OUTPUT"].startswith("/kaggle/working/")
    )
    assert values["DATASET"] in {path.stem for path in (ROOT / "datasets").glob("*.toml")}
