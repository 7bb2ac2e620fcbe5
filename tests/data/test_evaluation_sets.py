"""data/evaluation_sets.py: which rows are held back, and how others and prompts are put."""

from __future__ import annotations

import json
from itertools import pairwise

import pytest

from data.chat import ChatTemplate
from data.evaluation_sets import (
    make_row_prompt,
    prepare_sets,
    read_evaluation_rows,
    read_in_trained_format,
)
from data.formats import ALPACA, FORMATS, QA
from data.row_reasons import NO_ANSWER
from options.errors import UserError
from options.train import parse
from tests.helpers import chat_templates, small_tokenizers
from tests.helpers.data_files import to_jsonl, write_file
from tests.helpers.evaluation import options
from tests.helpers.images import image_tokenizer, stand_in, write_image
from tests.helpers.small_tokenizers import BYTES


def test_the_split(checkpoints, alpaca_file):
    """Every row is on exactly one side; the seed decides which, and nothing else does."""

    def sets(*more):
        config, _ = parse(options(checkpoints, alpaca_file, *more))
        _, rows, held = prepare_sets(config, BYTES)
        return [sorted(texts(r)) for r in (rows, held.rows)] if held.rows else sorted(texts(rows))

    everything, (kept, held) = sets(), sets("--eval_share", "0.25")
    assert sorted(kept + held) == everything and len(held) == 10
    assert sets("--eval_share", "0.25", "--batch_size", "2") == [kept, held]
    assert sets("--eval_share", "0.25", "--seed", "1") != [kept, held]
    kept_of_four, four = sets("--eval_share", "0.25", "--eval_samples", "4")
    assert kept_of_four == kept and len(four) == 4 and set(four) < set(held)
    assert sets("--eval_dataset", alpaca_file, "--eval_samples", "3")[0] == everything


def test_the_folds(checkpoints, alpaca_file):
    """Each row is evaluated on in one fold of three, and trained on in the other two."""

    def sets(fold, *more):
        config, _ = parse(options(checkpoints, alpaca_file, "--eval_fold", fold, *more))
        _, rows, held = prepare_sets(config, BYTES)
        return sorted(texts(rows)), sorted(texts(held.rows))

    folds = [sets(f"{k}/3") for k in (1, 2, 3)]
    everything = sorted(folds[0][0] + folds[0][1])
    assert sorted(text for _, held in folds for text in held) == everything
    assert all(sorted(kept + held) == everything for kept, held in folds)
    assert sorted(len(held) for _, held in folds) == [13, 13, 14]
    assert sets("1/3", "--seed", "1") != folds[0]
    config, _ = parse(options(checkpoints, alpaca_file, "--eval_fold", "2/3"))
    held, _ = read_evaluation_rows(config, BYTES)  # as evaluate.py reads them
    assert len(held) == len(folds[1][1])


def texts(rows) -> list[str]:
    starts = rows.starts.tolist()
    return [BYTES.decode(rows.tokens[a:b]) for a, b in pairwise(starts)]


def test_dropped_rows_of_several_sets_name_their_set(checkpoints, tmp_path):
    """Row numbers count within their set, for --eval_dataset and --eval_share."""
    a, b = (tmp_path / name for name in ("a.jsonl", "b.jsonl"))
    lines = [json.dumps({"question": "Q", "answer": answer}) for answer in ("yes", "", "no", "")]
    a.write_text("\n".join(lines))
    b.write_text("\n".join(lines[1:]))

    def reasons(*more):
        evaluation = prepare_sets(parse(options(checkpoints, *more))[0], BYTES)[2]
        return {(each.reason, each.first) for each in evaluation.rows.drop_reasons}

    of_a, of_b = (f"{NO_ANSWER}, in {path}" for path in (a, b))
    assert reasons(a, "--eval_dataset", f"{a},{b}") == {(of_a, (2, 4)), (of_b, (1, 3))}
    assert reasons(a, "--eval_dataset", a) == {(NO_ANSWER, (2, 4))}
    long = [tmp_path / name for name in ("long_a.jsonl", "long_b.jsonl")]
    for path in long:
        path.write_text("\n".join(lines * 20))
    held = reasons(f"{long[0]},{long[1]}", "--eval_share", "0.5")
    assert {reason for reason, _ in held} == {f"{NO_ANSWER}, in {path}" for path in long}
    assert all(number % 2 == 0 for _, first in held for number in first)


