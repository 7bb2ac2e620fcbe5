"""report.html says what the RUN's files say, runs nothing that a name in them says, and can be seen."""

from __future__ import annotations

import base64
import hashlib
import html
import importlib
import io
import json
import math
import re
import shlex
import sys

import pytest
import torch

import monitoring.report
import report
import train
from files.output_folder import clear_output
from monitoring.report_charts import downsample, number, running_mean, step_axis, value_axis
from options import config as options
from options.errors import UserError
from options.train import parse
from tests.helpers import tiny
from tests.helpers.report_pages import (
    CHROMIUM,
    HOSTILE,
    Page,
    make_run,
    metrics,
    page_of,
    screenshot,
    small_rows,
)
from tests.helpers.runs import full_run


def test_it_shows_what_the_files_say(tmp_path):
    steps = [metrics(i) for i in range(1, 11)]
    steps[3]["eval_loss"], steps[9]["eval_loss"] = 0.75, 0.9
    run = make_run(tmp_path / "run", steps, "--lr", "0.007", "--context_length", "20")
    page = page_of(run)
    for expected in ("Last loss 0.3000 3.0000 at the first step", "Validation loss 0.9000 best 0.7500 at step 4",
                     "Training time 5.0 s 10 optimizer steps", "Speed 2,006", "Peak memory 1.25 GiB",
                     "Tokens 10,000 8 parameters trained", "Rows kept 4 ", "Rows dropped 7 ",
                     "Rows cut 1 (25.0%) at 20 tokens", "median 5, 95% up to 20, longest 20 tokens",
                     "lr 0.007 0.0002", "context_length 20 512", f"torch {torch.__version__.split('+')[0]}"):  # fmt: skip
        assert expected in page.text, expected
    rows = small_rows()
    assert f"Learned tokens {rows.targets().sum()} (" in page.text
    by_name = {s["name"]: [p[:2] for p in s["points"]] for chart in page.charts for s in chart["series"]}
    assert by_name == {
        "training": [[s["step"], pytest.approx(s["loss"], rel=1e-4)] for s in steps],
        "validation": [[4, 0.75], [10, 0.9]],
        "learning rate": [[s["step"], pytest.approx(s["lr"])] for s in steps],
        "norm": [[s["step"], s["grad_norm"]] for s in steps],
        "speed": [[s["step"], s["tokens_per_second"]] for s in steps],
        "allocated": [[s["step"], 1.25] for s in steps],
        "reserved": [[s["step"], 1.5] for s in steps],
    }
    # The bars: 3, 5, 5 and 20 tokens, one token wide.
    heights = [float(a["height"]) for tag, a in page.tags if tag == "rect"]
    assert len(heights) == 20 and heights[4] == 2 * heights[2] == 2 * heights[19] > 0
    assert sum(h > 0 for h in heights) == 3
    # Options that have their default stand among all options only; what the header says, nowhere else.
    changed = page.text.partition("All options")[0].partition("Option This run Default")[2].split()
    assert [w for w in changed if w in options.FIELDS] == ["context_length", "lr"]


def test_the_curve_is_drawn_where_the_values_are(tmp_path):
    page = page_of(
        make_run(tmp_path / "run", [metrics(i, loss=float(v)) for i, v in ((1, 4), (2, 2), (3, 0))])
    )
    line = next(a["d"] for tag, a in page.tags if tag == "path" and a["class"] == "line main")
    points = [tuple(map(float, p.split(","))) for p in line[1:].split("L")]
    assert [x for x, _ in points] == [0, 500, 1000]
    assert points[0][1] < points[1][1] < points[2][1]
    assert points[1][1] == pytest.approx((points[0][1] + points[2][1]) / 2, abs=0.06)


