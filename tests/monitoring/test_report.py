"""report.html shows the values of the RUN's files, runs no code of their names, renders in a browser."""

from __future__ import annotations

import base64
import dataclasses
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
from jinja2 import UndefinedError

import monitoring.report
import report
import train
from benchmarks.make_checkpoint import byte_tokenizer
from data.row_text import RecordedRow, RowPart
from files.output_folder import clear_output
from monitoring.page import TEMPLATE_FOLDER, TEMPLATES, render
from monitoring.report_charts import downsample, log_axis, number, running_mean, step_axis, value_axis
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


def test_the_page_shows_the_values_of_the_files(tmp_path):
    steps = [metrics(i) for i in range(1, 11)]
    steps[3] |= {"eval_loss": 0.75, "eval_perplexity": 2.117}
    steps[9]["eval_loss"] = 0.9
    run = make_run(tmp_path / "run", steps, "--lr", "0.007", "--context_length", "20")
    page = page_of(run)
    for expected in ("Last loss 0.3000 3.0000 at the first step",
                     "Best validation loss 0.7500 perplexity 2.117, at step 4; last 0.9000",
                     "Training time 5.0 s 10 optimizer steps", "Speed 2,006", "Peak memory 1.25 GiB",
                     "Tokens 10,000 8 parameters trained", "Rows kept 4 ", "Rows dropped 7 ",
                     "7 4: no answer has any text to learn (rows 2, 4, 5, …)",
                     "3: the prompt fills --context_length (rows 3, 7, 10) Rows cut 1 (25.0%) at 20 tokens"
                     " 1: the end of an answer is beyond --context_length (row 11)",
                     "median 5, 95% up to 20, longest 20 tokens",
                     "lr 0.007 0.0002", "context_length 20 512",
                     f"torch {torch.__version__.split('+')[0]}"):  # fmt: skip
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
    # The table of changed options has neither defaults nor options that the header shows.
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


@pytest.mark.parametrize(
    ("losses", "expected"),
    [((100, 10, 1, 1), "linear"), ((1000, 1, 1, 1), "log"), ((4, 2, 0, 1), "none")],
)
def test_the_loss_has_a_log_scale_too(losses, expected, tmp_path):
    """The checkbox selects one of two figures; it is checked if a linear scale would show one value only."""
    page = page_of(make_run(tmp_path / "run", [metrics(i, loss=float(v)) for i, v in enumerate(losses, 1)]))
    boxes = [a for tag, a in page.tags if tag == "input"]
    figures = [c["series"][0]["points"] for c in page.charts if c["series"][0]["name"] == "training"]
    if expected == "none":  # 0 has no logarithm
        assert not boxes and len(figures) == 1
        return
    assert [("checked" in a, a["type"]) for a in boxes] == [(expected == "log", "checkbox")]
    ((_, _, top), (_, _, middle), (_, _, bottom), _), linear = figures[1], figures[0]
    assert [p[:2] for p in figures[1]] == [p[:2] for p in linear] and page.text.count("log scale") == 1
    if expected == "linear":
        assert middle - top == pytest.approx(bottom - middle, abs=0.11) and linear[2][2] - linear[1][2] < 30


def test_skipped_steps_and_odd_runs(tmp_path):
    """Steps that fp16 skipped have no norm, a loss may be NaN, a run may have one step or be writing a line.

    An older run has no run.json.
    """
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


def test_the_page_of_thousands_of_steps_is_small_and_keeps_outliers(tmp_path):
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
    argv = [
        "--model_name",
        HOSTILE,
        "--dataset",
        HOSTILE,
        "--output_dir",
        f"{HOSTILE}\udcff",
        "--name",
        HOSTILE,
    ]
    (run / "config.yaml").write_text(options.dump_yaml(parse(argv)[0]))
    (run / "samples.jsonl").write_text(json.dumps({"step": 0, "prompt": HOSTILE, "text": HOSTILE}) + "\n")
    facts = json.loads((run / "run.json").read_text())
    facts["hardware"]["device"] = facts["versions"]["torch"] = facts["versions"][HOSTILE] = HOSTILE
    (run / "run.json").write_text(json.dumps(facts))
    page = page_of(run)
    tags = [tag for tag, _ in page.tags]
    assert not {"img", "u"} & set(tags) and page.text.count(HOSTILE) >= 8
    assert [a.get("type") for tag, a in page.tags if tag == "script"] == ["application/json"] * 6 + [None]
    assert not [
        a for _, a in page.tags for name in a if name.startswith("on") or name in ("style", "src", "href")
    ]