def test_other_rows_are_put_as_the_data_is(checkpoints, alpaca_file, tmp_path):
    """They have the data's format, which the options keep; rows without its columns have their own format."""
    both = {"question": "Why?", "answer": "So.", "instruction": "Do it.", "output": "Done."}
    (tmp_path / "both.jsonl").write_text(json.dumps(both) + "\n")
    (tmp_path / "qa.jsonl").write_text('{"question": "Who?", "answer": "I."}\n' * 3)
    (tmp_path / "ask.txt").write_text("Why?\n")
    why = QA.format(question="Why?")

    def sets(data, *more):
        given, _ = parse(options(checkpoints, data, *more, "--sample_every", "1"))
        config, _, evaluation = prepare_sets(given, BYTES)
        return config, evaluation.prompts[0].text, evaluation.rows and texts(evaluation.rows)

    config, prompt, held = sets(tmp_path / "qa.jsonl", "--eval_dataset", tmp_path / "both.jsonl")
    assert (config.dataset_format, prompt, held) == ("qa", why, [f"<s>{why}So.</s>"])
    assert read_evaluation_rows(config, BYTES)[0][0].text == f"{why}So."  # evaluate.py, later
    config, prompt, _ = sets(alpaca_file, "--eval_dataset", tmp_path / "both.jsonl")
    assert (config.dataset_format, prompt) == ("alpaca", ALPACA.format(instruction="Do it."))
    for asked in ("ask.txt", "both.jsonl"):
        assert sets(tmp_path / "qa.jsonl", "--sample_prompts", tmp_path / asked)[1] == why
    _, prompt, held = sets(tmp_path / "qa.jsonl", "--eval_dataset", alpaca_file)
    assert prompt == ALPACA.format(instruction="Say red.") and len(held) == 40


def test_other_data_has_the_columns_of_the_runs_recipe(tmp_path):
    """Where it has them: without the recipe's name of the images, rows would be read without them."""
    row = {"image": write_image(tmp_path / "1.png", 16, 16).name, "question": "Is it?", "answer": "Yes."}
    named = {"image_id" if column == "image" else column: value for column, value in row.items()}
    write_file(tmp_path / "data.jsonl", to_jsonl([named]))
    recipe = write_file(tmp_path / "a.toml", 'source = "data.jsonl"\ncolumns = { image = "image_id" }\n')
    tokenizer = image_tokenizer()
    images = {"image_format": stand_in(tokenizer)}

    def read(rows: list[dict], trained_on: str = f"{recipe}*0.9,toy*0.1"):
        path = str(write_file(tmp_path / "other.jsonl", to_jsonl(rows)))
        config, _ = parse(["--dataset", trained_on])
        return read_in_trained_format(config, path, -1, tokenizer, **images).rendered

    of_text = {"question": "Is it?", "answer": "No."}
    assert [len(one.images) for one in read([named, of_text])] == [1, 0]
    assert [len(one.images) for one in read([row])] == [1]
    recipe.unlink()
    with pytest.raises(
        UserError, match=r"a\.toml: .*names of columns of the run, which --columns gives as well"
    ):
        read([named])


