"""Generate answers of trained models and of their base, in the prompt template of the run's training.

The base is the loaded model with its adapters switched off. Another run's adapter replaces the one before.
Runs that saved a model or new blocks have no adapter: they and their bases are loaded one at a time.

Shapes: P tokens of a prompt.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
from collections.abc import Iterator

import torch
from transformers import GenerationConfig, PreTrainedModel, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from data.answers import decode_answer
from data.columns import ColumnNames
from data.dataset_names import first_set, split_name
from data.formats import FORMATS, GUANACO_MARKERS, RenderContext
from data.image_files import ImageFiles
from data.reading import ReadingOptions, find_format
from data.stop_ids import collect_stop_ids
from files.config_parts import eos_token_id, text_config
from finished.finished_run import (
    Run,
    load_model,
    load_tokenizer,
    open_base,
    open_run,
    read_run_image_format,
    set_adapter,
)
from finished.prompt_images import PromptImages, read_image_arguments, without_dataset_option
from finished.prompt_template import (
    Answer,
    EncodedPrompt,
    MarkerCriterion,
    PromptTemplate,
)
from launch.precision import Precision, choose_precision
from models.adapters import replace_adapters
from models.dora import cached_norms
from models.lora import adapters_off
from options.data_files import file_suffix
from options.errors import UserError
from options.generate import Sampling

BASE = "base"


def name_model(run: Run) -> str:
    """Return the name of a run's model: its folder, as `./base` where that would read as BASE."""
    return f"./{run.folder}" if str(run.folder) == BASE else str(run.folder)


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
        if run.config.has_images != runs[0].config.has_images:
            raise UserError(
                f"{run.folder}: only one of it and {runs[0].folder} was trained on images; runs given"
                " together must have one base, with its vision parts or without"
            )
    return runs


def _describe_packing(run: Run) -> str:
    """Return words on how training packed the base: "not packed", "packed by hqq in 4 bits, groups of 64"."""
    config = run.config
    if config.method.quantizer is None:
        return "not packed"
    more = f" in {config.n_bits} bits, groups of {config.group_size}" if config.method.hqq else ""
    more += ", also in the vision tower" if config.has_images and config.vision_bits == 4 else ""
    return f"packed by {config.method.quantizer}{more}"


def make_template(
    run: Run,
    dataset_format: str,
    thinking: str = "auto",
    system: str | None = None,
    image_folder: str | None = None,
) -> PromptTemplate:
    """Make the prompt template of a run.

    Args:
        run: the opened RUN.
        dataset_format: replaces the run's own format, unless "auto".
        thinking: --thinking, which replaces the run's --empty_thinking, unless "auto".
        system: --system, which the template must be able to show.
        image_folder: --image_folder, that paths of images in rows are relative to.

    Raises UserError if its format is unknown, if `thinking` or `system` has no effect, and if `system` means
    a token of images.
    """
    tokenizer = load_tokenizer(run)
    format_name = dataset_format if dataset_format != "auto" else run.config.dataset_format
    options = dataclasses.replace(ReadingOptions.from_config(run.config, tokenizer), format=format_name)
    columns = options.columns
    try:
        name, recipe = find_format(run.config.dataset, options)
        markers, columns = recipe.markers, columns.over(ColumnNames.from_recipe(recipe.columns))
    except UserError as e:  # the data is gone; a file has no markers of its own, but a recipe may have
        is_recipe = file_suffix(split_name(first_set(run.config.dataset)).base) == ".toml"
        if format_name == "auto" or (format_name == "guanaco" and is_recipe):
            raise UserError(
                f"{run.folder}: its prompt template is unknown ({e}); name it with --dataset_format"
            ) from None
        name, markers = format_name, list(GUANACO_MARKERS)
    empty_thinking = {"auto": run.config.empty_thinking, "true": "auto", "false": "prompt"}[thinking]
    images = PromptImages(*read_run_image_format(run), ImageFiles(image_folder))
    context = RenderContext(tokenizer, markers, run.config.chat_date, empty_thinking, images.placeholder)
    if thinking != "auto" and not (name == "chat" and context.chat.shows_empty_thought()):
        raise UserError(
            f"--thinking {thinking}: has no effect: the prompts of {run.folder} have no empty thinking block"
        )
    stop_ids = collect_stop_ids(run.base, eos_token_id(run.model_config), name, context)
    marker = FORMATS[name].marker(context)
    max_positions = text_config(run.model_config).max_position_embeddings
    columns = dataclasses.replace(columns, must_exist=False)
    template = PromptTemplate(
        FORMATS[name], columns, context, max_positions, frozenset(stop_ids), marker, images
    )
    if system is not None:
        try:
            template.check_system()
        except UserError as e:
            raise UserError(f"--system: has no effect on {run.folder}: {e}") from None
        images.check_text(system, "--system")
    return template


