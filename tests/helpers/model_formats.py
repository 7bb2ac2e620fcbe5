"""The chat formats of twelve models: conversations, and by hand what is learned of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass

import pytest

from benchmarks.make_checkpoint import byte_tokenizer
from data.chat_turns import TEMPLATE_ERRORS
from data.formats import FORMATS, RenderContext, check_row
from tests.helpers import chat_templates as templates
from tests.helpers.chat_templates import trl_template

CALL = {"name": "weather", "arguments": {"city": "Oslo"}}
TOOLS = [{"type": "function", "function": {"name": "weather", "description": "Now.", "parameters": {
    "type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}}}]  # fmt: skip


def user(text: str = "Hi") -> dict:
    return {"role": "user", "content": text}


def says(content: str | None = "Yo", **more) -> dict:
    return {"role": "assistant", "content": content} | more


CALLS = {"tool_calls": [{"id": "call00001", "type": "function", "function": CALL}]}
RESULT = {"role": "tool", "name": "weather", "tool_call_id": "call00001", "content": "21"}
CONVERSATIONS = {
    "one turn": [user(), says()],
    "system": [{"role": "system", "content": "Be kind."}, user(), says()],
    "three turns": [user(), says(), user("And?"), says("Ciao"), user("So?"), says("Bye")],
    "ends with the user": [user(), says(), user("And?")],
    "empty answer": [user(), says(""), user("And?"), says("Ciao")],
    "null answer": [user(), says(None), user("And?"), says("Ciao")],
    "call without content": [user(), says(None, **CALLS), RESULT, says("21 degrees")],
    "call with content": [user(), says("Wait.", **CALLS), RESULT, says("21 degrees"), user("And?"),
        says("Ciao")],
    "call at the end": [user(), says(), user("Oslo?"), says(None, **CALLS)],
    "thinking": [user(), says("Yo", reasoning_content="Greet."), user("And?"),
        says("Ciao", reasoning_content="Part.")],
    "thinking alone": [user(), says("", reasoning_content="Hm.")],
    "two answers in a row": [user(), says(), says("Again"), user("And?"), says("Ciao")],
}  # fmt: skip
WITH_TOOLS = ("call without content", "call with content", "call at the end")


def last_question(messages: list[dict], i: int) -> bool:
    """Whether turn i comes after the last of the user's messages."""
    return all(m["role"] != "user" for m in messages[i:])


def qwen_call(message: dict, before: str) -> str:
    said = (message["content"] or "") + before if message["content"] or before else ""
    return (
        said
        + f'<tool_call>\n{{"name": "weather", "arguments": {json.dumps(CALL["arguments"])}}}\n</tool_call>'
    )


def of_qwen25(messages: list[dict], i: int) -> str:
    m = messages[i]
    if m.get("tool_calls"):
        return "\n".join(filter(None, [m["content"], qwen_call(m | {"content": None}, "")])) + "<|im_end|>"
    return m["content"] + "<|im_end|>" if m["content"] else ""


def of_qwen3(messages: list[dict], i: int) -> str:
    """Reasoning is shown behind the last question. In the last turn it may be empty, and is not learned."""
    thought = messages[i].get("reasoning_content", "")
    shown = last_question(messages, i) and thought
    said = of_qwen25(messages, i)
    if not said and not (shown and thought):
        return ""
    return (f"<think>\n{thought}\n</think>\n\n" if shown else "") + (said or "<|im_end|>")


def of_gpt_oss(messages: list[dict], i: int) -> str:
    m, last = messages[i], i == len(messages) - 1
    if m.get("tool_calls"):
        more = any(n["role"] == "assistant" and "tool_calls" not in n for n in messages[i + 1 :])
        thought = (
            f"<|channel|>analysis<|message|>{m['content']}<|end|><|start|>assistant"
            if m["content"] and not more
            else ""
        )
        header = " to=functions.weather<|channel|>commentary json<|message|>"
        return f"{thought}{header}{json.dumps(CALL['arguments'])}<|call|>"
    thought = m.get("reasoning_content") if last else None
    if not m["content"] and not thought:
        return ""
    thought = f"<|channel|>analysis<|message|>{thought}<|end|><|start|>assistant" if thought else ""
    return f"{thought}<|channel|>final<|message|>{m['content']}" + ("<|return|>" if last else "<|end|>")


