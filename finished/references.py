"""The answers that rows of prompts hold, which those of models are compared with."""

from __future__ import annotations

from dataclasses import replace

from data.chat import convert_template_errors
from data.encoding import drop_empty_answers
from data.tokenizing import decode_last_answer
from finished.prompt_template import PromptTemplate
from options.generate import Prompt


def read_reference(prompt: Prompt, template: PromptTemplate) -> str:
    """Return the answer in a prompt's row, as evaluate.py compares it; "" if it holds none.

    Raises UserError as `PromptTemplate.render` does, and if the chat template refuses the answer.
    """
    if isinstance(prompt.content, str):
        return ""
    answer = {} if prompt.answer is None else {"answer": prompt.answer}
    row, _ = template.read_row(replace(prompt, content=prompt.content | answer))
    row = template.format.check(row, prompt.origin)
    with convert_template_errors(prompt.origin):
        rendered = template.format.render(row, template.context)
    # A dialogue may end with a question. Its last answer then belongs to an earlier one.
    is_answered = row["messages"][-1]["role"] == "assistant" if "messages" in row else rendered.needs_eos
    rendered = drop_empty_answers(rendered, template.tokenizer)
    if not is_answered or not rendered.learned or not rendered.last_answer_range[0]:
        return ""  # the last: a plain text, which has no question
    return decode_last_answer(rendered, template.tokenizer, template.stop_ids)
