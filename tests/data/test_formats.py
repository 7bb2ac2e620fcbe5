"""data/formats.py: every format's exact text and the exact characters that are learned."""

from __future__ import annotations

import jinja2
import pytest

from benchmarks.make_checkpoint import byte_tokenizer
from data.chat import ChatTemplate
from data.encoding import encode_prompt
from data.formats import FORMATS, GUANACO_MARKERS, RenderContext, check_row, continue_dialogue
from data.tokenizing import tokenize
from options.config import DATASET_FORMATS
from options.errors import UserError
from tests.helpers import chat_templates as templates
from tests.helpers import small_tokenizers
from tests.helpers.fsdp_qlora import tokens_and_labels
from tests.helpers.small_tokenizers import chat_tokenizer

TOKENIZER = byte_tokenizer()


def render(name: str, row: dict, tokenizer=TOKENIZER, markers=GUANACO_MARKERS):
    return FORMATS[name].render(check_row(row, FORMATS[name], "here"), RenderContext(tokenizer, markers))


def learned(rendered) -> list[str]:
    return [rendered.text[start:end] for start, end in rendered.learned]


def learned_tokens(rendered, tokenizer) -> str:
    """What the targets say, from the tokens that training sees."""
    rows = tokenize([rendered], tokenizer, 10_000, "here")
    return tokenizer.decode(rows.tokens[rows.learned])


def talk(*contents: str, system: str | None = None) -> dict:
    """A conversation whose turns alternate, beginning with the user's."""
    messages = [{"role": "system", "content": system}] if system is not None else []
    roles = ("user", "assistant")
    return {
        "messages": messages + [{"role": roles[i % 2], "content": text} for i, text in enumerate(contents)]
    }


ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the"
    " request."
    "\n\n### Instruction:\nName a {city}.\n\n### Response:\nParis {{}}"
)
ALPACA_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context."
    " Write a"
    " response that appropriately completes the request.\n\n### Instruction:\nName a {city}."
    "\n\n### Input:\nin"
    " France\n\n### Response:\nParis {{}}"
)
CITY = {"instruction": "Name a {city}.", "output": "Paris {{}}"}
SQL = {"question": "How many?", "answer": "SELECT 1", "context": "CREATE TABLE t (x INT)"}
EXACT = {
    "alpaca": ("alpaca", CITY, ALPACA, "Paris {{}}"),
    "alpaca, blank input": ("alpaca", CITY | {"input": " \n"}, ALPACA, "Paris {{}}"),
    "alpaca, null input": ("alpaca", CITY | {"input": None}, ALPACA, "Paris {{}}"),
    "alpaca with input": ("alpaca", CITY | {"input": "in France"}, ALPACA_INPUT, "Paris {{}}"),
    "alpaca_stanford": ("alpaca_stanford", CITY, ALPACA.replace(":\nParis", ":Paris"), "Paris {{}}"),
    "alpaca_stanford, null input": (
        "alpaca_stanford",
        CITY | {"input": None},
        ALPACA.replace(":\nParis", ":Paris"),
        "Paris {{}}",
    ),
    "alpaca_stanford with input": (
        "alpaca_stanford",
        CITY | {"input": "in France"},
        ALPACA_INPUT.replace(":\nParis", ":Paris"),
        "Paris {{}}",
    ),
    "qa": ("qa", {"question": "2+2?", "answer": 4}, "### Question:\n2+2?\n\n### Answer:\n4", "4"),
    "qa with context": (
        "qa",
        SQL,
        "### Context:\nCREATE TABLE t (x INT)\n\n### Question:\nHow many?\n\n### Answer:\nSELECT 1",
        "SELECT 1",
    ),
    "completion": ("completion", {"text": " Once\nupon "}, " Once\nupon ", " Once\nupon "),
}


@pytest.mark.parametrize("case", EXACT)
def test_one_answer(case):
    name, row, text, answer = EXACT[case]
    rendered = render(name, row)
    assert rendered.text == text
    assert learned(rendered) == [answer]
    assert learned_tokens(rendered, TOKENIZER) == answer + "</s>"


STANFORD_ROWS = [
    {"instruction": "Name a {city}.", "output": "Paris {{}}", "input": ""},
    {"instruction": "Name a city.", "output": "Paris", "input": "in France"},
    {"instruction": "Name a city.", "output": " 4\n5", "input": " "},
    {"instruction": "Name a city.", "output": '"Paris"'},
]