def of_mistral(space: str) -> Callable[[list[dict], int], str]:
    def learned(messages: list[dict], i: int) -> str:
        m = messages[i]
        if m.get("tool_calls"):
            return f'[TOOL_CALLS]{space}[{json.dumps(CALL)[:-1]}, "id": "call00001"}}]</s>'
        return f"{space}{m['content']}</s>" if m["content"] else ""

    return learned


def of_deepseek(messages: list[dict], i: int) -> str:
    m = messages[i]
    if m.get("tool_calls"):
        call = f"function<｜tool▁sep｜>weather\n```json\n{json.dumps(CALL['arguments'])}\n```"
        return (f"{m['content'] or ''}<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>{call}<｜tool▁call▁end｜>"
                "<｜tool▁calls▁end｜><｜end▁of▁sentence｜>")  # fmt: skip
    return m["content"] + "<｜end▁of▁sentence｜>" if m["content"] else ""


def closed_by(token: str) -> Callable[[list[dict], int], str]:
    """Templates that show the content alone."""
    return lambda messages, i: messages[i]["content"] + token if messages[i]["content"] else ""


def of_llama31(messages: list[dict], i: int) -> str:
    if messages[i].get("tool_calls"):
        return f'{{"name": "weather", "parameters": {json.dumps(CALL["arguments"])}}}<|eot_id|>'
    return closed_by("<|eot_id|>")(messages, i)


def of_phi3(messages: list[dict], i: int) -> str:
    said = closed_by("<|end|>")(messages, i)
    return said + "\n<|endoftext|>" if said and i == len(messages) - 1 else said


@dataclass(frozen=True)
class Model:
    """A chat template and what is expected of it.

    Attributes:
        template: of the model.
        eos: the tokenizer's.
        learned: learned(messages, i) returns the learned text of turn i; "" if nothing is learned.
        headers: texts before a learned turn.
        tokens: the tokenizer's added tokens.
        marked: the same template with generation markers.
    """

    template: str
    eos: str
    learned: Callable[[list[dict], int], str]
    headers: tuple[str, ...]
    tokens: str
    marked: str | None = None


