"""The checks of a run, before a GPU is touched or a file is written."""

from __future__ import annotations

import dataclasses
import datetime
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel

from checkpoints import resume, same_run
from checkpoints.model_writer import apart_entries, check_entries_finite
from checkpoints.storage import Checkpoint
from data.evaluation_data import EvaluationData
from data.evaluation_sets import prepare_sets, rename_option_in_errors
from data.formats import FORMATS, RenderContext
from data.packing import make_sampler
from data.row_text import record_examples
from data.rows import TokenizedRows
from data.stop_ids import collect_stop_ids, make_generation_config
from data.template_choice import compare_with_base, read_template, use_template
from files.base_model import BaseModel, digest_without_head, record_base
from files.config_parts import eos_token_id, find_quantization, router_loss_factor, text_config
from files.disk_room import check_writable
from files.model_folder import CheckpointFiles, fetch_weights, find_model, pin_model_name
from files.output_folder import check_output, output_folder
from files.quantized_releases import packed_expansion_error
from files.tokenizer import read_tokenizer
from files.weight_cache import CachePlan, open_cache, plan_cache
from launch.precision import has_bf16_gpu
from launch.processes import check_address
from launch.program import is_under_torchrun
from launch.ranks import resolve_group_size, resolve_strategy, resolve_world_size
from models.adapters import (
    adapted_linears,
    check_expert_adapters,
    check_quantization,
    check_rank,
    describe_expert_dora,
    packed_linears,
    quantizer_from_config,
)
from models.family import Family, has_longrope_by_layer, uses_dynamic_rope
from models.llama_pro import check_can_leave_identity, new_layers
from models.redundant import UNTIED, corrected_config
from models.registry import build_on_meta, open_weights, read_config
from models.unused_parts import absent_parts
from models.vision_parts import describe_left_matrices
from monitoring.profiling import check_traces
from monitoring.tensorboard_logger import check_tensorboard
from monitoring.wandb_logger import check_wandb
from options.config import Config
from options.declaration import AUTO
from options.errors import UserError
from options.strategies import STRATEGIES
from parallel.optimizers import check_optimizer
from training.base_matmul import check_base_matmul_here, remark_on_matmuls
from training.job import Job
from training.recorded import make_paths_absolute
from training.run_images import explain_refused_images, read_image_format, settle_images, vision_family
from training.step_sizes import (
    adopt_recorded_sizes,
    check_step_fits_epoch,
    describe_adopted,
    settle_effective_batch,
    with_batch,
)
from training.warm_start import WarmStart, adapts_vision, adopt_adapter

# Values of config.json with which transformers' layers drop or change activations at random in training.
NOISES = (
    *("attention_dropout", "residual_dropout", "resid_pdrop", "embd_pdrop", "embedding_dropout"),
    "router_jitter_noise",
)


def check_run(config: Config) -> Job:
    """Return a run as a Job. Raises UserError if anything is wrong with its options, model or data.

    It uses no GPU and writes no file of the run, but downloads models and data into their caches.
    """
    if config.llama_pro_path is None:
        return _make_job(config)
    with rename_option_in_errors("--llama_pro_path", "--model_name"):  # the same model by another option
        return _make_job(config)


