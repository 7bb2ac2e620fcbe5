"""Serve several adapters over one loaded base, by OpenAI's chat API. docs/serving.md explains it.

python docs/serve_adapters.py BASE one=runs/a two=runs/b --load_in_4bit
"""

import argparse
import sys
import threading
import time
from contextlib import nullcontext, suppress
from pathlib import Path

import torch
import uvicorn
from fastapi import FastAPI, HTTPException
from jinja2 import TemplateError
from peft import PeftConfig, PeftModel
from peft.helpers import DoraCaching
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    GenerationConfig,
    StoppingCriteriaList,
)

DEFAULT_TOKENS = 256  # of an answer, at most
FIELDS = {"model", "messages", "max_tokens", "max_completion_tokens", "chat_template_kwargs", "user"}
# Values of other fields that ask for nothing.
NEUTRAL = {"stream": (False,), "temperature": (0,), "n": (1,), "top_p": (1,), "logprobs": (False,)}
TEMPLATE_OPTIONS = {"enable_thinking", "thinking", "reasoning_effort"}
TEMPLATE_ERRORS = (TemplateError, ValueError, TypeError, KeyError, AttributeError)
PROBE = "\uf8ffanswer\uf8ff"  # no template writes this private character
OPENINGS = ([], [{"role": "system", "content": "Be kind."}])  # some templates need a system message


def load(base: str, runs: dict[str, str], load_in_4bit: bool) -> tuple[PeftModel, dict[str, tuple]]:
    """Return (the base with all adapters, {name: (PEFT's name, tokenizer, stop tokens, stop string)})."""
    dtype = AutoConfig.from_pretrained(base, trust_remote_code=False).dtype or torch.bfloat16
    nf4 = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": dtype}
    model = AutoModelForCausalLM.from_pretrained(
        base,
        dtype=dtype,
        device_map="auto",
        quantization_config=BitsAndBytesConfig(load_in_4bit=True, **nf4) if load_in_4bit else None,
        use_safetensors=True,
        trust_remote_code=False,
    )
    tokenizer = AutoTokenizer.from_pretrained(base, trust_remote_code=False)
    served = {base: ("", tokenizer, model.generation_config.eos_token_id, find_stop_string(tokenizer))}
    model.generation_config = GenerationConfig()  # the base's may sample, or penalize repetitions
    for name, run in runs.items():
        adapter = f"adapter{len(served)}"  # PEFT allows no dot in a name
        trained_on = PeftConfig.from_pretrained(run).base_model_name_or_path
        if trained_on != base:  # PEFT compares only the shapes
            print(f"WARNING: {run} was trained on {trained_on}, and is loaded over {base}", file=sys.stderr)
        if isinstance(model, PeftModel):
            model.load_adapter(run, adapter)
        else:
            model = PeftModel.from_pretrained(model, run, adapter)
        # A RUN has these files where they differ from the base's.
        source = run if Path(run, "tokenizer.json").exists() else base
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
        has_stops = Path(run, "generation_config.json").exists()
        stops = GenerationConfig.from_pretrained(run).eos_token_id if has_stops else served[base][2]
        served[name] = (adapter, tokenizer, stops, find_stop_string(tokenizer))
    return model.eval(), served


def find_stop_string(tokenizer) -> str:
    """Return the text with which the chat template ends an answer; "" if a token ends it, or nothing does.

    Training teaches this text where the tokenizer has no token for the template's end of a turn.
    """
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": PROBE}]
    for opening in OPENINGS:
        with suppress(*TEMPLATE_ERRORS):
            text = tokenizer.apply_chat_template([*opening, *turns], tokenize=False)
            ending = text.partition(PROBE)[2].strip()
            is_token = ending.startswith(tuple(map(str, tokenizer.added_tokens_decoder.values())))
            return "" if is_token else ending
    return ""


