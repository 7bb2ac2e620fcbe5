"""data/chat.py on the templates of twelve models: which parts of a conversation are learned.

They are compared with the description of each format, and with transformers' generation markers where TRL has
the template with them.
"""

from __future__ import annotations

import dataclasses

import pytest
from tokenizers import AddedToken

from benchmarks.make_checkpoint import byte_tokenizer
from data.chat_remarks import describe_missing_endings
from data.evaluation_sets import make_row_prompt
from data.formats import FORMATS, RenderContext, check_row
from data.stop_ids import learned_stop_ids
from data.tokenizing import tokenize
from tests.helpers import chat_templates as templates
from tests.helpers.chat_templates import trl_template
from tests.helpers.model_formats import (
    CONVERSATIONS,
    IM,
    MODELS,
    Model,
    by_hand,
    closed_by,
    render,
    row_of,
    says,
    tokenizer_of,
    user,
)
from tests.helpers.small_tokenizers import chat_tokenizer

REFUSED = {
    "gemma 2": {"system", "call without content", "call with content", "two answers in a row"},
    "gemma 3": {"call without content", "call with content", "two answers in a row"},
    "mistral v3": {"two answers in a row"},
    "tekken": {"two answers in a row"},
}


@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("model", MODELS)
def test_what_is_learned(model, conversation):
    """Each turn's text in the model's format, after its header, is learned, and nothing else."""
    made = MODELS[model]()
    _, rendered = render(made, conversation)
    assert (rendered is None) == (conversation in REFUSED.get(model, ()))
    if rendered is None:
        return
    messages = CONVERSATIONS[conversation]
    wanted = [made.learned(messages, i) for i, m in enumerate(messages) if m["role"] == "assistant"]
    assert [rendered.text[start:end] for start, end in rendered.learned] == [w for w in wanted if w]
    for start, _ in rendered.learned:
        assert rendered.text[:start].endswith(made.headers)


SHOWS_CALLS = ("qwen 2.5", "qwen 3", "gpt-oss", "deepseek")
MARKED = [name for name, make in MODELS.items() if make().marked]


