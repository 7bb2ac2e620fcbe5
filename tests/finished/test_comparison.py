"""generate.py --out: answers side by side, with times, and the scores that evaluate.py gives them."""

from __future__ import annotations

import csv
import io
import itertools
import json
import shutil
import time
from pathlib import Path

import pytest
from markdown_it import MarkdownIt

import evaluate
import generate
from data.images import ImageRef
from finished.answer_table import WRITERS, format_averages, format_summary
from finished.comparison import ComparedPrompt, Comparison, TimedAnswer
from finished.finished_run import open_run
from finished.generation import make_template
from finished.references import read_reference
from options.generate import Prompt, read_prompts
from tests.helpers.products import slow
from tests.helpers.report_pages import CHROMIUM, HOSTILE, Page, screenshot

NEW = 8
ASKED = ["--max_new_tokens", str(NEW), "--repetition_penalty", "1.0"]
CODE = "def f(x):\n    return x | 1  # *not* <b>_bold_</b> & `x`\n"


@pytest.fixture
def compare(capsys, tmp_path):
    """compare(suffix, *argv) -> (the file's text, stdout)."""

    def compare(suffix: str, *argv) -> tuple[str, str]:
        capsys.readouterr()
        file = tmp_path / "made" / f"table{suffix}"
        status = generate.main([*map(str, argv), "--out", str(file)])
        shown = capsys.readouterr()
        assert status == 0, shown.err
        return file.read_text(encoding="utf-8"), shown.out

    return compare


@pytest.fixture(scope="module")
def rows(runs, tmp_path_factory) -> Path:
    """Rows whose answers are, in turn, those of the base, the first run and nobody, and one without."""
    file = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    questions = [{"instruction": f"Say {i}.", "input": "now" * (i % 2)} for i in range(4)]
    file.write_text("".join(json.dumps(row) + "\n" for row in questions))
    out = file.with_name("answers.jsonl")
    assert generate.main([str(runs[0]), "--prompts", str(file), *ASKED, "--out", str(out)]) == 0
    *lines, _ = map(json.loads, out.read_text().splitlines())
    given = [[a["text"] for a in line["answers"]] for line in lines]
    outputs = [given[0][0], given[1][1], "no model says these four words", None]
    answered = [
        row | ({} if output is None else {"output": output})
        for row, output in zip(questions, outputs, strict=True)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in answered))
    return file


def test_scores_are_those_of_evaluate(runs, rows, compare, tmp_path):
    """For the base and two adapters, LoRA and DoRA, over the rows that have an answer."""
    text, _ = compare(".jsonl", runs[0], runs[2], "--prompts", rows, *ASKED)
    averages = json.loads(text.splitlines()[-1])["averages"]
    scored, results = tmp_path / "scored.jsonl", tmp_path / "results.json"
    scored.write_text("\n".join(rows.read_text().splitlines()[:3]) + "\n")
    for run in (runs[0], runs[2]):
        asked = ["--dataset", scored, "--metrics", "exact_match,bleu,rouge", "--max_new_tokens", NEW]
        assert evaluate.main([str(run), *map(str, asked), "--out", str(results)]) == 0
        for name, scores in json.loads(results.read_text())["metrics"].items():
            assert averages["base"][name] == pytest.approx(scores["base"])
            assert averages[str(run)][name] == pytest.approx(scores["tuned"])
    assert averages["base"]["exact_match"] == averages[str(runs[0])]["exact_match"] == pytest.approx(100 / 3)
    assert averages["base"]["scored"] == 3


@pytest.mark.parametrize(
    "sampling", [*slow([[]]), ["--temperature", "1.5", "--seed", "3"]], ids=["greedy", "sampled"]
)
def test_answers_are_those_of_each_run_alone(sampling, runs, rows, compare, capsys):
    """What --json prints is the same with --out. Each answer is sampled with the same seed."""
    asked = ["--prompts", str(rows), *ASKED, *sampling]
    alone = {}
    for run in runs[:2]:
        assert generate.main([str(run), *asked, "--json"]) == 0
        for i, line in enumerate(capsys.readouterr().out.splitlines()):
            alone |= {(i, a["model"]): a for a in json.loads(line)["answers"]}
    assert generate.main([*map(str, runs[:2]), *asked, "--json"]) == 0
    printed = capsys.readouterr().out
    text, shown = compare(".jsonl", *runs[:2], *asked, "--json")
    assert shown == printed
    *lines, _ = map(json.loads, text.splitlines())
    added = ("first_token_seconds", "seconds", "tokens_per_second", "exact_match")
    for i, line in enumerate(lines):
        assert [a["model"] for a in line["answers"]] == ["base", *map(str, runs[:2])]
        for answer in line["answers"]:
            kept = {name: value for name, value in answer.items() if name not in added}
            assert kept == alone[i, answer["model"]]
            assert 0 < answer["first_token_seconds"] < answer["seconds"]