def has_bf16(device: torch.device) -> bool:
    """Return whether the device is a GPU that supports bf16 in hardware."""
    if device.type != "cuda":
        return False
    with torch.cuda.device(device):  # torch looks at the current GPU
        return torch.cuda.is_bf16_supported(including_emulation=False)


class AnsweringModels:
    """Models that answer prompts: each run, and with `compare` the base. One is active at a time.

    Attributes:
        runs: {name: run}, by `name_model`.
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
        self.runs = {name_model(run): run for run in runs}
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
        """Make `model` the run's: load all of it, or only its adapter if its base is there in its dtype."""
        if self.loaded_run is run:
            return
        if run.adapter and self._is_loaded_for(run):
            assert self.loaded_run is not None and self.model is not None
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

    def _is_loaded_for(self, run: Run) -> bool:
        """Return whether the loaded base has the dtype of the run's precision."""
        loaded = self.loaded_run
        return loaded is not None and self._precision(loaded).frozen == self._precision(run).frozen

    @contextlib.contextmanager
    def activate(self, name: str) -> Iterator[None]:
        """Let `generate_answer` use the model `name` (BASE or a run's) within the context."""
        run = self.runs.get(name)
        needed = run or self.base_run or self.first_run
        if run or self.base_run or not self._is_loaded_for(needed):  # else any adapter is switched off
            self._load(needed)
        assert self.model is not None
        with contextlib.ExitStack() as stack:
            stack.enter_context(torch.inference_mode())
            stack.enter_context(self._precision(needed).context(self.device.type))
            stack.enter_context(cached_norms(self.model))
            if run is None:
                stack.enter_context(adapters_off(self.model))
            yield

    def generate_answer(
        self,
        template: PromptTemplate,
        prompt: EncodedPrompt,
        sampling: Sampling,
        stream: BaseStreamer | None = None,
    ) -> Answer:
        """Generate the answer to the prompt with the active model. The seed is set for each answer.

        Raises UserError if an image of the prompt cannot be read.

        Args:
            template: template that the prompt was written with.
            prompt: the prompt.
            sampling: sampling options.
            stream: receives the answer's tokens as they are generated.
        """
        start = len(prompt.ids)
        ids = torch.tensor([prompt.ids], device=self.device)
        torch.manual_seed(sampling.seed)
        stopping = [MarkerCriterion(template.tokenizer, template.marker, start)] if template.marker else []
        assert self.model is not None
        with without_dataset_option():
            asked = [(prompt.ids, prompt.images)]
            images = read_image_arguments(self.model, asked, start, template.images.format)
        # PreTrainedModel has no generate(); the concrete classes inherit it from GenerationMixin.
        out = self.model.generate(  # type: ignore[operator]
            ids,
            attention_mask=torch.ones_like(ids),
            generation_config=_make_generation_config(
                sampling, template.max_positions - start, template.stop_ids
            ),
            stopping_criteria=StoppingCriteriaList(stopping),
            streamer=stream,
            **images,
        )[0, start:].tolist()
        ended = out[-1] in template.stop_ids
        text = decode_answer(out, template.tokenizer, template.stop_ids)
        if template.marker and template.marker in text:
            text, ended = text.partition(template.marker)[0], True
        return Answer(text, len(out), ended)


def _adapter_options(run: Run) -> tuple:
    c = run.config
    experts = c.lora_expert_rank, c.expert_scaling
    return c.method.adapter, c.lora_rank, c.lora_scaling, c.lora_target_modules, experts, c.vision_targets


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
