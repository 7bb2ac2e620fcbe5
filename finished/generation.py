"""Answers of a trained model and of its base, in the prompt template that the run was trained with.

The base's answers come from the same loaded model with its adapters switched off; another run's adapter takes
the place of the one before. Runs that saved a model, or new blocks, hold no adapter: of them and their bases
one is loaded at a time.

Shapes: P tokens of a prompt.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import (
    GenerationConfig,
    PreTrainedModel,
    StoppingCriteria,
    StoppingCriteriaList,
    TextStreamer,
)

from data.answers import answer_text
from data.chat import template_errors
from data.encoding import prompt_ids
from data.examples import find_format
from data.formats import FORMATS, GUANACO_MARKERS, Format, RenderContext, asked, checked
from data.stops import stop_tokens
from finished.finished_run import Run, load_model, load_tokenizer, open_base, open_run, set_adapter
from launch.precision import Precision, choose_precision
from models.adapters import replace_adapters
from models.dora import cached_norms
from models.lora import adapters_off
from options.data_files import file_suffix
from options.errors import UserError
from options.generate import Prompt, Sampling

BASE = "base"


def open_runs(folders: list[str], base_model: str | None) -> list[Run]:
    """The runs, checked, and checked to be able to share one base. Raises UserError."""
    runs = [open_run(folder, base_model) for folder in folders]
    for run in runs if len(runs) > 1 else []:
        if not run.adapter:
            raise UserError(f"{run.folder}: has no adapter; only adapters can share a base: give it alone")
        if run.base.resolve() != runs[0].base.resolve():
            raise UserError(
                f"{run.folder}: was trained on {run.base}, but {runs[0].folder} on {runs[0].base}; runs given"
                " together must have one base"
            )
        if _packing(run) != _packing(runs[0]):
            raise UserError(
                f"{run.folder}: its base is {_packing(run)}, that of {runs[0].folder} {_packing(runs[0])}; runs"
                " given together must have one base"
            )
    return runs


def _packing(run: Run) -> str:
    config = run.config
    if config.method.quantizer is None:
        return "not packed"
    more = f" in {config.n_bits} bits, groups of {config.group_size}" if config.method.hqq else ""
    return f"packed by {config.method.quantizer}{more}"


@dataclass(frozen=True)
class Template:
    """How a run's training wrote its prompts. stops: tokens that end an answer; marker: a text that does."""

    form: Format
    context: RenderContext
    positions: int
    stops: frozenset[int]
    marker: str | None

    @property
    def tokenizer(self) -> Any:
        return self.context.tokenizer

    def question(self, text: str) -> dict:
        """A bare prompt as the row that it would be."""
        return self.form.asking(text, self.context.markers)

    def text(self, prompt: Prompt) -> str:
        """The text that training would have up to the answer. Raises UserError for rows without a
        question."""
        given = self.question(prompt.content) if isinstance(prompt.content, str) else prompt.content
        row = checked(given, self.form, prompt.origin, answered=False)
        if not row[self.form.asks]:
            raise UserError(f"{prompt.origin}: {self.form.asks} is empty")
        with template_errors(prompt.origin):
            text = self.form.prompt(row, self.context)
            text.encode()
        return text

    def ids(self, text: str, origin: str) -> torch.Tensor:
        """[1, P] int64. Raises UserError if they leave no room for an answer."""
        ids = prompt_ids(text, self.tokenizer, self.form.special)
        if not ids:
            raise UserError(f"{origin}: is empty")
        if len(ids) >= self.positions:
            raise UserError(
                f"{origin}: takes {len(ids):,} tokens; the model has {self.positions:,} positions"
            )
        return torch.tensor([ids])


def make_template(run: Run, dataset_format: str) -> Template:
    """dataset_format: instead of the run's own, unless "auto". Raises UserError if nothing tells the
    format."""
    tokenizer = load_tokenizer(run)
    wanted = dataset_format if dataset_format != "auto" else run.config.dataset_format
    try:
        name, markers = find_format(run.config.dataset, wanted)
    except UserError as e:  # the data are gone; a file has no markers of its own, a recipe may have
        if wanted == "auto" or (wanted == "guanaco" and file_suffix(run.config.dataset) == ".toml"):
            raise UserError(f"{run.folder}: its prompt template cannot be told ({e}); --dataset_format"
                            " says it") from None  # fmt: skip
        name, markers = wanted, list(GUANACO_MARKERS)
    context = RenderContext(tokenizer, markers, run.config.chat_date)
    stops = stop_tokens(run.base, run.model_config.eos_token_id, name, context)
    marker = FORMATS[name].marker(context)
    positions = run.model_config.max_position_embeddings
    return Template(FORMATS[name], context, positions, frozenset(stops), marker)


@dataclass(frozen=True)
class Answer:
    """tokens: how many were generated; ended: by the model itself, not by max_new_tokens."""

    text: str
    tokens: int
    ended: bool


