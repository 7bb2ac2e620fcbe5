"""data/schemas.py: rows in other columns give the tokens and targets of the same conversation or text."""

from __future__ import annotations

import json

import pytest

from data.evaluation_sets import prepare_sets
from data.examples import read_examples
from data.formats import ALPACA, ALPACA_INPUT, FORMATS, RenderContext, check_row
from data.reading import ReadingOptions
from data.tokenizing import tokenize_dataset
from options.errors import UserError
from options.train import parse
from tests.helpers import chat_templates as templates
from tests.helpers.data_files import to_jsonl, write_file, write_parquet
from tests.helpers.evaluation import options
from tests.helpers.small_tokenizers import BYTES, chat_tokenizer

CHATML = chat_tokenizer(templates.CHATML)
QWEN = chat_tokenizer(templates.trl_template("qwen2_5"))
TOOL = {"type": "function", "function": {"name": "f", "description": "F.", "parameters": {
    "type": "object", "properties": {"city": {"type": "string"}}}}}  # fmt: skip
CALL = {"name": "f", "arguments": {"city": "Oslo"}}


def tokenize(tmp_path, rows: list[dict], tokenizer, dataset_format: str = "auto") -> tuple[list[int], str]:
    """Return (the token ids of all rows, the text of those that are learned)."""
    path = write_file(tmp_path / "rows.jsonl", to_jsonl(rows))
    made = tokenize_dataset(
        str(path), ReadingOptions(tokenizer, format=dataset_format, context_length=10_000)
    )
    return made.tokens.tolist(), tokenizer.decode(made.tokens[made.learned])


def talk(*turns: tuple[str, str], **more) -> list[dict]:
    return [{"role": role, "content": content} | more for role, content in turns]


def share(*turns: tuple[str, str]) -> list[dict]:
    return [{"from": name, "value": value} for name, value in turns]


def template_ids(tokenizer, messages, **more) -> list[int]:
    return tokenizer.apply_chat_template(messages, **more)["input_ids"]


TALK = talk(("system", "S"), ("user", "Hi"), ("assistant", "Yo"), ("user", "Bye"), ("assistant", "Ciao"))
SHAREGPT = {
    "human and gpt": {
        "conversations": share(
            ("system", "S"), ("human", "Hi"), ("gpt", "Yo"), ("human", "Bye"), ("gpt", "Ciao")
        )
    },
    "other names": {
        "conversations": share(
            ("system", "S"), ("User", "Hi"), ("chatgpt", "Yo"), ("prompter", "Bye"), ("bard", "Ciao")
        )
    },
    "a column system": {
        "conversations": share(("human", "Hi"), ("gpt", "Yo"), ("human", "Bye"), ("assistant", "Ciao")),
        "system": "S",
    },
    "its own system": {"conversations": TALK, "system": "another"},
    "role and content": {"conversations": TALK},
    "a column system beside messages": {"messages": TALK[1:], "system": "S"},
    "its own system in messages": {"messages": TALK, "system": "another"},
    "in messages": {
        "messages": share(("system", "S"), ("human", "Hi"), ("gpt", "Yo"), ("human", "Bye"), ("bing", "Ciao"))
    },
}


@pytest.mark.parametrize(
    "tokenizer", [CHATML, chat_tokenizer(templates.LLAMA3, "<|eot_id|>")], ids=["chatml", "llama3"]
)
@pytest.mark.parametrize("case", SHAREGPT)
def test_sharegpt_gives_the_tokens_of_messages(case, tokenizer, tmp_path):
    ids, learned = tokenize(tmp_path, [SHAREGPT[case]], tokenizer)
    assert ids == template_ids(tokenizer, TALK)
    assert learned == f"Yo{tokenizer.eos_token}Ciao{tokenizer.eos_token}"


def test_sharegpt_with_calls(tmp_path):
    """Calls are learned, results are not."""
    turns = [
        ("human", "Weather?"),
        ("function_call", json.dumps(CALL)),
        ("observation", "4"),
        ("gpt", "Cold"),
    ]
    row = {"conversations": share(*turns), "tools": json.dumps([TOOL])}
    called = {"role": "assistant", "tool_calls": [{"type": "function", "function": CALL}]}
    messages = [*talk(("user", "Weather?")), called, *talk(("tool", "4"), ("assistant", "Cold"))]
    ids, learned = tokenize(tmp_path, [row], QWEN)
    assert ids == template_ids(QWEN, messages, tools=[TOOL])
    call = '<tool_call>\n{"name": "f", "arguments": {"city": "Oslo"}}\n</tool_call><|im_end|>'
    assert learned == f"{call}Cold<|im_end|>"
    turns[1] = ("function_call", json.dumps([CALL, CALL]))
    called["tool_calls"] *= 2
    ids, _ = tokenize(tmp_path, [row | {"conversations": share(*turns)}], QWEN)
    assert ids == template_ids(QWEN, messages, tools=[TOOL])


