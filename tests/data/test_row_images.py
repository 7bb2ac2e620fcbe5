"""data/row_images.py and data/image_parts.py: images of rows, and the texts that show them."""

from __future__ import annotations

import base64
import json
import shutil

import datasets
import pytest

from data.columns import ColumnNames
from data.examples import read_examples
from data.formats import ALPACA_INPUT
from data.mixtures import read_mixture
from options.errors import UserError
from tests.helpers.chat_templates import CHATML
from tests.helpers.data_files import to_jsonl, write_csv, write_file, write_parquet
from tests.helpers.images import (
    BEGIN,
    TEMPLATE,
    encode_image,
    image_options,
    image_tokenizer,
    put_on_hub,
    stand_in,
    write_image,
    write_image_set,
)

IMAGE, ANSWER = {"type": "image"}, {"role": "assistant", "content": "Yes."}
BOTH, PAIR = ["1.png", "2.png"], {"question": "Is it?", "answer": "Yes."}


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """The folder of the rows, with images of different widths: 1.png, 2.png, 3.png."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    for width in (1, 2, 3):
        write_image(tmp_path / f"{width}.png", width, 20)
    return tmp_path


def text_part(text: str) -> dict:
    return {"type": "text", "text": text}


def asks(content, **columns) -> dict:
    return {"messages": [{"role": "user", "content": content}, ANSWER], **columns}


def read(folder, *rows: dict, **options):
    return read_examples(str(write_file(folder / "rows.jsonl", to_jsonl(rows))), image_options(**options))


def widths(example) -> list[int]:
    """The images of a row, which are known by their widths."""
    return [ref.width for ref in example.images]


def turns(question: str) -> str:
    """The text of a row of `asks`, as the template writes it."""
    return f"<s><start_of_turn>user\n{question}<end_of_turn>\n<start_of_turn>model\nYes.<end_of_turn>\n"


# name: (row, the question as the template shows it, the widths of its images)
SHOWN = {
    "TRL's parts": (asks([IMAGE, text_part(" Is it? ")], images=["1.png"]), f"{BEGIN}Is it?", [1]),
    "a single image": (asks([text_part("Is it?"), IMAGE], image="2.png"), f"Is it?{BEGIN}", [2]),
    "several": (
        asks([IMAGE, text_part("or"), IMAGE, IMAGE], images=["3.png", "1.png", "2.png"]),
        f"{BEGIN}or{BEGIN}{BEGIN}", [3, 1, 2]),
    "sources in the parts": (
        asks([{"type": "image", "image": "2.png"}, {"type": "image", "path": "1.png"},
              {"type": "image", "url": "3.png"}, {"type": "image_url", "image_url": {"url": "1.png"}},
              {"image": "2.png"}, {"text": "?"}]),
        f"{BEGIN * 5}?", [2, 1, 3, 1, 2]),
    "sources in a part and a column": (
        asks([IMAGE, {"type": "image", "path": "1.png"}], image="3.png"), BEGIN * 2, [3, 1]),
    "nulls of a table": (
        asks([{"type": "image", "text": None}, {"type": "text", "text": "a", "image": None}], image="1.png"),
        f"{BEGIN}a", [1]),
    "a text, and nothing says where": (asks(" Is it? ", images=BOTH), f"{BEGIN * 2}Is it?", [1, 2]),
    "LLaVA's mark": (asks("<image>\nIs it <image>?", images=BOTH), f"{BEGIN}Is it{BEGIN}?", [1, 2]),
    "parts of texts alone": (asks([text_part("a "), text_part("b")]), "ab", []),
    "an empty column": (asks("Is it?", image=None, images=[]), "Is it?", []),
    "ShareGPT": (
        {"conversations": [{"from": "human", "value": "<image>Is it?"}, {"from": "gpt", "value": "Yes."}],
         "image": "1.png"}, f"{BEGIN}Is it?", [1]),
    "prompt and completion": (
        {"prompt": [{"role": "user", "content": [IMAGE]}], "completion": [ANSWER], "images": ["1.png"]},
        BEGIN, [1]),
    "question and answer": ({"image": "1.png"} | PAIR, f"{BEGIN}Is it?", [1]),
    "instruction": (
        {"image": "1.png", "instruction": "Is it?", "input": "so", "output": "Yes."},
        f"{BEGIN}Is it?\nso", [1]),
    "prompt and response": (
        {"images": ["1.png"], "prompt": "Is it?", "response": "Yes."}, f"{BEGIN}Is it?", [1]),
}  # fmt: skip


@pytest.mark.parametrize("row, question, images", SHOWN.values(), ids=SHOWN)
def test_what_a_row_shows(folder, row, question, images):
    """In a conversation of the tokenizer's template; the answer is learned."""
    examples = read(folder, row)
    (one,) = examples.rendered
    assert one.text == turns(question) and widths(one) == images
    assert [one.text[start:end] for start, end in one.learned] == ["Yes.<end_of_turn>"]
    assert examples.format == "chat"


