"""generate.py with images: the answers are PEFT's, which gets the inputs of transformers' processor."""

from __future__ import annotations

import base64
import dataclasses
import io
import json
import shutil
import sys

import peft
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

import evaluate
import export
import generate
from data.images import ImageRef
from finished import generation
from finished.export import describe_logit_difference
from finished.finished_run import open_run
from finished.prompt_images import PromptImages
from finished.prompt_template import Answer
from options.errors import UserError
from tests.helpers.adapters import args_for
from tests.helpers.finished_runs import write_random_run
from tests.helpers.image_folders import write_gemma_folder, write_talkative_gemma
from tests.helpers.images import TEMPLATE, image_tokenizer, stand_in, write_image
from tests.helpers.pictures import draw
from tests.helpers.report_pages import Page
from tests.helpers.runs import dense_state, transformers_model

NEW, PENALTY = 8, 3.0
QUESTION = "What is it?"
MARKED = "<start_of_image>"
ASKED = ["--max_new_tokens", str(NEW), "--repetition_penalty", str(PENALTY)]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A tiny Gemma 3 with a chat template, whose sliding layers see 16 tokens."""
    return write_talkative_gemma(tmp_path_factory.mktemp("gemma") / "model", TEMPLATE)


@pytest.fixture(scope="module")
def args(model, tmp_path_factory):
    """The options of a run on conversations about images, with adapters on the tower."""
    folder = tmp_path_factory.mktemp("rows")
    write_image(folder / "a.png", 30, 20)
    (folder / "rows.jsonl").write_text(json.dumps({"image": "a.png", "question": "Is it?", "answer": "No."}))
    return args_for(model, folder / "rows.jsonl", "bnb_dora", "--vision_targets", "all")


@pytest.fixture(scope="module")
def run(args, one_rank, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "run"
    write_random_run(one_rank, folder, args)
    return folder


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Two images, of different shapes."""
    folder = tmp_path_factory.mktemp("asked")
    for i, size in enumerate([(61, 43), (20, 50)]):
        draw("RGB", size, seed=i).save(folder / f"{i}.png")
    return [folder / "0.png", folder / "1.png"]


@pytest.fixture
def ask(capsys):
    """ask(*argv) -> the objects that --json prints."""

    def ask(*argv) -> list[dict]:
        capsys.readouterr()
        status = generate.main([*map(str, argv), "--json"])
        shown = capsys.readouterr()
        assert status == 0, shown.err
        return [json.loads(line) for line in shown.out.splitlines()]

    return ask


def texts_of(line: dict) -> list[str]:
    """Return the answers of the base and the run."""
    return [answer["text"] for answer in line["answers"]]


@pytest.fixture(scope="module")
def peft_answers(model, args, run, one_rank, tmp_path_factory):
    """peft_answers(text, paths) -> the answers of the base and of PEFT's model, without a cache."""
    base = transformers_model(model, one_rank(dense_state, args)[0])
    tuned = peft.PeftModel.from_pretrained(base, run).eval()
    _, processor = write_gemma_folder(tmp_path_factory.mktemp("processor"))

    def generate_text(model, text: str, paths) -> str:
        images = [[Image.open(path).convert("RGB") for path in paths]] if paths else None
        inputs = processor(
            text=[text], images=images, return_tensors="pt", add_special_tokens=False,
            return_mm_token_type_ids=True,
        )  # fmt: skip
        start = inputs["input_ids"].shape[1]
        with torch.no_grad():
            out = model.generate(
                **inputs, max_new_tokens=NEW, do_sample=False, use_cache=False,
                repetition_penalty=PENALTY, pad_token_id=0,
            )  # fmt: skip
        return processor.tokenizer.decode(out[0, start:], skip_special_tokens=True)

    def peft_answers(text: str, paths) -> list[str]:
        with tuned.disable_adapter():
            base_answer = generate_text(tuned, text, paths)
        return [base_answer, generate_text(tuned, text, paths)]

    peft_answers.generate_text = generate_text
    return peft_answers