def test_the_first_rows(tmp_path):
    """Learned and special tokens are marked; texts of the data run no code and lose no space."""
    run = make_run(tmp_path / "run", [metrics(1)])
    assert "First rows" not in page_of(run).text  # of a run of an earlier version
    parts = [RowPart("<s>", False, True), RowPart(f" Why?\n {HOSTILE}", False, False)]
    answer = [RowPart("So & <so>", True, False), RowPart("</s>", True, True)]
    rows = [
        RecordedRow(3, 1200, 7, parts, 176, answer),
        RecordedRow(4, 9, 1, [RowPart("ok", True, False)], set="b"),
    ]
    facts = json.loads((run / "run.json").read_text())
    facts["first_rows"] = [dataclasses.asdict(row) for row in rows]
    (run / "run.json").write_text(json.dumps(facts))
    page = page_of(run)
    text = html.unescape((run / "report.html").read_text(encoding="utf-8"))
    first, second = re.findall(r'<p class="text">(.*?)</p></div>', text.partition("First rows</h2>")[2], re.S)
    assert first == (
        f'<span class=" special"><s></span><span class=""> Why?\n {HOSTILE}</span>'
        '<span class="omitted"> … 176 tokens … </span>'
        '<span class="learned">So & <so></span><span class="learned special"></s></span>'
    )
    assert second == '<span class="learned">ok</span>'
    assert "Row 3: 1,200 tokens, 7 of them learned" in page.text and "Row 4 of b: 9 tokens" in page.text
    facts["first_rows"] = [{k: v for k, v in facts["first_rows"][0].items() if k != "set"}]
    (run / "run.json").write_text(json.dumps(facts))
    assert "Row 3: 1,200 tokens" in page_of(run).text, "of a run of an earlier version"
    assert not {"img", "s", "so"} & {tag for tag, _ in page.tags}


def test_templates_escape_every_value_and_require_it():
    """A missing value is an error; only the page's own style sheet and script are not escaped."""
    with pytest.raises(UndefinedError, match="'title' is undefined"):
        render("page.html.j2")
    assert "&lt;b&gt;" in TEMPLATES.from_string("{{ name }}").render(name="<b>")
    for name in TEMPLATES.list_templates(extensions=["j2"]):
        assert not re.search(r"\|\s*safe|autoescape", (TEMPLATE_FOLDER / name).read_text(encoding="utf-8"))


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


def test_the_next_evaluation_uses_held_out_rows_if_there_are_any(tmp_path):
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


ROW = {"number": 1, "tokens": 2, "learned": 1, "omitted": 0, "head": [], "tail": []}


@pytest.mark.parametrize(
    "section, name, value",
    [("data", "lengths", [1, None]), ("data", "lengths", []), ("data", "rows_kept", 0),
     ("data", "tokens", "9"), ("data", "length_width", [5]), ("data", "padding_share", math.inf),
     ("hardware", "device", {}), ("hardware", "ranks", None), ("versions", "torch", 2),
     ("model", "parameters_trained", -1), ("memory", "predicted_peak_gib", "9"),
     ("data", "drop_reasons", [{"reason": "x", "rows": "2", "first": [1]}]),
     ("data", "cut_reasons", [{"reason": "x", "rows": 2, "first": []}]), ("data", "cut_reasons", None),
     ("first_rows", 0, {"number": 1}), ("first_rows", 0, {**ROW, "head": [{"text": 1}]}),
     ("first_rows", 0, {**ROW, "tail": None}), ("first_rows", 0, {**ROW, "set": 1})],
)  # fmt: skip
def test_facts_that_no_run_writes(tmp_path, section, name, value):
    run = make_run(tmp_path / "run", [metrics(1)])
    facts = json.loads((run / "run.json").read_text())
    changes: tuple[dict, ...] = {section: [value]}, {section: {"0": value}}
    if section != "first_rows":
        changes = {section: facts[section] | {name: value}}, {section: [facts[section]]}
    for changed in changes:
        (run / "run.json").write_text(json.dumps(facts | changed))
        with pytest.raises(UserError, match=rf"run\.json: {section} is damaged: no run writes it so"):
            monitoring.report.write_report(run)


def test_folders_that_have_no_page(tmp_path, capsys):
    assert report.main([str(tmp_path)]) == 2
    assert re.fullmatch(r"error: .*no config\.yaml\)\n", capsys.readouterr().err)
    run = make_run(tmp_path / "run", [])
    with pytest.raises(UserError, match="no step yet"):
        monitoring.report.write_report(run)
    for line, problem in (("[]", "line 2: is not a JSON object"), ("{", "line 2: is not a"),
                          ('{"step": 2}', "loss is missing or has the wrong type"),
                          ('{"step": "2", "loss": 1}', "step is missing or has the wrong type")):  # fmt: skip
        (run / "metrics.jsonl").write_text(f"{json.dumps(metrics(1))}\n{line}\n")
        with pytest.raises(UserError, match=problem):
            monitoring.report.write_report(run)
    (run / "metrics.jsonl").write_text(f'{json.dumps(metrics(1))}\n\n{{"step": 2}}\n')
    with pytest.raises(
        UserError, match="line 3: loss is missing or has the wrong type"
    ):  # the blank line counts
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
    (run / "evaluation.json").write_text("{}")  # as in best/ of a run, which has no metrics.jsonl
    with pytest.raises(
        UserError, match=f"is a run's best/ folder; .* the run itself: {re.escape(str(tmp_path))}$"
    ):
        monitoring.report.write_report(run)
    assert not list(run.glob("report*"))