def test_parts_are_shown_as_transformers_shows_them(folder):
    """The content that the template gets is that of the row."""
    content = [text_part(" a "), IMAGE, text_part(" b"), text_part("c ")]
    (one,) = read(folder, asks(content, image="1.png")).rendered
    tokenizer = image_tokenizer()
    assert one.text == tokenizer.apply_chat_template(
        [{"role": "user", "content": content}, ANSWER], tokenize=False
    )


# Templates that take one form of contents alone: lists as SmolVLM's; texts as most.
LISTS = TEMPLATE.replace("{% if m.content is string %}{{ m.content | trim }}{% else %}", "").replace(
    "{% endfor %}{% endif %}{{ '<end", "{% endfor %}{{ '<end"
)
TEMPLATES = {
    "lists alone": (LISTS, turns(f"{BEGIN}Is it?")),
    "texts alone": (
        CHATML, "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\n"
        f"{BEGIN}Is it?<|im_end|>\n<|im_start|>assistant\nYes.<|im_end|>\n"),
}  # fmt: skip


@pytest.mark.parametrize("template, text", TEMPLATES.values(), ids=TEMPLATES)
def test_a_template_that_takes_one_form_of_contents(folder, template, text):
    (one,) = read(
        folder, asks([IMAGE, text_part("Is it?")], image="1.png"), tokenizer=image_tokenizer(template)
    ).rendered
    assert one.text == text and one.learned and widths(one) == [1]


BASE64 = base64.b64encode(encode_image(7, 9)).decode()
URL = f"data:image/png;base64,{BASE64}"
ENCODED = {
    "URL": {"image": URL}, "URL of a type": {"type": "image", "url": URL}, "bytes": {"bytes": BASE64},
    "bytes of a type": {"type": "image", "bytes": BASE64, "path": "a.png"},
    "an object": {"image": {"bytes": BASE64}}, "OpenAI's": {"type": "image_url", "image_url": {"url": URL}},
}  # fmt: skip


@pytest.mark.parametrize("part", ENCODED.values(), ids=ENCODED)
def test_parts_that_hold_their_images(folder, part):
    """With a type or without. A text in the arguments of a tool stays."""
    (one,) = read(folder, asks([part, text_part("Is it?")])).rendered
    assert one.text == turns(f"{BEGIN}Is it?") and widths(one) == [7]
    call = {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {"image": URL}}}]}
    messages = [{"role": "user", "content": [part]}, call]
    template = CHATML.replace("m.content", "(m.content or m.tool_calls | string)")
    (one,) = read(folder, {"messages": messages}, tokenizer=image_tokenizer(template)).rendered
    assert URL in one.text


def test_images_that_a_table_lacks(folder):
    """Their objects have nulls in each field, in a column and in parts."""
    parts = [IMAGE | {"image": None}, text_part("Is it?") | {"image": {"bytes": None, "path": None}},
             IMAGE | {"image": {"bytes": encode_image(7, 9), "path": None}}]  # fmt: skip
    answer = {"role": "assistant", "content": [text_part("Yes.")]}
    rows = [
        {"messages": [{"role": "user", "content": content}, answer], "image": {"bytes": image, "path": None}}
        for content, image in ((parts, encode_image(8, 9)), ([text_part("Is it?")], None))
    ]
    found = read_examples(str(write_parquet(folder / "a.parquet", rows)), image_options()).rendered
    assert [widths(one) for one in found] == [[8, 7], []]
    (one,) = read(folder, asks([IMAGE | {"image": {}}], image="1.png")).rendered
    assert widths(one) == [1]


