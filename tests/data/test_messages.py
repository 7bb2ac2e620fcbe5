"""Tools, calls, reasoning, flags and the day of conversations.

Each is compared with transformers' own rendering of the cleaned conversation.
"""

from __future__ import annotations

import datetime
import json

import pyarrow
import pyarrow.parquet
import pytest

from benchmarks.make_checkpoint import byte_tokenizer
from data.chat import ChatTemplate
from data.chat_remarks import describe_hidden_parts
from data.evaluation_sets import prepare_sets
from data.examples import read_examples
from data.messages import check_messages, check_tools
from data.reading import ReadingOptions
from data.stop_ids import read_base_stop_ids
from data.template_date import set_template_date
from data.tokenizing import tokenize_dataset
from options.errors import UserError
from options.train import parse
from tests.helpers import chat_templates as templates
from tests.helpers.chat_templates import trl_template

TOOL = {"type": "function", "function": {"name": "f", "description": "F.", "parameters": {
    "type": "object", "properties": {"city": {"type": "string"}}}}}  # fmt: skip
TIME = {"type": "function", "function": {"name": "g", "description": "G.", "parameters": {
    "type": "object", "properties": {"year": {"type": "integer"}}}}}  # fmt: skip


def call(arguments, name: str = "f") -> dict:
    return {"id": "call00001", "type": "function", "function": {"name": name, "arguments": arguments}}


def user(text: str = "Hi") -> dict:
    return {"role": "user", "content": text}


def says(content: str | None = "Yo", **more) -> dict:
    return {"role": "assistant", "content": content} | more


def tokenizer_of(template: str, *tokens: str):
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["<|im_start|>", "<|im_end|>", *tokens], special_tokens=True)
    tokenizer.chat_template = template
    return tokenizer


QWEN = tokenizer_of(trl_template("qwen2_5"))


def write(path, *rows: dict) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def trained_text(dataset: str, tokenizer) -> str:
    return tokenizer.decode(
        tokenize_dataset(dataset, ReadingOptions(tokenizer, context_length=10_000)).tokens
    )


def learned_text(dataset: str, tokenizer) -> str:
    rows = tokenize_dataset(dataset, ReadingOptions(tokenizer, context_length=10_000))
    return tokenizer.decode(rows.tokens[rows.learned])


@pytest.mark.parametrize(
    "given", [[TOOL], json.dumps([TOOL]), [json.dumps(TOOL)]], ids=["list", "text", "texts"]
)
def test_the_tools_of_a_row_are_shown(given, tmp_path):
    messages = [user(), says()]
    dataset = write(tmp_path / "rows.jsonl", {"messages": messages, "tools": given})
    assert trained_text(dataset, QWEN) == QWEN.apply_chat_template(messages, tools=[TOOL], tokenize=False)
    assert learned_text(dataset, QWEN) == "Yo<|im_end|>"


@pytest.mark.parametrize("none", [[], None, "[]", ""])
def test_no_tools_are_none(none, tmp_path):
    """Llama 3.1's template takes an empty list for tools."""
    tokenizer = tokenizer_of(
        trl_template("llama3_1"), "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"
    )
    dataset = write(tmp_path / "rows.jsonl", {"messages": [user(), says()], "tools": none})
    assert trained_text(dataset, tokenizer) == tokenizer.apply_chat_template([user(), says()], tokenize=False)


@pytest.mark.parametrize("tools", ["not JSON", {"a": 1}, [1], "[1]"])
def test_tools_that_are_none(tools):
    with pytest.raises(UserError, match=r"^row 3: tools must be a list of objects"):
        check_tools(tools, "row 3")


@pytest.mark.parametrize("template", ["qwen2_5", "deepseekv3"])
@pytest.mark.parametrize("arguments", [{"city": "Åre"}, '{"city": "Åre"}'], ids=["object", "text"])
def test_arguments_of_calls_are_written_once(template, arguments, tmp_path):
    """OpenAI's are JSON text, which most templates would quote again; DeepSeek's takes nothing else."""
    tokenizer = tokenizer_of(trl_template(template))
    dataset = write(tmp_path / "rows.jsonl", {"messages": [user(), says(None, tool_calls=[call(arguments)])]})
    assert '{"city": "Åre"}' in learned_text(dataset, tokenizer)