@pytest.mark.parametrize("kind", ["BYTES", "trimming", "byte_fallback", "unigram"])
@pytest.mark.parametrize("row", STANFORD_ROWS, ids=lambda row: row["output"])
def test_stanfords_prompt_gives_fsdp_qloras_tokens_and_labels(kind, row):
    made = getattr(small_tokenizers, kind)
    tokenizer = made if kind == "BYTES" else made()
    ids, labels = tokens_and_labels(row, tokenizer)
    rows = tokenize([render("alpaca_stanford", row, tokenizer)], tokenizer, 10_000, "here")
    assert rows.tokens.tolist() == ids
    assert [t if learned else -100 for t, learned in zip(ids, rows.learned.tolist(), strict=True)] == labels


def prompt(name: str, row: dict, tokenizer=TOKENIZER, markers=GUANACO_MARKERS, **more) -> str:
    context = RenderContext(tokenizer, markers, **more)
    return FORMATS[name].prompt(check_row(row, FORMATS[name], "here", needs_answer=False), context)


@pytest.mark.parametrize("case", EXACT)
def test_a_prompt_is_the_text_before_the_answer(case):
    """With the row's answer or without."""
    name, row, _, answer = EXACT[case]
    rendered = render(name, row)
    before = rendered.text if name == "completion" else rendered.text[: rendered.learned[0][0]]
    assert prompt(name, row) == before
    answer_column = FORMATS[name].schemas[0].answer_column
    assert prompt(name, {k: v for k, v in row.items() if k != answer_column}) == before
    assert name == "completion" or before + answer == rendered.text


@pytest.mark.parametrize("name, answered, markers", [
    ("alpaca", {"instruction": "Why?", "output": "So"}, GUANACO_MARKERS),
    ("alpaca_stanford", {"instruction": "Why?", "output": "So"}, GUANACO_MARKERS),
    ("qa", {"question": "Why?", "answer": "So"}, GUANACO_MARKERS),
    ("chat", talk("Why?", "So"), GUANACO_MARKERS),
    ("guanaco", {"text": "### Human: Why?### Assistant: So"}, GUANACO_MARKERS),
    ("guanaco", {"text": "<human>: Why?\n<bot>: So"}, ("<human>:", "<bot>:")),
])  # fmt: skip
def test_a_bare_question_is_put_as_the_data_puts_it(name, answered, markers):
    form, tokenizer = FORMATS[name], chat_tokenizer(templates.CHATML)
    rendered = render(name, answered, tokenizer, markers)
    text = form.prompt(form.make_prompt_row("Why?", markers), RenderContext(tokenizer, markers))
    assert text == rendered.text[: rendered.learned[0][0]]
    assert form.add_special_tokens == rendered.add_special_tokens


def test_the_tokens_of_a_prompt():
    """Without the EOS that a tokenizer adds by itself, but with one that the text has."""
    ending, plain = small_tokenizers.ending(), TOKENIZER
    assert ending("ab")["input_ids"][-1] == ending.eos_token_id
    assert encode_prompt("ab", ending, add_special_tokens=True) == ending("ab")["input_ids"][:-1]
    assert encode_prompt("ab</s>", plain, add_special_tokens=True) == plain("ab</s>")["input_ids"]
    assert encode_prompt("ab", plain, add_special_tokens=False) == plain("ab")["input_ids"][1:]


@pytest.mark.parametrize("name, row", [
    ("alpaca", {"instruction": "x", "output": " \n"}),
    ("qa", {"question": "x", "answer": ""}),
    ("completion", {"text": " \n"}),
    ("guanaco", {"text": "### Human: hi### Assistant: "}),
    ("chat", talk("hi", "  ")),
])  # fmt: skip
def test_a_blank_answer_is_not_learned(name, row):
    assert render(name, row, chat_tokenizer(templates.CHATML)).learned == []


# text, what is learned, whether EOS follows
GUANACO = {
    "no line breaks": ("### Human: Hi### Assistant: Yo!### Human: Bye### Assistant: Ciao", [" Yo!", " Ciao"],
        True),
    "line breaks": ("### Human: Hi\n### Assistant: Yo\n\n!\n### Human: Bye\n### Assistant: Ciao \n",
                    [" Yo\n\n!", " Ciao"], True),
    "ends with the human": ("### Human: Hi### Assistant: Yo### Human: Bye", [" Yo"], False),
    "ends with an empty answer": ("### Human: Hi### Assistant: Yo### Human: Bye### Assistant:", [" Yo"],
        False),
    "two answers in a row": ("### Assistant: Yo### Assistant: Ciao", [" Yo", " Ciao"], True),
    "preamble": ("A chat.\n### Human: Hi\n### Assistant: Yo", [" Yo"], True),
}  # fmt: skip