def test_sharegpt_in_a_table_and_flags(tmp_path):
    """A parquet file gives every message the keys of all. A turn of weight 0 is not learned."""
    turns = share(("human", "Hi"), ("gpt", "Yo"), ("human", "Bye"), ("gpt", "Ciao"))
    turns[1]["weight"] = 0
    path = write_parquet(tmp_path / "rows.parquet", [{"conversations": turns}])
    made = tokenize_dataset(str(path), ReadingOptions(CHATML, context_length=1000))
    assert made.tokens.tolist() == template_ids(CHATML, TALK[1:])
    assert CHATML.decode(made.tokens[made.learned]) == "Ciao<|im_end|>"


@pytest.mark.parametrize("turns, words", [
    (share(("human", "Hi"), ("alien", "Yo")), "message 2: from is alien; known are system, human"),
    ([{"from": "human"}], "message 1 has no value, only from; a message of ShareGPT has"),
    ([{"from": 1, "value": "Hi"}], "message 1: its from is a number"),
    ([{"from": "human", "value": ["Hi"]}], "message 1: its value is a list"),
    (share(("human", "Hi"), ("tool_call", "f(1)")), "message 2: its value is a text; expected a call"),
    (share(("human", "Hi"), ("function_call", '[{"arguments": {}}]')), "expected a call as JSON"),
    ("Hi", "conversations is a text; expected a list of messages"),
    ([], "conversations is empty; expected a list of messages"),
    (share(("human", "Hi"), ("system", "Yo")), "no message has the role assistant, only user, system"),
])  # fmt: skip
def test_conversations_that_are_refused(turns, words, tmp_path):
    with pytest.raises(UserError, match=rf"^--dataset .*rows\.jsonl.*{words}"):
        tokenize(tmp_path, [{"conversations": turns}], CHATML)


@pytest.mark.parametrize("tokenizer", [CHATML, QWEN, chat_tokenizer(templates.LLAMA3, "<|eot_id|>")])
def test_of_prompt_and_completion_only_the_completion_is_learned(tokenizer, tmp_path):
    """TRL's rule: the tokens after those of the prompt with the generation prompt, to the end of the turn."""
    ids, learned = tokenize(tmp_path, [{"prompt": TALK[:4], "completion": TALK[4:]}], tokenizer)
    beside = {"prompt": TALK[1:4], "completion": TALK[4:], "system": "S"}
    assert tokenize(tmp_path, [beside], tokenizer) == (ids, learned)
    asked = template_ids(tokenizer, TALK[:4], add_generation_prompt=True)
    assert ids == template_ids(tokenizer, TALK) and ids[: len(asked)] == asked
    assert learned == tokenizer.decode(ids[len(asked) :]).rstrip() == f"Ciao{tokenizer.eos_token}"


def test_a_completion_with_a_call_and_its_result(tmp_path):
    called = {"role": "assistant", "tool_calls": [{"type": "function", "function": CALL}]}
    completion = [called, *talk(("tool", "4"), ("assistant", "Cold"))]
    ids, learned = tokenize(tmp_path, [{"prompt": TALK[:4], "completion": completion, "tools": [TOOL]}], QWEN)
    assert ids == template_ids(QWEN, [*TALK[:4], *completion], tools=[TOOL])
    assert learned.startswith("<tool_call>") and learned.endswith("Cold<|im_end|>") and "4" not in learned


@pytest.mark.parametrize("tokenizer", [BYTES, CHATML], ids=["base", "chat"])
def test_prompt_and_completion_as_texts_are_one_text(tokenizer, tmp_path):
    """With a chat template and without: no template, nothing between them, and EOS after the completion."""
    ids, learned = tokenize(tmp_path, [{"prompt": "2+2=", "completion": " 4"}], tokenizer)
    assert ids == [*tokenizer("2+2= 4")["input_ids"], tokenizer.eos_token_id]
    assert learned == f" 4{tokenizer.eos_token}"


PAIRS = [("prompt", "response"), ("query", "answer"), ("query", "response"), ("question", "response"),
         ("input", "output")]  # fmt: skip


@pytest.mark.parametrize("question, answer", PAIRS)
def test_pairs_are_two_turns_of_the_chat_template(question, answer, tmp_path):
    turns = talk(("user", "2+2?"), ("assistant", "4"))
    ids, learned = tokenize(tmp_path, [{question: "2+2?", answer: 4}], CHATML)
    assert ids == template_ids(CHATML, turns) and learned == "4<|im_end|>"
    ids, _ = tokenize(tmp_path, [{question: "2+2?", answer: "4", "system": "S"}], CHATML)
    assert ids == template_ids(CHATML, [*talk(("system", "S")), *turns])