def test_arguments_keep_their_digits_where_the_template_takes_text(tmp_path):
    """Qwen3's writes a text as it is, as transformers shows it."""
    messages = [user(), says(None, tool_calls=[call('{"price": 1.10}')])]
    tokenizer = tokenizer_of(trl_template("qwen3"))
    dataset = write(tmp_path / "rows.jsonl", {"messages": messages})
    assert '"arguments": {"price": 1.10}' in learned_text(dataset, tokenizer)
    assert trained_text(dataset, tokenizer) == tokenizer.apply_chat_template(messages, tokenize=False)


def test_arguments_in_python_s_form_are_not_learned(tmp_path):
    printing = (
        "{% for m in messages %}{{ m.role + ': ' + m.content }}{% for c in m.tool_calls or [] %}"
        "{{ c.function.arguments }}{% endfor %}{{ eos_token }}{% endfor %}"
    )
    dataset = write(tmp_path / "rows.jsonl", {"messages": [user(), says("", tool_calls=[call({"x": None})])]})
    assert learned_text(dataset, tokenizer_of(printing)) == 'assistant: {"x": null}</s>'


SPOILED = [
    (user() | {"train": "no"}, "train of a message is 'no'"),
    (says(weight=0.5), "weight of a message is 0.5"),
    (says(tool_calls="x"), "tool_calls must be a list"),
    (says(tool_calls=[{"function": "f"}]), "the function of a tool call"),
    (says(tool_calls=[call("{'x': 1}")]), "arguments of a tool call"),
    (says(tool_calls=[call('{"x": 1e400}')]), "arguments of a tool call"),
    (
        says(tool_calls=[call({"x": [float("nan")]})]),
        "a tool or its call holds the number nan, which JSON cannot express",
    ),
    (says(reasoning_content=["x"]), "reasoning must be a text"),
    (says(content=[{"type": "text"}]), r"message 1: its content is a list \(join the texts of its parts\)"),
    ({"role": "tool", "content": {"x": 1}}, r"message 1: its content is an object \(write it as JSON text\)"),
    ({"role": "tool", "content": 7}, "message 1: its content is a number"),
    ({"role": "tool", "content": None}, "message 1 has no content, only role"),
    ({"role": 1, "content": "x"}, "message 1: its role is a number"),
    ({"from": "gpt", "value": "x"}, "message 1 has no role, only from, value"),
    ({}, "message 1 has no role; messages must"),
    (json.dumps(user()), "message 1 is a text"),
    (None, "message 1 is null"),
]


@pytest.mark.parametrize("message, error", SPOILED)
def test_unusable_messages(message, error):
    with pytest.raises(UserError, match=f"^row 3: .*{error}"):
        check_messages([message], "row 3")


@pytest.mark.parametrize("messages, problem", [
    (json.dumps([user(), says()]), "messages is the JSON text of a list"),
    (user(), "messages is an object"),
    ([], "messages is empty"),
    ([user(), says(), user(), says(weight=2)], "message 4: weight of a message is 2"),
    ([user(), says(content=["x"])], "message 2: its content is a list"),
])  # fmt: skip
def test_errors_of_messages_name_the_message_and_the_problem(messages, problem):
    with pytest.raises(UserError, match=f"^row 3: {problem}"):
        check_messages(messages, "row 3")


@pytest.mark.parametrize("flag", [{"train": False}, {"weight": 0}, {"train": True, "weight": 0.0}])
def test_a_turn_that_its_row_leaves_out(flag, tmp_path):
    messages = [
        user(),
        says("No", **flag),
        user(),
        says("Yes", train=True, weight=1),
        user(),
        says("Sure", weight=None),
    ]
    dataset = write(tmp_path / "rows.jsonl", {"messages": messages})
    assert learned_text(dataset, QWEN) == "Yes<|im_end|>Sure<|im_end|>"
    plain = [{"role": m["role"], "content": m["content"]} for m in messages]
    assert trained_text(dataset, QWEN) == QWEN.apply_chat_template(plain, tokenize=False)


def test_a_row_with_nothing_to_train_is_dropped(tmp_path):
    rows = [{"messages": [user(), says("No", weight=0)]}, {"messages": [user(), says()]}]
    made = tokenize_dataset(write(tmp_path / "rows.jsonl", *rows), ReadingOptions(QWEN, context_length=1000))
    assert made.dropped == 1 and len(made) == 1


