"""compare.html shows several runs with the values of their files, and draws them where these values are."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from itertools import accumulate
from pathlib import Path

import pytest
import torch

import report
from monitoring.comparison import short_names
from monitoring.report_charts import running_mean
from monitoring.run_curves import MAX_ROWS, PLOTS, WINDOWS, make_curves
from tests.helpers.browser import open_browser
from tests.helpers.pictures import draw
from tests.helpers.report_pages import CHROMIUM, HOSTILE, Page, make_run, metrics, small_rows

EVALUATED = ("--eval_share", "0.1", "--eval_every", "5")


def other_rows():
    """Return rows of the same lengths with other tokens."""
    return dataclasses.replace(small_rows(), tokens=torch.full((33,), 2, dtype=torch.int32))


def make_steps(count: int, scale: float, *, evaluate_every: int = 5) -> list[dict]:
    """Return lines of metrics.jsonl whose evaluation loss is lowest at half of the steps."""
    steps = [
        metrics(i, loss=scale * (1 + 3 / i), tokens=1000 + i, step_seconds=0.5 + i / 50)
        for i in range(1, count + 1)
    ]
    for i in range(evaluate_every, count + 1, evaluate_every):
        steps[i - 1]["eval_loss"] = scale + abs(i / count - 0.5)
    return steps


def compare(folder: Path, *runs: Path, more: tuple = ()) -> Page:
    """Write a page of the runs, and parse it."""
    assert report.main([*map(str, runs), "--out", str(folder / "page.html"), *more]) == 0
    return Page((folder / "page.html").read_text(encoding="utf-8"))


@pytest.fixture
def runs(tmp_path) -> list[Path]:
    """Two runs on the same rows; the second is better, and its best step is not the last."""
    one = make_run(tmp_path / "one", make_steps(20, 2.0), *EVALUATED, evaluation=small_rows())
    two = make_run(tmp_path / "two", make_steps(30, 1.5), *EVALUATED, "--lr", "2e-3", evaluation=small_rows())
    (two / "best").mkdir()
    (two / "best" / "evaluation.json").write_text('{"step": 15, "eval_loss": 1.5}')
    for folder in (two, two / "best"):
        (folder / "adapter_model.safetensors").touch()
    return [one, two]


def test_references_that_differ_are_shown_with_their_runs(runs, tmp_path):
    for run, reference in zip(runs, ("Red.", "Blue."), strict=True):
        line = {"step": 20, "prompt": "Why?", "text": "So.", "reference": reference}
        (run / "samples.jsonl").write_text(json.dumps(line) + "\n")
    assert "Reference one: Red. two: Blue." in compare(tmp_path, *runs).text


def test_evaluations_that_are_not_finite_are_shown(tmp_path):
    """On both pages: the last one, and all of them."""
    last, every = make_steps(20, 2.0), make_steps(20, 2.0)
    last[-1]["eval_loss"] = None  # as metrics.jsonl has NaN
    every = [step | ({"eval_loss": None} if "eval_loss" in step else {}) for step in every]
    one, two = make_run(tmp_path / "one", last), make_run(tmp_path / "two", every)
    page = compare(tmp_path, one, two)
    assert "one 2.0000 step 10 not finite 2.3000" in page.text
    assert "two not finite not finite 2.3000" in page.text
    for run, words in ((one, "at step 10; last not finite"), (two, "not finite at no step a number")):
        assert report.main([str(run)]) == 0
        assert words in Page((run / "report.html").read_text(encoding="utf-8")).text


def test_the_page_shows_the_values_of_the_files(runs, tmp_path, capsys):
    page = compare(tmp_path, *runs)
    assert capsys.readouterr() == (f"{tmp_path}/page.html\n", ""), "the data are the same"
    assert "one 2.0000 step 10 2.5000 2.3000 20 20,210 14.2 s 2,011 1.25 two" in page.text
    assert "two 1.5000 step 15, the lowest, in best/ 2.0000 1.6500 30 30,465 24.3 s 2,016 1.25" in page.text
    # Defaults count: the first run was not given the default, 2e-4, and config.yaml has it.
    assert "Option one two lr 0.0002 0.002 Samples" in page.text
    assert "With two, which has the lowest evaluation loss." in page.text
    assert f"Ask the base model and the best step, 15 (evaluation loss 1.5000) {runs[1]}/best" in re.sub(
        r"\S+ \S*generate\.py ", "", page.text
    )
    assert f"report.py {runs[0]} {runs[1]} --out {tmp_path}/page.html" in page.text
    (data,) = page.charts
    assert [run["name"] for run in data["runs"]] == ["one", "two"]
    for run, folder in zip(data["runs"], runs, strict=True):
        steps = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        totals = [[*accumulate(step[name] for step in steps)] for name in ("tokens", "step_seconds")]
        for plot in PLOTS:
            expected = [
                [
                    step["step"],
                    tokens,
                    pytest.approx(seconds, abs=1e-3),
                    1,
                    pytest.approx(step[plot.column], rel=1e-5),
                ]
                for step, tokens, seconds in zip(steps, *totals, strict=True)
                if plot.column in step
            ]
            assert run["curves"].get(plot.column, []) == expected
            assert len(expected) in ((0,) if plot.column == "router_aux_loss" else (4, 6, 20, 30))


def test_a_long_run_keeps_its_outliers_and_its_mean():
    steps = [metrics(i, grad_norm=90.0 if i == 7777 else float(i % 7)) for i in range(1, 20_001)]
    steps[41]["grad_norm"] = None  # of a step that fp16 skipped
    rows = make_curves(steps)["grad_norm"]
    assert len(rows) <= MAX_ROWS and rows[0] == [1, 1000, 0.5, 1, 1.0] and rows[-1][0] == 20_000
    assert sum(row[3] for row in rows) == 19_999
    values = [step["grad_norm"] for step in steps if step["grad_norm"] is not None]
    total = sum(row[3] * row[4] for row in rows)
    assert total == pytest.approx(sum(values), rel=1e-5)
    assert [row[6] for row in rows[1:] if row[6] > 6] == [90.0] and rows[5][5] == 0.0


def test_runs_on_other_data_are_refused(runs, tmp_path, capsys):
    """One line names the runs of each data, and the option that compares them."""
    why = "(other rows, split, tokenizer, template or context length), so their losses cannot be compared"
    option = "--different_data true makes the page all the same"
    third = make_run(tmp_path / "three", make_steps(10, 1.0), *EVALUATED, evaluation=other_rows())
    argv = [*map(str, (*runs, third)), "--out", str(tmp_path / "page.html")]

    def refuse(words: str) -> None:
        assert report.main(argv) == 2 and not (tmp_path / "page.html").exists()
        assert capsys.readouterr() == ("", f"error: runs were {words} {why}; {option}\n")

    refuse("evaluated on different tokens: one, two | three")
    facts = json.loads((third / "run.json").read_text())
    facts["data"]["training_digest"] = "another"
    (third / "run.json").write_text(json.dumps(facts))
    config = (third / "config.yaml").read_text()
    (third / "config.yaml").write_text(config.replace("dataset: rows.jsonl", "dataset: more.jsonl"))
    named = "one, two (--dataset rows.jsonl) | three (--dataset more.jsonl)"
    refuse(f"trained and evaluated on different tokens: {named}")
    facts["data"]["evaluation_digest"] = json.loads((runs[0] / "run.json").read_text())["data"][
        "evaluation_digest"
    ]
    (third / "run.json").write_text(json.dumps(facts))
    refuse(f"trained on different tokens: {named}")
    del facts["data"]["training_digest"]
    (third / "run.json").write_text(json.dumps(facts))
    assert report.main(argv) == 0, "what an earlier version did not record is told"


def test_runs_whose_rows_are_the_same_are_compared(runs, tmp_path):
    """Options that change no row, and the name of the dataset, do not count."""
    more = ("--lr", "1e-3", "--batch_size", "4", "--seed", "7", "--dataset", "copy.jsonl")
    third = make_run(tmp_path / "three", make_steps(10, 1.0), *EVALUATED, *more, evaluation=small_rows())
    page = compare(tmp_path, *runs, third)
    assert "three" in page.text and "--different_data" not in page.text


def test_different_data_of_one_run(runs, capsys):
    assert report.main([str(runs[0]), "--different_data", "true"]) == 2
    assert capsys.readouterr() == ("", "error: --different_data has no effect on a single RUN\n")


def test_runs_on_other_data_are_told(runs, tmp_path, capsys):
    """They are compared if asked for, but none is called the best if their evaluations differ."""
    different = ("--different_data", "true")
    third = make_run(tmp_path / "three", make_steps(10, 1.0), *EVALUATED, evaluation=other_rows())
    page = compare(tmp_path, *runs, third, more=different)
    line = (
        "data: runs were evaluated on different tokens (other rows, split, tokenizer, template or context"
        " length): one, two | three; their evaluation losses cannot be compared"
    )
    assert capsys.readouterr().err == f"{line}\n" and line in page.text
    assert "the lowest" not in page.text and "generate.py" not in page.text
    assert f"--out {tmp_path}/page.html --different_data true" in page.text
    facts = [json.loads((run / "run.json").read_text()) for run in (*runs, third)]
    facts[1]["data"]["training_digest"] = "another"
    del facts[0]["data"]["training_digest"], facts[2]["data"]["evaluation_digest"]
    for run, changed in zip((*runs, third), facts, strict=True):
        (run / "run.json").write_text(json.dumps(changed))
    compare(tmp_path, *runs, third, more=different)
    differing, *unknown = capsys.readouterr().err.splitlines()
    assert differing.startswith("data: runs were trained on different tokens")
    assert differing.endswith(": two | three; their training losses cannot be compared")
    assert [line.rpartition(": ")[2] for line in unknown] == ["one", "three"]
    facts[0]["data"]["evaluation_digest"] = 7
    (runs[0] / "run.json").write_text(json.dumps(facts[0]))
    assert report.main(list(map(str, runs))) == 2
    assert "one/run.json: data is damaged" in capsys.readouterr().err


def test_a_run_alone_is_not_the_best(runs, tmp_path):
    page = compare(tmp_path, runs[0], make_run(tmp_path / "three", [metrics(1)]))
    assert "one 2.0000 step 10 2.5000" in page.text and "three none none 3.0000 1" in page.text
    assert "lowest" not in page.text


def test_answers_to_the_same_prompts(runs, tmp_path):
    """A prompt is the same if its images are, wherever their files lie."""
    copy = "0123456789abcdef.jpg"
    for run, place in zip(runs, ("a", "b"), strict=True):
        (run / "sample_images").mkdir()
        draw("RGB", (9, 9)).save(run / "sample_images" / copy)
        images = [{"label": f"{place}/1.png", "copy": copy}]
        lines = [
            {"step": 0, "prompt": "Why?", "text": "why why", "reference": "For this."},
            {"step": 20, "prompt": "Why?", "text": f"Because {place}.", "reference": "For this."},
            {"step": 10, "prompt": "Why?", "text": "half"},
            {"step": 20, "prompt": "What is it?", "text": f"A cat {place}.", "images": images},
            {"step": 20, "prompt": f"Only {place}?", "text": "Yes."},
            {"step": 20 * (place == "a"), "prompt": "Now?", "text": f"Now {place}."},
        ]
        (run / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    page = compare(tmp_path, *runs)
    why = "Why? Reference For this. Before training why why one, step 20 Because a. two, step 20 Because b."
    assert why in page.text and "half" not in page.text
    assert "What is it? a/1.png one, step 20 A cat a. two, step 20 A cat b." in page.text
    assert "Now? one, step 20 Now a. two, before training Now b." in page.text
    assert "2 prompts are of one run alone" in page.text and "Only" not in page.text
    assert [a["src"][:23] for tag, a in page.tags if tag == "img"] == ["data:image/jpeg;base64,"]


def test_hostile_names_stay_text(tmp_path):
    made = []
    for i in range(2):
        folder = tmp_path / f"<u>{i}<img src=x onerror=alert(2)>"
        made.append(make_run(folder, make_steps(10, 1.0), "--name", f"{HOSTILE}{i}"))
        facts = json.loads((folder / "run.json").read_text())
        facts["versions"][HOSTILE] = f"{HOSTILE}{i}"
        (folder / "run.json").write_text(json.dumps(facts))
        lines = [{"step": 0, "prompt": HOSTILE, "text": f"{HOSTILE}{i}"}]
        (folder / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    page = compare(tmp_path, *made)
    assert not {"img", "u"} & {tag for tag, _ in page.tags} and page.text.count(HOSTILE) >= 8
    assert page.charts[0]["runs"][1]["name"] == made[1].name
    assert not [a for _, a in page.tags for n in a if n.startswith("on") or n in ("style", "src", "href")]


def test_runs_that_cannot_be_compared(runs, tmp_path, capsys, monkeypatch):
    (tmp_path / "link").symlink_to(runs[0])
    (tmp_path / "new").mkdir()
    make_run(tmp_path / "waiting", [])
    (runs[1] / "best" / "config.yaml").write_text((runs[1] / "config.yaml").read_text())
    monkeypatch.chdir(tmp_path)
    for argv, problem in (
        (["one", "missing"], "missing: no such folder; expected a RUN, the --output_dir of train.py"),
        (["one", "new"], "new: is no run of train.py (no config.yaml)"),
        (["one", "link"], "link: is given twice"),
        (["one", "waiting"], "waiting: its metrics.jsonl has no step yet"),
        (["one", "two/best"], "two/best: is a run's best/ folder; make the report of the run itself: "
         f"{runs[1]}"),
        (["one", "two", "--out", "page.txt"], "--out page.txt: is no name of a page; it ends with .html"),
        (["one", "two", "--out", "no/page.html"], "--out no/page.html: there is no folder no"),
        ([], "give a RUN, the --output_dir of a run of train.py; several are compared on one page;"
         " see --help"),
    ):  # fmt: skip
        assert report.main(argv) == 2
        assert capsys.readouterr() == ("", f"error: {problem}\n")
    assert not list(tmp_path.glob("*.html"))
    assert report.main(["one", "two"]) == 0 and report.main(["one", "--out", "single.html"]) == 0
    assert capsys.readouterr().out == "compare.html\nsingle.html\n"
    assert "runs compared" in Path("compare.html").read_text(encoding="utf-8")
    assert "runs compared" not in Path("single.html").read_text(encoding="utf-8")


def test_names_are_as_short_as_they_can_be():
    assert short_names([Path("runs/a"), Path("runs/b")]) == ["a", "b"]
    assert short_names([Path("x/run"), Path("y/../z/run"), Path("x/b")]) == ["x/run", "z/run", "x/b"]
    assert short_names([Path("/runs"), Path("/runs/sub")]) == ["runs", "runs/sub"]


# In a browser

# The labels of a chart's y axis, and the points of a run's curve.
DRAWN = """(() => {
  const figure = document.querySelectorAll("figure[data-plot]")[%d];
  const texts = [...figure.querySelectorAll(".labels text")];
  const labels = texts.map((t) => [t.textContent, Number(t.getAttribute("y"))]);
  return [labels, figure.querySelector(`path.curve[data-run="%d"]`).getAttribute("d")];
})()"""
SET = "(() => {{ const e = document.getElementById('{}'); e.{}; e.dispatchEvent(new Event('input')); }})()"


def drawn_values(browser, plot: int, run: int, is_log: bool) -> list[tuple[float, float]]:
    """Return (x from 0 to 1000, value) of a run's curve, by the labels of the axis."""
    labels, path = browser.run(DRAWN % (plot, run))
    scale = math.log10 if is_log else float
    (low, bottom), *_, (high, top) = [(scale(float(text.replace(",", ""))), y) for text, y in labels]
    points = [tuple(map(float, p.split(","))) for p in re.findall(r"[ML]([\d.]+,[\d.]+)", path)]
    values = [low + (bottom - y) / (bottom - top) * (high - low) for _, y in points]
    return [(x, 10**v if is_log else v) for (x, _), v in zip(points, values, strict=True)]


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium")
def test_a_browser_draws_the_curves(runs, tmp_path):
    """Linear and log, against steps, tokens and time, smoothed, and of the runs that are shown."""
    compare(tmp_path, *runs)
    steps = [[json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()] for run in runs]
    losses = [[step["loss"] for step in each] for each in steps]
    with open_browser(tmp_path) as browser:
        browser.open(tmp_path / "page.html", "light")
        counts = (
            "[...document.querySelectorAll('figure')].map((f) => f.querySelectorAll('path.curve').length)"
        )
        assert browser.run(counts) == [2] * 6
        for is_log in (False, True):
            for run, expected in enumerate(losses):
                drawn = drawn_values(browser, 0, run, is_log)
                assert [v for _, v in drawn] == pytest.approx(expected, rel=0.01)
                left = [1000 * i / 29 for i in range(len(expected))]  # the longest run has 30 steps
                assert [x for x, _ in drawn] == pytest.approx(left, abs=0.06)
            browser.run("document.querySelector('.y-log').click()")
        for column, name in ((1, "tokens"), (2, "step_seconds")):
            browser.run(SET.format("x-axis", f"value = '{column}'"))
            totals = [[*accumulate(step[name] for step in each)] for each in steps]
            first, last = totals[0][0], totals[1][-1]
            left = [1000 * (total - first) / (last - first) for total in totals[0]]
            assert [x for x, _ in drawn_values(browser, 0, 0, False)] == pytest.approx(left, abs=0.06)
        browser.run(SET.format("x-log", "checked = true"))
        left = [1000 * math.log(total / first) / math.log(last / first) for total in totals[0]]
        assert [x for x, _ in drawn_values(browser, 0, 0, False)] == pytest.approx(left, abs=0.06)
        browser.run(SET.format("smoothing", "value = 2"))
        expected = [v for _, v in running_mean([*enumerate(losses[0])], 5)]
        assert [v for _, v in drawn_values(browser, 0, 0, False)] == pytest.approx(expected, rel=0.01)
        assert browser.run("document.getElementById('window').textContent") == "mean of 5 steps"
        browser.run("document.querySelector('.shown').click()")
        assert browser.run(counts) == [1] * 6 and drawn_values(browser, 0, 1, False)
        assert browser.problems == []


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium")
def test_the_label_of_the_smoothing_is_true(runs, tmp_path):
    """A point of 1,000 steps sums up 3: a window of 5 steps has 6 of them."""
    steps = make_steps(1000, 2.0)
    steps[-6]["loss"] = 50.0  # is in the last mean of 6 steps, but not of 5
    compare(tmp_path, runs[0], make_run(tmp_path / "long", steps, *EVALUATED, evaluation=small_rows()))
    label = "document.getElementById('window').textContent"
    with open_browser(tmp_path) as browser:
        browser.open(tmp_path / "page.html", "light")
        for window, shown in ((0, "off; a point is the mean of up to 3 steps"), (2, "mean of 5 to 6 steps")):
            browser.run(SET.format("smoothing", f"value = {window}"))
            assert browser.run(label) == shown
        last_mean = sum(step["loss"] for step in steps[-6:]) / 6
        assert drawn_values(browser, 0, 1, False)[-1][1] == pytest.approx(last_mean, rel=0.02)
        browser.run("document.querySelectorAll('.shown')[0].click()")
        assert browser.run(label) == "mean of 6 steps"
        browser.run("document.querySelectorAll('.shown').forEach((box) => box.click())")
        browser.run(SET.format("smoothing", f"value = {WINDOWS.index(50)}"))
        assert browser.run(label) == "mean of all steps so far"
        assert browser.problems == []


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium")
def test_a_browser_shows_the_page_light_and_dark(runs, tmp_path):
    """The policy allows the style sheets and the scripts. The pointer shows the values of all runs."""
    from matplotlib.image import imread

    compare(tmp_path, *runs)
    with open_browser(tmp_path) as browser:
        for scheme, colours in (("light", (0x2563C4, 0xC4560A)), ("dark", (0x6EA8FF, 0xF39A52))):
            browser.open(tmp_path / "page.html", scheme, height=1400)
            picture = imread(browser.screenshot(tmp_path / f"{scheme}.png"))[..., :3]
            assert picture.mean() > 0.85 if scheme == "light" else picture.mean() < 0.2
            levels = (picture * 255).round().astype(int)
            for colour in colours:
                rgb = [colour >> 16, colour >> 8 & 255, colour & 255]
                curve = (abs(levels - rgb).max(axis=-1) <= 3).nonzero()
                assert curve[1].max() - curve[1].min() > 800 and len(curve[0]) > 500, (scheme, hex(colour))
        box = browser.run("document.querySelector('.area').getBoundingClientRect().toJSON()")
        browser.move_pointer(box["left"] + box["width"] * 9 / 29, box["top"] + 50)
        tip = "[...document.querySelector('.tip').children].map((e) => e.innerText)"
        assert [text.split() for text in browser.run(tip)] == [
            ["step", "10"],
            ["one", "2.6"],
            ["two", "1.95"],
        ]
        assert browser.run("document.querySelectorAll('.cross.there').length") == 6
        assert browser.problems == []