def messages_of(path) -> dict:
    """Return QUESTION about an image as a row of messages, with the image as bytes."""
    url = f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": QUESTION}]
    return {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": "No."}]}


def as_asked(question: str) -> str:
    """Return a question as the chat template writes it."""
    return f"<s><start_of_turn>user\n{question}<end_of_turn>\n<start_of_turn>model\n"


def test_answers_are_those_of_peft(run, pictures, ask, peft_answers):
    """Token for token, greedy: two images, one, and none."""
    one, two = pictures
    named = ["--image_path", one, "--image_path", two]
    [both] = ask(run, "--text_prompt", QUESTION, *named, *ASKED)
    assert texts_of(both) == peft_answers(as_asked(MARKED * 2 + QUESTION), pictures)
    assert both["images"] == [str(one), str(two)]
    [placed] = ask(run, "--prompt", "A <image> b?", "--image_path", one, *ASKED)
    assert texts_of(placed) == peft_answers(as_asked(f"A{MARKED}b?"), [one])
    inputs = {"image": "0.png", "question": QUESTION}
    file = one.parent / "asked.jsonl"
    grouped = {"image": "0.png", "questions": [QUESTION] * 2, "answers": ["No.", "Yes."]}
    file.write_text("".join(f"{json.dumps(row)}\n" for row in (inputs, messages_of(one), grouped)))
    rows = ask(run, "--prompts", file, *ASKED)
    assert [texts_of(row) for row in rows] == [peft_answers(as_asked(MARKED + QUESTION), [one])] * 4
    [none] = ask(run, "--prompt", QUESTION, *ASKED)
    assert texts_of(none) == peft_answers(as_asked(QUESTION), [])
    assert len({*texts_of(both), *texts_of(none)}) == 4


def test_lists_of_questions_with_the_names_of_the_data(run, pictures, ask, tmp_path):
    """A run on such data has asked each question about the image."""
    renamed = shutil.copytree(run, tmp_path / "run")
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["columns"] = "image=scan,questions=qs,answers=as"
    (renamed / "config.yaml").write_text(yaml.safe_dump(config))
    row = {"scan": str(pictures[0]), "qs": ["A?", "B?"], "as": ["a", "b"]}
    (pictures[0].parent / "renamed.jsonl").write_text(json.dumps(row))
    short = ["--max_new_tokens", "1", "--compare", "false"]
    lines = ask(renamed, "--prompts", pictures[0].parent / "renamed.jsonl", *short)
    assert [line["rendered"] for line in lines] == [as_asked(f"{MARKED}{q}") for q in ("A?", "B?")]
    assert [line["images"] for line in lines] == [[str(pictures[0])]] * 2
    table = tmp_path / "table.jsonl"
    ask(renamed, "--prompts", pictures[0].parent / "renamed.jsonl", *short, "--out", table)
    assert [json.loads(line).get("reference") for line in table.read_text().splitlines()] == ["a", "b", None]


def test_a_table_of_answers_about_images(run, pictures, ask, tmp_path):
    """The answers are those of --json. A page embeds small copies of the images."""
    file = tmp_path / "ask.jsonl"
    grouped = {"image": str(pictures[0].name), "questions": [QUESTION, "Why?"], "answers": ["No.", "Yes."]}
    messages = messages_of(pictures[1])
    file.write_text(json.dumps(grouped) + "\n" + json.dumps(messages))
    asked = [run, "--prompts", file, "--image_folder", pictures[0].parent, *ASKED]
    tables = [tmp_path / "t.jsonl", tmp_path / "t.html"]
    printed = [ask(*asked, "--out", table) for table in tables]
    *lines, last = map(json.loads, tables[0].read_text().splitlines())
    assert [texts_of(line) for line in lines] == [texts_of(line) for line in printed[0]]
    assert [line["reference"] for line in lines] == ["No.", "Yes.", "No."]
    assert lines[0]["images"] == [str(pictures[0])] and last["averages"]["base"]["scored"] == 3
    page = Page(tables[1].read_text())
    sources = [attributes["src"] for tag, attributes in page.tags if tag == "img"]
    copies = [Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2]))) for source in sources]
    assert [copy.size for copy in copies] == [(61, 43), (61, 43), (20, 50)]