def test_text_rows_of_a_template_of_lists(folder):
    (one,) = read(folder, asks("Is it?"), tokenizer=image_tokenizer(LISTS)).rendered
    assert one.text == turns("Is it?")


# Without a chat template, the images are at their marks, or before the question. format: (row, text)
PLAIN = {
    "qa": (
        {"images": BOTH, "context": "See <image> and <image>."} | PAIR,
        f"### Context:\nSee {BEGIN} and {BEGIN}.\n\n### Question:\nIs it?\n\n### Answer:\nYes."),
    "prompt_completion": (
        {"image": "1.png", "prompt": "Is it? ", "completion": "Yes."}, f"{BEGIN}Is it? Yes."),
    "completion": ({"images": BOTH, "text": "A cat."}, f"{BEGIN * 2}A cat."),
    "alpaca": (
        {"images": BOTH, "instruction": "Compare <image> with the other.", "input": "<image>", "output": "A"},
        ALPACA_INPUT.format(instruction=f"Compare {BEGIN} with the other.", input=BEGIN) + "A"),
}  # fmt: skip


@pytest.mark.parametrize("name", PLAIN)
def test_without_a_chat_template(folder, name):
    row, text = PLAIN[name]
    examples = read(folder, row, tokenizer=image_tokenizer(None))
    assert examples.format == name and examples.rendered[0].text == text
    named = read(folder, row, format=name)  # with a template, if the user says so
    assert named.rendered[0].text == text


def test_rows_with_and_without_images(folder):
    """They are one data set. `<image>` is a text where no row has an image."""
    rows = [{"question": "Is it?", "answer": "Yes.", "image": image} for image in ("1.png", None, "2.png")]
    examples = read(folder, *rows)
    assert [widths(one) for one in examples.rendered] == [[1], [], [2]]
    assert any("since the tokenizer has a chat template" in remark for remark in examples.remarks)
    assert not any("not read" in remark for remark in examples.remarks)
    (one,) = read(folder, asks("What does <image> do?")).rendered
    assert one.text == turns("What does <image> do?")


# A row with an image of each kind, and rows after it that lack the image of their mark: (kind, row).
SCANS = {
    "parts": asks([{"type": "image", "path": "1.png"}, text_part("Is it?")]),
    "messages": asks("<image>Is it?", images=["1.png"]),
    "questions": {"image": "1.png"} | PAIR,
}
LOST = {
    "an empty list": ("messages", asks("<image>Is it?", images=[])),
    "no column": ("messages", asks("<image>Is it?")),
    "beside rows with parts": ("parts", asks("<image>Is it?")),
    "in a part": ("parts", asks([text_part("<image>Is it?")])),
    "a question": ("questions", PAIR | {"image": "", "question": "<image>Is it?"}),
    "a context": ("questions", PAIR | {"image": None, "context": "See <image>."}),
}  # fmt: skip


@pytest.mark.parametrize("kind, row", LOST.values(), ids=LOST)
def test_a_mark_without_its_image(folder, kind, row):
    """It is an error, not a text to learn from, once a row of the data set has an image."""
    template = None if "answer" in row else TEMPLATE
    with pytest.raises(UserError, match=r"rows.jsonl:2: has more images in the text than in the column"):
        read(folder, SCANS[kind], row, tokenizer=image_tokenizer(template))


def test_marks_and_a_column_without_images(folder):
    """The column says that the marks are images, even if it has none."""
    with pytest.raises(UserError, match=r"rows.jsonl:1: has more images in the text than in the column"):
        read(folder, asks("<image>Is it?", image=None))


def test_marks_of_a_set_of_texts_in_a_mixture(folder):
    """Each set decides on its own marks; those that are texts are counted."""
    scans = write_file(folder / "scans.jsonl", to_jsonl([SCANS["messages"]]))
    texts = write_file(folder / "texts.jsonl", to_jsonl([asks("What does <image> do?"), asks("Hi")]))
    mixture = read_mixture(f"{scans},{texts}", image_options())
    assert [widths(one) for each in mixture.sets for one in each.rendered] == [[1], [], []]
    assert mixture.sets[1].rendered[0].text == turns("What does <image> do?")
    assert [remark for remark in mixture.remarks if "<image>" in remark] == [
        f"data: {texts}: 1 of 2 rows hold <image>, which is a text here: the set has neither images nor a"
        " column for them"
    ]


