"""plan.py as users start it: a model of 70B on a CPU, in seconds and without its weights."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from importlib import metadata

import pytest
from transformers.utils import import_utils

from tests.helpers.programs import ROOT

SECONDS, MIB = 5.0, 1024
BEYOND_IMPORTS = 2.0  # seconds
MAIN = ast.parse((ROOT / "plan.py").read_text()).body[-1]
# Runs a command, then prints the CPU seconds and the largest resident size, in MiB, that it took.
MEASURE = """
import resource, subprocess, sys
done = subprocess.run(sys.argv[1:], capture_output=True, text=True)
used = resource.getrusage(resource.RUSAGE_CHILDREN)
print(done.stdout, done.stderr, used.ru_utime + used.ru_stime, used.ru_maxrss / 1024, sep="\\0")
"""


def blocked() -> set[str]:
    """Return the names of packages that plan.py leaves out."""
    return {key.value for node in ast.walk(MAIN) if isinstance(node, ast.Dict) for key in node.keys}


def measure(*words: str) -> tuple[str, float, float]:
    """Return (what Python prints with these words, CPU seconds, MiB)."""
    command = [sys.executable, "-c", MEASURE, sys.executable, *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100, check=True)
    out, err, seconds, mib = done.stdout.split("\0")
    assert err == ""
    return out, float(seconds), float(mib)


def checked_plan(*words: str) -> tuple[dict, float]:
    """Return (the plan of a model of 70B by Python with these words, CPU seconds), and check its memory."""
    options = "--model_name 70b --gpus 2 --gib 24 --train_type bnb_dora --json".split()
    out, seconds, mib = measure(*words, *options)
    plan = json.loads(out)
    assert {"fits", "peak_gib", "host_gib", "phases"} <= plan.keys()
    assert mib < MIB
    return plan, seconds


# Imports torch and transformers' code of models, without the packages that plan.py leaves out. Then runs
# plan.py, and adds the CPU seconds since the imports to its result.
BEYOND = """
import contextlib, gc, io, json, runpy, sys, time
gc.disable()
sys.modules.update(dict.fromkeys({blocked}))
import torch, transformers.modeling_utils
start, out = time.process_time(), io.StringIO()
sys.argv[0] = "plan.py"
try:
    with contextlib.redirect_stdout(out):
        runpy.run_path("plan.py", run_name="__main__")
except SystemExit as end:
    assert not end.code
print(json.dumps(json.loads(out.getvalue()) | {{"seconds": time.process_time() - start}}))
"""


def test_70b_takes_little_time_and_memory():
    """CPU time, since tests share the machine. Other programs slow that too.

    So the imports are not counted, and the best of three counts.
    """
    taken = []
    while not taken or (min(taken) >= BEYOND_IMPORTS and len(taken) < 3):
        taken.append(checked_plan("-c", BEYOND.format(blocked=blocked()))[0]["seconds"])
    assert min(taken) < BEYOND_IMPORTS, taken


@pytest.mark.slow
@pytest.mark.parametrize("context", [["--context_length=4096"], []])
def test_70b_takes_seconds(context):
    taken = []
    while not taken or (min(taken) >= SECONDS and len(taken) < 5):
        taken.append(checked_plan("plan.py", *context)[1])
    assert min(taken) < SECONDS, taken


def test_no_package_needs_what_plan_leaves_out():
    """transformers 5.17 imports an installed scikit-learn at once, which fails without scipy."""
    left_out = {"scikit-learn" if name == "sklearn" else name for name in blocked()}
    assert "scipy" in left_out
    for package in metadata.distributions():
        needs = {re.match(r"[\w.-]+", r)[0].lower() for r in package.requires or () if "extra ==" not in r}
        name = "sklearn" if package.name == "scikit-learn" else package.name.lower()
        is_imported = name not in blocked() and hasattr(import_utils, f"is_{name}_available")
        assert not (is_imported and needs & left_out), package.name