def test_the_arithmetic_of_the_charts():
    points = [(i, float(i % 10)) for i in range(1, 1001)]
    assert downsample(points, 600) == points
    few = downsample(points, 50)
    assert len(few) <= 102 and few[0] == points[0] and few[-1] == points[-1] and set(few) <= set(points)
    assert running_mean([(1, 2.0), (2, 4.0), (3, 9.0)], 2) == [(1, 2.0), (2, 3.0), (3, 6.5)]
    assert value_axis([0.0, 2.5]).ticks == [0, 1, 2, 3]
    assert value_axis([1.1, 1.2], with_zero=False).ticks == pytest.approx([1.1, 1.125, 1.15, 1.175, 1.2])
    assert value_axis([0.0]).ticks[0] == 0 and value_axis([-3.0, 1.0]).low <= -3
    wide = value_axis([1.0] * 50 + [1e6])
    assert wide.is_log and wide.low == 1 and wide.high == 1e6 and wide.share(1e3) == pytest.approx(0.5)
    assert log_axis([0.07, 3.0]).ticks == pytest.approx([0.05, 0.1, 0.2, 0.5, 1, 2, 5])
    assert [(a.low, a.high) for a in (log_axis([1.0]), log_axis([7.0]))] == [(1, 2), (5, 10)]
    assert step_axis(1, 285).ticks == [1, 100, 200, 285] and step_axis(7, 7).share(7) == 0.5
    assert step_axis(1, 2).ticks == [1, 2]
    assert [number(v) for v in (12.9641, 5677.2, 3e-4, 0)] == ["12.96", "5,677", "3.00e-4", "0"]


def test_a_real_run_writes_the_page(checkpoints, one_rank, tmp_path, monkeypatch, capsys):
    """The command makes the same page as the run. All commands on it and at the end of the run work."""
    data = tiny.write_alpaca(tmp_path / "some rows.jsonl", rows=3)
    argv = ["--model_name", checkpoints(), "--dataset", data, "--output_dir", tmp_path / "run",
             "--max_steps", "3", "--lora_rank", "8", "--world_size", "1"]  # fmt: skip
    job = train.check_run(parse(list(map(str, argv)))[0])
    printed = one_rank(full_run, job)[0]
    page = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    learned = "".join(
        re.findall(r'<span class="learned(?: special)?">(.*?)</span>', page.partition("Row 1:")[2])
    )
    ids = job.rows.tokens[job.rows.learned]
    assert html.unescape(learned) == byte_tokenizer().decode(ids)  # of all three rows
    assert "report.html" in printed and f"Rows kept {len(job.rows):,}" in Page(page).text
    (tmp_path / "run" / "report.html").unlink()
    assert report.main([str(tmp_path / "run")]) == 0
    assert (tmp_path / "run" / "report.html").read_text(encoding="utf-8") == page
    assert {p.name for p in (tmp_path / "run").glob("*.tmp")} == set()
    commands = [shlex.split(c) for c in re.findall(r"<pre>(.*?)</pre>", html.unescape(page))]
    commands += [shlex.split(c) for c in re.findall(r"^(?:next|try): (.*)$", printed, re.MULTILINE)]
    monkeypatch.setattr(sys, "stdin", io.StringIO("Say red.\n"))
    names = [run_command(*command) for command in commands]
    assert names == ["generate", "evaluate", "export", "train", "report", "train", "generate"]
    assert "perplexity" in capsys.readouterr().out
    clear_output(tmp_path / "run")
    assert not list((tmp_path / "run").iterdir())


def run_command(python: str, script: str, *options: str) -> str:
    """Run a command in this process and return its name; train.py only until it would start processes."""
    name = script.removesuffix(".py")
    if name == "train":
        train.check_run(parse(list(options))[0])
    else:
        assert importlib.import_module(name).main(list(options)) == 0
    return name


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium")
def test_a_browser_shows_the_page_light_and_dark(tmp_path):
    """Each scheme has its own colours, which the browser only uses if the policy allows the style sheet."""
    from matplotlib.image import imread

    run = make_run(tmp_path / "run", [metrics(i) for i in range(1, 60)])
    monitoring.report.write_report(run)
    screenshots = [screenshot(run / "report.html", tmp_path, scheme) for scheme in (1, 0)]
    light, dark = (imread(picture)[..., :3] for picture, _ in screenshots)
    for _, document in screenshots:  # the script ran: each of the six charts has its crosshair
        assert document.count('class="cross"') == 6
    assert light.shape == dark.shape == (1400, 1000, 3)
    assert light.mean() > 0.85 and dark.mean() < 0.2
    for picture, line in ((light, (0x25, 0x63, 0xC4)), (dark, (0x6E, 0xA8, 0xFF))):
        levels = (picture * 255).round().astype(int)
        assert len({tuple(c) for c in levels.reshape(-1, 3)}) > 50  # text, smoothed at its edges
        curve = (abs(levels - list(line)).max(axis=-1) <= 3).nonzero()
        assert curve[1].max() - curve[1].min() > 700 and len(curve[0]) > 500  # from side to side