@pytest.mark.parametrize("name", ["reasoning_content", "thinking", "reasoning"])
def test_reasoning_by_any_name(name, tmp_path):
    """As transformers does it from 5.23 on: each template finds the name that it reads."""
    dataset = write(tmp_path / "rows.jsonl", {"messages": [user(), says(**{name: "Hm."})]})
    assert (
        learned_text(dataset, tokenizer_of(trl_template("qwen3"))) == "<think>\nHm.\n</think>\n\nYo<|im_end|>"
    )
    shown = learned_text(dataset, tokenizer_of(trl_template("gptoss")))
    assert shown.startswith("<|channel|>analysis<|message|>Hm.<|end|>")


# What tables make of conversations


def test_what_a_table_s_schema_fills_in_is_not_trained(tmp_path):
    """All objects of a column have the keys of all rows: arguments, tools' parameters, messages."""
    calls = [call({"city": "Oslo"}), call({"year": 1969}, "g")]
    rows = [
        {
            "messages": [user(), says(None, tool_calls=[c]), {"role": "tool", "content": "1"}, says()],
            "tools": [TOOL, TIME],
        }
        for c in calls
    ]
    table = pyarrow.Table.from_pylist(rows)
    pyarrow.parquet.write_table(table, tmp_path / "rows.parquet")
    assert table.to_pylist()[0]["messages"][1]["tool_calls"][0]["function"]["arguments"] == {
        "city": "Oslo",
        "year": None,
    }
    expected = [QWEN.apply_chat_template(row["messages"], tools=row["tools"], tokenize=False) for row in rows]
    assert trained_text(str(tmp_path / "rows.parquet"), QWEN) == "".join(expected)
    assert trained_text(write(tmp_path / "rows.jsonl", *rows), QWEN) == "".join(expected)


def test_a_null_that_the_data_say_is_trained(tmp_path):
    """A JSON file has no schema: its nulls are its own; so are those in a table's lists."""
    row = {"messages": [user(), says(None, tool_calls=[call({"city": None})])]}
    assert '"arguments": {"city": null}' in learned_text(write(tmp_path / "rows.jsonl", row), QWEN)
    row["messages"][1]["tool_calls"][0]["function"]["arguments"] = {"cities": ["Oslo", None]}
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row]), tmp_path / "rows.parquet")
    assert '{"cities": ["Oslo", null]}' in learned_text(str(tmp_path / "rows.parquet"), QWEN)


# The day


DATED = {
    "gpt-oss": (trl_template("gptoss"), "Current date: 2024-02-29\n"),
    "llama 3.2": (trl_template("llama3_2"), "Today Date: 29 Feb 2024\n"),
    "of all parts": (
        "\n  {% set day = strftime_now('%A, %-d %B %Y, %j %% %y-%m-%d %D %_d') %}\n{{ day }}{% for m in"
        " messages %}{{ m.content }}"
        "{% endfor %}",
        "Thursday, 29 February 2024, 060 % 24-02-29 02/29/24 29",
    ),
    "in a macro": (
        "{% macro today() %}{{ strftime_now(format='%d.%m.%Y') }}{% endmacro %}{{ today() }}"
        "{{ messages[0].content }}",
        "29.02.2024",
    ),
}


@pytest.mark.parametrize("name", DATED)
def test_a_template_tells_the_day_of_the_run(name):
    template, told = DATED[name]
    tokenizer, messages = tokenizer_of(template), [user(), says()]
    shown = ChatTemplate(tokenizer, "2024-02-29").apply(messages)
    assert told in shown
    today = ChatTemplate(tokenizer).apply(messages)
    assert today == tokenizer.apply_chat_template(messages, tokenize=False) != shown
    assert today == ChatTemplate(tokenizer, datetime.date.today().isoformat()).apply(messages)


def test_a_template_without_a_day_stays_as_it_is():
    assert set_template_date(templates.CHATML, "2024-02-29") is templates.CHATML


# What is told


ASKS = "data: the chat template asks for an answer with "


def told(rows: list[dict], template: str) -> list[str]:
    """Return the remarks, but for the one on the generation prompt."""
    remarks = describe_hidden_parts(ChatTemplate(tokenizer_of(template)), rows)
    return [remark for remark in remarks if not remark.startswith(ASKS)]


NEMOTRON = trl_template("nemotron_3_nano")