def test_columns_that_are_not_read_are_told_of_both_sets(checkpoints, tmp_path):
    """In a line each; one for both where they are the same."""
    row = {"question": "Who?", "answer": "I."}
    for name, more in (("a", {"id": 1}), ("b", {"id": 2}), ("c", {"id": 3, "source": "s"}), ("d", {})):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(row | more) + "\n")

    def told(data, beside):
        given, _ = parse(options(checkpoints, tmp_path / data, "--eval_dataset", tmp_path / beside))
        return prepare_sets(given, BYTES)[2].remarks

    line = "data: columns that are not read: id"
    assert told("a.jsonl", "b.jsonl") == (line,)
    assert told("a.jsonl", "c.jsonl") == (line, f"evaluation {line}, source")
    assert told("d.jsonl", "a.jsonl") == (f"evaluation {line}",)
    assert told("d.jsonl", "d.jsonl") == ()


def test_the_prompt_of_a_row(checkpoints):
    rendered = FORMATS["alpaca"].render({"instruction": "Add.", "output": " 3 "})
    made = make_row_prompt(rendered, BYTES, 1000)
    assert made.text.endswith("Add.\n\n### Response:\n") and made.answer == "3"
    assert made.ids == BYTES(made.text)["input_ids"]
    assert make_row_prompt(rendered, BYTES, 7).ids == made.ids[-7:]
    plain = make_row_prompt(FORMATS["completion"].render({"text": "a b c d e f g h i j"}), BYTES, 1000)
    assert (plain.text, plain.answer) == ("a b c d e f g h", "")


@pytest.mark.parametrize(
    "template, header",
    [("CHATML", "<|im_start|>user\n"), ("LLAMA3", "<|start_header_id|>user<|end_header_id|>\n\n"),
     ("LLAMA2", "<s>[INST] "), ("MISTRAL", "[INST] "), ("GEMMA", "<start_of_turn>user\n"),
     ("QWEN3", "<|im_start|>user\n"), ("R1", "<|User|>")],
)  # fmt: skip
def test_the_header_of_a_question_is_found_in_the_template(template, header):
    chat = ChatTemplate(small_tokenizers.chat_tokenizer(getattr(chat_templates, template), eos="</s>"))
    assert chat.endings.question_header == header


def test_a_printed_prompt_begins_with_its_last_question(checkpoints, tmp_path):
    """Neither with the template's preamble nor with earlier turns; a long one loses its middle."""
    tokenizer = small_tokenizers.chat_tokenizer(chat_templates.CHATML)
    turns = [
        ("system", "Be brief. " * 50),
        ("user", "First?"),
        ("assistant", "Yes."),
        ("user", "And\n\nnow?"),
    ]
    messages = [{"role": role, "content": text} for role, text in turns]
    rows = {
        "chat": {"messages": [*messages, {"role": "assistant", "content": "Also."}]},
        "alone": {"messages": [messages[1], {"role": "assistant", "content": "Yes."}]},
        "alpaca": {"instruction": "Say red.", "output": "red"},
        "guanaco": {"text": "### Human: a### Assistant: b### Human: why?### Assistant: c"},
        "qa": {"question": "x" * 100 + "y" * 100, "answer": "z"},
    }

    def printed(name: str, *more) -> str:
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(rows[name]) + "\n")
        argv = options(checkpoints, tmp_path / f"{name}.jsonl", "--sample_every", "1", *more)
        argv += ["--context_length", "2000"]
        (prompt,) = prepare_sets(parse(argv)[0], tokenizer)[2].prompts
        return prompt.describe()

    (tmp_path / "ask.txt").write_text("Why?\n")
    asked = "<|im_start|>user {}<|im_end|> <|im_start|>assistant"
    assert printed("chat") == asked.format("And now?")
    assert printed("alone") == asked.format("First?")
    assert printed("chat", "--sample_prompts", tmp_path / "ask.txt") == asked.format("Why?")
    assert printed("alpaca") == "### Instruction: Say red. ### Response:"
    assert printed("guanaco") == "### Human: why?### Assistant:"
    assert printed("alpaca", "--sample_prompts", tmp_path / "guanaco.jsonl").startswith("### Human: why?")
    shown = f"### Question: {'x' * 43} ... {'y' * 45} ### Answer:"
    assert printed("qa") == shown and len(shown) == 119
