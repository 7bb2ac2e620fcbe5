"""--chat_template: the texts and tokens of the official templates, and errors of a template as one line."""

from __future__ import annotations

import json

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from benchmarks.make_checkpoint import byte_tokenizer
from data.chat_turns import TEMPLATE_ERRORS
from data.formats import FORMATS, RenderContext, check_row
from data.template_choice import read_template, use_template
from data.tokenizing import tokenize
from options.config import CHAT_TEMPLATES
from options.errors import UserError
from tests.helpers.chat_templates import PLAIN_CHATML, trl_template

OFFICIAL = {
    "chatml": lambda: PLAIN_CHATML,
    "llama3": lambda: trl_template("llama3"),
    "gemma": lambda: trl_template("gemma3"),
    "qwen": lambda: trl_template("qwen3"),
}
ROOM = 300  # rows of an embedding for the 258 tokens of `byte_tokenizer` and some more
USER, SYSTEM = {"role": "user", "content": " Hi "}, {"role": "system", "content": "Be kind."}
YES = {"role": "assistant", "content": " Yes.\n"}
CALL = {"type": "function", "function": {"name": "now", "arguments": {"zone": "UTC"}}}
CALLS = {"role": "assistant", "content": "Wait.", "tool_calls": [CALL, CALL]}
RESULT = {"role": "tool", "content": "21"}
THINKS = YES | {"reasoning_content": "\nHm.\n"}
CONVERSATIONS = {
    "one turn": [USER, YES],
    "system": [SYSTEM, USER, YES, USER, YES],
    "ends with the user": [USER, YES, USER],
    "system in the middle": [USER, YES, SYSTEM, USER, YES],
    "two answers": [USER, YES, YES],
    "thoughts": [USER, THINKS, USER, THINKS],
    "thoughts in the content": [USER, YES | {"content": "<think>\nHm.\n</think>\n\nYes."}],
    "calls": [USER, CALLS, RESULT, RESULT, THINKS],
    "result in a question": [USER, CALLS, USER | {"content": "<tool_response>1</tool_response>"}, YES],
}
TOOLS = [{"type": "function", "function": {"name": "now", "description": "Time.", "parameters": {}}}]
WITH_TOOLS = ("system", "calls")


def chosen(choice: str, rows: int = ROOM):
    """(a tokenizer with the template, the remarks on it)."""
    tokenizer = byte_tokenizer()
    return tokenizer, use_template(tokenizer, choice, rows)


def rendered(tokenizer, name: str):
    """The conversation as training renders it; None if the template refuses it."""
    row = {"messages": CONVERSATIONS[name]} | ({"tools": TOOLS} if name in WITH_TOOLS else {})
    try:
        return FORMATS["chat"].render(check_row(row, FORMATS["chat"], "here"), RenderContext(tokenizer))
    except TEMPLATE_ERRORS:
        return None


@pytest.mark.parametrize("name", CHAT_TEMPLATES)
def test_the_tokens_are_those_of_the_official_template(name):
    """By transformers, and the same is learned as without markers, which its turns are compared for."""
    tokenizer, _ = chosen(name)
    official, _ = chosen(name)
    official.chat_template = OFFICIAL[name]()
    seen = 0
    for conversation, messages in CONVERSATIONS.items():
        ours, theirs = rendered(tokenizer, conversation), rendered(official, conversation)
        assert (ours is None) == (theirs is None), conversation
        if ours is None:
            continue
        rows, reference = (tokenize([each], tokenizer, 9999, "here") for each in (ours, theirs))
        tools = TOOLS if conversation in WITH_TOOLS else None
        by_transformers = official.apply_chat_template(messages, tools=tools)["input_ids"]
        assert rows.tokens.tolist() == by_transformers, conversation
        assert rows.learned.tolist() == reference.learned.tolist(), conversation
        asked = official.apply_chat_template(messages[:1], tokenize=False, add_generation_prompt=True)
        assert (
            tokenizer.apply_chat_template(messages[:1], tokenize=False, add_generation_prompt=True) == asked
        )
        seen += 1
    assert seen >= 4


def test_a_server_can_ask_qwen_without_a_thought():
    tokenizer, _ = chosen("qwen")
    settings = {"tokenize": False, "add_generation_prompt": True, "enable_thinking": False}
    asked = tokenizer.apply_chat_template([USER], **settings)
    assert asked == tokenizer.apply_chat_template([USER], chat_template=OFFICIAL["qwen"](), **settings)
    assert asked.endswith("<think>\n\n</think>\n\n")


MARKERS = {
    "chatml": ["<|im_start|>", "<|im_end|>"],
    "llama3": ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
    "gemma": ["<start_of_turn>", "<end_of_turn>"],
    "qwen": ["<|im_start|>", "<|im_end|>"],
}