def test_a_merged_folder_answers_as_the_run(run, pictures, peft_answers, capsys, tmp_path):
    """transformers loads it with its vision parts, in which the adapters of the tower are merged.

    The check of the merge has seen them: it finds a tensor of the tower that is changed.
    """
    assert (
        export.main([str(run), "--to", "merged", "--out", str(tmp_path / "merged"), "--dtype", "float32"])
        == 0
    )
    merged = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    text = as_asked(MARKED + QUESTION)
    assert peft_answers.generate_text(merged, text, pictures[:1]) == peft_answers(text, pictures[:1])[1]
    line = capsys.readouterr().out.splitlines()[-1]
    assert "(1 rows of the data with 1 images, " in line and largest_difference(line) < 1e-4
    path = tmp_path / "merged" / "model.safetensors"
    tensors = load_file(path)
    name = next(name for name in tensors if "vision_tower" in name and name.endswith("mlp.fc1.weight"))
    save_file(tensors | {name: tensors[name] * 2}, path, metadata={"format": "pt"})
    line = describe_logit_difference(open_run(run), tmp_path / "merged", torch.device("cpu"))
    assert largest_difference(line) > 1e-2


def largest_difference(line: str) -> float:
    """Return the number in export.py's line about logits."""
    return float(line.partition(": ")[2].partition(",")[0])


@pytest.fixture
def refused(capsys, monkeypatch):
    """refused(*argv) -> the error line of a command that must not load weights."""
    monkeypatch.setattr(generation, "load_model", None)

    def refused(*argv) -> str:
        status, shown = generate.main([*map(str, argv)]), capsys.readouterr()
        assert status == 2 and not shown.out, shown
        assert shown.err.startswith("error: ") and shown.err.count("\n") == 1
        return shown.err

    return refused


def test_images_that_cannot_be_asked_about(run, runs, pictures, refused, tmp_path):
    asked, picture = ["--prompt", QUESTION], pictures[0]
    text_only = refused(runs[0], *asked, "--image_path", picture)
    assert f"--image_path {picture}: {runs[0]} was trained on texts, and takes no image" in text_only
    whole = picture.read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.png").write_text("no image")
    for path, words in (
        (tmp_path / "none.png", "No such file"),
        (tmp_path, "is not a file"),
        (tmp_path / "cut.png", "is truncated or damaged"),
        (tmp_path / "text.png", "is not an image (PNG, JPEG"),
        ("https://example.org/a.png", "is an address; download it"),
    ):
        assert f"error: --image_path {path}: {words}" in refused(run, *asked, "--image_path", path)
    assert "--prompt 1: has 2 places <image> for 1 image" in refused(
        run, "--prompt", "<image><image>", "--image_path", picture
    )
    assert "--prompt 1: has 1 places <image> for 0 image" in refused(run, "--prompt", "<image> what?")
    assert f"--prompt 1: its text holds {MARKED}" in refused(run, "--prompt", f"{MARKED} is what?")
    system = ["--system", f"You see {MARKED}", "--image_path", picture]
    assert f"error: --system: its text holds {MARKED}" in refused(run, *asked, *system)
    assert "error: --system: its text holds <image_soft_token>" in refused(
        run, *asked, "--system", "<image_soft_token>"
    )
    many = [word for _ in range(200) for word in ("--image_path", picture)]
    assert "--prompt 1: takes 2," in refused(run, *asked, *many)


