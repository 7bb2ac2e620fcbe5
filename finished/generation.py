"""Generate answers of trained models and of their base, in the prompt template of the run's training.

The base is the loaded model with its adapters switched off. Another run's adapter replaces the one before.
Runs that saved a model or new blocks have no adapter: they and their bases are loaded one at a time.

Shapes: P tokens of a prompt.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
from collections.abc import Callable, Iterator
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

from data.answers import decode_answer
from data.chat import convert_template_errors
from data.columns import ColumnNames
from data.dataset_names import first_set, split_name
from data.encoding import encode_prompt
from data.evaluation_sets import name_columns
from data.formats import FORMATS, GUANACO_MARKERS, Format, RenderContext, check_row, continue_dialogue
from data.reading import find_format
from data.row_files import Rows
from data.schemas import Schema
from data.stop_ids import collect_stop_ids
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
    """Open the runs and check that they can share one base. Raises UserError."""
    runs = [open_run(folder, base_model) for folder in folders]
    for run in runs if len(runs) > 1 else []:
        if not run.adapter:
            raise UserError(f"{run.folder}: has no adapter; only adapters can share a base: give it alone")
        if run.base.resolve() != runs[0].base.resolve():
            raise UserError(
                f"{run.folder}: was trained on {run.base}, but {runs[0].folder} on {runs[0].base}; runs given"
                " together must have one base"
            )
        if _describe_packing(run) != _describe_packing(runs[0]):
            raise UserError(
                f"{run.folder}: its base is {_describe_packing(run)}, that of {runs[0].folder}"
                f" {_describe_packing(runs[0])}; runs given together must have one base"
            )
    return runs


def _describe_packing(run: Run) -> str:
    """Return words on how training packed the base: "not packed", "packed by hqq in 4 bits, groups of 64"."""
    config = run.config
    if config.method.quantizer is None:
        return "not packed"
    more = f" in {config.n_bits} bits, groups of {config.group_size}" if config.method.hqq else ""
    return f"packed by {config.method.quantizer}{more}"


@dataclass(frozen=True)
class PromptTemplate:
    """How a run's training wrote its prompts.

    Attributes:
        format: format of the run's rows.
        columns: the training data's names for columns, which rows of prompts may have, too.
        context: the tokenizer and what else rendering needs.
        max_positions: tokens that the model can attend to.
        stop_ids: tokens that end an answer.
        marker: text that ends an answer, or None.
    """

    format: Format
    columns: ColumnNames
    context: RenderContext
    max_positions: int
    stop_ids: frozenset[int]
    marker: str | None

    @property
    def tokenizer(self) -> Any:
        return self.context.tokenizer

    def make_row(self, text: str) -> dict:
        """Make a row of this format from a question alone."""
        return self.format.make_prompt_row(text, self.context.markers)

    def match_row(self, row: dict) -> tuple[dict, list[Schema]]:
        """Return (the row with the format's names for its columns, the schemas that it may have)."""
        data, renamed = self.columns.rename(Rows([row], [""]), "--prompts")
        fitting = [schema for schema in self.format.schemas if set(schema.columns) >= set(renamed.names)]
        return data.rows[0], fitting or [*self.format.schemas]

    def render(self, prompt: Prompt) -> str:
        """Render the prompt's text up to the answer, as in training.

        Raises UserError for a row without a question.
        """
        given = self.make_row(prompt.content) if isinstance(prompt.content, str) else prompt.content
        given, schemas = self.match_row(given)
        row = check_row(given, self.format, prompt.origin, needs_answer=False, schemas=schemas)
        if not row[self.format.prompt_column]:
            raise UserError(f"{prompt.origin}: {self.format.prompt_column} is empty")
        with convert_template_errors(prompt.origin):
            text = self.format.prompt(row, self.context)
            text.encode()
        return text

    def encode(self, text: str, origin: str) -> torch.Tensor:
        """Tokenize a prompt's text: [1, P] int64. Raises UserError if it leaves no room for an answer."""
        ids = encode_prompt(text, self.tokenizer, self.format.add_special_tokens)
        if not ids:
            raise UserError(f"{origin}: is empty")
        if len(ids) >= self.max_positions:
            raise UserError(
                f"{origin}: takes {len(ids):,} tokens; the model has {self.max_positions:,} positions"
            )
        return torch.tensor([ids])


def make_template(run: Run, dataset_format: str) -> PromptTemplate:
    """Make the prompt template of a run. Raises UserError if its format is unknown.

    dataset_format: replaces the run's own format, unless "auto".
    """
    tokenizer = load_tokenizer(run)
    format_name = dataset_format if dataset_format != "auto" else run.config.dataset_format
    columns = name_columns(run.config)
    try:
        name, recipe = find_format(run.config.dataset, format_name, bool(tokenizer.chat_template), columns)
        markers, columns = recipe.markers, columns.over(ColumnNames.from_recipe(recipe.columns))
    except UserError as e:  # the data is gone; a file has no markers of its own, but a recipe may have
        is_recipe = file_suffix(split_name(first_set(run.config.dataset)).base) == ".toml"
        if format_name == "auto" or (format_name == "guanaco" and is_recipe):
            raise UserError(
                f"{run.folder}: its prompt template is unknown ({e}); name it with --dataset_format"
            ) from None
        name, markers = format_name, list(GUANACO_MARKERS)
    context = RenderContext(tokenizer, markers, run.config.chat_date)
    stop_ids = collect_stop_ids(run.base, run.model_config.eos_token_id, name, context)
    marker = FORMATS[name].marker(context)
    max_positions = run.model_config.max_position_embeddings
    columns = dataclasses.replace(columns, must_exist=False)
    return PromptTemplate(FORMATS[name], columns, context, max_positions, frozenset(stop_ids), marker)


@dataclass(frozen=True)
class Answer:
    """A generated answer.

    Attributes:
        text: its text.
        tokens: number of generated tokens.
        ended: whether the model ended it, rather than max_new_tokens.
    """

    text: str
    tokens: int
    ended: bool


def has_bf16(device: torch.device) -> bool:
    """Return whether the device is a GPU that supports bf16 in hardware."""
    if device.type != "cuda":
        return False
    with torch.cuda.device(device):  # torch looks at the current GPU
        return torch.cuda.is_bf16_supported(including_emulation=False)


class AnsweringModels:
    """Models that answer prompts: each run, and with `compare` the base. One is active at a time.

    Attributes:
        runs: {name: run}; a run's name is its folder.
        names: names of all models, BASE first.
        first_run: the run whose base answers as BASE.
        base_run: the base of a run without an adapter, or None.
        loaded_run: the run whose weights `model` has, or None.
        model: the loaded model, or None.
    """

    def __init__(
        self, runs: list[Run], base_model: str | None, device: torch.device, precision: str, compare: bool
    ):
        """Load nothing yet.

        Args:
            runs: the opened runs; if there are several, each has an adapter of the same base.
            base_model: --base_model; None = the base that the run's options name.
            device: device that the models compute on.
            precision: --precision; "auto" = as in training, as far as the device supports it.
            compare: whether the base answers too.

        Raises UserError if the base must be loaded alone but is packed.
        """
        self.runs = {str(run.folder): run for run in runs}
        self.names = [BASE] * compare + list(self.runs)
        self.first_run, self.device, self.precision = runs[0], device, precision
        self.base_run = (
            open_base(self.first_run, base_model) if compare and not self.first_run.adapter else None
        )
        if self.base_run and self.base_run.files.prequantized:
            raise UserError(
                f"{self.base_run.base}: is packed, so it cannot answer alone; add --compare false"
            )
        self.loaded_run: Run | None = None
        self.model: PreTrainedModel | None = None

    def _precision(self, run: Run) -> Precision:
        """Return --precision, or with auto the precision of training as far as this device supports it."""
        dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
        if self.precision in dtypes:
            return Precision(*[dtypes[self.precision]] * 2)
        return choose_precision(run.config.precision, self.device.type == "cuda", has_bf16(self.device))

    def _load(self, run: Run) -> None:
        """Make `model` the run's: load all of it, or only its adapter if its base is loaded already."""
        if self.loaded_run is run:
            return
        if self.loaded_run and self.model is not None and run.adapter:
            if _adapter_options(self.loaded_run) != _adapter_options(run):
                replace_adapters(self.model, run.family, run.config)
            set_adapter(self.model, run)
        else:
            self.loaded_run = self.model = None  # free one model's memory before the next is loaded
            gc.collect()
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
            self.model = load_model(run, self.device, self._precision(run).frozen)
        self.loaded_run = run

    @contextlib.contextmanager
    def activate(self, name: str) -> Iterator[None]:
        """Let `generate_answer` use the model `name` (BASE or a run's) within the context."""
        run = self.runs.get(name)
        self._load(run or self.base_run or self.loaded_run or self.first_run)
        assert self.loaded_run is not None and self.model is not None
        with contextlib.ExitStack() as stack:
            stack.enter_context(torch.inference_mode())
            stack.enter_context(self._precision(self.loaded_run).context(self.device.type))
            stack.enter_context(cached_norms(self.model))
            if run is None:
                stack.enter_context(adapters_off(self.model))
            yield

    def generate_answer(
        self,
        template: PromptTemplate,
        ids: torch.Tensor,
        sampling: Sampling,
        stream: AnswerStreamer | None = None,
    ) -> Answer:
        """Generate the answer to the prompt with the active model. The seed is set for each answer.

        Args:
            template: template that the prompt was written with.
            ids: the prompt, [1, P].
            sampling: sampling options.
            stream: receives the answer's tokens as they are generated.
        """
        token_limit = template.max_positions - ids.shape[1]
        ids, start = ids.to(self.device), ids.shape[1]
        torch.manual_seed(sampling.seed)
        stopping = [MarkerCriterion(template.tokenizer, template.marker, start)] if template.marker else []
        assert self.model is not None
        # PreTrainedModel has no generate(); the concrete classes inherit it from GenerationMixin.
        out = self.model.generate(  # type: ignore[operator]
            ids,
            attention_mask=torch.ones_like(ids),
            generation_config=_make_generation_config(sampling, token_limit, template.stop_ids),
            stopping_criteria=StoppingCriteriaList(stopping),
            streamer=stream,
        )[0, start:].tolist()
        ended = out[-1] in template.stop_ids
        text = decode_answer(out, template.tokenizer, template.stop_ids)
        if template.marker and template.marker in text:
            text, ended = text.partition(template.marker)[0], True
        return Answer(text, len(out), ended)


def _adapter_options(run: Run) -> tuple:
    c = run.config
    return c.method.adapter, c.lora_rank, c.lora_alpha, c.lora_target_modules


def _make_generation_config(
    sampling: Sampling, token_limit: int, stop_ids: frozenset[int]
) -> GenerationConfig:
    """Make transformers' config, for at most token_limit new tokens; temperature 0 means greedy."""
    config = GenerationConfig(
        max_new_tokens=min(sampling.max_new_tokens, token_limit),
        do_sample=bool(sampling.temperature),
        repetition_penalty=sampling.repetition_penalty,
        eos_token_id=sorted(stop_ids) or None,
        pad_token_id=min(stop_ids, default=0),  # unused with a single prompt; unset, transformers warns
    )
    if sampling.temperature:
        options = {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": sampling.top_k}
        config.update(**options)
    return config


class MarkerCriterion(StoppingCriteria):
    """Stop an answer where the next question's marker begins: training dialogues have no EOS there.

    start: position where the answers of all rows begin.
    """

    def __init__(self, tokenizer, marker: str, start: int):
        self.tokenizer, self.marker, self.start = tokenizer, marker, start

    def __call__(self, ids: torch.Tensor, _scores, **_) -> torch.Tensor:
        last = ids[:, max(self.start, ids.shape[1] - 2 * len(self.marker)) :]
        found = [self.marker in self.tokenizer.decode(row) for row in last]
        return torch.tensor(found, device=ids.device)


class AnswerStreamer(TextStreamer):
    """Pass on an answer's text as it is generated, up to the stop token or marker.

    write: called with each chunk of text.
    """

    def __init__(self, template: PromptTemplate, write: Callable[[str], None]):
        super().__init__(template.tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.template, self.write, self.pending, self.is_finished = template, write, "", False

    def put(self, value: torch.Tensor) -> None:
        """Take the next token of the answer; skip stop tokens."""
        if self.next_tokens_are_prompt or int(value) not in self.template.stop_ids:
            super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Write the text up to the marker; hold back what may be the marker's beginning."""
        marker = self.template.marker
        self.pending += text
        if marker and marker in self.pending:
            self.pending, self.is_finished = (
                "" if self.is_finished else self.pending.partition(marker)[0],
                True,
            )
            stream_end = True
        elif self.is_finished:
            self.pending = ""
        n_held_back = 0 if stream_end or not marker else _count_marker_start(self.pending, marker)
        self.write(self.pending[: len(self.pending) - n_held_back])
        self.pending = self.pending[len(self.pending) - n_held_back :]


def _count_marker_start(text: str, marker: str) -> int:
    """Count the characters at the end of `text` that may be the beginning of the marker."""
    return next(n for n in range(min(len(text), len(marker)), -1, -1) if text.endswith(marker[:n]))


@dataclass
class Conversation:
    """The turns so far. Formats without turns start anew with each question."""

    template: PromptTemplate
    row: dict = field(default_factory=dict)

    def make_prompt(self, question: str) -> tuple[dict, str]:
        """Return (row with the turns so far and the question, its prompt's text). Raises UserError.

        Does not change the conversation: `record_answer` does.
        """
        row_format = self.template.format
        row = self.template.make_row(question)
        if row_format is FORMATS["chat"]:
            row = {"messages": [*self.row.get("messages", []), *row["messages"]]}
        elif row_format is FORMATS["guanaco"] and self.row:
            row = {
                "text": continue_dialogue(
                    question, self.row["text"], self.row["answer"], self.template.context.markers
                )
            }
        return row, self.template.render(Prompt("the question", row))

    def record_answer(self, row: dict, answer: str) -> None:
        """Make the row and its answer the turns so far; formats without turns keep none."""
        if self.template.format is FORMATS["chat"]:
            self.row = {"messages": [*row["messages"], {"role": "assistant", "content": answer.strip()}]}
        elif self.template.format is FORMATS["guanaco"]:
            self.row = row | {"answer": answer}
