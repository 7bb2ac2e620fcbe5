"""--columns, --text_column and a recipe's `columns`: the tokens are those of rows with the format's names."""

from __future__ import annotations

import pytest

from checkpoints.same_run import is_fixed
from data.columns import ColumnNames
from data.evaluation_sets import prepare_sets, read_evaluation_rows, read_in_trained_format
from data.formats import QA
from data.mixtures import read_mixture
from data.reading import ReadingOptions
from data.tokenizing import tokenize_dataset
from options import evaluate
from options.columns import parse_columns
from options.config import dump_yaml
from options.errors import UserError
from options.train import parse
from tests.helpers import chat_templates
from tests.helpers.data_files import to_jsonl, write_file
from tests.helpers.evaluation import options
from tests.helpers.small_tokenizers import BYTES, chat_tokenizer

NAMES = "question=prompt,answer=reply"
ROW = {"prompt": "Why?", "reply": "So."}


def tokenize(tmp_path, row: dict, columns: str | None = None, text_column: str | None = None, **more) -> str:
    """Return the text of the tokens of a row, with what is learned, which may end it, in brackets."""
    path = write_file(tmp_path / "rows.jsonl", to_jsonl([row]))
    return read(path, columns, text_column, **more)


def read(path, columns=None, text_column=None, dataset_format: str = "auto", tokenizer=BYTES) -> str:
    names = ColumnNames.from_options(columns, text_column)
    made = tokenize_dataset(
        str(path), ReadingOptions(tokenizer, format=dataset_format, context_length=1000, columns=names)
    )
    learned = tokenizer.decode(made.tokens[made.learned])
    return f"{tokenizer.decode(made.tokens).removesuffix(learned)}[{learned}]"


ANSWERED = f"<s>{QA.format(question='Why?')}[So.</s>]"
BOTH = {"prompt": "Why?", "completion": "So.", "question": "no", "answer": "no"}


@pytest.mark.parametrize("row, columns", [
    (ROW, NAMES),
    (ROW, " question = prompt , answer = reply "),
    (ROW | {"text": "### Assistant: no", "messages": "no"}, NAMES),  # other formats do not come into question
    (BOTH, "question=prompt,answer=completion"),
    ({"question": "So.", "answer": "Why?"}, "question=answer,answer=question"),
    ({"question": "Why?", "reply": "So."}, "answer=reply"),
])  # fmt: skip
def test_columns_are_read_under_the_names_of_the_format(row, columns, tmp_path):
    assert tokenize(tmp_path, row, columns) == ANSWERED


def test_an_optional_column(tmp_path):
    """Dolly's rows: instruction, context, response."""
    row = {"instruction": "Add.", "context": "1 2", "response": "3"}
    text = tokenize(tmp_path, row, "output=response,input=context")
    assert text.endswith("### Instruction:\nAdd.\n\n### Input:\n1 2\n\n### Response:\n[3</s>]")


def test_the_system_prompt_of_openorca(tmp_path):
    tokenizer = chat_tokenizer(chat_templates.CHATML)
    row = {"system_prompt": "S", "question": "Why?", "response": "So."}
    text = tokenize(tmp_path, row, "system=system_prompt", tokenizer=tokenizer)
    turns = [("system", "S"), ("user", "Why?"), ("assistant", "So.")]
    messages = [{"role": role, "content": content} for role, content in turns]
    assert text == tokenizer.apply_chat_template(messages, tokenize=False) + "[So.<|im_end|>]"


@pytest.mark.parametrize("row, text", [
    ({"body": " Once\nupon"}, "<s>[ Once\nupon</s>]"),
    ({"body": "### Human: Hi### Assistant: Yo", "text": "no"}, "<s>### Human: Hi### Assistant:[ Yo</s>]"),
    ({"body": "Once", "question": "no", "answer": "no"}, "<s>[Once</s>]"),
])  # fmt: skip
def test_a_column_of_text(row, text, tmp_path):
    assert tokenize(tmp_path, row, None, "body") == tokenize(tmp_path, row, "text=body") == text