class Voices:
    """Who can answer: with `compare` the base, and each run by the name of its folder; one of them at a
    time."""

    def __init__(
        self, runs: list[Run], base_model: str | None, device: torch.device, precision: str, compare: bool
    ):
        self.runs = {str(run.folder): run for run in runs}
        self.names = [BASE] * compare + list(self.runs)
        self.first, self.device, self.precision = runs[0], device, precision
        self.base = open_base(self.first, base_model) if compare and not self.first.adapter else None
        if self.base and self.base.files.prequantized:
            raise UserError(f"{self.base.base}: is packed, and cannot be asked by itself; --compare false")
        self.loaded: Run | None = None
        self.model: PreTrainedModel | None = None

    def _precision(self, run: Run) -> Precision:
        """What training computed in, or would on this device; or what --precision says."""
        dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
        if self.precision in dtypes:
            return Precision(*[dtypes[self.precision]] * 2)
        gpu = self.device.type == "cuda"
        bf16 = gpu and torch.cuda.is_bf16_supported(including_emulation=False)
        return choose_precision(run.config.precision, gpu, bf16)

    def _load(self, run: Run) -> None:
        if self.loaded is run:
            return
        if self.loaded and self.model is not None and run.adapter:
            if _adapter_options(self.loaded) != _adapter_options(run):
                replace_adapters(self.model, run.family, run.config)
            set_adapter(self.model, run)
        else:
            self.loaded = self.model = None  # the room of one whole model before the next takes it
            gc.collect()
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
            self.model = load_model(run, self.device, self._precision(run).frozen)
        self.loaded = run

    @contextlib.contextmanager
    def speaking(self, name: str) -> Iterator[None]:
        """Within, `answer` is that of `name`, BASE or a run's."""
        run = self.runs.get(name)
        self._load(run or self.base or self.loaded or self.first)
        assert self.loaded is not None and self.model is not None
        with contextlib.ExitStack() as stack:
            stack.enter_context(torch.inference_mode())
            stack.enter_context(self._precision(self.loaded).context(self.device.type))
            stack.enter_context(cached_norms(self.model))
            if run is None:
                stack.enter_context(adapters_off(self.model))
            yield

    def answer(
        self, template: Template, ids: torch.Tensor, sampling: Sampling, stream: Stream | None = None
    ) -> Answer:
        """Goes on behind the prompt ids [1, P]. Seeded for each answer by itself."""
        room = template.positions - ids.shape[1]
        ids, start = ids.to(self.device), ids.shape[1]
        torch.manual_seed(sampling.seed)
        stopping = [Ending(template.tokenizer, template.marker, start)] if template.marker else []
        assert self.model is not None
        # The classes of families have transformers' GenerationMixin, the base class has not.
        out = self.model.generate(  # type: ignore[operator]
            ids,
            attention_mask=torch.ones_like(ids),
            generation_config=_as_generation_config(sampling, room, template.stops),
            stopping_criteria=StoppingCriteriaList(stopping),
            streamer=stream,
        )[0, start:].tolist()
        ended = out[-1] in template.stops
        text = answer_text(out, template.tokenizer, template.stops)
        if template.marker and template.marker in text:
            text, ended = text.partition(template.marker)[0], True
        return Answer(text, len(out), ended)


def _adapter_options(run: Run) -> tuple:
    c = run.config
    return c.method.adapter, c.lora_rank, c.lora_alpha, c.lora_target_modules


def _as_generation_config(sampling: Sampling, room: int, stops: frozenset[int]) -> GenerationConfig:
    config = GenerationConfig(
        max_new_tokens=min(sampling.max_new_tokens, room),
        repetition_penalty=sampling.repetition_penalty,
        eos_token_id=sorted(stops) or None,
        pad_token_id=min(stops, default=0),  # a single prompt has no padding; unset is a warning
    )
    if sampling.temperature:
        picks = {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": sampling.top_k}
        config.update(do_sample=True, **picks)
    return config


class Ending(StoppingCriteria):
    """An answer ends where the next question's marker begins: in a dialogue training had no EOS there. start:
    the position where the answers of all lines begin."""

    def __init__(self, tokenizer, marker: str, start: int):
        self.tokenizer, self.marker, self.start = tokenizer, marker, start

    def __call__(self, ids: torch.Tensor, _scores, **_) -> torch.Tensor:
        last = ids[:, max(self.start, ids.shape[1] - 2 * len(self.marker)) :]
        found = [self.marker in self.tokenizer.decode(line) for line in last]
        return torch.tensor(found, device=ids.device)


class Stream(TextStreamer):
    """Hands on an answer's text as it is generated, up to what ends it. write: gets each piece."""

    def __init__(self, template: Template, write):
        super().__init__(template.tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.template, self.write, self.held, self.over = template, write, "", False

    def put(self, value: torch.Tensor) -> None:
        if self.next_tokens_are_prompt or int(value) not in self.template.stops:
            super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        marker = self.template.marker
        self.held += text
        if marker and marker in self.held:
            self.held, self.over = "" if self.over else self.held.partition(marker)[0], True
            stream_end = True
        elif self.over:
            self.held = ""
        keep = 0 if stream_end or not marker else _begun(self.held, marker)
        self.write(self.held[: len(self.held) - keep])
        self.held = self.held[len(self.held) - keep :]


def _begun(text: str, marker: str) -> int:
    """How many characters at the end of text could be the beginning of marker."""
    return next(n for n in range(min(len(text), len(marker)), -1, -1) if text.endswith(marker[:n]))


@dataclass
class Conversation:
    """What was said so far. Formats without turns begin anew with each question."""

    template: Template
    row: dict = field(default_factory=dict)

    def ask(self, question: str) -> tuple[dict, str]:
        """(the row with the question, its prompt). Takes nothing down: `answered` does."""
        form = self.template.form
        row = self.template.question(question)
        if form is FORMATS["chat"]:
            row = {"messages": [*self.row.get("messages", []), *row["messages"]]}
        elif form is FORMATS["guanaco"] and self.row:
            row = {
                "text": asked(question, self.row["text"], self.row["answer"], self.template.context.markers)
            }
        return row, self.template.text(Prompt("the question", row))

    def answered(self, row: dict, answer: str) -> None:
        if self.template.form is FORMATS["chat"]:
            self.row = {"messages": [*row["messages"], {"role": "assistant", "content": answer.strip()}]}
        elif self.template.form is FORMATS["guanaco"]:
            self.row = row | {"answer": answer}