def test_marks_in_parts_of_texts(folder):
    """They stand for the images of the column, as in a text."""
    (one,) = read(folder, asks([text_part("<image>Is it "), text_part("<image>?")], images=BOTH)).rendered
    assert one.text == turns(f"{BEGIN}Is it{BEGIN}?") and widths(one) == [1, 2]


def test_paths_in_a_csv(folder):
    """One, several as a JSON list, or none."""
    paths = ["1.png", json.dumps(BOTH), ""]
    path = write_csv(folder / "rows.csv", [PAIR | {"image": each} for each in paths])
    assert [widths(one) for one in read_examples(str(path), image_options()).rendered] == [[1], [1, 2], []]


def test_a_data_set_with_images(folder, monkeypatch):
    """A folder with it, and the same on the hub, which `datasets` reads. No image is decoded."""
    monkeypatch.setattr(datasets.Image, "decode_example", lambda *_, **__: pytest.fail("decoded"))
    path = write_image_set(folder / "scans", {"train": [PAIR | {"image": encode_image(7, 9)}]})
    put_on_hub(monkeypatch, folder / "cache", "me/scans", path)
    for name in (str(path), "me/scans"):
        (one,) = read_examples(name, image_options()).rendered
        assert widths(one) == [7] and one.text == turns(f"{BEGIN}Is it?")
        assert one.images[0].path.startswith(str(folder / "hf"))
    with pytest.raises(UserError, match=r"me/scans: --columns image=scan: the data has no column scan"):
        read_examples("me/scans", image_options(columns=ColumnNames.from_options("image=scan", None)))


def test_a_folder_of_images_and_their_questions(folder):
    """As Hugging Face's library knows it: metadata.jsonl with a column file_name, and images beside it."""
    scans = write_image(folder / "scans" / "ct" / "a.png", 7, 9).parents[1]
    write_file(scans / "metadata.jsonl", to_jsonl([PAIR | {"file_name": "ct/a.png"}]))
    names = ColumnNames.from_options("image=file_name", None)
    (one,) = read_examples(str(scans), image_options(columns=names)).rendered
    assert widths(one) == [7] and one.text == turns(f"{BEGIN}Is it?")


# The schemas of the sets. recipe: (the set, {split: rows}, {what --dataset names: widths and learned texts})
SCAN, OTHERS = encode_image(7, 9), {"mode": "CT", "case_id": "c1"}
ROW = OTHERS | {"image_id": SCAN, "question": "What is it?"}
MEDPIX = {
    "medpix": (
        "mmoukouba/MedPix-Grouped-QA",
        {"train": [{"image": SCAN, "questions": ["What is it?", "Where?"], "answers": ["A cyst", "Left"]}]},
        {"medpix": ["A cyst", "Left"]}),
    "medpix_vqa": (
        "mmoukouba/MedPix-VQA", {"train": [ROW | {"answer": "A"}], "validation": [ROW | {"answer": "B"}]},
        {"medpix_vqa": ["A"], "medpix_vqa::validation": ["B"]}),
    "medpix_shortqa": (
        "adishourya/MEDPIX-ShortQA",
        {name: [ROW | {"answer": name}] for name in ("Train", "Test", "Valid")},
        {"medpix_shortqa": ["Train"], "medpix_shortqa::Valid": ["Valid"], "medpix_shortqa::Test": ["Test"]}),
}  # fmt: skip