LACKING = {  # rows of which the last one lacks a named column, the columns, the error
    "its own text": (
        [{"text": "META1", "body": "real"}, {"text": "META2"}],
        {"text": "body"},
        r":2: column body \({}\) is missing or empty$",
    ),
    "its own question": (
        [ROW, {"question": "META", "answer": "META"}],
        {"question": "prompt", "answer": "reply"},
        r":2: columns prompt \({}\), reply \({}\) are missing or empty$",
    ),
    "names that change places": (
        [{"question": "So.", "answer": "Why?"}, {"question": "So."}],
        {"question": "answer", "answer": "question"},
        r":2: column answer \({}\) is missing or empty$",
    ),
    "a null": (
        [{"text": "META1", "body": "real", "id": 1}, {"text": "META2", "body": None, "id": 2}],
        {"text": "body"},
        r":2: column body \({}\) is missing or empty; columns with content: id$",
    ),
}


@pytest.mark.parametrize("case", LACKING)
def test_a_row_without_the_named_column_is_refused(case, tmp_path):
    """Not the column of the format's own name is read, which is another one."""
    rows, columns, words = LACKING[case]
    path = write_file(tmp_path / "rows.jsonl", to_jsonl(rows))
    given = [f"{ours}={theirs}" for ours, theirs in columns.items()]
    with pytest.raises(UserError, match=words.format(*(f"--columns {each}" for each in given))):
        read(path, ",".join(given))
    quoted = ", ".join(f'{ours} = "{theirs}"' for ours, theirs in columns.items())
    recipe = write_file(tmp_path / "r.toml", f'source = "rows.jsonl"\ncolumns = {{ {quoted} }}\n')
    with pytest.raises(UserError, match=words.format(*["`columns` of the recipe"] * 2)):
        read(recipe)


def test_an_optional_column_of_a_row_is_not_replaced_by_another(tmp_path):
    rows = [{"question": "Why?", "answer": "So.", "ctx": "C"},
            {"question": "Why?", "answer": "So.", "context": "META"}]  # fmt: skip
    text = read(write_file(tmp_path / "rows.jsonl", to_jsonl(rows)), "context=ctx")
    assert "META" not in text and text.count("### Context:\nC\n") == 1


def test_the_names_are_for_every_set_of_a_mixture(tmp_path):
    write_file(tmp_path / "a.jsonl", to_jsonl([{"q": "Why?", "a": "So."}]))
    write_file(tmp_path / "b.jsonl", to_jsonl([ROW]))
    options = ReadingOptions(BYTES, columns=ColumnNames.from_options("question=q,answer=a", None))
    with pytest.raises(
        UserError, match=r"b\.jsonl: .* no column q; .*every set of the mixture, and a recipe"
    ):
        read_mixture(f"{tmp_path}/a.jsonl,{tmp_path}/b.jsonl", options)
    recipe = 'source = "{}.jsonl"\ncolumns = {{ question = "{}", answer = "{}" }}\n'
    write_file(tmp_path / "a.toml", recipe.format("a", "q", "a"))
    write_file(tmp_path / "b.toml", recipe.format("b", "prompt", "reply"))
    mixture = read_mixture(f"{tmp_path}/a.toml,{tmp_path}/b.toml", ReadingOptions(BYTES))
    assert {row.text for each in mixture.sets for row in each.rendered} == {
        QA.format(question="Why?") + "So."
    }


def test_options_count_more_than_a_recipe(tmp_path):
    write_file(tmp_path / "rows.jsonl", to_jsonl([ROW | {"ask": "no"}]))
    for columns in ('question = "prompt", answer = "reply"', 'question = "ask", answer = "reply"'):
        recipe = f'source = "rows.jsonl"\ncolumns = {{ {columns} }}\n'
        path = write_file(tmp_path / "mine.toml", recipe)
        assert read(path, "question=prompt") == ANSWERED
    of_recipe = ColumnNames.from_recipe({"question": "ask", "answer": "reply"})
    names = ColumnNames.from_options("question=prompt", None).over(of_recipe).names  # generate.py --prompts
    assert names == {"question": "prompt", "answer": "reply"}
    recipe = recipe.replace("ask", "prompt")
    assert read(write_file(path, recipe)) == ANSWERED
    write_file(path, recipe.replace("question", "questoin"))
    with pytest.raises(UserError, match=r"`columns` of the recipe: no format reads a column questoin"):
        read(path)


def test_options_name_columns_of_the_data_not_of_its_recipe(tmp_path):
    write_file(tmp_path / "rows.jsonl", to_jsonl([{"ask": "Why?", "question": "So.", "answer": "META"}]))
    recipe = 'source = "rows.jsonl"\ncolumns = { question = "ask" }\n'
    assert read(write_file(tmp_path / "mine.toml", recipe), "answer=question") == ANSWERED