@pytest.mark.parametrize("template, asked", [
    (templates.R1, "<|Assistant|><think>\\n"), (NEMOTRON, "assistant\\n<think>\\n"),
    (templates.CHATML, None), (templates.LLAMA2, None), (trl_template("qwen3"), None),
    (trl_template("gptoss"), None),
])  # fmt: skip
def test_answers_that_do_not_follow_the_generation_prompt_are_told(template, asked):
    """Against transformers' own prompt, which servers write.

    Nemotron's opens a thought that is not its empty one, so the latter is learned behind another text.
    """
    tokenizer, messages = tokenizer_of(template), [user()]
    prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    shown = tokenizer.apply_chat_template([*messages, says("Yo")], tokenize=False)
    chat = ChatTemplate(tokenizer, empty_thinking="learn")
    remarks = describe_hidden_parts(chat, [{"messages": [user(), says()]}])
    found = [remark for remark in remarks if remark.startswith(ASKS)]
    assert bool(found) == (not shown.startswith(prompt)) == (asked is not None)
    assert all(asked in remark for remark in found)


@pytest.mark.parametrize("empty_thinking", ["auto", "prompt"])
def test_nemotron_learns_to_answer_after_both_of_its_prompts(empty_thinking):
    """With a thought after one, without a thought after the other."""
    chat = ChatTemplate(tokenizer_of(NEMOTRON), empty_thinking=empty_thinking)
    assert not describe_hidden_parts(chat, [{"messages": [user(), says()]}])


@pytest.mark.parametrize("thought", ["<think>\n\n</think>\n\n", "<think></think>"])
@pytest.mark.parametrize("template", ["qwen3", "qwen2_5", "qwen3_8", "nemotron_3_nano", "deepseekv3"])
def test_an_empty_thought_is_neither_hidden_nor_outside(template, thought):
    """Earlier turns too; what is learned has the answer."""
    rows = [{"messages": [user(), says(f"{thought}number 0"), user(), says(f"{thought}number 1")]}] * 8
    assert told(rows, trl_template(template)) == []


def test_what_a_template_does_not_show_is_told(tmp_path):
    rows = [{"messages": [user(), says(reasoning_content="Hm.", name="Ann")], "tools": [TOOL]}]
    assert told(rows, templates.PLAIN_CHATML) == [
        "data: the chat template does not show name, reasoning_content, tools"
    ]
    assert told(rows, trl_template("qwen3")) == ["data: the chat template does not show name"]
    with_results = [{"messages": [user(), says("x"), {"role": "tool", "content": "1"}, says()]}]
    assert told(with_results, trl_template("phi3")) == [
        "data: the chat template does not show what role tool says"
    ]
    thoughts = [{"messages": [user(), says("<think>a</think>b")]}]
    assert told(thoughts, templates.R1) == ["data: the chat template does not show <think> in content"]
    assert told([{"messages": [user(), says()]}], templates.CHATML) == []


def tools_shown(shown: str) -> str:
    """A template that writes `shown` for each tool t, under a header."""
    return (
        "{% if tools %}TOOLS:{% for t in tools %}"
        + shown
        + "{% endfor %}{% endif %}"
        + templates.PLAIN_CHATML
    )


BARE_TOOL = TOOL["function"] | {"description": "d", "parameters": {"type": "object", "properties": {"x": {}}}}


@pytest.mark.parametrize("shown, wrapped, hidden", [
    ("{% if t.function is defined %}{{ t | tojson }}{% endif %}", False,
     "description of tools, name of tools, parameters of tools"),
    ("{{ t.name }}: {{ t.description }}", True, "description of tools, name of tools, parameters of tools"),
    ("{{ t.function.name }}: {{ t.function.description }}", True, "parameters of tools"),
    ("{% for p in t.function.parameters.properties %}{{ p }}{% endfor %}", True,
     "description of tools, name of tools"),
    ("{{ t | tojson }}", True, ""), ("{{ t | tojson }}", False, ""), ("{{ t }}", True, ""),
])  # fmt: skip
def test_parts_of_tools_that_a_template_does_not_show_are_told(shown, wrapped, hidden):
    tool = {"type": "function", "function": BARE_TOOL} if wrapped else BARE_TOOL
    rows = [{"messages": [user(), says()], "tools": [tool]}, {"messages": [user(), says()]}]
    line = f"data: the chat template does not show {hidden}"
    assert told(rows, tools_shown(shown)) == ([line] if hidden else [])