def test_skipped_steps_and_odd_runs(tmp_path):
    """fp16's skipped steps have no norm; a loss may be no number; one step is a run as well; the run may still
    be writing; an older one has no run.json."""
    steps = [metrics(i) for i in range(1, 5)]
    steps[1]["grad_norm"], steps[3]["loss"] = None, None
    steps[1]["bad_steps"] = steps[2]["bad_steps"] = 1
    steps[3]["bad_steps"] = 2
    run = make_run(tmp_path / "run", steps)
    page = page_of(run)
    norms = next(s for c in page.charts for s in c["series"] if s["name"] == "norm")
    assert [p[0] for p in norms["points"]] == [1, 3, 4] and "Last loss not finite" in page.text
    assert "4 optimizer steps, 2 skipped as NaN or infinite" in page.text
    assert "skipped as" not in page_of(make_run(tmp_path / "good", [metrics(1)])).text
    with (run / "metrics.jsonl").open("a") as f:
        f.write('{"step": 5, "lo')
    assert "4 optimizer steps" in page_of(run).text
    (run / "run.json").unlink()
    assert "recorded nothing about its data" in page_of(run).text
    for name, lines in (("one", [metrics(1)]), ("nan", [metrics(1, loss=None, grad_norm=None, lr=0.0)])):
        assert page_of(make_run(tmp_path / name, lines)).charts


def test_thousands_of_steps_stay_small_and_keep_what_stands_out(tmp_path):
    steps = [metrics(i, grad_norm=9.0 if i == 7777 else 1.0 + i % 7 / 10) for i in range(1, 20_001)]
    run = make_run(tmp_path / "run", steps)
    page = page_of(run)
    assert (run / "report.html").stat().st_size < 250_000
    for chart in page.charts:
        for series in chart["series"]:
            points = [p[0] for p in series["points"]]
            assert points == sorted(points) and (points[0], points[-1]) == (1, 20_000) and len(points) < 510
    norms = next(s["points"] for c in page.charts for s in c["series"] if s["name"] == "norm")
    assert [7777, 9.0] in [p[:2] for p in norms]


def test_samples_before_and_after(tmp_path):
    run = make_run(tmp_path / "run", [metrics(1)])
    lines = [
        (20, "Why?", "Because.\nSo."),
        (0, "Why?", "why why"),
        (10, "Why?", "half"),
        (20, "New?", "x" * 9000),
    ]
    (run / "samples.jsonl").write_text(
        "".join(json.dumps(dict(zip(("step", "prompt", "text"), line, strict=True))) + "\n" for line in lines)
    )
    page = page_of(run)
    assert "Why? Before training why why After step 20 Because. So. New? After step 20 xxx" in page.text
    assert "half" not in page.text and max(map(len, page.texts)) < 5000


def test_hostile_names_stay_text(tmp_path):
    run = make_run(tmp_path / "<u>run&", [metrics(1)])
    given = [
        "--model_name",
        HOSTILE,
        "--dataset",
        HOSTILE,
        "--output_dir",
        f"{HOSTILE}\udcff",
        "--name",
        HOSTILE,
    ]
    (run / "config.yaml").write_text(options.dump_yaml(parse(given)[0]))
    (run / "samples.jsonl").write_text(json.dumps({"step": 0, "prompt": HOSTILE, "text": HOSTILE}) + "\n")
    facts = json.loads((run / "run.json").read_text())
    facts["hardware"]["device"] = facts["versions"]["torch"] = HOSTILE
    (run / "run.json").write_text(json.dumps(facts))
    page = page_of(run)
    tags = [tag for tag, _ in page.tags]
    assert not {"img", "u"} & set(tags) and page.text.count(HOSTILE) >= 8
    assert [a.get("type") for tag, a in page.tags if tag == "script"] == ["application/json"] * 5 + [None]
    assert not [
        a for _, a in page.tags for name in a if name.startswith("on") or name in ("style", "src", "href")
    ]