@pytest.mark.slow
def test_a_run_in_a_folder_called_base_is_not_the_base(runs, rows, compare, tmp_path, monkeypatch):
    """Beside the base, another run, and alone."""
    shutil.copytree(runs[0], tmp_path / "base")
    asked = ["--prompts", rows, *ASKED]
    expected, _ = compare(".jsonl", *runs[:2], *asked)
    monkeypatch.chdir(tmp_path)

    def read_texts(text: str) -> dict[str, list[str]]:
        *lines, _ = map(json.loads, text.splitlines())
        answers = [answer for line in lines for answer in line["answers"]]
        return {a["model"]: [b["text"] for b in answers if b["model"] == a["model"]] for a in answers}

    expected = read_texts(expected)
    expected["./base"] = expected.pop(str(runs[0]))
    found = read_texts(compare(".jsonl", "base", runs[1], *asked)[0])
    assert list(found) == ["base", "./base", str(runs[1])] and found == expected
    assert found["base"] != found["./base"]
    alone = read_texts(compare(".jsonl", "base", *asked)[0])
    assert alone == {name: expected[name] for name in ("base", "./base")}


def test_each_token_is_timed(runs, rows, compare, monkeypatch):
    """By a clock that ticks when it is read: at the start, for the prompt, then for each token."""
    clock = itertools.count()
    with monkeypatch.context() as m:
        m.setattr(time, "perf_counter", lambda: next(clock))
        text, _ = compare(".jsonl", runs[0], "--prompts", rows, *ASKED)
    *lines, last = map(json.loads, text.splitlines())
    for answer in (answer for line in lines for answer in line["answers"]):
        assert answer["first_token_seconds"] == 2 and answer["seconds"] == answer["tokens"] + 1
        assert answer["tokens_per_second"] == 1
    assert last["averages"]["base"]["tokens_per_second"] == 1 and last["settings"]["sampling"] == "greedy"


def test_the_last_row_of_a_csv_has_the_means(runs, rows, compare):
    text, shown = compare(".csv", *runs[:2], "--prompts", rows, *ASKED)
    *prompts, means = csv.DictReader(io.StringIO(text))
    assert [row["row"] for row in prompts] == ["1", "2", "3", "4"] and means["row"] == "mean"
    assert prompts[1]["prompt"].startswith("### Instruction:\nSay 1.\n\n### Input:\nnow")
    for model in ("base", *map(str, runs[:2])):
        for measure in ("first_token_seconds", "seconds", "tokens", "exact_match"):
            values = [float(v) for row in prompts if (v := row[f"{model}: {measure}"])]
            assert len(values) == (3 if measure == "exact_match" else 4)
            assert float(means[f"{model}: {measure}"]) == pytest.approx(sum(values) / len(values))
        seconds, first, tokens = (
            [float(row[f"{model}: {name}"]) for row in prompts]
            for name in ("seconds", "first_token_seconds", "tokens")
        )
        speed = (sum(tokens) - 4) / (sum(seconds) - sum(first))
        assert float(means[f"{model}: tokens_per_second"]) == pytest.approx(speed)
    table = shown.split("\n\n")[-1].splitlines()
    assert table[0].split() == ["mean", "base", *map(str, runs[:2])]
    assert table[-1].startswith("answers and times: ") and table[-1].endswith("table.csv")


# references


@pytest.mark.parametrize(
    ("row", "reference"),
    [
        ({"messages": [("user", "Hi"), ("assistant", " Yo ")]}, "Yo"),
        ({"messages": [("user", "Hi"), ("assistant", "Yo"), ("user", "So?")]}, ""),
        ({"messages": [("user", "Hi"), ("assistant", "")]}, ""),
        ({"question": "Hi", "answer": "Yo"}, "Yo"),
        ({"question": "Hi"}, ""),
    ],
)
def test_the_reference_of_a_row(row, reference, chat_run):
    if "messages" in row:
        row = {"messages": [{"role": role, "content": content} for role, content in row["messages"]]}
    assert read_reference(Prompt("p:1", row), make_template(open_run(chat_run), "auto")) == reference


@pytest.mark.parametrize(
    ("text", "reference"),
    [
        ("### Human: Hi### Assistant: Yo", "Yo"),
        ("### Human: Hi### Assistant: Yo### Human: So?", ""),
        ("### Human: Hi### Assistant:", ""),
    ],
)
def test_the_reference_of_a_dialogue(text, reference, runs):
    assert (
        read_reference(Prompt("p:1", {"text": text}), make_template(open_run(runs[0]), "guanaco"))
        == reference
    )


def test_a_plain_text_has_no_reference(runs):
    template = make_template(open_run(runs[0]), "completion")
    assert read_reference(Prompt("p:1", {"text": "Once upon"}), template) == ""
    assert read_reference(Prompt("p:1", "Once upon"), template) == ""


def test_references_of_a_list_of_questions(chat_run, tmp_path):
    """A list of answers that does not match the questions has none of their answers."""
    file = tmp_path / "rows.jsonl"
    file.write_text(
        '{"questions": ["A?", "B?"], "answers": ["a", "b"]}\n{"questions": ["A?"], "answers": []}\n'
    )
    template = make_template(open_run(chat_run), "auto")
    assert [read_reference(prompt, template) for prompt in read_prompts(file)] == ["a", "b", ""]