@pytest.mark.parametrize("text, words", [
    ("question", "'question' does not name two columns; expected .* like question=prompt,answer=reply"),
    ("question=", "'question=' does not name two columns"),
    ("question=a,", "'' does not name two columns"),
    ("question=a,question=b", "names the column question twice: a and b"),
])  # fmt: skip
def test_malformed_columns(text, words):
    with pytest.raises(UserError, match=f"^--columns: {words}"):
        parse(["--columns", text])
    assert parse_columns("a=b=c, d = e f") == {"a": "b=c", "d": "e f"}


def test_the_text_is_named_once():
    with pytest.raises(UserError, match=r"^--text_column: is text=NAME of --columns"):
        parse(["--columns", "text=a", "--text_column", "b"])
    with pytest.raises(UserError, match=r"^--text_column: needs the name of a column"):
        parse(["--text_column", " "])


def test_columns_go_into_config_yaml(tmp_path):
    config, _ = parse(["--columns", NAMES.replace(",", " , "), "--output_dir", "x"])
    assert config.columns == NAMES
    path = write_file(tmp_path / "config.yaml", dump_yaml(config))
    assert parse(["--config", str(path)])[0] == config
    write_file(path, "columns: [question=prompt, answer=reply]\n")
    assert parse(["--config", str(path)])[0].columns == NAMES
    write_file(path, "columns: {question: prompt}\n")
    with pytest.raises(UserError, match="is not like question=prompt,answer=reply"):
        parse(["--config", str(path)])
    assert not is_fixed("columns") and not is_fixed("text_column")  # the rows themselves are compared


BESIDE = {  # rows beside the data, which has the columns of ROW
    "the data's names": ROW,
    "the format's names": {"question": "Why?", "answer": "So."},
    "some of each": {"prompt": "Why?", "answer": "So."},
}


@pytest.mark.parametrize("case", BESIDE)
def test_rows_beside_the_data_have_its_names_or_the_format_s(case, checkpoints, tmp_path):
    data = write_file(tmp_path / "rows.jsonl", to_jsonl([{"prompt": "Who?", "reply": "I."}]))
    beside = write_file(tmp_path / "beside.jsonl", to_jsonl([BESIDE[case]]))
    more = ("--eval_dataset", beside, "--sample_prompts", beside, "--sample_every", "1", "--columns", NAMES)
    config, _ = parse(options(checkpoints, data, *more))
    config, rows, evaluation = prepare_sets(config, BYTES)
    assert BYTES.decode(rows.tokens) == f"<s>{QA.format(question='Who?')}I.</s>"
    assert BYTES.decode(evaluation.rows.tokens) == f"<s>{QA.format(question='Why?')}So.</s>"
    assert evaluation.prompts[0].text == QA.format(question="Why?")
    for rendered in (
        read_evaluation_rows(config, BYTES)[0],  # evaluate.py
        read_in_trained_format(config, str(beside), -1, BYTES).rendered,  # evaluate.py --dataset
    ):
        assert [one.text for one in rendered] == [QA.format(question="Why?") + "So."]


def test_a_recipe_beside_the_data_names_its_own_columns(checkpoints, tmp_path):
    data = write_file(tmp_path / "rows.jsonl", to_jsonl([ROW]))
    write_file(tmp_path / "beside.jsonl", to_jsonl([{"ask": "Why?", "prompt": "no", "reply": "So."}]))
    recipe = 'source = "beside.jsonl"\ncolumns = { question = "ask" }\n'
    beside = write_file(tmp_path / "mine.toml", recipe)
    config, _ = parse(options(checkpoints, data, "--eval_dataset", beside, "--columns", NAMES))
    _, _, evaluation = prepare_sets(config, BYTES)
    assert BYTES.decode(evaluation.rows.tokens) == f"<s>{QA.format(question='Why?')}So.</s>"
    assert evaluation.remarks == ("evaluation data: columns that are not read: prompt",)


def test_evaluate_takes_columns_of_its_own(tmp_path):
    assert evaluate.parse(["RUN", "--dataset", "x.csv", "--columns", NAMES]).columns == NAMES
    for option in ("--columns=a=b", "--text_column=a"):
        with pytest.raises(UserError, match=f"^{option.split('=')[0]}: has no effect without --dataset"):
            evaluate.parse(["RUN", option])
    with pytest.raises(UserError, match=r"^--text_column: is text=NAME"):
        evaluate.parse(["RUN", "--dataset", "x.csv", "--columns", "text=a", "--text_column", "b"])