def test_answers_that_hold_the_ending_already_are_told():
    rows = [
        {"messages": [user(), says("Yo<|im_end|>\n")]},
        {"messages": [user("<|im_end|>"), says("a<|im_end|>b")]},
    ]
    assert told(rows, templates.PLAIN_CHATML) == [
        "data: 1 answers end with <|im_end|>, which the chat template writes again: both are learned"
    ]


def test_what_a_template_shows_in_part_is_told():
    rows = [{"messages": [user(), says(reasoning_content="a"), user(), says(reasoning_content="b")]}] * 3
    assert told(rows, trl_template("qwen3")) == [
        "data: the chat template does not show reasoning_content of earlier turns"
    ]


ESCAPE = "\x1b[2J\nerror: no such file"


@pytest.mark.parametrize("rows, names", [
    ([{"messages": [user(), says(**{ESCAPE: 1})]}], repr(ESCAPE)),
    ([{"messages": [user(), {"role": ESCAPE, "content": "a"}, says()]}], repr(f"what role {ESCAPE} says")),
    ([{"messages": [user(), says(**{f"k{i:03}": 1 for i in range(500)})]}],
     ", ".join(f"k{i:03}" for i in range(20)) + " and 480 more"),
    ([{"messages": [user(), says(**{"k" * 10**6: 1})]}], "k" * 60 + "..."),
])  # fmt: skip
def test_names_of_the_data_stay_harmless_and_few(rows, names):
    only_turns = (
        "{% for m in messages %}{% if m.role in ('user', 'assistant') %}<|im_start|>{{ m.role }}\n"
        "{{ m.content }}"
        "<|im_end|>\n{% endif %}{% endfor %}"
    )
    remarks = told(rows, only_turns)
    assert remarks[0] == f"data: the chat template does not show {names}" and "".join(remarks).isprintable()


THINKING = {"messages": [user(), says("<think>\na\n</think>\n\nb")]}
EARLIER = {"messages": [*THINKING["messages"], user(), says()]}
CALL = says("Wait.", tool_calls=[call({"x": 1})])
RARE = {
    "DeepSeek, of thoughts with line breaks": ("deepseekv3", [THINKING], "<think> in content"),
    "of earlier turns": ("qwen3", [THINKING] * 60 + [EARLIER] * 60, "<think> in content of earlier turns"),
    "reasoning of earlier turns": (
        "qwen3",
        [{"messages": [user(), says(reasoning_content="a")]}] * 60
        + [{"messages": [user(), says(reasoning_content="a"), user(), says()]}] * 60,
        "reasoning_content of earlier turns",
    ),
    "beside calls": (
        "llama3_1",
        [{"messages": [user(), says()]}] * 60 + [{"messages": [user(), CALL]}] * 20,
        "what role assistant says beside tool_calls",
    ),
    "second calls": (
        "gptoss",
        [{"messages": [user(), says(None, tool_calls=[call({}), call({})])]}],
        "further tool_calls",
    ),
}


@pytest.mark.parametrize("name", RARE)
def test_what_is_hidden_in_some_messages_is_told_by_its_own_name(name):
    template, rows, part = RARE[name]
    assert told(rows, trl_template(template)) == [f"data: the chat template does not show {part}"]


def test_thoughts_that_leave_a_line_break_behind_are_hidden_all_the_same():
    rows = [{"messages": [user(), says(reasoning_content="R1"), user(), says(reasoning_content="R2")]}]
    assert told(rows, trl_template("nemotron_3_nano")) == [
        "data: the chat template does not show reasoning_content of earlier turns"
    ]


def test_what_is_shown_outside_of_its_turn_is_told():
    """Gemma 4 writes what is said beside a call behind the call's result."""
    result = {"role": "tool", "content": "21"}
    rows = [{"messages": [user(), says("Wait.", tool_calls=[call({"x": 1})]), result, says("Done.")]}]
    markers = ["<|turn>", "<turn|>", "<|tool_call>", "<tool_call|>", "<|tool_response>", "<tool_response|>"]
    gemma = tokenizer_of(trl_template("gemma4_v5"), *markers)
    assert describe_hidden_parts(ChatTemplate(gemma), rows) == [
        "data: shown outside of the assistant's turn, and not learned: what role assistant says beside"
        " tool_calls in 1 of 1 messages looked at"
    ]
    assert not any("outside" in remark for remark in told(rows, trl_template("qwen3")))


