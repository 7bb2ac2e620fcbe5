"""Chat templates like those of well-known models, each with the differences that matter to a loss mask."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

# Qwen2: ChatML, with a default system prompt if the conversation has none.
CHATML = (
    "{% for m in messages %}{% if loop.first and m.role != 'system' %}"
    "{{ '<|im_start|>system\nBe kind.<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Llama 3: writes its BOS, strips contents, ends a turn with a token that need not be the tokenizer's EOS.
LLAMA3 = (
    "{% for m in messages %}{{ (bos_token if loop.first else '') + '<|start_header_id|>' + m.role"
    " + '<|end_header_id|>\n\n' + m.content | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
# Llama 2: the system prompt inside the first user turn, no generation prompt, a space on both sides.
LLAMA2 = (
    "{% if messages[0].role == 'system' %}{% set rest = messages[1:] %}"
    "{% set system = '<<SYS>>\n' + messages[0].content + '\n<</SYS>>\n\n' %}"
    "{% else %}{% set rest = messages %}{% set system = '' %}{% endif %}{% for m in rest %}"
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Roles must alternate') }}{% endif %}"
    "{% if m.role == 'user' %}{{ bos_token + '[INST] ' + (system if loop.first else '') + m.content | trim"
    " + ' [/INST]' }}{% else %}{{ ' ' + m.content | trim + ' ' + eos_token }}{% endif %}{% endfor %}"
)
# Mistral: nothing between [/INST] and the answer; refuses system messages.
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}"
    "{% elif m.role == 'assistant' %}{{ m.content + eos_token }}"
    "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"
)
# Gemma: the assistant is called model.
GEMMA = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}{% for m in messages %}{% set role = 'model' if m.role == 'assistant' else m.role %}"
    "{{ '<start_of_turn>' + role + '\n' + m.content | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
# Qwen3: reasoning is shown in the last turn, where it may be empty, and dropped from earlier ones.
QWEN3 = (
    "{% for m in messages %}{% set content = m.content %}{% set thought = '' %}"
    "{% if '</think>' in content %}"
    "{% set thought = content.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
    "{% set content = content.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' and loop.last %}"
    "{{ '<think>\n' + thought + '\n</think>\n\n' }}{% endif %}{{ content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# DeepSeek R1: the generation prompt opens <think>, and no turn shows one.
R1 = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '<|User|>' + m.content }}"
    "{% elif m.role == 'assistant' %}{{ '<|Assistant|>' + m.content.split('</think>')[-1] + eos_token }}"
    "{% else %}{{ m.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|Assistant|><think>\n' }}{% endif %}"
)
# Hides the text of earlier answers.
FORGETFUL = (
    "{% for m in messages %}"
    "{{ m.role + ': ' + (m.content if loop.last or m.role == 'user' else '...') + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
# DEAF shows no answer; QUOTING shows one twice.
DEAF = "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}"
QUOTING = (
    "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' * loop.last }}{% endfor %}"
    "{{ 'You said ' + (messages[1] or messages[0]).content }}"
)
# Mistral's tokenizers v3: the system prompt and the tools are in front of the last question. SPACE is a space
# after a marker in SentencePiece's versions, and nothing in Tekken's.
_MISTRAL_V3 = (
    "{% if messages[0].role == 'system' %}"
    "{% set system = messages[0].content + '\n\n' %}{% set rest = messages[1:] %}"
    "{% else %}{% set system = '' %}{% set rest = messages %}{% endif %}"
    "{% set asked = rest | selectattr('role', 'equalto', 'user') | list %}"
    "{% set ns = namespace(index=0) %}"
    "{% for m in rest %}{% if m.role != 'tool' and not m.tool_calls is defined %}"
    "{% if (m.role == 'user') != (ns.index % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% set ns.index = ns.index + 1 %}{% endif %}{% endfor %}"
    "{{ bos_token }}{% for m in rest %}{% if m.role == 'user' %}"
    "{% if m == asked[-1] %}"
    "{% if tools %}{{ '[AVAILABLE_TOOLS]SPACE' + (tools | tojson) + '[/AVAILABLE_TOOLS]' }}{% endif %}"
    "{{ '[INST]SPACE' + system + m.content + '[/INST]' }}"
    "{% else %}{{ '[INST]SPACE' + m.content + '[/INST]' }}{% endif %}"
    "{% elif m.tool_calls is defined %}{{ '[TOOL_CALLS]SPACE[' }}{% for call in m.tool_calls %}"
    "{{ (call.function | tojson)[:-1] + ', \"id\": \"' + call.id + '\"}' + (']' if loop.last else ', ') }}"
    "{% endfor %}{{ eos_token }}"
    "{% elif m.role == 'assistant' %}{{ 'SPACE' + m.content + eos_token }}"
    "{% elif m.role == 'tool' %}{{ '[TOOL_RESULTS]SPACE{\"content\": ' + m.content + '}[/TOOL_RESULTS]' }}"
    "{% endif %}{% endfor %}"
)
MISTRAL_V3 = _MISTRAL_V3.replace("SPACE", " ")
TEKKEN = _MISTRAL_V3.replace("SPACE", "")
# Phi-4: ChatML's markers with another separator, and no line breaks.
PHI4 = (
    "{% for m in messages %}"
    "{{ '<|im_start|>' + m.role + '<|im_sep|>' + m.content + '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant<|im_sep|>' }}{% endif %}"
)
# Zephyr: turns are closed by the EOS token, under plain role markers.
ZEPHYR = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + eos_token + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
# Plain ChatML, as base models get it.
PLAIN_CHATML = (
    "{% for m in messages %}"
    "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def trl_template(name: str) -> str:
    """Read a template of TRL: a model's own, or `<model>_training`, which has generation markers."""
    spec = importlib.util.find_spec("trl")
    if spec is None:  # the GPU tests run where requirements-dev.txt is not installed
        pytest.skip("needs TRL's chat templates (requirements-dev.txt)", allow_module_level=True)
    (root,) = spec.submodule_search_locations
    return (Path(root) / "chat_templates" / f"{name}.jinja").read_text(encoding="utf-8")