@pytest.mark.parametrize("name", MARKERS)
def test_markers_become_tokens_where_the_embedding_has_room_for_all(name):
    markers, first = MARKERS[name], len(byte_tokenizer())
    tokenizer, remarks = chosen(name, first + len(markers))
    assert tokenizer.convert_tokens_to_ids(markers) == [*range(first, first + len(markers))]
    assert f"new tokens {markers[0]} ({first})" in remarks[-1]
    assert tokenizer.decode([first, 40], skip_special_tokens=True) == tokenizer.decode([40])
    assert not [remark for remark in use_template(tokenizer, name, first + len(markers)) if "new" in remark]
    tokenizer, remarks = chosen(name, first + len(markers) - 1)
    assert len(tokenizer) == first and "are encoded as ordinary text" in remarks[-1]
    assert f"give servers {markers[-1]} as a stop string" in remarks[-1]
    tokenizer.add_special_tokens({"additional_special_tokens": [markers[-1]]})
    assert "as a stop string" not in use_template(tokenizer, name, first)[-1]  # this one closes turns
    row = tokenize([rendered(tokenizer, "one turn")], tokenizer, 9999, "here")
    assert tokenizer.decode(row.tokens) == rendered(tokenizer, "one turn").text
    assert markers[-1] in tokenizer.decode(row.tokens[row.learned])  # letters, which end the answer


def gapped_tokenizer(ids: list[int], added: list[str]):
    """A tokenizer whose words w0, w1, ... have these ids, of which those in `added` are added tokens."""
    words = {f"w{i}": i for i in ids} | {"<s>": 0}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, unk_token="<s>")), unk_token="<s>", eos_token="<s>"
    )
    tokenizer.add_tokens(added, special_tokens=True)
    return tokenizer


def test_a_vocabulary_with_a_gap_gets_free_ids(tmp_path):
    """The saved tokenizer has them, too, and no other token has lost its id."""
    tokenizer = gapped_tokenizer([1, 2, 9], [])
    before = tokenizer.get_vocab()
    assert "new tokens <|im_start|> (4)" in use_template(tokenizer, "chatml", 10)[-1]
    tokenizer.save_pretrained(tmp_path)
    for each in (tokenizer, AutoTokenizer.from_pretrained(tmp_path)):
        assert each.convert_tokens_to_ids(MARKERS["chatml"]) == [4, 5]
        assert before.items() <= each.get_vocab().items()
    tokenizer = gapped_tokenizer([1, 2, 9], [])
    assert "the model no room" in use_template(tokenizer, "chatml", 5)[-1]
    assert tokenizer.get_vocab() == before


@pytest.mark.parametrize(("ids", "added"), [
    ([1, 2, 4], []),  # the tokenizers library would give a new token the id of another one
    ([1, 2, 9], ["w9"]),  # it would give a new token the id 10, and 4 when tokenizer.json is read
])  # fmt: skip
def test_a_vocabulary_with_a_gap_that_allows_no_tokens(ids, added):
    tokenizer = gapped_tokenizer(ids, added)
    before = tokenizer.get_vocab()
    (remark,) = use_template(tokenizer, "chatml", ROOM)
    assert f"can take none, since its ids have a gap: 4 tokens, ids up to {ids[-1]}. They" in remark
    assert "are encoded as ordinary text" in remark and tokenizer.get_vocab() == before


def test_a_missing_bos_is_told():
    assert "does not begin with BOS (<s>)" in chosen("chatml")[1][0]
    assert not any("BOS" in remark for remark in chosen("llama3")[1])


def test_a_file_and_its_text_are_the_same_choice(tmp_path):
    """The file's generation markers say what is learned, and its markers of turns become tokens."""
    text = (
        "{% for m in messages %}<|{{ m.role }}|>{% generation %}{{ m.content }}{% endgeneration %}<|x|>"
        "{% endfor %}\n"
    )
    path = tmp_path / "own.jinja"
    path.write_text("\ufeff" + text)
    (tokenizer, remarks), (other, others) = chosen(str(path)), chosen(text)
    assert tokenizer.chat_template == other.chat_template == text and remarks == others
    assert tokenizer.convert_tokens_to_ids(["<|user|>", "<|x|>", "<|assistant|>"]) == [258, 259, 260]
    row = {"messages": [USER, {"role": "assistant", "content": "Yo"}]}
    one = FORMATS["chat"].render(row, RenderContext(tokenizer))
    assert [one.text[start:end] for start, end in one.learned] == [" Hi ", "Yo"]


TURN = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}"
CALLED = "{% if m.tool_calls %}<|call|>{{ m.tool_calls[0].function.name }}{% endif %}"
THOUGHT = "{% if m.reasoning_content %}<|thought|>{% endif %}"
REFUSED = "{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}"