def marked_tokens(model: Model, name: str) -> tuple[list[int], list[int]]:
    """(tokens, 1 for each that the markers of the model's other template hold), by transformers."""
    tokenizer = tokenizer_of(dataclasses.replace(model, template=model.marked))
    made = tokenizer.apply_chat_template(
        by_hand(name),
        tools=row_of(name).get("tools"),
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    return made["input_ids"], made["assistant_masks"]


def runs_of(tokens: list[int], mask: list[int], tokenizer) -> list[str]:
    """The texts of neighbouring tokens of a mask."""
    texts, before = [], 0
    for token, learned in zip(tokens, mask, strict=True):
        if learned and not before:
            texts.append([])
        if learned:
            texts[-1].append(token)
        before = learned
    return [tokenizer.decode(each) for each in texts]


COMPARED = [(model, "one turn") for model in MARKED] + [
    # TRL's Qwen 3 shows thoughts, if only empty ones, where Qwen's own does not: those texts differ.
    (model, conversation)
    for model in MARKED
    for conversation in ["three turns", "call without content", "call at the end"]
    if model != "qwen 3" and (model in SHOWS_CALLS or conversation == "three turns")
]


@pytest.mark.parametrize("model, conversation", COMPARED)
def test_of_a_template_without_markers_what_its_markers_would_say(model, conversation):
    """But for the header and the line break, which docs/data.md argues."""
    made = MODELS[model]()
    tokenizer, rendered = render(made, conversation, "learn")
    rows = tokenize([rendered], tokenizer, 10_000, "here")
    tokens, mask = marked_tokens(made, conversation)
    assert rows.tokens.tolist() == tokens
    theirs = runs_of(tokens, mask, tokenizer)
    for header in (*made.headers, "\n"):  # which TRL's markers of some models hold besides
        theirs = [text.removeprefix(header) for text in theirs]
    assert runs_of(tokens, rows.learned.tolist(), tokenizer) == [text.removesuffix("\n") for text in theirs]


@pytest.mark.parametrize("model, conversation", [
    *((model, "three turns") for model in MARKED),
    *((model, conversation) for model in SHOWS_CALLS for conversation in ("call without content",
        "thinking")),
])  # fmt: skip
def test_a_template_s_own_markers_are_what_is_learned(model, conversation):
    """Token for token."""
    made = dataclasses.replace(MODELS[model](), template=MODELS[model]().marked)
    tokenizer, rendered = render(made, conversation, "learn")
    rows = tokenize([rendered], tokenizer, 10_000, "here")
    tokens, mask = marked_tokens(made, conversation)
    assert rows.tokens.tolist() == tokens and rows.learned.int().tolist() == mask
    assert any(mask)


EMPTY = "<think>\n\n</think>\n\n"


@pytest.mark.parametrize("template", ["qwen3", "qwen3_training", "qwen3_5_think"])
def test_an_empty_thought_is_learned_only_on_demand(template):
    """Without demand, a server's enable_thinking=False asks for what is learned; a thought stays learned."""
    made = dataclasses.replace(MODELS["qwen 3"](), template=trl_template(template))
    tokenizer, rendered = render(made, "one turn")
    _, asked_for = render(made, "one turn", "learn")
    (start, end), (begin, _) = rendered.learned[0], asked_for.learned[0]
    assert rendered.text[start:end].rstrip() in ("Yo", "Yo<|im_end|>") and rendered.has_empty_thought
    assert not asked_for.has_empty_thought and rendered.text[begin:start].endswith("\n</think>\n\n")
    contexts = [RenderContext(tokenizer, empty_thinking=choice) for choice in ("prompt", "learn", "auto")]
    prompts = [FORMATS["chat"].prompt({"messages": [user()]}, context) for context in contexts]
    settings = {"tokenize": False, "add_generation_prompt": True}
    without = tokenizer.apply_chat_template([user()], enable_thinking=False, **settings)
    assert prompts[0] == rendered.text[:start] and prompts[0].rstrip() == without.rstrip()
    assert prompts[1] == prompts[2] == asked_for.text[:begin]
    _, thinking = render(made, "thinking")
    assert "Part." in thinking.text[slice(*thinking.learned[-1])]


def render_answer(template: str, answer: dict, empty_thinking: str = "auto"):
    """(the tokenizer, a question and an answer in a template of TRL, the prompt that training asks with)."""
    tokenizer = tokenizer_of(dataclasses.replace(MODELS["qwen 3"](), template=trl_template(template)))
    row = check_row({"messages": [user(), answer]}, FORMATS["chat"], "here")
    rendered = FORMATS["chat"].render(row, RenderContext(tokenizer, empty_thinking=empty_thinking))
    recorded = "prompt" if rendered.has_empty_thought else empty_thinking
    return tokenizer, rendered, FORMATS["chat"].prompt(row, RenderContext(tokenizer, empty_thinking=recorded))


@pytest.mark.parametrize("template", ["llama3", "gemma3", "qwen2_5", "phi3", "nemotron_3_super"])
@pytest.mark.parametrize("thought", [EMPTY, "<think>\n</think>"])
def test_an_empty_thought_that_no_prompt_ends_with_is_text_of_the_answer(template, thought):
    tokenizer, rendered, asked = render_answer(template, says(thought + "Yo"))
    default = tokenizer.apply_chat_template([user()], tokenize=False, add_generation_prompt=True)
    assert asked == default and not rendered.has_empty_thought
    ((start, end),) = rendered.learned
    assert rendered.text[:start] == default
    opened = "<think>\n" if default.endswith("<think>\n") else ""
    assert (opened + rendered.text[start:end]).startswith(thought + "Yo")


@pytest.mark.parametrize("template", ["nemotron_3_nano", "nemotron_3_super", "nemotron_3_super_training"])
def test_an_empty_thought_that_the_generation_prompt_does_not_open(template):
    """The generation prompt ends with "<think>\\n", the empty thought is "<think></think>"."""
    settings = {"tokenize": False, "add_generation_prompt": True}
    tokenizer, rendered, asked = render_answer(template, says("Yo"))
    without = tokenizer.apply_chat_template([user()], enable_thinking=False, **settings)
    assert asked == without == rendered.text[: rendered.learned[0][0]] and asked.endswith("<think></think>")
    _, rendered, asked = render_answer(template, says("Yo", reasoning_content="Hm."))
    assert asked == tokenizer.apply_chat_template([user()], **settings) and rendered.text.startswith(asked)
    _, rendered, asked = render_answer(template, says("Yo"), "learn")
    assert "</think>Yo" in rendered.text[slice(*rendered.learned[0])] and asked.endswith("assistant\n<think>")


@pytest.mark.parametrize("conversation", ["one turn", "three turns", "call without content"])
def test_markers_around_an_empty_thought_lose_it(conversation):
    made = dataclasses.replace(MODELS["qwen 3"](), template=trl_template("qwen3_training"))
    (_, rendered), (_, marked) = render(made, conversation), render(made, conversation, "learn")
    learned, whole = ([one.text[s:e] for s, e in one.learned] for one in (rendered, marked))
    assert learned == [text.removeprefix(EMPTY) for text in whole] != whole


def test_turns_between_markers_that_are_not_learned():
    """An empty one, and one that its row leaves out."""
    made = dataclasses.replace(MODELS["chatml"](), template=trl_template("qwen2_5_training"))
    tokenizer = tokenizer_of(made)
    messages = [user(), says("No", train=False), user(), says(""), user(), says("Yes")]
    values = check_row({"messages": messages}, FORMATS["chat"], "here")
    rendered = FORMATS["chat"].render(values, RenderContext(tokenizer))
    assert [rendered.text[s:e] for s, e in rendered.learned] == ["\nYes<|im_end|>\n"]


@pytest.mark.parametrize("special", ["<s>", "</s>", " <s></s>"])
@pytest.mark.parametrize("trl", [False, True])
def test_an_answer_of_nothing_but_special_tokens_is_none(special, trl):
    """Its turn's closing token alone is not learned, as after an empty answer."""
    template = trl_template("qwen2_5_training") if trl else MODELS["chatml"]().template
    tokenizer = chat_tokenizer(template, "</s>")
    tokenizer.add_special_tokens(
        {"bos_token": "<s>", "additional_special_tokens": ["<|im_start|>", "<|im_end|>"]}
    )

    def rows_of(content: str):
        conversations = [
            [user(), says(content)],
            [user(), says(content), user(), says("Yes")],
            [user(), says("Yes"), user(), says(content)],
        ]
        values = [check_row({"messages": m}, FORMATS["chat"], "here") for m in conversations]
        rendered = [FORMATS["chat"].render(v, RenderContext(tokenizer)) for v in values]
        return tokenize(rendered, tokenizer, 10_000, "here")

    rows, empty = rows_of(special), rows_of("")
    assert rows.dropped == empty.dropped == 1
    assert rows.tokens[rows.learned].tolist() == empty.tokens[empty.learned].tolist()
    assert tokenizer.decode(rows.tokens[rows.learned]).count("Yes<|im_end|>") == 2


@pytest.mark.parametrize("model, stop_ids", [
    ("llama 3.1", "<|eot_id|>"), ("qwen 2.5", "<|im_end|>"), ("qwen 3", "<|im_end|>"),
        ("gemma 3", "<end_of_turn>"),
    ("mistral v3", "</s>"), ("phi 3", "<|end|>"), ("gpt-oss", "<|return|> <|call|>"),
        ("chatml", "<|im_end|>"),
    ("zephyr", "</s>"), ("deepseek", "<｜end▁of▁sentence｜>"),
])  # fmt: skip
def test_the_tokens_that_a_model_learns_to_stop_with(model, stop_ids):
    tokenizer = tokenizer_of(MODELS[model]())
    assert learned_stop_ids("chat", RenderContext(tokenizer)) == sorted(
        tokenizer.convert_tokens_to_ids(stop_ids.split())
    )
    assert learned_stop_ids("alpaca", RenderContext(tokenizer)) == []


# Templates that close turns in other ways. Shown is what is learned of "a", then of "c".


BEFORE_NEXT = (  # the closing of a turn is written with the next header
    "{% for m in messages %}{{ ('<|im_end|>\n' if not loop.first else '') + '<|im_start|>' + m.role + '\n'"
    " + m.content }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_end|>\n<|im_start|>assistant\n' }}{% endif %}"
)
NEEDS_SYSTEM = (
    "{% if messages[0].role != 'system' %}{{ raise_exception('needs a system message') }}{% endif %}"
    + templates.PLAIN_CHATML
)
NEEDS_TWO_TURNS = (
    "{% if messages | length < 3 %}{{ raise_exception('too short') }}{% endif %}" + templates.PLAIN_CHATML
)
VICUNA = (
    "{% for m in messages %}{{ ('USER: ' if m.role == 'user' else 'ASSISTANT: ') + m.content + ' ' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
ROUNDS = (  # as ChatGLM2's; no token closes a turn
    "{% for m in messages %}{% if m.role == 'user' %}{{ '[Round ' ~ (loop.index0 // 2 + 1) ~ '] Q: ' }}"
    "{{ m.content + ' A: ' }}{% elif m.role == 'assistant' %}"
    "{{ m.content }}{{ '' if loop.last else '\n\n' }}{% endif %}{% endfor %}"
)
UNMARKED_END = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}"
    "{% else %}{{ '<|im_start|>' + m.content }}{% endif %}{{ '<|im_end|>' }}{% endfor %}"
)
ALWAYS_OPEN = (  # the next answer is opened whatever add_generation_prompt is
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{{ '<|im_start|>assistant\n' }}"
)
CLOSED = {
    "before a header that always follows": (ALWAYS_OPEN, ["a<|im_end|>", "c<|im_end|>"], False),
    "with the next header": (BEFORE_NEXT, ["a<|im_end|>", "c"], True),
    "with the next header, and an EOS at the end": (
        BEFORE_NEXT + "{% if not add_generation_prompt %}{{ eos_token }}{% endif %}",
            ["a<|im_end|>", "c</s>"], False),
    "after a system message": (NEEDS_SYSTEM, ["a<|im_end|>", "c<|im_end|>"], False),
    "from the second turn on": (NEEDS_TWO_TURNS, ["a<|im_end|>", "c<|im_end|>"], False),
    "by nothing": (VICUNA, [" a", " c"], True),
    "by a numbered header": (ROUNDS, ["a", "c"], True),
    "by letters, before the next": (ROUNDS.replace("'\n\n'", "' (over)\n'"), ["a (over)", "c"], True),
    "by letters": (
        ROUNDS.replace("{{ m.content }}", "{{ m.content + ' (over)' }}"), ["a (over)", "c (over)"], False),
    "outside of the markers": (UNMARKED_END, ["a", "c"], True),
}  # fmt: skip


