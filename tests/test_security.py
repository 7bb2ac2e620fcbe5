"""Read from its source what this program never does: unpickle, run a model's code, evaluate text.

Ranks of one run exchange objects through torch, which pickles them; those objects have no other source. Files
of a run hold no secrets of its environment.
"""

from __future__ import annotations

import ast

import pytest

from checkpoints.storage import MANIFEST
from tests.helpers.bad_rows import SECRETS
from tests.helpers.programs import ROOT

PEERS = ROOT / "benchmarks" / "peers"  # other programs' own loops, as their users run them
SOURCES = sorted(
    p
    for p in ROOT.rglob("*.py")
    if not any(part in ("tests", "runs") or part.startswith(".") for part in p.relative_to(ROOT).parts)
    and PEERS not in p.parents
)
UNPICKLERS = {"cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
KNOWN = {"torch", "torch.serialization", "pickle", "yaml", "os", "subprocess"}  # recognized by these names
EVALUATORS = {"eval", "exec", "compile", "__import__"}


def name_of(node: ast.AST) -> str:
    """Return a.b.c for a name or an attribute, "" for anything else."""
    if isinstance(node, ast.Attribute):
        return f"{name_of(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def renamed(node: ast.Import | ast.ImportFrom) -> list[str]:
    """Return imports that rename a module or a function, so that `faults` would not recognize its calls."""
    if isinstance(node, ast.ImportFrom):
        module = node.module or ""
        loads = module.partition(".")[0] in ("torch", "numpy") and any(a.name == "load" for a in node.names)
        return [f"from {module} import"] * (loads or module in ("pickle", "yaml"))
    return [f"import {a.name} as" for a in node.names if a.asname and a.name in KNOWN]


def faults(source: str) -> list[str]:
    """Return the forbidden imports and calls of a file, with their lines."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            modules = [a.name for a in node.names] + [getattr(node, "module", None) or ""]
            found += [f"{node.lineno}: import {m}" for m in modules if m.partition(".")[0] in UNPICKLERS]
            found += [f"{node.lineno}: {name}" for name in renamed(node)]
        if not isinstance(node, ast.Call):
            continue
        called = name_of(node.func)
        values = {k.arg: k.value.value if isinstance(k.value, ast.Constant) else ... for k in node.keywords}
        wrong = (
            (called.endswith(("torch.load", "serialization.load")) and values.get("weights_only") is not True)
            or (
                called.startswith("yaml.")
                and called.endswith(("load", "load_all"))
                and called != "yaml.safe_load"
            )
            or values.get("trust_remote_code", False) is not False
            or values.get("allow_pickle", False) is not False
            or values.get("shell", False) is not False
            or called in EVALUATORS
            or called in ("os.system", "os.popen")
            or (
                called.startswith("pickle.") and called != "pickle.dump"
            )  # torch's memory snapshots are pickles
        )
        # If it is missing, transformers and datasets take it from a file or the environment.
        wrong = wrong or (
            called.startswith("Auto")
            and called.endswith(".from_pretrained")
            and "trust_remote_code" not in values
        )
        if wrong:
            found.append(f"{node.lineno}: {called}")
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_the_source(path):
    assert faults(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "source",
    [
        "import torch\ntorch.load('x')",
        "torch.load('x', weights_only=False)",
        "torch.load('x', weights_only=flag)",
        "torch.serialization.load('x')",
        "from torch import load",
        "from torch.serialization import load",
        "import torch as t",
        "from pickle import loads",
        "import pickle as p",
        "from yaml import load",
        "pickle.loads(text)",
        "pickle.Unpickler(file)",
        "from joblib import load",
        "AutoModel.from_pretrained('x', trust_remote_code=True)",
        "AutoModel.from_pretrained('x', trust_remote_code=config.trust)",
        "AutoTokenizer.from_pretrained('x')",
        "numpy.load('x', allow_pickle=True)",
        "yaml.load(text)",
        "yaml.unsafe_load_all(text)",
        "subprocess.run('x', shell=True)",
        "eval('1')",
        "os.system('x')",
    ],
)
def test_each_of_these_would_be_found(source):
    assert len(faults(source)) == 1


def test_all_files_are_read():
    names = {path.name for path in SOURCES}
    assert {"train.py", "export.py", "output_folder.py", "lora.py", "make_checkpoint.py"} <= names


def test_secrets_are_in_no_file_of_a_run(ended):
    out, _, shown, errors = ended
    files = [path for path in out.rglob("*") if path.is_file()]
    assert {"config.yaml", "run.json", "report.html", "samples.jsonl"} <= {path.name for path in files}
    assert any(path.suffix == ".wandb" for path in files) and any(path.name == MANIFEST for path in files)
    texts = {str(path): path.read_bytes() for path in files} | {"output": (shown + errors).encode()}
    for secret in SECRETS.values():
        assert [name for name, text in texts.items() if secret.encode() in text] == []