@pytest.mark.parametrize(("text", "markers"), [
    (TURN + "{% endfor %}", ["<|user|>", "<|assistant|>", "<|system|>", "<|tool|>"]),
    (TURN + CALLED + THOUGHT + "{% endfor %}{% if tools %}<|tools|>{% endif %}",
        ["<|user|>", "<|assistant|>", "<|system|>", "<|thought|>", "<|tools|>", "<|call|>", "<|tool|>"]),
    (TURN + REFUSED + "{% endfor %}", ["<|user|>", "<|assistant|>", "<|tool|>"]),
])  # fmt: skip
def test_the_markers_of_all_roles_become_tokens(text, markers):
    """In the order in which the template writes them; a role that it refuses is left out."""
    first = len(byte_tokenizer())
    tokenizer, remarks = chosen(text, first + len(markers))
    assert tokenizer.convert_tokens_to_ids(markers) == [*range(first, first + len(markers))]
    assert all(marker in remarks[-1] for marker in markers)
    assert "are encoded as ordinary text" in chosen(text, first + len(markers) - 1)[1][-1]


@pytest.mark.parametrize(("template", "markers"), [
    ("deepseekv3", ["<｜User｜>", "<｜Assistant｜>", "<｜tool▁call▁begin｜>", "<｜tool▁outputs▁end｜>"]),
    ("gemma4_v5", ["<|turn>", "<turn|>", "<|tool_call>", "<tool_call|>", "<|tool_response>"]),
    ("glm4moe", ["<|user|>", "<|assistant|>", "<|system|>", "<|observation|>"]),
])  # fmt: skip
def test_the_markers_of_known_templates_become_tokens(template, markers):
    tokenizer, _ = chosen(trl_template(template), 400)
    ids = tokenizer.convert_tokens_to_ids(markers)
    assert len({*ids}) == len(markers) and min(ids) >= len(byte_tokenizer())


NAMED = [{"name": "tool_use", "template": "{{ tools }}"}, {"name": "default", "template": PLAIN_CHATML}]


@pytest.mark.parametrize("value", [PLAIN_CHATML, NAMED])
def test_a_json_file_of_the_hub_holds_a_template(value, tmp_path):
    """chat_template.json, and tokenizer_config.json under any name, which can be large."""
    for name in ("chat_template.json", "tokenizer_config"):
        path = tmp_path / name
        path.write_text(json.dumps({"chat_template": value, "added_tokens_decoder": "x" * 200_000}, indent=2))
        assert read_template(str(path)) == chosen(str(path))[0].chat_template == PLAIN_CHATML
    assert read_template(json.dumps({"chat_template": value})) == PLAIN_CHATML


@pytest.mark.parametrize(("name", "text"), [
    ("tokenizer_config.json", '{"eos_token": "{{ messages }}"}'),
    ("named", json.dumps({"chat_template": NAMED[:1]})),
    ("list.json", json.dumps(NAMED)),
    ("cut.json", json.dumps({"chat_template": PLAIN_CHATML})[:-9]),
    ("half.json", '{"chat_template": "{{ messages }}\\ud83d"}'),
    ("null", '{"chat_template": null}'),
])  # fmt: skip
def test_a_json_file_without_a_template(name, text, tmp_path):
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match="or a JSON object whose key chat_template holds one") as e:
        read_template(str(tmp_path / name))
    assert str(e.value).startswith(f"--chat_template {tmp_path / name}: ")


@pytest.mark.parametrize("name", CHAT_TEMPLATES)
def test_a_name_and_its_text_are_the_same_choice(name):
    """config.yaml has the text, which no file name is as long as."""
    text = read_template(name)
    assert read_template(text) == text and chosen(text)[0].chat_template == text


@pytest.mark.parametrize(("text", "reason"), [
    ("a\n{% if %}", "line 2: Expected an expression"),
    ("{% for m in messages %}{{ m.content }}\n{{ 1 // 0 }}{% endfor %}", "line 2: ZeroDivisionError"),
    ("{{ nothing.at.all }}", "does not render a conversation: line 1: 'nothing' is undefined"),
    ("{{ raise_exception('Not\nme') }}", "does not render a conversation: line 1: Not me"),
    ("Hello", "it does not show the answer"),
    ("{% for m in messages if m.role == 'assistant' %}{{ m.content }}{% endfor %}", "not show the question"),
])  # fmt: skip
def test_a_template_that_does_not_render(text, reason, tmp_path):
    path = tmp_path / "bad.jinja"
    path.write_text(text)
    with pytest.raises(UserError) as e:
        chosen(str(path))
    assert str(e.value).startswith(f"--chat_template {path}: ") and reason in str(e.value)
    assert "\n" not in str(e.value)


def test_a_choice_that_is_nothing(tmp_path):
    for choice, reason in (
        ("chatlm", "No such file or directory; expected chatml, llama3, gemma, qwen, or a file"),
        (str(tmp_path), "Is a directory"),
        ("x\0y", "null"),
        ("", "Is a directory"),
    ):
        with pytest.raises(UserError, match=reason):
            read_template(choice)
    (tmp_path / "long").write_text("{{ messages }}" * 10_000)
    with pytest.raises(UserError, match="has more than 131,072 bytes"):
        read_template(str(tmp_path / "long"))
    (tmp_path / "latin").write_bytes(b"\xe9{{ messages }}")
    with pytest.raises(UserError, match="not a UTF-8 text"):
        read_template(str(tmp_path / "latin"))