@pytest.mark.parametrize("recipe", MEDPIX)
def test_the_recipes_of_medpix(folder, monkeypatch, recipe):
    """Each split of each set; a set that has lost its images is refused instead of trained without them."""
    name, splits, expected = MEDPIX[recipe]
    put_on_hub(monkeypatch, folder / "cache", name, write_image_set(folder / name.partition("/")[2], splits))
    for dataset, answers in expected.items():
        found = read_examples(dataset, image_options()).rendered
        assert [one.text[slice(*one.learned[-1])] for one in found] == [f"{a}<end_of_turn>" for a in answers]
        assert [widths(one) for one in found] == [[7]] * len(answers)
        assert found[0].text.startswith(f"<s><start_of_turn>user\n{BEGIN}What is it?<end_of_turn>")
    gone = {
        split: [{k: v for k, v in row.items() if v != SCAN} for row in rows] for split, rows in splits.items()
    }
    shutil.rmtree(folder / "cache")
    shutil.rmtree(folder / name.partition("/")[2])
    put_on_hub(monkeypatch, folder / "cache", name, write_image_set(folder / name.partition("/")[2], gone))
    with pytest.raises(UserError, match=r": `columns` of the recipe: the data has no column image"):
        read_examples(recipe, image_options())


def test_questions_of_one_image(folder):
    """Each is a row with the image. Errors name the row and the question."""
    rows = [{"image": "1.png", "questions": ["A?", "B?"], "answers": ["a", "b"]},
            {"image": "2.png", "questions": ["C?"], "answers": ["c"]}]  # fmt: skip
    examples = read(folder, *rows)
    assert [widths(one) for one in examples.rendered] == [[1], [1], [2]]
    assert [one.text.count(name) for one, name in zip(examples.rendered, "ABC", strict=True)] == [1, 1, 1]
    few = read(folder, *rows, samples=1).rendered  # --dataset_samples counts questions
    assert [one.text.count("A?") for one in few] == [1]
    with pytest.raises(UserError, match=r"rows.jsonl:2 question 1: image 9.png: no such file"):
        read(folder, rows[0], rows[1] | {"image": "9.png"})
    with pytest.raises(UserError, match=r"rows.jsonl:1: has 2 questions and 1 answers"):
        read(folder, rows[0] | {"answers": ["a"]})


def test_lists_of_questions_that_stay(folder):
    """Those beside a question, an answer or messages, and those of texts alone, for each model."""
    lists = {"questions": ["A?", "B?"], "answers": ["a", "b"]}
    for row in (PAIR | lists | {"image": "1.png"}, asks("Is it?", image="2.png", **lists)):
        assert [one.text for one in read(folder, row).rendered] == [turns(f"{BEGIN}Is it?")]
    for image_format in (None, stand_in(image_tokenizer())):
        with pytest.raises(UserError, match=r"columns answers, questions fit no format"):
            read(folder, lists, image_format=image_format)


def test_lists_without_questions(folder):
    """Their rows are counted, and a set of them alone is refused."""
    empty, full = ({"image": "1.png", "questions": each, "answers": each} for each in ([], ["A"]))
    examples = read(folder, empty, full, {"image": None, "questions": ["B"], "answers": ["b"]})
    assert [widths(one) for one in examples.rendered] == [[1], []]
    assert "data: 1 of 3 rows have no questions, and are dropped" in examples.remarks
    with pytest.raises(UserError, match=r"rows.jsonl:1: this row and all others have no questions"):
        read(folder, empty)


def test_columns_with_other_names(folder):
    """Also those whose bytes are in a table."""
    row = {"scan": {"bytes": encode_image(7, 9), "path": None}, "q": "Is it?", "answer": "Yes."}
    names = ColumnNames.from_options("image=scan,question=q", None)
    found = read_examples(str(write_parquet(folder / "a.parquet", [row])), image_options(columns=names))
    assert widths(found.rendered[0]) == [7] and found.rendered[0].text == turns(f"{BEGIN}Is it?")
    names = ColumnNames.from_options("image=scan,questions=qs,answers=as", None)
    found = read(folder, {"scan": "1.png", "qs": ["Is it?", "B?"], "as": ["Yes.", "b"]}, columns=names)
    assert [widths(one) for one in found.rendered] == [[1], [1]]
    assert found.rendered[0].text == turns(f"{BEGIN}Is it?")
    with pytest.raises(
        UserError, match=r"img=scan: no format reads a column img; .* for images images or image"
    ):
        read(folder, {"scan": "1.png"} | PAIR, columns=ColumnNames.from_options("img=scan", None))


def test_the_image_folder(folder):
    write_image(folder / "elsewhere" / "1.png", 30, 20)
    (one,) = read(folder, asks([IMAGE], image="1.png"), image_folder=str(folder / "elsewhere")).rendered
    assert widths(one) == [30]