def _make_job(config: Config) -> Job:
    """Check the options, the model, the data and what combines them; return the Job. Raises UserError."""
    started = time.time()
    unsettled = config.unsettled
    config, saved = _check_options(config)
    model = _check_model(config)
    if config.images == "auto" and adapts_vision(config, model.family):
        config = dataclasses.replace(config, images="true")
        model = _check_model(config)
    config, adapter = _check_adapter(config, model)
    config, rows, evaluation, tokenizer = _check_data(config, model, adapter)
    if config.has_images and not model.family.has_images:  # which only the rows have said
        model = _check_model(config)
    # Runs in the library's threads, so it comes after the fork of the processes that render rows.
    folder_name = f"--model_name {model.folder}"
    tokenizer_use = compare_with_base(model.folder, folder_name, tokenizer, config.chat_template)
    learned = make_generation_config(model.folder, model.config, evaluation.stop_ids)
    model_remarks = remarks_on_model(
        model.config, model.folder, bool(model.untied_head), absent_parts(model.family, model.files)
    )
    job = Job(
        config=make_paths_absolute(config, model.name),
        model_config=model.config,
        files=model.files,
        base=model.base,
        rows=rows,
        evaluation=evaluation,
        cache=model.cache,
        saved=saved,
        adapter=adapter,
        started=started,
        small_files=tokenizer_use.files | corrected_config(model.folder, model.config) | learned,
        remarks=(
            *tokenizer_use.remarks,
            *evaluation.remarks,
            *model_remarks,
            *filter(None, [describe_left_matrices(model.family, config), describe_expert_dora(config)]),
            *remark_on_matmuls(model.config, model.family, config, model.files),
            *(adapter.remarks if adapter else ()),
            *describe_adopted(config, unsettled if saved else []),
        ),
        first_rows=tuple(record_examples(rows, tokenizer)),
    )
    if config.method.expansion:
        assert config.lr is not None
        new = new_layers(model.config)
        check_can_leave_identity(model.files, model.family, new, job.precision.trained, config.lr)
    if config.effective_batch_size and config.context_length != AUTO:  # which is checked again as a number
        one = with_batch(config, 1) if config.batch_size == AUTO else config
        check_step_fits_epoch(config, make_sampler(one, rows, 0, config.world_size).items_per_epoch())
    if config.profile and not config.unsettled:
        check_traces(config, job.total_steps(make_sampler(config, rows, 0, config.world_size)))
    if not saved:
        return job
    head = model.untied_head
    without_head = (head, digest_without_head(model.config, model.files, head)) if head else None
    same_run.check_same_run(saved, config, job.run_identity(), without_head)
    resume.check_growing_files(saved, output_folder(config))
    resume_remarks = same_run.describe_changes(saved, config, model.base.digest())
    return dataclasses.replace(job, remarks=(*job.remarks, *resume_remarks))


def _check_options(config: Config) -> tuple[Config, Checkpoint | None]:
    """Return (options with this machine's ranks and this day's chat_date, the checkpoint to resume or None).

    Raises UserError for what is wrong with a run whatever its model and data are.
    """
    config = settle_effective_batch(_resolve_launch(config))
    if config.precision.startswith("bf16") and torch.cuda.is_available() and not has_bf16_gpu():
        raise UserError(
            f"--precision {config.precision}: this GPU has no bf16; use auto, fp16_autocast or fp32"
        )
    check_base_matmul_here(config.base_matmul, config.precision)
    check_optimizer(config.optimizer, config.use_cpu_offload)
    if config.log_to == "wandb":
        check_wandb()
    if config.log_to == "tensorboard":
        check_tensorboard()
    if config.chat_template is not None:
        read_template(config.chat_template)
    check_output(output_folder(config), config.overwrite or config.resume is not None)
    saved = resume.find_checkpoint(config)
    config = adopt_recorded_sizes(config, saved)
    if config.chat_date is None:
        today = datetime.date.today().isoformat()
        config = dataclasses.replace(config, chat_date=same_run.recorded_chat_date(saved) if saved else today)
    if config.profile:
        check_writable(Path(config.profiling_output), "--profiling_output")
    path = config.llama_pro_path
    if path is not None and not os.path.isdir(os.path.expanduser(path)):
        raise UserError(f"--llama_pro_path {path}: no such folder; block_expansion.py makes expanded models")
    return config, saved


@dataclass(frozen=True)
class _Model:
    """The model to train, checked."""

    name: str  # `pin_model_name` of --model_name
    folder: Path
    config: PretrainedConfig
    family: Family
    files: CheckpointFiles
    base: BaseModel
    untied_head: str | None  # as `open_weights` returns it
    cache: CachePlan | None  # if --quantized_cache is still to be written


def _check_model(config: Config) -> _Model:
    """Find, download and open the model. Raises UserError if it cannot be trained as the options say."""
    folder = find_model(config.model_name)
    if output_folder(config).resolve() == folder.resolve():  # --overwrite would delete the weights to read
        raise UserError(f"--output_dir {folder}: is the folder of --model_name; choose another")
    model_config, family = read_config(folder)
    family = vision_family(config, model_config, family)
    if config.compile == "true" and not family.compiles:
        raise UserError(
            f"--compile true: a layer of {model_config.model_type} does not compile to one graph; choose auto"
            " or false"
        )
    if config.method.expansion:
        if find_quantization(model_config):
            raise packed_expansion_error(folder)
        new_layers(model_config)
    name = pin_model_name(config.model_name, folder)
    fetch_weights(name, folder)
    files, model, untied_head = open_weights(folder, model_config, family)
    base = record_base(name, model_config, files)
    check_quantization(model, family, config, files)
    if config.method.saves != "adapter" and config.llama_pro_save != "blocks":
        # The result gets a copy of them, which would fail after the training.
        check_entries_finite(apart_entries(files))
    cache = find_cache(model, family, config, files) if config.quantized_cache else None
    return _Model(name, folder, model_config, family, files, base, untied_head, cache)