def read_request(body: dict, served: dict[str, tuple]) -> tuple[str, list[dict], int, dict]:
    """Return (model's name, messages, most new tokens, options of the template); HTTPException if wrong."""
    name, messages = body.get("model"), body.get("messages")
    if not isinstance(name, str) or name not in served:
        raise HTTPException(404, f"model {name!r} is not served; these are: {', '.join(served)}")
    if not (isinstance(messages, list) and messages and all(isinstance(m, dict) for m in messages)):
        raise HTTPException(400, "messages: must be a list of objects with role and content")
    for key, value in body.items():
        if key not in FIELDS and value not in NEUTRAL.get(key, ()) and value is not None:
            raise HTTPException(400, f"{key}: is not supported: answers are greedy, whole, and one at a time")
    given = [body[key] for key in ("max_tokens", "max_completion_tokens") if body.get(key) is not None]
    longest = given[0] if given else DEFAULT_TOKENS
    if type(longest) is not int or longest < 1:
        raise HTTPException(400, f"max_tokens: must be a whole number from 1, not {longest!r}")
    template = body.get("chat_template_kwargs") or {}
    # A client's chat_template would be a program that runs here.
    if not isinstance(template, dict) or not template.keys() <= TEMPLATE_OPTIONS:
        raise HTTPException(400, f"chat_template_kwargs: may have only {', '.join(sorted(TEMPLATE_OPTIONS))}")
    return name, messages, longest, template


def make_app(model: PeftModel, served: dict[str, tuple]) -> FastAPI:
    """Return the server of what `load` returns. Answers are greedy."""
    app, turn = FastAPI(), threading.Lock()  # the model has one active adapter, so requests take turns

    @app.get("/v1/models")
    def list_models() -> dict:
        return {"object": "list", "data": [{"id": name, "object": "model"} for name in served]}

    @app.post("/v1/chat/completions")
    def complete(body: dict) -> dict:
        name, messages, longest, template = read_request(body, served)
        adapter, tokenizer, stops, stop_string = served[name]
        try:
            asked = tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, return_tensors="pt", return_dict=True, **template
            )
        except TEMPLATE_ERRORS as e:
            raise HTTPException(400, f"the chat template refuses the messages: {e}") from e
        length = asked["input_ids"].shape[1]
        room = model.config.get_text_config().max_position_embeddings - length
        if room < 1:
            raise HTTPException(400, f"messages: {length} tokens leave no room for an answer")

        def has_stop_string(ids, _scores, **_) -> torch.Tensor:
            last = ids[0, max(length, ids.shape[1] - 2 * len(stop_string)) :]
            return torch.tensor([stop_string in tokenizer.decode(last)], device=ids.device)

        with turn, torch.inference_mode():
            if adapter:
                model.set_adapter(adapter)
            with nullcontext() if adapter else model.disable_adapter():
                tokens = model.generate(
                    **asked.to(model.device),
                    max_new_tokens=min(longest, room),
                    eos_token_id=stops,
                    pad_token_id=0,
                    stopping_criteria=StoppingCriteriaList([has_stop_string] if stop_string else []),
                )[0, length:].tolist()
        text = tokenizer.decode(tokens, skip_special_tokens=True)
        ended = tokens[-1] in (stops if isinstance(stops, list) else [stops])
        if stop_string and stop_string in text:
            text, ended = text.partition(stop_string)[0], True
        message = {"role": "assistant", "content": text}
        usage = {"prompt_tokens": length, "completion_tokens": len(tokens)}
        return {
            "object": "chat.completion",
            "created": int(time.time()),
            "model": name,
            "choices": [{"index": 0, "message": message, "finish_reason": "stop" if ended else "length"}],
            "usage": usage | {"total_tokens": sum(usage.values())},
        }

    return app


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Serve several adapters over one base.")
    parser.add_argument("base", help="folder or hub id of the base, which requests may name, too")
    parser.add_argument(
        "runs", nargs="+", metavar="NAME=RUN", help="requests with this name get this adapter"
    )
    parser.add_argument("--load_in_4bit", action="store_true", help="pack the base to NF4")
    parser.add_argument("--cache_dora", action="store_true", help="faster DoRA, for the memory of B A")
    parser.add_argument("--port", type=int, default=8000)
    options = parser.parse_args()
    runs = dict(text.split("=", 1) for text in options.runs if "=" in text)
    if len({options.base, *runs}) <= len(options.runs):
        parser.error("give each adapter as NAME=RUN, with names of their own")
    for run in runs.values():
        if not Path(run, "adapter_config.json").is_file():
            parser.error(f"{run}: holds no adapter (adapter_config.json)")
    DoraCaching()(options.cache_dora)
    app = make_app(*load(options.base, runs, options.load_in_4bit))
    uvicorn.run(app, host="localhost", port=options.port)
