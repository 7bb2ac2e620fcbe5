"""The options of train.py, each declared once: the command line, --help, YAML files and checks use this.

This module needs no torch, GPU or model.
"""

from __future__ import annotations

import dataclasses
import datetime
import math
import re
from dataclasses import dataclass

import yaml

from options.columns import EXAMPLE, check_columns
from options.declaration import AUTO, option, option_fields
from options.methods import HQQ_BITS, METHODS, Method

# The embedded models are small: they need larger steps and more epochs than large ones.
TOY_MODEL = TOY_DATASET = "toy"
TOY_VISION = "toy_vision"  # the embedded model that takes images, and its data set
EMBEDDED_MODELS = (TOY_MODEL, TOY_VISION)
TOY_DEFAULTS = {
    "lr": 3e-3,
    "lr_scheduler": "cosine",
    "lora_rank": 32,
    "lora_alpha": 64.0,
    "batch_size": 8,
    "num_epochs": 5,
    "context_length": 128,
    "use_gradient_checkpointing": False,
    "sample_every": 1000,  # more than the steps of a demo run: samples before and after it
}

# Asks for something new: no row of the toy data sorts these digits (tools/make_toy_dataset.py).
TOY_PROMPT = "Put these numbers in order: 8 4 7"

# Defined in data/formats.py.
DATASET_FORMATS = (
    "auto", "alpaca", "alpaca_stanford", "chat", "guanaco", "qa", "prompt_completion", "completion"
)  # fmt: skip
# Chat templates of this program: data/templates/<name>.jinja.
CHAT_TEMPLATES = ("chatml", "llama3", "gemma", "qwen")
# Files in options/presets/, which options/presets.py reads.
PRESETS = ("instruct", "chat", "code", "summarize", "classify", "domain")
BASE_MATMULS = ("16bit", "fp8", "int8")
CHECKPOINTS = "checkpoints"  # folder in a RUN
# Options that --adapter decides. They are None until training/warm_start.py has read the adapter.
ADAPTER_OPTIONS = ("lora_rank", "lora_alpha", "use_rslora", "lora_target_modules", "vision_targets",
                   "train_embeddings", "lora_expert_rank", "train_router")  # fmt: skip
COMPATIBILITY = "Accepted for older commands, without effect"  # group of options that change nothing


DAY = r"\d{4}-\d\d-\d\d"


def _parse_day(text: str) -> str:
    """Return the text if it is a day, written YYYY-MM-DD. Raises ValueError if not."""
    if not re.fullmatch(DAY, text):
        raise ValueError(text)
    return datetime.date.fromisoformat(text).isoformat()


def parse_fold(text: str) -> str:
    """Return the text if it is K/N, fold K of N, with N at least 2. Raises ValueError if not."""
    match = re.fullmatch(r"([0-9]{1,6})/([0-9]{1,6})", text)
    if not match or not 1 <= int(match[1]) <= int(match[2]) or int(match[2]) < 2:
        raise ValueError(text)
    return text