SOFT = "<image_soft_token>"
# name: (row, the error's text behind the file)
BAD = {
    "more in the text": (asks([IMAGE, IMAGE], image="1.png"), r":1: has more images .* more than the 1 in"),
    "more marks": (asks("<image><image>", image="1.png"), r":1: has more images .* more than the 1 in"),
    "none in the column": (asks([IMAGE]), r":1: has more images .* message 1 .* more than the 0 in"),
    "a mark beside a part": (
        asks([IMAGE, text_part("<image>\nIs it?")], images=BOTH),
        r":1: message 1: part 2 of its content holds <image> beside parts of images"),
    "more in the column": (asks([IMAGE], images=["1.png", "2.png"]), r":1: has 2 images .* places for 1"),
    "more than marks": (asks("<image>", images=["1.png", "2.png"]), r":1: has 2 images .* places for 1"),
    "no place in parts": (asks([text_part("a")], image="1.png"), r":1: has 1 images .* places for 0"),
    "both columns": (asks([IMAGE], image="1.png", images=["1.png"]), r":1: both columns images and image"),
    "no question": ({"messages": [ANSWER], "image": "1.png"}, r":1: has images, but no message of the role"),
    "a number": (asks([IMAGE], image=3), r":1: an image is a number; expected a path"),
    "an object without a path": (asks([IMAGE], image={"id": 3}), r":1: an image is an object; expected"),
    "an empty path": (asks([IMAGE], images=[""]), r":1: an image is an empty text; expected a path"),
    "a part of another type": (asks([{"type": "video"}]), r":1: message 1: part 1 .* is of the type 'video'"),
    "a part without a text": (asks([{"type": "text"}]), r":1: message 1: part 1 of its content has no text"),
    "a part that is a text": (asks([IMAGE, "a"], image="1.png"), r"part 2 of its content is a text"),
    "a token of images": (asks(f"a{SOFT}b"), rf":1: its text holds {SOFT}, which stands for an image"),
    "in a part": (asks([IMAGE, text_part(BEGIN)], image="1.png"), rf":1: its text holds {BEGIN}"),
    "in an answer": ({"question": "Q", "answer": SOFT, "image": "1.png"}, rf":1: its text holds {SOFT}"),
    "an address": (asks([IMAGE], image="https://host/1.png"), r":1: image https://host/1.png is an address"),
    "an address in a part": (asks([{"type": "image_url", "image_url": "http://h/1.png"}]), r"is an address"),
    "a missing file": (asks([IMAGE], image="4.png"), r":1: image 4.png: no such file"),
    "no base64": (asks([{"type": "image", "image": "data:image/png;base64,?"}]), r":1: image data:.* is not"),
}  # fmt: skip


@pytest.mark.parametrize("row, message", BAD.values(), ids=BAD)
def test_a_row_that_cannot_be_read(folder, row, message):
    """The line names its file and number."""
    with pytest.raises(
        UserError, match=rf"^--dataset .*rows.jsonl{message}|^--dataset .*rows.jsonl:1: .*{message}"
    ):
        read(folder, row)