def _check_adapter(config: Config, model: _Model) -> tuple[Config, WarmStart | None]:
    """Return (config with what --adapter decides, that adapter or None). Raises UserError.

    Checks the options of adapters against the model.
    """
    adapter = None
    if config.adapter is not None:
        config, adapter = adopt_adapter(
            config, model.name, model.config, model.family, model.files, model.untied_head
        )
    if config.method.adapter:
        meta = build_on_meta(model.config, model.family)
        check_rank(meta, adapted_linears(meta, model.family, config), config.lora_rank)
        check_expert_adapters(meta, model.family, config)
    return config, adapter


def _check_data(
    config: Config, model: _Model, adapter: WarmStart | None
) -> tuple[Config, TokenizedRows, EvaluationData, Any]:
    """Return (config with the data's format, training rows, evaluation data, tokenizer). Raises UserError.

    In the config the text of --chat_template replaces the name or the file. adapter: that of --adapter.
    """
    folder, vocabulary = model.folder, text_config(model.config).vocab_size
    tokenizer = read_tokenizer(folder, f"--model_name {folder}")
    template_remarks = []
    if config.chat_template is not None:
        template_remarks = use_template(
            tokenizer, config.chat_template, vocabulary, _describe_token_training(config)
        )
        config = dataclasses.replace(config, chat_template=tokenizer.chat_template)
    length = config.context_length
    if length == AUTO:  # the rows are cut again once it is known
        config = dataclasses.replace(config, context_length=text_config(model.config).max_position_embeddings)
    image_format, reason = read_image_format(config, model.config, model.family, folder)
    with explain_refused_images(reason):
        config, rows, evaluation = prepare_sets(config, tokenizer, image_format)
    config, image_remarks = settle_images(config, rows, evaluation)
    is_adapters = adapter is not None and adapter.has_template  # kept with the adapter, whatever the rows are
    if config.chat_template is not None and config.dataset_format != "chat" and not is_adapters:
        raise UserError(_describe_unused_template(config.dataset_format))
    if (
        max(rows.largest_id(), evaluation.largest_id(image_format.token_id if image_format else -1))
        >= vocabulary
    ):
        raise UserError(
            f"--model_name {folder}: the tokenizer returns ids of vocab_size {vocabulary} or more"
        )
    check_rope(config, model.config, rows, evaluation)
    context = RenderContext(tokenizer, day=config.chat_date)
    stop_ids = collect_stop_ids(folder, eos_token_id(model.config), config.dataset_format, context)
    remarks = (*template_remarks, *evaluation.remarks, *image_remarks)
    evaluation = dataclasses.replace(evaluation, stop_ids=tuple(stop_ids), remarks=remarks)
    return dataclasses.replace(config, context_length=length), rows, evaluation, tokenizer


def _describe_unused_template(format_name: str) -> str:
    """Return the error of a --chat_template for rows of another format than chat."""
    text = f"--chat_template: has no effect on rows of the format {format_name}"
    columns = [schema.required for schema in FORMATS["chat"].schemas if schema.has_texts]
    if any(schema.required in columns for schema in FORMATS[format_name].schemas):
        return f"{text}; --dataset_format chat renders such rows as conversations (docs/data.md)"
    return f"{text}; it renders conversations (docs/data.md)"


def _describe_token_training(config: Config) -> str:
    """Return the end of a remark on tokens that are new to the base: whether this run learns them."""
    is_full = not config.method.adapter and not config.method.expansion
    if config.train_embeddings or is_full:
        return "; this run trains these"
    remedy = ": --train_embeddings true does" if config.method.adapter else ""
    return f"; this run does not train these{remedy}"