@pytest.mark.parametrize("question, answer", PAIRS)
def test_pairs_without_a_chat_template_are_a_question_and_its_answer(question, answer, tmp_path):
    ids, learned = tokenize(tmp_path, [{question: "2+2?", answer: 4}], BYTES)
    assert ids == [*BYTES("### Question:\n2+2?\n\n### Answer:\n4")["input_ids"], BYTES.eos_token_id]
    assert learned == "4</s>"


def test_a_line_says_what_the_tokenizer_decided(tmp_path):
    path = write_file(tmp_path / "rows.jsonl", to_jsonl([{"input": "2+2?", "output": "4"}]))
    for tokenizer, name, reason in ((CHATML, "chat", "a"), (BYTES, "qa", "no")):
        told = f"data: columns input and output are read as {name}, since the tokenizer has {reason} chat"
        examples = read_examples(str(path), ReadingOptions(tokenizer, context_length=100))
        assert examples.format == name and examples.remarks[0].startswith(told)
        for more in ({"format": name}, {"preferred": name}):  # named, or the format of the training
            other = read_examples(str(path), ReadingOptions(tokenizer, context_length=100, **more))
            assert other.rendered == examples.rendered and told not in str(other.remarks)


BY_NAME = {  # the format that is named, a row: the turns or the text that it becomes
    "alpaca": ("chat", {"instruction": "Add.", "input": "1 2", "output": "3"}, "Add.\n1 2"),
    "alpaca without input": ("chat", {"instruction": "Add.", "output": "3"}, "Add."),
    "qa": ("chat", {"question": "Sum?", "context": "1 2", "answer": "3"}, "1 2\n\nSum?"),
    "texts": ("chat", {"prompt": "Sum?", "completion": "3"}, "Sum?"),
    "one text": ("prompt_completion", {"question": "Sum?", "answer": "3"}, "Sum?3"),
    "a question": ("qa", {"prompt": "Sum?", "completion": "3"}, "### Question:\nSum?\n\n### Answer:\n3"),
}


@pytest.mark.parametrize("case", BY_NAME)
def test_the_format_can_be_named(case, tmp_path):
    name, row, text = BY_NAME[case]
    ids, learned = tokenize(tmp_path, [row], CHATML, name)
    eos = CHATML.eos_token
    assert learned == f"3{eos}"
    turns = talk(("user", text), ("assistant", "3"))
    assert ids == (template_ids(CHATML, turns) if name == "chat" else CHATML(text + eos)["input_ids"])


@pytest.mark.parametrize("rows, words", [
    ([{"prompt": "a", "completion": "b"}, {"prompt": "a", "response": "b"}],
     "1 prompt_completion .*rows.jsonl:1.*, 1 chat of prompt, response .*rows.jsonl:2"),
    ([{"conversations": TALK}, {"messages": TALK}], "1 chat of conversations .*1 chat "),
    ([{"prompt": TALK[:4], "completion": TALK[4:]}, {"prompt": "a", "completion": "b"}],
     "1 chat of prompt, completion .*1 prompt_completion"),
    ([{"input": "a", "output": "b"}, {"instruction": "a", "input": "a", "output": "b"}], "1 alpaca"),
])  # fmt: skip
def test_rows_of_several_forms_are_refused(rows, words, tmp_path):
    with pytest.raises(UserError, match=rf"its rows are of different formats: .*{words}.*--dataset_format"):
        tokenize(tmp_path, rows, CHATML)


def test_a_row_that_lacks_its_answer_is_named_with_its_own_column(tmp_path):
    with pytest.raises(UserError, match=r"rows\.jsonl:2: column response is missing or empty"):
        tokenize(tmp_path, [{"prompt": "a", "response": "b"}, {"prompt": "a", "response": None}], CHATML)
    with pytest.raises(UserError, match="column completion is a text; prompt and completion must both be"):
        tokenize(tmp_path, [{"prompt": TALK[:2], "completion": "b"}], CHATML)


@pytest.mark.parametrize("row", [
    {"conversations": share(("human", "Hi"), ("gpt", "Yo"))},
    {"prompt": "Hi"},
    {"question": "Hi"},
    {"instruction": "Hi", "output": "Yo"},
    {"prompt": talk(("user", "Hi"))},
])  # fmt: skip
def test_a_prompt_may_have_any_columns_of_the_format(row):
    """The prompts of generate.py: with an answer, which is left out, or without."""
    chat = FORMATS["chat"]
    text = chat.prompt(check_row(row, chat, "here", needs_answer=False), RenderContext(CHATML))
    asked = talk(("user", "Hi"))
    assert text == CHATML.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)