def test_rows_of_prompts_whose_images_are_wrong(run, runs, pictures, refused, tmp_path):
    file, row = tmp_path / "ask.jsonl", {"image": "0.png", "question": QUESTION}
    file.write_text(json.dumps(row))
    assert "ask.jsonl:1: image 0.png: no such file in" in refused(run, "--prompts", file)
    none = tmp_path / "none"
    assert f"--image_folder {none}: no such folder" in refused(run, "--prompts", file, "--image_folder", none)
    assert "ask.jsonl:1: is a row" in refused(run, "--prompts", file, "--image_path", pictures[0])
    parts = [{"type": "text", "text": text} for text in ("see <image_soft", "_token> ok")]
    file.write_text(json.dumps({"messages": [{"role": "user", "content": parts}]}))
    assert "ask.jsonl:1: its text, as it is rendered, holds <image_soft_token>" in refused(
        run, "--prompts", file
    )
    file.write_text(json.dumps({"question": f"<image>{QUESTION}"}))
    assert "ask.jsonl:1: has more images in the text than in the column" in refused(run, "--prompts", file)
    file.write_text(json.dumps(row))
    assert "--image_folder: has no effect" in refused(run, "--prompt", "Hi", "--image_folder", none)
    found = refused(runs[0], "--prompts", file, "--image_folder", pictures[0].parent)
    empty = tmp_path / "empty.jsonl"
    empty.write_text(json.dumps({"image": "0.png", "questions": [], "answers": []}))
    assert "empty.jsonl:1: questions is an empty list" in refused(run, "--prompts", empty)
    assert "ask.jsonl:1: has an image:" in found and "takes no image" in found


def test_tokens_of_images_out_of_other_texts():
    """A tokenizer may make them, which the rendered text does not show."""
    form = stand_in(image_tokenizer())
    images = PromptImages(form)
    shown = ImageRef("a.png", 0, None, 16, 32, "--prompt 1")  # two tokens
    images.check_tokens([5, form.token_id, form.token_id, 6], [shown], "--prompt 1")
    with pytest.raises(
        UserError, match=r"^--prompt 1: has 1 tokens of images, and 0 are those of its images"
    ):
        images.check_tokens([5, form.token_id], [], "--prompt 1")


def test_rows_to_score_whose_images_are_wrong(run, runs, pictures, capsys, tmp_path):
    file = tmp_path / "test.jsonl"
    file.write_text(json.dumps({"image": "0.png", "question": QUESTION, "answer": "No."}))
    for folder, options, words in (
        (
            runs[0],
            [],
            f"has an image, but the model takes texts only; leave the column or part out, or name a model"
            f" with images by --model_name; {runs[0]} was trained on texts, and takes no image",
        ),
        (run, [], "image 0.png: no such file in"),
        (run, ["--image_folder", tmp_path / "none"], "no such folder"),
    ):
        assert evaluate.main([*map(str, [folder, "--dataset", file, *options])]) == 2
        err = capsys.readouterr().err
        assert err.startswith("error: --") and words in err and err.count("\n") == 1


def test_rows_whose_images_are_too_many_to_score(run, pictures, capsys):
    """The images of a question cannot be cut to the context."""
    data, short = pictures[0].parent / "many.jsonl", ["--metrics", "exact_match", "--max_new_tokens", "1"]
    rows = [{"images": ["0.png"] * n, "question": QUESTION, "answer": "No."} for n in (1, 150, 150)]
    data.write_text("".join(f"{json.dumps(row)}\n" for row in [*rows, rows[0] | {"answer": ""}]))
    assert evaluate.main([*map(str, [run, "--dataset", data, *short])]) == 0
    out = capsys.readouterr().out
    line = "exact_match: of 4 rows 2 are left out, whose question and images take more than 512 tokens\n"
    assert line in out and "of 4 rows 1 are left out, without a question or an answer" in out
    data.write_text(json.dumps(rows[1]))
    assert evaluate.main([*map(str, [run, "--dataset", data, *short])]) == 2
    assert "no question with its images fits in the run's 512 tokens" in capsys.readouterr().err


