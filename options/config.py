"""The options of train.py, each declared once: the command line, --help, YAML files and checks come from
here.

Nothing here needs torch, a GPU or a model.
"""

from __future__ import annotations

import dataclasses
import datetime
import math
import os
import re
from dataclasses import dataclass
from pathlib import Path

import yaml

from options.declaration import option, options_of
from options.methods import HQQ_BITS, METHODS, Method

# The embedded demo model has random weights: it needs larger steps and more passes than a real one.
TOY_MODEL = TOY_DATASET = "toy"
TOY_DEFAULTS = {
    "lr": 3e-3,
    "lr_scheduler": "cosine",
    "lora_rank": 32,
    "lora_alpha": 64.0,
    "batch_size": 8,
    "num_epochs": 5,
    "context_length": 128,
    "use_gradient_checkpointing": False,
    "sample_every": 1000,  # more than its steps: before and after
}

# A row of the toy data that a demo run learns for sure: the right tokens are far ahead of all others.
TOY_PROMPT = "Put these numbers in order: 5 4 6"

# data/formats.py has them
DATASET_FORMATS = ("auto", "alpaca", "alpaca_stanford", "chat", "guanaco", "qa", "completion")
CHECKPOINTS = "checkpoints"  # the folder in a RUN
COMPATIBILITY = "Accepted for older commands, without effect"  # the group of options that change nothing


DAY = r"\d{4}-\d\d-\d\d"


def _day(text: str) -> str:
    if not re.fullmatch(DAY, text):
        raise ValueError(text)
    return datetime.date.fromisoformat(text).isoformat()