def test_a_line_counts_the_rows_with_two_systems(tmp_path):
    rows = [{"messages": TALK, "system": "another"}, {"messages": TALK, "system": "S"},
            {"messages": TALK[1:], "system": "S"}]  # fmt: skip
    examples = read_examples(str(write_file(tmp_path / "a.jsonl", to_jsonl(rows))), ReadingOptions(CHATML))
    told = "data: 1 of 3 rows begin with a system message of their own; their column system is not read"
    assert examples.remarks == (told,)


QUESTIONS = {  # rows without an answer: the turns that they ask
    "a context": ({"question": "q9", "context": "c9"}, [("user", "c9\n\nq9")]),
    "a null": ({"question": "q9", "context": "c9", "answer": None}, [("user", "c9\n\nq9")]),
    "all columns": (
        {"question": "q9", "context": "c9", "system": "S"},
        [("system", "S"), ("user", "c9\n\nq9")],
    ),
    "an input": ({"instruction": "i", "input": "x", "system": "S"}, [("system", "S"), ("user", "i\nx")]),
    "a system": ({"prompt": "p", "system": "S"}, [("system", "S"), ("user", "p")]),
    "messages": ({"prompt": talk(("user", "p")), "system": "S"}, [("system", "S"), ("user", "p")]),
    "an answer": ({"question": "q", "response": "r", "context": "c"}, [("user", "q")]),
    "messages first": ({"messages": talk(("user", "m")), "question": "q", "context": "c"}, [("user", "m")]),
}


@pytest.mark.parametrize("case", QUESTIONS)
def test_a_question_has_all_columns_that_training_reads(case, checkpoints, tmp_path):
    """The prompts of generate.py, and of --sample_prompts."""
    row, turns = QUESTIONS[case]
    chat, asked = FORMATS["chat"], talk(*turns)
    text = CHATML.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
    assert chat.prompt(check_row(row, chat, "here", needs_answer=False), RenderContext(CHATML)) == text
    data = write_file(tmp_path / "a.jsonl", to_jsonl([{"messages": TALK}]))
    prompts = write_file(tmp_path / "b.jsonl", to_jsonl([row]))
    more = ("--sample_every", "1", "--sample_prompts", prompts)
    _, _, evaluation = prepare_sets(parse(options(checkpoints, data, *more))[0], CHATML)
    assert [prompt.text for prompt in evaluation.prompts] == [text]
    assert evaluation.prompts[0].ids == template_ids(CHATML, asked, add_generation_prompt=True)


@pytest.mark.parametrize("row, text", [
    ({"instruction": "Add.", "input": "1 2"}, ALPACA_INPUT.format(instruction="Add.", input="1 2")),
    ({"instruction": "Add.", "output": ""}, ALPACA.format(instruction="Add.")),
])  # fmt: skip
def test_sample_prompts_without_answers_beside_some_with_one(row, text, checkpoints, tmp_path):
    full = {"instruction": "Say.", "input": "", "output": "Yo"}
    data = write_file(tmp_path / "a.jsonl", to_jsonl([full]))
    prompts = write_file(tmp_path / "b.jsonl", to_jsonl([row, full]))
    more = ("--sample_every", "1", "--sample_prompts", prompts)
    _, _, evaluation = prepare_sets(parse(options(checkpoints, data, *more))[0], BYTES)
    found = [(prompt.text, prompt.answer or "") for prompt in evaluation.prompts]
    assert found == [(text, ""), (ALPACA.format(instruction="Say."), "Yo")]


def test_other_rows_of_a_chat_run_are_asked_through_its_template(checkpoints, tmp_path):
    """The recorded format is that of the run, whatever columns the rows beside its data have."""
    write_file(tmp_path / "a.jsonl", to_jsonl([{"conversations": share(("human", "Hi"), ("gpt", "Yo"))}]))
    write_file(tmp_path / "b.jsonl", to_jsonl([{"question": "Why?", "answer": "So"}]))
    beside = ("--eval_dataset", tmp_path / "b.jsonl", "--sample_every", "1")
    config, _ = parse(options(checkpoints, tmp_path / "a.jsonl", *beside))
    config, _, evaluation = prepare_sets(config, CHATML)
    assert config.dataset_format == "chat"
    turns = talk(("user", "Why?"), ("assistant", "So"))
    assert evaluation.rows.tokens.tolist() == template_ids(CHATML, turns)
    assert evaluation.prompts[0].ids == template_ids(CHATML, turns[:1], add_generation_prompt=True)