@pytest.mark.parametrize("name", CLOSED)
def test_turns_that_are_closed_otherwise(name):
    """What is learned, and whether a line says that the end is not."""
    template, learned, told = CLOSED[name]
    tokenizer = tokenizer_of(Model(template, "</s>", closed_by(""), (), IM))
    messages = [{"role": "system", "content": "s"}, user("q"), says("a"), user("r"), says("c")]
    values = check_row({"messages": messages}, FORMATS["chat"], "here")
    context = RenderContext(tokenizer)
    rendered = FORMATS["chat"].render(values, context)
    assert [rendered.text[start:end] for start, end in rendered.learned] == learned
    assert rendered.text == tokenizer.apply_chat_template(messages, tokenize=False)
    remarks = describe_missing_endings(context.chat, [rendered.text[slice(*rendered.learned[-1])]])
    assert sum("is not taught to stop" in remark for remark in remarks) == told
    assert sum("is learned as letters" in remark for remark in remarks) == ("letters" in name)
    assert len(remarks) == told + ("letters" in name)


@pytest.mark.parametrize("space", ["", " ", "\n", " \n "])
def test_a_header_that_swallows_whitespace_is_not_learned(space):
    """Phi-3's added tokens have rstrip. The tokens are the same with and without the space, and so are the
    learned ones."""
    learned = []
    for content in ("Yo", f"{space}Yo"):
        tokenizer = tokenizer_of(
            Model(trl_template("phi3"), "</s>", closed_by("<|end|>"), (), "<|end|> <|user|>")
        )
        tokenizer.add_tokens([AddedToken("<|assistant|>", rstrip=True, special=True, normalized=False)])
        row = FORMATS["chat"].render({"messages": [user("q"), says(content)]}, RenderContext(tokenizer))
        rows = tokenize([row], tokenizer, 100, "here")
        assert "<|assistant|>" in tokenizer.convert_ids_to_tokens(rows.tokens.tolist())
        learned.append(tokenizer.convert_ids_to_tokens(rows.tokens[rows.learned].tolist()))
    assert learned[0] == learned[1] and learned[0][:2] == ["Y", "o"]