@pytest.mark.parametrize("case", GUANACO)
def test_guanaco(case):
    text, answers, ends = GUANACO[case]
    rendered = render("guanaco", {"text": text})
    assert rendered.text == text.rstrip()
    assert learned(rendered) == answers
    assert learned_tokens(rendered, TOKENIZER) == "".join(answers) + "</s>" * ends


@pytest.mark.parametrize("case", GUANACO)
def test_a_prompt_of_a_dialogue(case):
    """Up to the last answer; where there is none, with the marker of the one to come."""
    text, _, ends = GUANACO[case]
    rendered = render("guanaco", {"text": text})
    if ends:
        assert prompt("guanaco", {"text": text}) == rendered.text[: rendered.learned[-1][0]]
    else:
        assert prompt("guanaco", {"text": text}) == text.removesuffix("### Assistant:") + "### Assistant:"


@pytest.mark.parametrize("markers", [GUANACO_MARKERS, ("<human>:", "<bot>:")])
def test_a_dialogue_that_goes_on_is_one_of_the_data(markers):
    """What is asked, turn by turn, is the beginning of the text that training would have of it."""
    between = "" if markers == GUANACO_MARKERS else "\n"
    text = between.join(f"{markers[i % 2]} {said}" for i, said in enumerate(["Hi", "Yo", "Bye", "Ciao"]))
    rendered = render("guanaco", {"text": text}, markers=markers)
    first, second = (text[:start] for start, _ in rendered.learned)
    assert (
        continue_dialogue("Hi", "", None, markers)
        == prompt("guanaco", {"text": first}, markers=markers)
        == first
    )
    assert (
        continue_dialogue("Bye", first, " Yo", markers)
        == prompt("guanaco", {"text": second}, markers=markers)
        == second
    )


def test_markers_of_chip2():
    text = "\n<human>: Hi, (a) or [b]?\n<bot>: ### Assistant: b"
    rendered = render("guanaco", {"text": text, "metadata": {"source": "x"}}, markers=("<human>:", "<bot>:"))
    assert rendered.text == text
    assert learned(rendered) == [" ### Assistant: b"]


QWEN2, LLAMA3_END, ASKED = "<|im_end|>", "<|eot_id|>", "<|im_start|>assistant\n"
THINK = "<think>\n{}\n</think>\n\n{}"
# template, the tokenizer's EOS, conversation, what is learned
CHATS = {
    "chatml": (templates.CHATML, QWEN2, talk("Hi", "Yo", "Bye", "Ciao"), ["Yo<|im_end|>", "Ciao<|im_end|>"]),
    "chatml, system": (templates.CHATML, QWEN2, talk("Hi", "Yo", system="Yo"), ["Yo<|im_end|>"]),
    "chatml, another EOS": (templates.CHATML, "</s>", talk("Hi", "Yo", "Bye", "Ciao"),
                            ["Yo<|im_end|>", "Ciao<|im_end|>"]),
    "chatml, ends with the user": (templates.CHATML, QWEN2, talk("Hi", "Yo", "Bye"), ["Yo<|im_end|>"]),
    "chatml, one empty answer": (templates.CHATML, QWEN2, talk("Hi", "", "Bye", "Ciao"), ["Ciao<|im_end|>"]),
    "chatml, EOS in the answer": (templates.CHATML, QWEN2, talk("Hi", "a<|im_end|>b"),
        ["a<|im_end|>b<|im_end|>"]),
    "llama 3": (templates.LLAMA3, LLAMA3_END, talk("Hi", "\n Yo ", "Bye", "Ciao", system="S"),
                ["Yo<|eot_id|>", "Ciao<|eot_id|>"]),
    "llama 3, another EOS": (templates.LLAMA3, "</s>", talk("Hi", "Yo", "Bye", "Ciao"),
                             ["Yo<|eot_id|>", "Ciao<|eot_id|>"]),
    "llama 2": (templates.LLAMA2, "</s>", talk("Hi", "Yo ", "Bye", "Ciao", system="S"),
        [" Yo </s>", " Ciao </s>"]),
    "mistral": (templates.MISTRAL, "</s>", talk("Hi", " Yo", "Bye", "Ciao"), [" Yo</s>", "Ciao</s>"]),
    "gemma": (templates.GEMMA, "<eos>", talk("Hi", "Yo", "Bye", "Ciao "),
        ["Yo<end_of_turn>", "Ciao<end_of_turn>"]),
    "qwen 3": (templates.QWEN3, QWEN2, talk("Hi", "Yo", "Bye", "Ciao"),
               ["Yo<|im_end|>", "Ciao<|im_end|>"]),
    "qwen 3, reasoning": (templates.QWEN3, QWEN2,
        talk("Hi", THINK.format("h", "Yo"), "Bye", THINK.format("b", "Ciao")),
                          ["Yo<|im_end|>", THINK.format("b", "Ciao<|im_end|>")]),
    "qwen 3, another EOS": (templates.QWEN3, "</s>", talk("Hi", "Yo", "Bye", "Ciao"),
                            ["Yo<|im_end|>", "Ciao<|im_end|>"]),
    "no generation prompt": (templates.QWEN3.partition("{% if add_gen")[0], QWEN2,
        talk("Hi", "Yo", "Bye", "Ciao"),
                             [ASKED + "Yo<|im_end|>", ASKED + THINK.format("", "Ciao<|im_end|>")]),
    "deepseek r1": (templates.R1, "</s>", talk("Hi", "<think>h</think>Yo", "Bye", "Ciao"),
        ["Yo</s>", "Ciao</s>"]),
}  # fmt: skip