def test_the_policy_allows_the_page_itself_and_nothing_else(tmp_path):
    page = page_of(make_run(tmp_path / "run", [metrics(1)]))
    text = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    policy = next(a["content"] for tag, a in page.tags if a.get("http-equiv") == "Content-Security-Policy")
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    assert rules["default-src"] == "'none'" and "unsafe" not in policy and "http" not in policy
    for tag, rule in (("style", "style-src"), ("script", "script-src")):
        inner = re.findall(rf"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
        digests = [base64.b64encode(hashlib.sha256(t.encode()).digest()).decode() for t in inner]
        assert [f"'sha256-{d}'" for d in digests] == [rules[rule]]
    assert "http" not in text.replace("http-equiv", "").replace("http://www.w3.org/2000/svg", "")


def test_the_next_measurement_is_not_of_what_was_learned(tmp_path):
    for name, *more in (["all"], ["split", "--eval_share", "0.1"]):
        run = make_run(tmp_path / name, [metrics(1)], "--train_type", "full", *more)
        (run / "config.json").write_text("{}")
        text = page_of(run).text
        assert f"evaluate.py {run}" in text
        assert (f"evaluate.py {run} --dataset rows.jsonl --samples 200" in text) == (name == "all")


def test_the_next_commands(tmp_path):
    run = make_run(tmp_path / "a run", [metrics(1)], "--train_type", "full")
    assert "transformers serve" not in page_of(run).text
    (run / "config.json").write_text("{}")
    text = page_of(run).text
    assert f"transformers serve '{run}'" in text and f"report.py '{run}'" in text
    assert f"train.py --config '{run}/config.yaml' --output_dir '{run}-again'" in text
    assert "export.py" not in text
    for name in ("adapter_model.safetensors", "new_blocks.safetensors"):
        run = make_run(tmp_path / name, [metrics(1)])
        assert "generate.py" not in page_of(run).text
        (run / name).touch()
        for script in ("generate.py", "evaluate.py", "export.py"):
            assert f"{script} {run}" in page_of(run).text


@pytest.mark.parametrize(
    "part, name, value",
    [("data", "lengths", [1, None]), ("data", "lengths", []), ("data", "rows_kept", 0), ("data", "tokens", "9"),
     ("data", "length_width", [5]), ("data", "padding_share", math.inf), ("hardware", "device", {}),
     ("hardware", "ranks", None), ("versions", "torch", 2), ("model", "parameters_trained", -1)],
)  # fmt: skip
def test_facts_that_no_run_writes(tmp_path, part, name, value):
    run = make_run(tmp_path / "run", [metrics(1)])
    facts = json.loads((run / "run.json").read_text())
    for changed in ({part: facts[part] | {name: value}}, {part: [facts[part]]}):
        (run / "run.json").write_text(json.dumps(facts | changed))
        with pytest.raises(UserError, match=rf"run\.json: {part} is not as a run writes it"):
            monitoring.report.write_report(run)


def test_folders_that_have_no_page(tmp_path, capsys):
    assert report.main([str(tmp_path)]) == 2
    assert re.fullmatch(r"error: .*no config\.yaml\)\n", capsys.readouterr().err)
    run = make_run(tmp_path / "run", [])
    with pytest.raises(UserError, match="no step yet"):
        monitoring.report.write_report(run)
    for line, problem in (("[]", "line 2: is not a JSON object"), ("{", "line 2: is not a"), ('{"step": 2}', "no loss"),
                          ('{"step": "2", "loss": 1}', "no step")):  # fmt: skip
        (run / "metrics.jsonl").write_text(f"{json.dumps(metrics(1))}\n{line}\n")
        with pytest.raises(UserError, match=problem):
            monitoring.report.write_report(run)
    (run / "metrics.jsonl").write_bytes(b"\xff\n")
    with pytest.raises(UserError, match="not a UTF-8 text"):
        monitoring.report.write_report(run)
    (run / "metrics.jsonl").write_text(json.dumps(metrics(1)) + "\n")
    (run / "run.json").write_text("{")
    with pytest.raises(UserError, match=r"run\.json: is not a JSON object"):
        monitoring.report.write_report(run)
    (run / "run.json").unlink()
    (run / "metrics.jsonl").unlink()
    (run / "evaluation.json").write_text("{}")  # best/ of a run, which holds no curves
    with pytest.raises(UserError, match=f"best step of a run; .* whole one: {re.escape(str(tmp_path))}$"):
        monitoring.report.write_report(run)
    assert not list(run.glob("report*"))


def test_the_arithmetic_of_the_charts():
    points = [(i, float(i % 10)) for i in range(1, 1001)]
    assert downsample(points, 600) == points
    few = downsample(points, 50)
    assert len(few) <= 102 and few[0] == points[0] and few[-1] == points[-1] and set(few) <= set(points)
    assert running_mean([(1, 2.0), (2, 4.0), (3, 9.0)], 2) == [(1, 2.0), (2, 3.0), (3, 6.5)]
    assert value_axis([0.0, 2.5]).ticks == [0, 1, 2, 3]
    assert value_axis([1.1, 1.2], zero=False).ticks == pytest.approx([1.1, 1.125, 1.15, 1.175, 1.2])
    assert value_axis([0.0]).ticks[0] == 0 and value_axis([-3.0, 1.0]).low <= -3
    wide = value_axis([1.0] * 50 + [1e6])
    assert wide.log and wide.low == 1 and wide.high == 1e6 and wide.share(1e3) == pytest.approx(0.5)
    assert step_axis(1, 285).ticks == [1, 100, 200, 285] and step_axis(7, 7).share(7) == 0.5
    assert step_axis(1, 2).ticks == [1, 2]
    assert [number(v) for v in (12.9641, 5677.2, 3e-4, 0)] == ["12.96", "5,677", "3.00e-4", "0"]


def test_a_real_run_leaves_the_page(checkpoints, one_rank, tmp_path, monkeypatch, capsys):
    """run_rank itself: run.json from the start, the page at the end, and the same page from the command. All
    commands on it, and in the lines at the end of the run, work as they stand."""
    data = tiny.write_alpaca(tmp_path / "some rows.jsonl", rows=3)
    given = ["--model_name", checkpoints(), "--dataset", data, "--output_dir", tmp_path / "run",
             "--max_steps", "3", "--lora_rank", "8", "--world_size", "1"]  # fmt: skip
    job = train.check_run(parse(list(map(str, given)))[0])
    shown = one_rank(full_run, job)[0]
    made = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert "report.html" in shown and f"Rows kept {len(job.rows):,}" in Page(made).text
    (tmp_path / "run" / "report.html").unlink()
    assert report.main([str(tmp_path / "run")]) == 0
    assert (tmp_path / "run" / "report.html").read_text(encoding="utf-8") == made
    assert {p.name for p in (tmp_path / "run").glob("*.tmp")} == set()
    typed = [shlex.split(c) for c in re.findall(r"<pre>(.*?)</pre>", html.unescape(made))]
    typed += [shlex.split(c) for c in re.findall(r"^(?:next|try): (.*)$", shown, re.MULTILINE)]
    monkeypatch.setattr(sys, "stdin", io.StringIO("Say red.\n"))
    done = [run_typed(*command) for command in typed]
    assert done == ["generate", "evaluate", "export", "train", "report", "train", "generate"]
    assert "perplexity" in capsys.readouterr().out
    clear_output(tmp_path / "run")
    assert not list((tmp_path / "run").iterdir())


def run_typed(python: str, script: str, *options: str) -> str:
    """A command that was shown, in this process; of train.py, up to the start of its processes."""
    name = script.removesuffix(".py")
    if name == "train":
        train.check_run(parse(list(options))[0])
    else:
        assert importlib.import_module(name).main(list(options)) == 0
    return name


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium")
def test_it_can_be_seen_in_a_browser_light_and_dark(tmp_path):
    """Each scheme's own background and colour of curves, which only a style sheet that the policy lets pass gives."""
    from matplotlib.image import imread

    run = make_run(tmp_path / "run", [metrics(i) for i in range(1, 60)])
    monitoring.report.write_report(run)
    shown = [screenshot(run / "report.html", tmp_path, scheme) for scheme in (1, 0)]
    light, dark = (imread(picture)[..., :3] for picture, _ in shown)
    for _, document in shown:  # the script ran, too: each of the five charts got its crosshair
        assert document.count('class="cross"') == 5
    assert light.shape == dark.shape == (1400, 1000, 3)
    assert light.mean() > 0.85 and dark.mean() < 0.2
    for picture, line in ((light, (0x25, 0x63, 0xC4)), (dark, (0x6E, 0xA8, 0xFF))):
        levels = (picture * 255).round().astype(int)
        assert len({tuple(c) for c in levels.reshape(-1, 3)}) > 50  # text, smoothed at its edges
        curve = (abs(levels - list(line)).max(axis=-1) <= 3).nonzero()
        assert curve[1].max() - curve[1].min() > 700 and len(curve[0]) > 500  # from side to side