def test_a_closing_that_is_no_token():
    """ChatML for a tokenizer without its tokens: their letters are learned, and end an answer as text."""
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = templates.PLAIN_CHATML
    context = RenderContext(tokenizer)
    rendered = FORMATS["chat"].render({"messages": [user(), says()]}, context)
    assert rendered.marker == FORMATS["chat"].marker(context) == "<|im_end|>"
    prompt = make_row_prompt(rendered, tokenizer, 999, learned_stop_ids("chat", context))
    assert (prompt.answer, prompt.marker) == ("Yo", "<|im_end|>")
    (remark,) = describe_missing_endings(context.chat, ["Yo<|im_end|>"])
    assert "'<|im_end|>', for which the tokenizer has no token" in remark
    assert FORMATS["chat"].marker(RenderContext(tokenizer_of(MODELS["qwen 3"]()))) is None


MARKED_APART = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{{ '<|im_start|>assistant\n' }}{% generation %}"
    "{{ '<think>' +"
    " m.reasoning_content }}{% endgeneration %}{{ '</think>' }}{% generation %}{{ m.content + '<|im_end|>' }}"
    "{% endgeneration %}{% else %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' }}"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.mark.parametrize("template, answer", [
    (MARKED_APART, "<think>h</think>c"),
    (trl_template("phi3_training"), "c"), (trl_template("qwen2_5_training"), "c"),
])  # fmt: skip
def test_evaluation_asks_without_any_part_of_the_answer(template, answer):
    """Also where the template's markers have several parts for one turn."""
    made = Model(template, "<|endoftext|>", closed_by(""), (), f"{IM} <|end|> <|user|> <|assistant|>")
    tokenizer = tokenizer_of(made)
    messages = [user("q"), says("a", reasoning_content="g"), user("r"), says("c", reasoning_content="h")]
    context = RenderContext(tokenizer)
    rendered = FORMATS["chat"].render(check_row({"messages": messages}, FORMATS["chat"], "here"), context)
    prompt = make_row_prompt(rendered, tokenizer, 999, learned_stop_ids("chat", context))
    asked = tokenizer.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True)
    assert asked.startswith(prompt.text) and asked.removeprefix(prompt.text) in ("", "\n")
    assert prompt.answer == answer