def test_a_run_with_images_and_one_without_share_no_base(runs, refused, monkeypatch):
    def open_with_images(folder, base_model):
        opened = open_run(runs[0], base_model)
        images = "true" if folder == str(runs[1]) else "false"
        return dataclasses.replace(opened, config=dataclasses.replace(opened.config, images=images))

    monkeypatch.setattr(generation, "open_run", open_with_images)
    assert "only one of it and" in refused(*runs[:2], "--prompt", "Hi")


def test_images_of_a_conversation(run, pictures, monkeypatch, capsys, tmp_path):
    """Each question shows the images named before it, and the turns keep theirs. Errors end nothing."""
    asked = []

    def answer(self, template, prompt, sampling, stream=None):
        text = template.tokenizer.decode(prompt.ids).replace("<image_soft_token>", ".")
        asked.append((text, [ref.path for ref in prompt.images]))
        return Answer(f"Yo{len(asked)}", 3, True)

    monkeypatch.setattr(generation.AnsweringModels, "generate_answer", answer)
    one, two = map(str, pictures)
    typed = ["A", f"/image {tmp_path}/none.png", f"/image {two}", "B", "C", "/undo", "/undo", "D"]
    typed += [f"/image {one}", "/image", "E", "/reset", f"/image {one}", f"/image {two}", "<image> F"]
    typed += ["/system <image_soft_token>", "G <image_soft_token>"]
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join([*typed, "<image> F <image>", ""])))
    assert generate.main([str(run), "--image_path", one]) == 0
    out = capsys.readouterr().out
    assert f"/image {tmp_path}/none.png: No such file" in out and "/image PATH, /system" in out
    assert "the next question shows 1.png 20x50" in out and "shows 0.png 61x43, 1.png 20x50" in out
    assert "the question: has 1 places <image> for 2 image(s)" in out
    for name in ("/system", "the question"):
        assert f"> {name}: its text holds <image_soft_token>" in out
    image, turns = f"\n\n{MARKED}....<end_of_image>\n\n", lambda *texts: "".join(texts)
    first = f"{image}A<end_of_turn>\n<start_of_turn>model\nYo1<end_of_turn>\n<start_of_turn>user\n"
    second = f"{image}B<end_of_turn>\n<start_of_turn>model\nYo2<end_of_turn>\n<start_of_turn>user\n"
    assert asked == [
        (as_asked(f"{image}A"), [one]),
        (as_asked(turns(first, f"{image}B")), [one, two]),
        (as_asked(turns(first, second, "C")), [one, two]),
        (as_asked(turns(first, "D")), [one]),
        (
            as_asked(
                turns(
                    first,
                    "D<end_of_turn>\n<start_of_turn>model\nYo4<end_of_turn>\n",
                    "<start_of_turn>user\nE",
                )
            ),
            [one],
        ),
        (as_asked(f"{image}F{image}"), [one, two]),
    ]


def test_paths_that_are_typed_or_dragged_into_a_conversation(run, pictures, monkeypatch, capsys, tmp_path):
    """With ~, spaces, and the quotes of a shell."""
    monkeypatch.setenv("HOME", str(tmp_path))
    named = tmp_path / "my folder" / "it's.png"
    named.parent.mkdir()
    shutil.copy(pictures[0], named)
    path = "my folder/it's.png"
    typed = [f"~/{path}", str(named), f'"{named}"', f"'{tmp_path}/my folder/it'\\''s.png'", "~/none it's.png"]
    typed.append(str(named).replace(" ", "\\ ").replace("'", "\\'"))
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"/image {text}\n/image\n" for text in typed)))
    assert generate.main([str(run)]) == 0
    out = capsys.readouterr().out
    assert out.count("the next question shows it's.png 61x43") == 5
    assert "/image ~/none it's.png: No such file" in out


def test_a_conversation_on_a_run_without_images(chat_run, pictures, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"/image {pictures[0]}\n/quit\n"))
    assert generate.main([str(chat_run)]) == 0
    assert f"/image {pictures[0]}: {chat_run} was trained on texts" in capsys.readouterr().out