@dataclass(frozen=True)
class Config:
    """All options of a run. A frozen value: made by `parse`, never changed afterwards."""

    # fmt: off
    train_type: str = option("bnb_dora", "Method", "what is trained, and how frozen weights are stored",
        choices=tuple(METHODS))
    lora_rank: int = option(64, "Method", "rank R of LoRA and DoRA", needs="adapter", least=1)
    lora_alpha: float = option(16.0, "Method", "the low-rank branch is scaled by lora_alpha / lora_rank",
        needs="adapter", above=0)
    lora_dropout: float = option(0.0, "Method", "dropout on the low-rank branch's input",
        needs="adapter", least=0, below=1)
    lora_target_modules: str = option("all", "Method", "all = every linear of the decoder layers, or of their"
        " attention where experts are routed; default = PEFT's choice for the family; or names, comma-separated:"
        " q_proj,v_proj", needs="adapter", commas=True)
    n_bits: int | None = option(None, "Method", "bits per weight; unset = 4", needs="hqq", choices=HQQ_BITS)
    group_size: int | None = option(None, "Method", "weights that share a scale and a zero point; unset = 64",
        needs="hqq", least=8)
    llama_pro_path: str | None = option(None, "Method", "folder of the expanded model, instead of --model_name",
        needs="expansion")
    llama_pro_save: str = option("model", "Method", "what is saved: the whole expanded model, or its new blocks"
        " alone (new_blocks.safetensors)", choices=("model", "blocks"), needs="expansion")

    model_name: str = option(TOY_MODEL, "Model and data", "folder or hub id of a safetensors model, also as"
        " owner/name@revision (branch, tag or commit); toy = a tiny random Llama made on the spot")
    dataset: str = option(TOY_DATASET, "Model and data", "a recipe in datasets/, a .json, .jsonl, .ndjson,"
        " .csv or .parquet file, a folder of files of one kind, or a hub id")
    dataset_format: str = option("auto", "Model and data", "how a row becomes a text (docs/data.md); auto"
        " is the recipe's, or recognised from the columns, and config.yaml keeps which it was",
        choices=DATASET_FORMATS)
    dataset_samples: int = option(-1, "Model and data", "rows used, from the first; -1 = all (alpaca_sample and"
        " dummy: 512)", least=1, other=-1)
    chat_date: str | None = option(None, "Model and data", "day, as YYYY-MM-DD, that a chat template which"
        " writes today's date shows; unset = that of the run's first start", convert=_day,
        noun="a day as YYYY-MM-DD")
    context_length: int = option(512, "Model and data", "longest example, in tokens; longer ones are cut", least=2)
    packing: bool = option(False, "Model and data", "put several examples behind one another, up to context_length"
        " tokens, instead of padding them; each sees only itself")

    batch_size: int = option(1, "Training", "examples per GPU and micro-batch; with --packing, packs of examples", least=1)
    gradient_accumulation_steps: int = option(1, "Training", "micro-batches per optimizer step, which is that of one"
        " big batch", least=1)
    num_epochs: int = option(1, "Training", "passes over the data", least=1)
    max_steps: int = option(-1, "Training", "stop after this many optimizer steps of the whole run; -1 = no limit", least=1, other=-1)
    optimizer: str = option("adamw", "Training", "fused = torch's single-kernel step, which adamw and adam take anyway; 8bit = Adam's moments in 8 bits,"
        " paged = moments move to host memory when the GPU is full: bitsandbytes' AdamW, under transformers' names",
        choices=("adamw", "adam", "sgd", "adadelta", "fused_adamw", "fused_adam", "adamw_8bit", "paged_adamw_32bit",
        "paged_adamw_8bit"))
    lr: float | None = option(None, "Training", "peak learning rate; unset = 2e-4, or 1e-5 for full", least=0)
    lr_scheduler: str = option("constant", "Training", "after warm-up; linear falls to 0, cosine to a tenth",
        choices=("constant", "linear", "cosine"))
    lr_warmup: float | None = option(None, "Training", "share of the steps spent warming up; unset = 0.1 for linear"
        " and cosine, 0 for constant", least=0, most=1)
    wd: float = option(0.0, "Training", "weight decay; never on norms, biases or DoRA magnitudes", least=0)
    apply_gradient_clipping: bool = option(True, "Training", "clip the gradient to --grad_norm")
    max_bad_steps: int = option(10, "Training", "steps whose loss or gradient may be NaN or infinite: they are skipped,"
        " and one more ends the run; -1 = any number", least=0, other=-1)
    grad_norm: float = option(1.0, "Training", "largest 2-norm of the whole gradient, when clipping; inf = any", above=0, other=math.inf)
    seed: int = option(42, "Training", "seeds adapters, data order and dropout", least=0, below=2**63)
    deterministic: bool = option(False, "Training", "only operations that give the same bits each time: twice the same"
        " losses on the same hardware, at some cost in speed")

    eval_share: float = option(0.0, "Evaluation", "share of the rows that is split off, by --seed, and evaluated on;"
        " 0 = none", least=0, below=1)
    eval_dataset: str | None = option(None, "Evaluation", "rows to evaluate on instead: whatever --dataset takes")
    eval_samples: int = option(-1, "Evaluation", "rows of the evaluation set that are used, from the first; -1 = all", least=1, other=-1)
    eval_every: int = option(0, "Evaluation", "optimizer steps from one evaluation to the next; 0 = only at the end."
        " The best one's trained weights are kept in <output_dir>/best", least=0)
    early_stopping_patience: int = option(0, "Evaluation", "stop after so many evaluations in a row that were not"
        " better than the best; 0 = never", least=0)
    sample_every: int = option(0, "Evaluation", "optimizer steps from one generation of samples to the next; also"
        " before the first step and after the last; 0 = no samples", least=0)
    sample_prompts: str | None = option(None, "Evaluation", "prompts of the samples: a .txt file with one in each"
        " line, which are asked as --dataset's rows are, or rows as --dataset takes them; unset = the first three rows"
        " of the evaluation set, or of --dataset")
    sample_tokens: int = option(64, "Evaluation", "longest sample, in tokens", least=1)

    precision: str = option("auto", "Memory and speed", "auto is bf16 compute with fp32 trained weights where the GPU"
        " has bf16, fp16_autocast on older GPUs, fp32 on a CPU; docs/options.md has a line on each",
        choices=("auto", "fp32", "bf16", "fp16_autocast", "bf16_autocast", "bf16_buffers_autocast"))
    sharding_strategy: str = option("auto", "Memory and speed", "full_shard spreads all over all ranks;"
        " shard_grad_op keeps parameters gathered between forward and backward; ddp gives every rank a whole copy;"
        " the hybrid ones shard within groups, each of which holds a whole copy; auto is full_shard, on several nodes"
        " with several ranks each hybrid_full_shard",
        choices=("auto", "full_shard", "shard_grad_op", "ddp", "hybrid_full_shard", "hybrid_shard_grad_op"))
    hybrid_shard_size: int = option(-1, "Memory and speed", "ranks of a group, for the hybrid strategies; -1 = those"
        " of one node", least=1, other=-1)
    wrap_policy: str = option("layer", "Memory and speed", "what is gathered at a time: a whole decoder"
        " layer, or its attention and its MLP separately (half the gathered memory, more all-gathers)", choices=("layer", "sublayer"))
    use_gradient_checkpointing: bool = option(True, "Memory and speed", "recompute each layer in backward instead of"
        " keeping its activations")
    activation_budget: float = option(0.0, "Memory and speed", "with gradient checkpointing: GiB per GPU in which"
        " results of matmuls and attention are kept instead of computed again; 0 = none, -1 = what is free after the"
        " second step", least=0, other=-1)
    compile: str = option("auto", "Memory and speed", "compile each decoder layer, the last norm and the loss, once; auto = on GPUs"
        " of compute capability 8.0 and more, which Triton supports, but not layers of routed experts",
        choices=("auto", "true", "false"))
    use_cpu_offload: bool = option(False, "Memory and speed", "keep parameters, gradients and optimizer states in"
        " host memory; the optimizer runs on the CPU")
    use_activation_cpu_offload: bool = option(False, "Memory and speed", "keep the layers' inputs, which gradient"
        " checkpointing saves, in host memory; copied while the GPU computes")
    no_sync: bool = option(False, "Memory and speed", "reduce gradients once per optimizer step, not per micro-batch:"
        " less traffic, but unsharded gradients in memory")
    loading_workers: int = option(-1, "Memory and speed", "threads of each rank that read and quantize; -1 = its share"
        " of the processors, at most 4", least=1, most=256, other=-1)
    quantized_cache: str | None = option(None, "Memory and speed", "folder that the first run leaves the packed"
        " weights in, and later runs load them from; all nodes must see it", needs="quantizer")

    world_size: int = option(-1, "Launch", "processes to start; -1 = all GPUs, or two CPU processes without a GPU", least=1, other=-1)
    master_addr: str = option("localhost", "Launch", "address of rank 0, for mp.spawn")
    master_port: int | None = option(None, "Launch", "port of rank 0, for mp.spawn; unset = a free one", least=1, most=65535)

    save_every: int = option(0, "Checkpoints", "optimizer steps from one checkpoint to the next, and one at the end;"
        " 0 = none. SIGTERM, SIGINT and SIGUSR1 ask for one in any case", least=0)
    save_minutes: float = option(0.0, "Checkpoints", "minutes from one checkpoint to the next; 0 = as --save_every says", least=0)
    keep: int = option(2, "Checkpoints", "newest checkpoints that are kept; -1 = all", least=1, other=-1)
    resume: str | None = option(None, "Checkpoints", "go on with a stopped run, with the same options: auto = from the"
        " newest whole checkpoint of --output_dir, or from the start if there is none; or a RUN, or one of its checkpoints")
    max_minutes: float = option(0.0, "Checkpoints", "stop with a checkpoint in time to end within so many minutes of the"
        " start; 0 = no limit", least=0)

    output_dir: str | None = option(None, "Output", "folder of the run; unset = runs/<date-time>-<train_type>")
    overwrite: bool = option(False, "Output", "replace the run that output_dir holds")
    save_model: bool = option(True, "Output", "save the adapter, or the model, at the end")
    log_to: str = option("tqdm", "Output", "a progress bar, plain lines, or Weights & Biases as well",
        choices=("tqdm", "stdout", "wandb"))
    project_name: str = option("fsdp-finetune", "Output", "wandb project")
    name: str | None = option(None, "Output", "wandb run name")
    group: str | None = option(None, "Output", "wandb group")
    entity: str | None = option(None, "Output", "wandb entity")
    verbose: bool = option(False, "Output", "more lines, and tracebacks with errors")

    profile_memory: bool = option(False, "Profiling", "record memory over time, from the start to the end of the third"
        " step: memory.html, memory.png and, of GPUs, memory_snapshot.pickle in output_dir")
    profile: bool = option(False, "Profiling", "record traces of single steps with torch.profiler, in cycles of steps:"
        " waited, warmed up, recorded")
    profiling_output: str = option("profiles", "Profiling", "folder of the traces")
    overwrite_profiling_output: bool = option(True, "Profiling", "replace the traces that profiling_output holds")
    with_stack: bool = option(False, "Profiling", "record Python stacks as well")
    with_shapes: bool = option(False, "Profiling", "record the operations' shapes as well")
    export_trace: bool = option(True, "Profiling", "write each cycle's trace, for https://ui.perfetto.dev")
    export_memory_timeline: bool = option(False, "Profiling", "write memory over time in each cycle's recorded"
        " steps, as --profile_memory does")
    wait_steps: int = option(1, "Profiling", "steps waited in each cycle; read if repeat is not 0", least=0)
    warmup_steps: int = option(1, "Profiling", "steps of each cycle under the profiler that are thrown away", least=0)
    active_steps: int = option(2, "Profiling", "recorded steps of each cycle", least=1)
    repeat: int = option(0, "Profiling", "cycles; 0 = until the end of the run", least=0)
    profiling_frequency: int = option(10, "Profiling", "steps of a whole cycle; read if repeat is 0")

    reentrant_checkpointing: bool = option(False, COMPATIBILITY, "checkpointing is always non-reentrant")
    low_memory: bool = option(True, COMPATIBILITY, "loading never holds a whole model")
    # fmt: on

    @property
    def method(self) -> Method:
        return METHODS[self.train_type]

    @property
    def keeps_best(self) -> bool:
        """Whether the best step is kept in best/. With a single evaluation, at the end, the result is the
        best."""
        return self.save_model and self.eval_every > 0


FIELDS = options_of(Config)


def user_cache() -> Path:
    """Where this program keeps models that it made itself; it need not exist."""
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "fsdp-finetune"


def dump_yaml(config: Config, **instead) -> str:
    """Every resolved option, as a file that --config reads back. How the run was started, --resume or
    --overwrite, is no part of it. instead: options that have another value there."""
    values = dataclasses.asdict(config) | {"resume": None, "overwrite": False} | instead
    return yaml.safe_dump(values, sort_keys=False)