IM = "<|im_start|> <|im_end|>"
LLAMA = "<|start_header_id|> <|end_header_id|> <|eot_id|>"
LLAMA_HEADER, IM_HEADER = "<|start_header_id|>assistant<|end_header_id|>\n\n", "<|im_start|>assistant\n"
INST = ("[/INST]", "[/TOOL_RESULTS]", "</s>")
MISTRAL_TOKENS = (
    "[INST] [/INST] [TOOL_CALLS] [AVAILABLE_TOOLS] [/AVAILABLE_TOOLS] [TOOL_RESULTS] [/TOOL_RESULTS]"
)
GPT = "<|start|> <|end|> <|message|> <|channel|> <|call|> <|return|>"
DEEPSEEK = (
    "<｜User｜> <｜Assistant｜> <｜tool▁calls▁begin｜> <｜tool▁call▁begin｜> <｜tool▁sep｜>"
    " <｜tool▁call▁end｜>"
    " <｜tool▁calls▁end｜> <｜tool▁outputs▁begin｜> <｜tool▁outputs▁end｜> <｜tool▁output▁begin｜>"
    " <｜tool▁output▁end｜>"
)
MODELS = {
    "llama 3": lambda: Model(trl_template("llama3"), "<|eot_id|>", closed_by("<|eot_id|>"), (LLAMA_HEADER,),
                             LLAMA, trl_template("llama3_training")),
    "llama 3.1": lambda: Model(trl_template("llama3_1"), "<|eot_id|>", of_llama31, (LLAMA_HEADER,), LLAMA),
    "qwen 2.5": lambda: Model(trl_template("qwen2_5"), "<|im_end|>", of_qwen25, (IM_HEADER,), IM,
        trl_template("qwen2_5_training")),
    "qwen 3": lambda: Model(trl_template("qwen3"), "<|im_end|>", of_qwen3,
        (IM_HEADER, f"{IM_HEADER}<think>\n\n</think>\n\n"),
        f"{IM} <think> </think> <tool_call> </tool_call>",
                            trl_template("qwen3_training")),
    "gemma 2": lambda: Model(trl_template("gemma"), "<eos>", closed_by("<end_of_turn>"),
        ("<start_of_turn>model\n",),
                             "<start_of_turn> <end_of_turn>", trl_template("gemma_training")),
    "gemma 3": lambda: Model(trl_template("gemma3"), "<eos>", closed_by("<end_of_turn>"),
        ("<start_of_turn>model\n",),
                             "<start_of_turn> <end_of_turn>", trl_template("gemma3_training")),
    "mistral v3": lambda: Model(templates.MISTRAL_V3, "</s>", of_mistral(" "), INST, MISTRAL_TOKENS),
    "tekken": lambda: Model(templates.TEKKEN, "</s>", of_mistral(""), INST, MISTRAL_TOKENS),
    "phi 3": lambda: Model(trl_template("phi3"), "<|endoftext|>", of_phi3, ("<|assistant|>\n",),
        "<|end|> <|user|> <|assistant|> <|system|>",
                           trl_template("phi3_training")),
    "phi 4": lambda: Model(templates.PHI4, "<|im_end|>", closed_by("<|im_end|>"),
        ("<|im_start|>assistant<|im_sep|>",), f"{IM} <|im_sep|>"),
    "gpt-oss": lambda: Model(trl_template("gptoss"), "<|return|>", of_gpt_oss, ("<|start|>assistant",), GPT,
        trl_template("gptoss_training")),
    "chatml": lambda: Model(templates.PLAIN_CHATML, "<|endoftext|>", closed_by("<|im_end|>"), (IM_HEADER,),
        IM),
    "zephyr": lambda: Model(templates.ZEPHYR, "</s>", closed_by("</s>"), ("<|assistant|>\n",),
        "<|user|> <|assistant|>"),
    "deepseek": lambda: Model(trl_template("deepseekv3"), "<｜end▁of▁sentence｜>", of_deepseek,
                              ("<｜Assistant｜>", "<｜tool▁outputs▁end｜>"), DEEPSEEK,
                                  trl_template("deepseekv3_training")),
}  # fmt: skip


def tokenizer_of(model: Model):
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"eos_token": model.eos})
    tokenizer.add_tokens(model.tokens.split(), special_tokens=True)
    tokenizer.chat_template = model.template
    return tokenizer


def row_of(name: str) -> dict:
    return {"messages": CONVERSATIONS[name]} | ({"tools": TOOLS} if name in WITH_TOOLS else {})


def by_hand(name: str) -> list[dict]:
    """Return the conversation as transformers 5.17 takes it.

    It has no nulls, but an empty content in their place, and a thought under both names that templates have.
    """
    made = []
    for message in CONVERSATIONS[name]:
        thought = message.get("reasoning_content")
        made.append(
            message | {"content": message["content"] or ""} | ({"thinking": thought} if thought else {})
        )
    return made


def render(model: Model, name: str, empty_thinking: str = "auto"):
    """(the tokenizer, what training sees of the conversation), None where the template refuses it."""
    tokenizer = tokenizer_of(model)
    values = check_row(row_of(name), FORMATS["chat"], "here")
    context = RenderContext(tokenizer, empty_thinking=empty_thinking)
    try:
        return tokenizer, FORMATS["chat"].render(values, context)
    except TEMPLATE_ERRORS:
        with pytest.raises(TEMPLATE_ERRORS):  # as transformers does
            tokenizer.apply_chat_template(by_hand(name), tools=values.get("tools"), tokenize=False)
        return tokenizer, None