def test_turns_under_other_names_than_the_assistant_s_are_told():
    rows = [
        {
            "messages": [
                user(),
                {"role": "Assistant", "content": "No"},
                {"role": "gpt", "content": "No"},
                says(),
            ]
        }
    ] * 2
    assert told(rows, templates.PLAIN_CHATML) == [
        "data: messages of the roles Assistant (2), gpt (2) are not learned; only the role assistant is"
    ]


def test_a_conversation_without_an_assistant_is_refused_by_its_roles(tmp_path):
    rows = {"messages": [{"role": "human", "content": "Hi"}, {"role": "gpt", "content": "Yo"}]}
    with pytest.raises(UserError, match=r"rows.jsonl: no message has the role assistant, only human, gpt$"):
        tokenize_dataset(write(tmp_path / "rows.jsonl", rows), ReadingOptions(QWEN, context_length=1000))


def test_tokens_that_the_tokenizer_splits_are_none():
    """split_special_tokens: the closing is learned as letters, which end answers, and a line says so."""
    tokenizer = tokenizer_of(templates.PLAIN_CHATML)
    assert ChatTemplate(tokenizer).marker is None
    tokenizer.split_special_tokens = True
    chat = ChatTemplate(tokenizer)
    assert chat.marker == "<|im_end|>" and chat.find_stop_ids() == []


def test_arguments_in_a_table_s_map(tmp_path):
    """Spark writes maps, which pyarrow gives as pairs."""
    messages = [user(), says(None, tool_calls=[call({"city": "Oslo"})])]
    table = pyarrow.Table.from_pylist([{"messages": messages}])
    kind = pyarrow.list_(pyarrow.struct([
        ("role", pyarrow.string()), ("content", pyarrow.string()),
            ("tool_calls", pyarrow.list_(pyarrow.struct([
            ("id", pyarrow.string()), ("type", pyarrow.string()), ("function", pyarrow.struct([
                ("name", pyarrow.string()),
                    ("arguments", pyarrow.map_(pyarrow.string(), pyarrow.string()))]))])))]))  # fmt: skip
    mapped = [messages[0], messages[1] | {"tool_calls": [call([("city", "Oslo")])]}]
    table = pyarrow.Table.from_arrays([pyarrow.array([mapped], kind)], ["messages"])
    pyarrow.parquet.write_table(table, tmp_path / "rows.parquet")
    expected = QWEN.apply_chat_template(messages, tokenize=False)
    assert trained_text(str(tmp_path / "rows.parquet"), QWEN) == expected


def test_what_is_empty_is_not_told_of():
    rows = [{"messages": [user() | {"tool_calls": []}, says()], "tools": "[]"}]
    assert told(rows, templates.CHATML) == []


def test_flags_without_effect_are_told():
    rows = [{"messages": [user() | {"train": True}, says()]}] * 2
    assert told(rows, templates.CHATML) == [
        "data: 2 rows set train or weight for roles other than the assistant; only the assistant's turns"
        " are learned"
    ]


def test_remarks_reach_the_checks(tmp_path):
    rows = [{"messages": [user(), says(name="Ann")]}] * 4
    options = [
        "--dataset",
        write(tmp_path / "rows.jsonl", *rows),
        "--eval_share",
        "0.5",
        "--chat_date",
        "2024-02-29",
    ]
    _, _, evaluation = prepare_sets(parse(options)[0], QWEN)
    assert evaluation.remarks == ("data: the chat template does not show name",)
    assert read_examples(options[1], ReadingOptions(QWEN, context_length=1000)).remarks == evaluation.remarks


def test_the_stops_of_a_base(tmp_path):
    tokenizer = byte_tokenizer()
    assert read_base_stop_ids(tmp_path, None, tokenizer) == [tokenizer.eos_token_id]
    assert read_base_stop_ids(tmp_path, [7, 8], tokenizer) == [7, 8, tokenizer.eos_token_id]
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [3, 4]}')
    assert read_base_stop_ids(tmp_path, 7, tokenizer) == [3, 4, 7, tokenizer.eos_token_id]
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": "</s>"}')
    with pytest.raises(UserError, match=r"generation_config.json: eos_token_id must be a token's number"):
        read_base_stop_ids(tmp_path, None, tokenizer)