@pytest.mark.parametrize("case", CHATS)
def test_chat(case):
    """Every assistant turn with what ends it, and nothing else; the text is the template's own."""
    template, eos, row, answers = CHATS[case]
    tokenizer = chat_tokenizer(template, eos)
    rendered = render("chat", row, tokenizer)
    assert rendered.text == tokenizer.apply_chat_template(row["messages"], tokenize=False)
    assert learned(rendered) == answers
    assert learned_tokens(rendered, tokenizer) == "".join(answers)
    rows = tokenize([rendered], tokenizer, 10_000, "here")
    assert (
        rows.tokens.tolist() == tokenizer.apply_chat_template(row["messages"])["input_ids"]
    )  # one BOS, no extra EOS


@pytest.mark.parametrize("case", CHATS)
def test_a_prompt_of_a_conversation(case):
    """It ends where the learned text begins, with the generation prompt if the template has one."""
    template, eos, row, _ = CHATS[case]
    tokenizer = chat_tokenizer(template, eos)
    messages = row["messages"]
    if messages[-1]["role"] == "user":
        row = {"messages": [*messages, {"role": "assistant", "content": "Ciao"}]}
    rendered = render("chat", row, tokenizer)
    expected = rendered.text[: rendered.learned[-1][0]]
    empty = {"empty_thinking": "prompt" if rendered.has_empty_thought else "auto"}
    assert (
        prompt("chat", row, tokenizer, **empty)
        == prompt("chat", {"messages": row["messages"][:-1]}, tokenizer, **empty)
        == expected
    )
    if "add_generation_prompt" in template and template != templates.R1:
        asks = tokenizer.apply_chat_template(row["messages"][:-1], tokenize=False, add_generation_prompt=True)
        assert expected == asks + THINK.format("", "") * rendered.has_empty_thought


def test_what_a_prompt_cannot_be_made_of():
    tokenizer = chat_tokenizer(templates.CHATML)
    with pytest.raises(ValueError, match="no message to be answered"):
        prompt("chat", {"messages": [{"role": "assistant", "content": "Yo"}]}, tokenizer)
    with pytest.raises(UserError, match="column instruction is missing or empty"):
        prompt("alpaca", {"output": "x"})


@pytest.mark.parametrize("template, ending", [
    ("CHATML", "<|im_end|>\n"), ("LLAMA3", "<|eot_id|>"), ("LLAMA2", " </s>"), ("MISTRAL", "</s>"),
        ("DEAF", ""),
])  # fmt: skip
def test_what_a_template_ends_a_turn_with(template, ending):
    assert ChatTemplate(chat_tokenizer(getattr(templates, template), "</s>")).endings.after_answer == ending