# tables


@pytest.fixture
def comparison() -> Comparison:
    """Two models and three prompts, with texts that would break a table or a page."""
    image = ImageRef("a|b.png", 0, None, 16, 32, "--prompt 1")
    texts = [(CODE, HOSTILE), ("", "| a | b |\n|---|---|"), ("[x](y) ~~z~~ $1$ \\", "\x1b[2J<details>")]
    prompts = [
        ComparedPrompt(
            HOSTILE,
            f"<s>{HOSTILE}",
            HOSTILE,
            [image] * (i == 2),
            CODE.strip() if i == 0 else "",
            {
                "base": TimedAnswer(one, 3, True, 0.25, 0.75),
                "runs/a|b": TimedAnswer(two, 1, False, 0.5, 0.5),
            },
        )
        for i, (one, two) in enumerate(texts)
    ]
    return Comparison({"base model": HOSTILE}, {"base": "base", "runs/a|b": "runs/a|b"}, prompts)


def shown_texts(tokens) -> list[str]:
    """Return the text of each cell of a parsed Markdown table, with line breaks for <br>."""
    found = []
    for token in tokens:
        if token.type == "inline":
            parts = [
                "\n" if child.content == "<br>" else child.content
                for child in token.children
                if child.type in ("text", "text_special", "entity", "code_inline", "html_inline", "image")
            ]
            found.append("".join(parts))
    return found


def test_a_markdown_table_shows_the_texts_as_they_are(comparison):
    """Parsed by markdown-it: each cell is one text, without markup, links or code but our own."""
    tokens = MarkdownIt().enable("table").enable("strikethrough").parse(WRITERS[".md"](comparison))
    kinds = {child.type for token in tokens if token.children for child in token.children}
    assert kinds <= {"text", "text_special", "entity", "html_inline", "em_open", "em_close"}
    ours = {c.content for t in tokens if t.children for c in t.children if c.type == "html_inline"}
    assert ours == {"<br>", "<sub>", "</sub>"}
    assert sum(token.type == "table_open" for token in tokens) == 2
    assert sum(token.type == "tr_open" for token in tokens) == len(format_averages(comparison)) + 4
    cells = [text.replace("\u00a0", " ") for text in shown_texts(tokens)][-20:]
    assert cells[:5] == ["", "prompt", "reference", "base", "runs/a|b"]
    assert cells[5:8] == ["1", HOSTILE, CODE.strip()]
    assert cells[8].startswith(
        f"{CODE.strip()}\n<sub>exact match · 0.250 s to the first token, 0.750 s in all"
    )
    assert cells[8].endswith("3 tokens at 4.0/s</sub>")
    assert cells[9].startswith(f"{HOSTILE}\n<sub>no match") and cells[9].endswith("1 tokens · cut</sub>")
    assert cells[14].startswith("| a | b |\n|---|---|\n<sub>0.500 s")
    assert cells[16] == f"{HOSTILE}\nimage: a|b.png 16x32"
    assert cells[18].startswith("[x](y) ~~z~~ $1$ \\\n") and cells[19].startswith("\ufffd[2J<details>\n")


def test_a_page_shows_the_texts_and_runs_none(comparison, monkeypatch):
    monkeypatch.setattr("finished.answer_table.embed_image", lambda ref: "data:image/jpeg;base64,AAAA")
    page = Page(WRITERS[".html"](comparison))
    assert [tag for tag, _ in page.tags].count("script") == 1
    assert [attributes["src"] for tag, attributes in page.tags if tag == "img"] == [
        "data:image/jpeg;base64,AAAA"
    ]
    for text in (HOSTILE, CODE, "a|b.png 16x32", "exact match", "runs/a|b"):
        assert " ".join(text.split()) in page.text


def test_a_csv_and_jsonl_keep_the_texts(comparison):
    rows = list(csv.DictReader(io.StringIO(WRITERS[".csv"](comparison))))
    *lines, _ = map(json.loads, WRITERS[".jsonl"](comparison).splitlines())
    for prompt, row, line in zip(comparison.prompts, rows, lines, strict=False):
        for model, answer in prompt.answers.items():
            assert row[f"{model}: answer"] == answer.text
            assert [a["text"] for a in line["answers"] if a["model"] == model] == [answer.text]
        assert row["reference"] == line.get("reference", "") == prompt.reference
    assert lines[2]["images"] == ["a|b.png"] and "\x1b" not in format_summary(comparison)


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium")
def test_a_browser_shows_the_page_light_and_dark(comparison, tmp_path, monkeypatch):
    from matplotlib.image import imread

    monkeypatch.setattr("finished.answer_table.embed_image", lambda ref: "")
    page = tmp_path / "table.html"
    page.write_text(WRITERS[".html"](comparison), encoding="utf-8")
    light, dark = (imread(screenshot(page, tmp_path, scheme)[0])[..., :3] for scheme in (1, 0))
    assert light.mean() > 0.85 and dark.mean() < 0.2