# Rows whose texts are harmless alone, and mean a token of images where they are joined. name: (format, row)
CALL = {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {SOFT: 1}}}]}
JOINED = {
    "parts": ("auto", asks([IMAGE, text_part("see <image_soft"), text_part("_token> ok")], image="1.png")),
    "parts of an answer": ("auto", {"messages": [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": [text_part("see <image_soft"), text_part("_token> ok")]}]}),
    "a question and its answer": (
        "prompt_completion", {"prompt": "see <image_soft", "completion": "_token> ok", "image": "1.png"}),
    "another image": ("auto", asks([IMAGE, text_part("see <start_of"), text_part("_image>")], image="1.png")),
    "no image at all": ("prompt_completion", {"prompt": "see <end_of", "completion": "_image> ok"}),
    "the name of an argument": ("auto", {"messages": [{"role": "user", "content": "Hi"}, CALL]}),
}  # fmt: skip


@pytest.mark.parametrize("name, row", JOINED.values(), ids=JOINED)
def test_tokens_of_images_out_of_joined_texts(folder, name, row):
    """The rendered text is checked, so no token of an image is learned."""
    with pytest.raises(
        UserError, match=r"rows.jsonl:1: its text.* holds <[a-z_]+>, which stands for an image"
    ):
        read(folder, row, format=name)


def test_a_template_that_hides_images(folder):
    hiding = TEMPLATE.replace("{% for m in messages %}", "{% for m in messages if m.role != 'system' %}")
    row = {
        "messages": [{"role": "system", "content": [IMAGE]}, *asks("Is it?")["messages"]],
        "image": "1.png",
    }
    with pytest.raises(
        UserError, match=rf"rows.jsonl:1: the chat template shows 0 of its 1 images as {BEGIN}"
    ):
        read(folder, row, tokenizer=image_tokenizer(hiding))


@pytest.mark.parametrize("name", ["auto", "guanaco"])
@pytest.mark.parametrize("template", [TEMPLATE, None], ids=["template", "none"])
def test_a_dialogue_in_one_text(folder, name, template):
    """It is not taken for a plain text, of which the question would be learned, too."""
    text = {"text": "### Human: Is it?### Assistant: Yes."}
    with pytest.raises(UserError, match=r"rows.jsonl:2: has an image, which a text of a whole dialogue"):
        read(folder, text, text | {"image": "1.png"}, format=name, tokenizer=image_tokenizer(template))


@pytest.mark.parametrize("row", [
    asks([IMAGE], image="1.png"), asks([{"type": "image", "path": "1.png"}]), asks("Hi", images=["1.png"]),
    {"question": "Q", "answer": "A", "image": {"bytes": "iVBORw0KGgo=", "path": "1.png"}},
])  # fmt: skip
def test_images_for_a_model_of_texts(folder, row):
    """The first row with one is named."""
    text = asks("Hi") if "messages" in row else {"question": "Q", "answer": "A"}
    with pytest.raises(UserError, match=r"rows.jsonl:2: has an image, but the model takes texts only"):
        read(folder, text, row, image_format=None)


def test_a_column_image_of_texts(folder):
    """A model of texts does not read it, as always; one of images takes it for a path."""
    row = {"question": "Which image?", "answer": "ubuntu", "image": "ubuntu:24.04"}
    examples = read(folder, row, image_format=None)
    assert any("not read: image" in remark for remark in examples.remarks) and examples.format == "qa"
    with pytest.raises(UserError, match=r"image ubuntu:24.04: no such file .* --images false trains without"):
        read(folder, row)


STRUCT = {"bytes": SCAN, "path": None}
UNREAD = {"bytes of a table": STRUCT, "raw bytes": SCAN, "a list": [STRUCT], "a path": "ct/a.PNG",
          "data URLs": "data:image/png;base64,iVBORw0KGgo="}  # fmt: skip


@pytest.mark.parametrize("value", UNREAD.values(), ids=UNREAD)
def test_images_in_a_column_that_is_not_read(folder, value):
    """They are an error for each model, unless the user wants the texts alone."""
    path = write_parquet(folder / "a.parquet", [PAIR | {"scan": None}, PAIR | {"scan": value}])
    with pytest.raises(UserError, match=r"a.parquet: its column scan holds images, .*--columns image=scan"):
        read_examples(str(path), image_options())
    with pytest.raises(UserError, match=r"its column scan holds images, .*--model_name.*--images false"):
        read_examples(str(path), image_options(image_format=None))
    examples = read_examples(str(path), image_options(image_format=None, texts_alone=True))
    assert len(examples.rendered) == 2 and any("not read: scan" in remark for remark in examples.remarks)


@pytest.mark.parametrize("row", [
    {"scan": {"bytes": b"RIFF1234WAVEfmt ", "path": "a.wav"}}, {"scan": b"ID3"}, {"scan": "why my.png"},
    {"image": "1.png", "scan": "2.png"},
])  # fmt: skip
def test_columns_that_need_not_be_read(folder, row):
    """Those of other things than images, and all columns beside the images of a row."""
    rows = [PAIR | row, PAIR | {"scan": "a text" if isinstance(row["scan"], str) else row["scan"]}]
    examples = read_examples(str(write_parquet(folder / "a.parquet", rows)), image_options())
    assert any("not read: scan" in remark for remark in examples.remarks)