@pytest.mark.parametrize("template", ["CHATML", "LLAMA3", "LLAMA2", "MISTRAL", "GEMMA", "QWEN3", "R1"])
@pytest.mark.parametrize(
    "answer", ["Paris", "e", "a", "<", "|", "assistant", "model", "end", "Be kind.", "INST"]
)
def test_an_answer_that_is_in_the_prompt_too(template, answer):
    """The range is the assistant's: the user said the same before, and the template's own words hold it."""
    tokenizer = chat_tokenizer(getattr(templates, template), "</s>")
    row = talk(answer, answer, f"{answer}?", answer, answer)
    rendered = render("chat", row, tokenizer)
    other = render("chat", talk(answer, "first", f"{answer}?", "second", answer), tokenizer)
    assert [t.replace("first", answer).replace("second", answer) for t in learned(other)] == learned(rendered)
    assert [rendered.text[:s] for s, _ in rendered.learned] == [
        other.text[:s].replace("first", answer) for s, _ in other.learned
    ]


def test_a_conversation_that_the_assistant_begins():
    rendered = render(
        "chat",
        {"messages": [{"role": "assistant", "content": "kind"}, {"role": "user", "content": "Hi"}]},
        chat_tokenizer(templates.CHATML),
    )
    assert learned(rendered) == ["kind<|im_end|>"]
    assert rendered.text[: rendered.learned[0][0]].endswith("<|im_start|>assistant\n")


@pytest.mark.parametrize("template, row, error, message", [
    (templates.MISTRAL, talk("Hi", "Yo", system="S"), jinja2.TemplateError, "Only user and assistant"),
    (templates.GEMMA, talk("Hi", "Yo", system="S"), jinja2.TemplateError, "System role not supported"),
    (templates.LLAMA2, {"messages": talk("Hi", "Yo")["messages"][1:]}, jinja2.TemplateError,
        "must alternate"),
    (templates.FORGETFUL, talk("Hi", "Yo", "Bye", "Ciao"), ValueError, "does not show"),
    (templates.DEAF, talk("Hi", "Yo"), ValueError, "does not show"),
    (templates.QUOTING, talk("Hi", "Yo", "Bye", "Ciao"), ValueError, "as it is"),
    (None, talk("Hi", "Yo"), ValueError, "chat_template"),
])  # fmt: skip
def test_what_a_template_refuses(template, row, error, message):
    with pytest.raises(error, match=message):
        render("chat", row, chat_tokenizer(template))


def test_absent_keys_of_a_message_stay_absent():
    """Parquet gives every message every key; Llama 3.1's template asks whether tool_calls is there."""
    template = "{% for m in messages %}{{ 'TOOLS' if 'tool_calls' in m else m.content }}{% endfor %}"
    row = {"messages": [{"role": "user", "content": "Hi", "tool_calls": None, "name": "Ann"}]}
    assert check_row(row, FORMATS["chat"], "here")["messages"] == [
        {"role": "user", "content": "Hi", "name": "Ann"}
    ]
    assert render("chat", row, chat_tokenizer(template)).text == "Hi"


@pytest.mark.parametrize("name, row, message", [
    ("alpaca", {"instruction": "x"},
     r"column output is missing or empty; columns with content: instruction$"),
    ("qa", {"question": "x", "answer": None},
     r"column answer is missing or empty; columns with content: question$"),
    ("alpaca", {"instruction": ["x"], "output": "y"}, r"column instruction holds a list"),
    ("qa", {"question": "x", "answer": "y", "context": {}}, r"column context holds a dict"),
    ("chat", {"messages": "Hi"}, r"must be a list of objects with a role and a content"),
    ("chat", {"messages": []}, r"must be a list of objects"),
    ("chat", {"messages": ["Hi"]}, r"must be a list of objects"),
    ("chat", {"messages": [{"role": "user"}]}, r"must be a list of objects"),
    ("chat", {"messages": [{"role": "user", "content": None}]}, r"must be a list of objects"),
])  # fmt: skip
def test_unusable_rows(name, row, message):
    with pytest.raises(UserError, match=f"^here: .*{message}"):
        check_row(row, FORMATS[name], "here")


def test_a_dialogue_without_markers_is_dropped_not_an_error():
    row = FORMATS["guanaco"].render({"text": "plain text here"}, RenderContext())
    assert row.learned == [] and not row.needs_eos


def test_each_name_that_options_take_is_a_format():
    assert {"auto", *FORMATS} == {*DATASET_FORMATS}