@dataclass(frozen=True)
class Config:
    """All options of a run. Made by options/train.py: `parse`, and never changed afterwards."""

    # fmt: off
    train_type: str = option("bnb_dora", "Method", "what is trained, and how frozen weights are stored",
        choices=tuple(METHODS))
    preset: str | None = option(None, "Method", "values for a kind of task, of options that are not given:"
        f" {', '.join(PRESETS)}; --help_presets shows them (docs/recipes.md)", needs="adapter")
    adapter: str | None = option(None, "Method", "train this adapter further: a RUN, a folder in PEFT's"
        " format or a hub id, also as owner/name@revision; --lora_rank, --lora_alpha, --use_rslora,"
        " --lora_target_modules, --lora_expert_rank, --vision_targets, --train_embeddings and --train_router"
        " are the adapter's", needs="adapter")
    lora_rank: int = option(64, "Method", "rank R of LoRA and DoRA", needs="adapter", ge=1)
    lora_alpha: float = option(16.0, "Method", "the low-rank branch is scaled by lora_alpha / lora_rank",
        needs="adapter", gt=0)
    use_rslora: bool = option(False, "Method", "scale the low-rank branch by lora_alpha / sqrt(lora_rank)"
        " instead (rank-stabilized LoRA)", needs="adapter")
    lora_dropout: float = option(0.0, "Method", "dropout on the low-rank branch's input", needs="adapter",
        ge=0, lt=1)
    lora_target_modules: str = option("all", "Method", "all = every linear of the decoder layers (of"
        " attention only, in models with routed experts); default = PEFT's choice for the model family; or"
        " comma-separated names: q_proj,v_proj", needs="adapter", commas=True)
    lora_expert_rank: int = option(0, "Method", "rank of LoRA or DoRA on each routed expert's gate, up and"
        " down, scaled by lora_alpha / lora_expert_rank; 0 = none (docs/design/experts.md)", needs="adapter",
        ge=0)
    vision_targets: str | None = option("none", "Method", "adapters on the vision parts of a model that is"
        " trained on images: projector = the linears between tower and text model, of Gemma 3 a matrix, which"
        " only LoRA adapts; all = also the linears of the tower's blocks", needs="adapter",
        choices=("none", "projector", "all"))
    vision_bits: int | None = option(16, "Method", "bits of the weights of the vision tower's linears: 16, or"
        " 4 = packed as the decoder layers' are", needs="quantizer", choices=(16, 4))
    train_embeddings: bool = option(False, "Method", "train the embedding and the head in full beside the"
        " adapter, for tokens that the base has not learned (PEFT's modules_to_save); only for LoRA and DoRA")
    train_router: bool = option(False, "Method", "train the routers of experts in full beside the adapter"
        " (PEFT's modules_to_save); only for LoRA and DoRA")
    n_bits: int | None = option(None, "Method", "bits per weight; unset = 4", needs="hqq", choices=HQQ_BITS)
    group_size: int | None = option(None, "Method", "number of weights that share a scale and a zero point;"
        " unset = 64", needs="hqq", ge=8)
    llama_pro_path: str | None = option(None, "Method", "folder of the expanded model; replaces --model_name",
        needs="expansion")
    llama_pro_save: str = option("model", "Method", "result to save: the whole expanded model, or only its"
        " new blocks (new_blocks.safetensors)", choices=("model", "blocks"), needs="expansion")

    model_name: str = option(TOY_MODEL, "Model and data", "folder or hub id of a safetensors model, also as"
        " owner/name@revision (branch, tag or commit); toy = the demo's tiny Llama,"
        " toy_vision = a tiny Gemma 3 that takes images")
    dataset: str = option(TOY_DATASET, "Model and data", "a recipe in datasets/, a .json, .jsonl, .ndjson,"
        " .csv or .parquet file, a folder or a quoted pattern of files of one kind, or a hub id, also as"
        " owner/name:config:split@revision; or a mixture: 'a*0.7,b*0.3' (docs/data.md)")
    dataset_format: str = option("auto", "Model and data", "how a row becomes a text (docs/data.md); auto ="
        " the recipe's, or the one that fits the columns; config.yaml records which one it was",
        choices=DATASET_FORMATS)
    columns: str | None = option(None, "Model and data", "the data's names for columns of the format:"
        " question=prompt,answer=reply reads prompt as question; docs/data.md lists the columns", commas=True,
        convert=check_columns, noun=f"like {EXAMPLE}")
    text_column: str | None = option(None, "Model and data", "the data's name for the column of plain texts"
        " or dialogues; the same as --columns text=NAME")
    dataset_samples: int = option(-1, "Model and data", "number of rows used, from the first, of a"
        " mixture of each set; -1 = all (alpaca_sample and dummy: 512)", ge=1, sentinel=-1)
    image_folder: str | None = option(None, "Model and data", "folder that the paths of images in the data"
        " are relative to; unset = the folder of the data file (docs/data.md)")
    image_size: int | None = option(None, "Model and data", "longest side, in pixels, of an image as the"
        " vision tower gets it, for models whose images take tokens by their size: larger ones are made"
        " smaller, and none larger; unset = as the model says",
        ge=28, le=16384)
    chat_date: str | None = option(None, "Model and data", "date, as YYYY-MM-DD, for chat templates that"
        " contain today's date; unset = the day of the run's first start", convert=_parse_day,
        noun="a day as YYYY-MM-DD")
    chat_template: str | None = option(None, "Model and data", "chat template for conversations, in place of"
        " the tokenizer's own: chatml, llama3, gemma, qwen, or a file with a Jinja template (docs/data.md);"
        " config.yaml records its text; unset = the tokenizer's")
    empty_thinking: str = option("auto", "Model and data", "an empty thinking block before an answer, as"
        " Qwen3's template writes it: prompt = not learned, and asked with; learn = learned with the answer;"
        " auto = prompt if an answer has one; config.yaml records which one it was",
        choices=("auto", "prompt", "learn"))
    images: str = option("auto", "Model and data", "load the model's vision parts, and train on the rows'"
        " images; auto = if a row has one; config.yaml records which one it was",
        choices=("auto", "true", "false"))
    context_length: int = option(512, "Model and data", "longest example, in tokens; longer ones are cut;"
        " auto = the longest that fits on the GPUs, at most the longest example (docs/batch_size.md)", ge=2,
        auto=True)
    packing: bool = option(False, "Model and data", "concatenate several examples, up to context_length"
        " tokens, instead of padding them; each attends only to itself")
    images_per_pack: int = option(16, "Model and data", "with --packing, most images of a sequence, which"
        " bounds the memory of the vision tower; -1 = no limit (docs/design/images.md)", ge=1, sentinel=-1)
    show_rows: int = option(0, "Model and data", "print the tokens of this many examples as text, with what"
        " is learned between [[ and ]], and end; nothing is written", ge=0)

    batch_size: int = option(1, "Training", "examples per GPU and micro-batch; with --packing, packs of"
        " examples; auto = as many as fit, tried on the GPUs before the run (docs/batch_size.md)", ge=1,
        auto=True)
    effective_batch_size: int | None = option(None, "Training", "examples, or packs, of an optimizer step on"
        " all GPUs together; --gradient_accumulation_steps follows from it, and --batch_size auto divides it;"
        " unset = batch_size x gradient_accumulation_steps x GPUs", ge=1)
    gradient_accumulation_steps: int = option(1, "Training", "micro-batches per optimizer step; the step"
        " equals that of one big batch", ge=1)
    num_epochs: int = option(1, "Training", "passes over the data", ge=1)
    max_steps: int = option(-1, "Training", "stop after this many optimizer steps of the whole run; -1 = no"
        " limit", ge=1, sentinel=-1)
    optimizer: str = option("adamw", "Training", "fused = torch's single-kernel step, which adamw and adam"
        " use anyway; bitsandbytes' AdamW under transformers' names: 8bit = moments in 8 bits, paged ="
        " moments move to host memory when the GPU is full", choices=("adamw", "adam", "sgd", "adadelta",
        "fused_adamw", "fused_adam", "adamw_8bit", "paged_adamw_32bit", "paged_adamw_8bit"))
    lr: float | None = option(None, "Training", "peak learning rate; unset = 2e-4, or 1e-5 for full", ge=0)
    lora_plus_ratio: float | None = option(1.0, "Training", "learning rate of LoRA's B, and of DoRA's"
        " magnitudes, relative to --lr, which is A's (LoRA+); 1 = the same", needs="adapter", ge=1)
    lr_scheduler: str = option("constant", "Training", "learning rate after warm-up: linear falls to 0,"
        " cosine to a tenth of --lr", choices=("constant", "linear", "cosine"))
    lr_warmup: float | None = option(None, "Training", "share of the steps spent warming up; unset = 0.1 for"
        " linear and cosine, 0 for constant", ge=0, le=1)
    wd: float = option(0.0, "Training", "weight decay; never on norms, biases or DoRA magnitudes", ge=0)
    apply_gradient_clipping: bool = option(True, "Training", "clip the gradient to --grad_norm")
    max_bad_steps: int = option(10, "Training", "number of steps that may have a NaN or infinite loss or"
        " gradient: they are skipped, and one more ends the run; -1 = any number", ge=0, sentinel=-1)
    grad_norm: float = option(1.0, "Training", "clip the gradient of all parameters together to this 2-norm;"
        " inf = no limit", gt=0, sentinel=math.inf)
    seed: int = option(42, "Training", "seeds adapters, data order and dropout", ge=0, lt=2**63)
    deterministic: bool = option(False, "Training", "use only deterministic operations: the same losses, bit"
        " by bit, on the same hardware, at some cost in speed")

    eval_share: float = option(0.0, "Evaluation", "share of the rows that is split off, by --seed, for"
        " evaluation; 0 = none", ge=0, lt=1)
    eval_fold: str | None = option(None, "Evaluation", "K/N: split the rows, by --seed, into N equal folds,"
        " and evaluate on the K-th instead of training on it, for cross-validation; instead of --eval_share",
        convert=parse_fold, noun="a fold like 1/5, the first of five")
    eval_dataset: str | None = option(None, "Evaluation", "rows to evaluate on, instead of --eval_share:"
        " whatever --dataset takes, without weights")
    eval_samples: int = option(-1, "Evaluation", "number of rows of the evaluation set that are used, from"
        " the first; -1 = all", ge=1, sentinel=-1)
    eval_every: int = option(0, "Evaluation", "optimizer steps between evaluations; 0 = only at the end. The"
        " trained weights of the best evaluation are kept in <output_dir>/best", ge=0)
    early_stopping_patience: int = option(0, "Evaluation", "stop after this many evaluations in a row that"
        " were not better than the best one; 0 = never", ge=0)
    sample_every: int = option(0, "Evaluation", "optimizer steps between generations of samples; also before"
        " the first step and after the last; 0 = no samples", ge=0)
    sample_prompts: str | None = option(None, "Evaluation", "prompts of the samples: a .txt file with one"
        " prompt per line, in the format of --dataset, or rows as --dataset takes them; unset = the first"
        " three rows of the evaluation set, or of --dataset")
    sample_tokens: int = option(64, "Evaluation", "longest sample, in tokens", ge=1)

    precision: str = option("auto", "Memory and speed", "auto = bf16 compute with fp32 trained weights if the"
        " GPU has bf16, fp16_autocast on older GPUs, fp32 on a CPU; docs/options.md describes each",
        choices=("auto", "fp32", "bf16", "fp16_autocast", "bf16_autocast", "bf16_buffers_autocast"))
    sharding_strategy: str = option("auto", "Memory and speed", "full_shard shards parameters, gradients and"
        " optimizer states over all ranks; shard_grad_op keeps parameters gathered between forward and"
        " backward; ddp gives every rank a full copy; the hybrid ones shard within groups of ranks, and each"
        " group holds a full copy; auto = full_shard, or hybrid_full_shard on several nodes with several"
        " ranks each", choices=("auto", "full_shard", "shard_grad_op", "ddp", "hybrid_full_shard",
        "hybrid_shard_grad_op"))
    hybrid_shard_size: int = option(-1, "Memory and speed", "ranks per group, for the hybrid strategies; -1 ="
        " the ranks of one node", ge=1, sentinel=-1)
    wrap_policy: str = option("layer", "Memory and speed", "unit that is gathered at a time: a whole decoder"
        " layer, or its attention and its MLP separately (half the gathered memory, more all-gathers)",
        choices=("layer", "sublayer"))
    use_gradient_checkpointing: bool = option(True, "Memory and speed", "recompute each layer in backward"
        " instead of saving its activations")
    activation_budget: float = option(0.0, "Memory and speed", "with gradient checkpointing: GiB per GPU for"
        " results of matmuls and attention that are saved instead of recomputed, in long rows those of"
        " attention first; 0 = none, -1 = what is free after the second step", ge=0, sentinel=-1)
    base_matmul: str | None = option("16bit", "Memory and speed", "matmuls with the 4-bit weights, forward"
        " and backward: 16bit; fp8 = operands are rounded to 8 bits, faster on GPUs of compute capability 8.9"
        " and more; int8 = rounded to integers, for older GPUs (docs/fp8.md)", needs="quantizer",
        choices=BASE_MATMULS)
    compile: str = option("auto", "Memory and speed", "compile each decoder layer, the last norm and the"
        " loss, once; auto = on GPUs of compute capability 8.0 and more, which Triton supports",
        choices=("auto", "true", "false"))
    cuda_graphs: str = option("auto", "Memory and speed", "record compiled layers as CUDA graphs and replay"
        " these: the host's part of a step takes 0.14 to 0.37 of the time; auto = if there is one rank, and"
        " its GPU often waits for the host",
        choices=("auto", "true", "false"))
    use_cpu_offload: bool = option(False, "Memory and speed", "keep parameters, gradients and optimizer"
        " states in host memory; the optimizer runs on the CPU")
    use_activation_cpu_offload: bool = option(False, "Memory and speed", "keep the inputs of layers, which"
        " gradient checkpointing saves, in host memory; they are copied while the GPU computes")
    no_sync: bool = option(False, "Memory and speed", "reduce gradients once per optimizer step, not per"
        " micro-batch: less traffic, but unsharded gradients in memory")
    loading_workers: int = option(-1, "Memory and speed", "threads of each rank that read and quantize"
        " weights, and later decode images; -1 = its share of the CPUs, at most 4", ge=1, le=256, sentinel=-1)
    quantized_cache: str | None = option(None, "Memory and speed", "folder for the packed weights: the first"
        " run writes them, later runs load them; all nodes must see it", needs="quantizer")

    world_size: int = option(-1, "Launch", "processes to start; -1 = all GPUs, or two CPU processes without a"
        " GPU", ge=1, sentinel=-1)
    master_addr: str = option("localhost", "Launch", "address of rank 0, for mp.spawn")
    master_port: int | None = option(None, "Launch", "port of rank 0, for mp.spawn; unset = a free one", ge=1,
        le=65535)

    save_every: int = option(0, "Checkpoints", "optimizer steps between checkpoints; there is also one at the"
        " end; 0 = none. SIGTERM, SIGINT and SIGUSR1 ask for one in any case", ge=0)
    save_minutes: float = option(0.0, "Checkpoints", "minutes between checkpoints; 0 = as --save_every says",
        ge=0)
    keep: int = option(2, "Checkpoints", "number of newest checkpoints to keep; -1 = all", ge=1, sentinel=-1)
    resume: str | None = option(None, "Checkpoints", "go on with a stopped run, with the same options: auto ="
        " from the newest complete checkpoint in --output_dir, or from the start if there is none; or the"
        " folder of a RUN or of one of its checkpoints")
    max_minutes: float = option(0.0, "Checkpoints", "stop with a checkpoint in time to end within this many"
        " minutes after the start; 0 = no limit", ge=0)

    output_dir: str | None = option(None, "Output", "folder of the run; unset ="
        " runs/<date-time>-<train_type>")
    overwrite: bool = option(False, "Output", "replace the run that output_dir holds")
    save_model: bool = option(True, "Output", "save the adapter, or the model, at the end")
    log_to: str = option("tqdm", "Output", "a progress bar, and plain lines where the output is no terminal;"
        " plain lines; or Weights & Biases or TensorBoard as well (docs/logs.md)", choices=("tqdm", "stdout",
        "wandb", "tensorboard"))
    log_every: int | None = option(None, "Output", "optimizer steps between plain lines; unset = at most one"
        " line in five seconds. metrics.jsonl has every step", ge=1)
    project_name: str = option("fsdp-finetune", "Output", "wandb project")
    name: str | None = option(None, "Output", "wandb run name")
    group: str | None = option(None, "Output", "wandb group")
    entity: str | None = option(None, "Output", "wandb entity")
    verbose: bool = option(False, "Output", "print more lines, and tracebacks with errors")

    profile_memory: bool = option(False, "Profiling", "record memory over time, from the start to the end of"
        " the third step: memory.html, memory.png and, on GPUs, memory_snapshot.pickle in output_dir")
    profile: bool = option(False, "Profiling", "record traces of steps with torch.profiler, in cycles: steps"
        " to wait, to warm up, and to record")
    profiling_output: str = option("profiles", "Profiling", "folder of the traces")
    overwrite_profiling_output: bool = option(True, "Profiling", "replace the traces that profiling_output"
        " holds")
    with_stack: bool = option(False, "Profiling", "record Python stacks as well")
    with_shapes: bool = option(False, "Profiling", "record the operations' shapes as well")
    export_trace: bool = option(True, "Profiling", "write each cycle's trace, for https://ui.perfetto.dev")
    export_memory_timeline: bool = option(False, "Profiling", "write memory over time of each cycle's"
        " recorded steps, in the form of --profile_memory")
    wait_steps: int = option(1, "Profiling", "steps to wait in each cycle; used only if repeat is not 0",
        ge=0)
    warmup_steps: int = option(1, "Profiling", "steps of each cycle that the profiler runs in but discards",
        ge=0)
    active_steps: int = option(2, "Profiling", "recorded steps of each cycle", ge=1)
    repeat: int = option(0, "Profiling", "cycles; 0 = until the end of the run", ge=0)
    profiling_frequency: int = option(10, "Profiling", "steps of a whole cycle; used only if repeat is 0")

    reentrant_checkpointing: bool = option(False, COMPATIBILITY, "checkpointing is always non-reentrant")
    low_memory: bool = option(True, COMPATIBILITY, "loading never holds a whole model")
    # fmt: on

    @property
    def method(self) -> Method:
        """What --train_type quantizes, trains and saves."""
        return METHODS[self.train_type]

    @property
    def lora_scaling(self) -> float:
        """Scale s of the low-rank branch s B A x.

        With --use_rslora the divisor is the root of the rank (Kalajdzievski, arXiv 2312.03732, section 3).
        """
        return self._scaling(self.lora_rank)

    @property
    def expert_scaling(self) -> float:
        """Scale of the low-rank branch on experts, by the same rule; 0 without one."""
        return self._scaling(self.lora_expert_rank) if self.lora_expert_rank else 0.0

    def _scaling(self, rank: int) -> float:
        return self.lora_alpha / (math.sqrt(rank) if self.use_rslora else rank)

    @property
    def has_images(self) -> bool:
        """Whether the model is built with its vision parts. Known once the data was read."""
        return self.images == "true"

    @property
    def unsettled(self) -> list[str]:
        """The options that are AUTO: numbers that are decided at the start of a run, before its ranks."""
        numbers = ("batch_size", "gradient_accumulation_steps", "context_length")
        return [name for name in numbers if getattr(self, name) == AUTO]

    @property
    def evaluates(self) -> bool:
        """Whether there are rows to evaluate on."""
        return bool(self.eval_share or self.eval_fold) or self.eval_dataset is not None

    @property
    def saves_best(self) -> bool:
        """Whether the trained weights of the best evaluation are kept in best/.

        With a single evaluation, at the end, the result itself is the best.
        """
        return self.save_model and self.eval_every > 0


FIELDS = option_fields(Config)


def dump_yaml(config: Config, **overrides) -> str:
    """Return all options as a YAML text that --config reads back, but resume and overwrite as if not given.

    overrides: options that have another value there.
    """
    values = dataclasses.asdict(config) | {"resume": None, "overwrite": False} | overrides
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False)


class _Dumper(yaml.SafeDumper):
    """Writes texts of several lines, such as a chat template, line by line where YAML can."""


_Dumper.add_representer(
    str,
    lambda dumper, text: dumper.represent_scalar(
        "tag:yaml.org,2002:str", text, style="|" if "\n" in text else None
    ),
)