def remarks_on_model(
    model_config: PretrainedConfig, folder: Path, was_untied: bool, absent: Sequence[str] = ()
) -> list[str]:
    """Return lines on settings that change the loss, or that training ignores, noise, and absent parts.

    Args:
        model_config: the model's config.
        folder: its folder.
        was_untied: whether the head got its own weights.
        absent: result of `absent_parts`.
    """
    remarks = []
    if was_untied:
        remarks.append(f"{folder}: {UNTIED}")
    if absent:
        remarks.append(
            f"{folder}: the weights lack {' and '.join(absent)}, which text does not need; the result lacks"
            " them, too"
        )
    model_config = text_config(model_config)
    routed = getattr(model_config, "num_experts", 0) or getattr(model_config, "num_local_experts", 0)
    factor = router_loss_factor(model_config)
    if factor is not None:
        remarks.append(
            f"{folder}/config.json: output_router_logits: the auxiliary loss of the routers, times"
            f" {factor:g}, is added to the loss of the tokens"
        )
    elif routed and getattr(model_config, "output_router_logits", False):
        remarks.append(
            f"{folder}/config.json: output_router_logits has no effect: transformers has no auxiliary loss of"
            " the routers of such models"
        )
    # A key of other families has no attribute in this config's class, and no effect.
    known = (name for name in NOISES if hasattr(type(model_config), name))
    noises = [f"{name} {value:g}" for name in known if (value := getattr(model_config, name))]
    if noises:
        masks = "; packed rows need masks for it" if getattr(model_config, "attention_dropout", 0) else ""
        remarks.append(f"{folder}/config.json: {', '.join(noises)}: acts in training{masks}")
    return remarks


def _resolve_launch(config: Config) -> Config:
    """Return the options with this machine's ranks and sharding, and after a restart with --resume auto.

    Raises UserError if this machine cannot have such ranks, or they cannot meet at --master_addr.
    """
    world = resolve_world_size(config.world_size)
    strategy = resolve_strategy(config.sharding_strategy, world)
    config = dataclasses.replace(config, world_size=world, sharding_strategy=strategy)
    config = resume.resume_after_restart(config)
    if not is_under_torchrun():
        check_address(config.master_addr, config.master_port)
    if STRATEGIES[config.sharding_strategy].replicas != "groups":
        return config
    group = resolve_group_size(config.hybrid_shard_size, world)
    return dataclasses.replace(config, hybrid_shard_size=group)


def check_rope(
    config: Config, model_config: PretrainedConfig, rows: TokenizedRows, evaluation: EvaluationData
) -> None:
    """Raise UserError if RoPE would compute rows otherwise beside, or after, one of the run's longer rows.

    Otherwise evaluation would change training, and a resumed run would differ.

    Args:
        config: the run's options, for messages and the number of tokens that a sample adds to its prompt.
        model_config: the model's config.
        rows: the training rows.
        evaluation: the evaluation set and the prompts of samples.
    """
    if has_longrope_by_layer(model_config):
        raise UserError(
            f"--model_name {config.model_name}: its RoPE is of type longrope for some kinds of layers, which"
            " is not supported"
        )
    if not uses_dynamic_rope(model_config):
        return
    limit = text_config(model_config).max_position_embeddings
    sets = [rows, evaluation.rows] if evaluation.rows else [rows]
    lengths = [int(s.lengths().max()) for s in sets]
    longest = max(lengths + [len(prompt.ids) + config.sample_tokens for prompt in evaluation.prompts])
    if longest > limit:
        shorter = "--context_length" if longest in lengths else "--context_length or --sample_tokens"
        raise UserError(
            f"--model_name {config.model_name}: its RoPE is of type dynamic, where a row of more than {limit}"
            f" tokens (max_position_embeddings) changes all later ones; here rows have up to {longest}: lower"
            f" {shorter}"
        )


def find_cache(
    model: PreTrainedModel, family: Family, config: Config, files: CheckpointFiles
) -> CachePlan | None:
    """Return the cache that is still to be written; or add an existing one to `files`, and return None.

    The cache is that of --quantized_cache.

    Args:
        model: from build_on_meta, before `apply_method` changes it.
        family: the model's family.
        config: the run's options, with --quantized_cache and an --output_dir.
        files: the model's weights, not packed; packed weights of an existing cache are added.

    Raises UserError if the cache cannot be used.
    """
    assert config.quantized_cache is not None and config.output_dir is not None
    names = [f"{name}.weight" for name in packed_linears(model, family, config, files)]
    device_type = "cuda" if torch.cuda.is_available() else "cpu"  # like the ranks of launch/processes.py
    cache_key = (Path(config.quantized_cache), files, names, quantizer_from_config(config), device_type)
    cached = open_cache(*cache_key, vision_parts=family.unused)
    if cached is None:
        return plan_cache(*cache_key, config.output_dir)
    files.packed.update(cached)
    return None
