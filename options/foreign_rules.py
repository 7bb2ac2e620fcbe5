"""The options of other training programs, and what they are here: one table, by subject.

Add an option of another program to a row, or a row for it. `python -m tools.make_migrate_doc` then writes the
tables of docs/migrate.md.
"""

from __future__ import annotations

from options import foreign_images as images
from options import foreign_parallel as parallel
from options import foreign_rows as rows
from options import foreign_values as values
from options.foreign import ForeignOptions, Rule, Translate, lost, needless, same, switch


def _rule(
    here: str,
    translate: Translate,
    *,
    hf: str = "",
    axolotl: str = "",
    factory: str = "",
    launcher: str = "",
    note: str = "",
) -> Rule:
    """Return a row of the table.

    Args:
        here: the options here, for docs/migrate.md.
        translate: as in Rule.
        hf, axolotl, factory, launcher: the names in transformers, TRL and unsloth; in axolotl; in
            LLaMA-Factory, where they are not transformers'; in accelerate and DeepSpeed. With spaces.
        note: what docs/migrate.md says.
    """
    names = tuple(tuple(column.split()) for column in (hf, axolotl, factory, launcher))
    return Rule(here, names, translate, note)


# fmt: off
MODEL_AND_METHOD = (
    _rule("--model_name", values.model, hf="model_name_or_path model_revision",
        axolotl="base_model revision_of_model", note="a revision follows behind @: owner/name@revision"),
    _rule("--train_type, --n_bits", values.train_type,
        hf="use_peft use_dora load_in_4bit load_in_8bit full_finetuning qdora",
        axolotl="adapter peft_use_dora load_in_4bit load_in_8bit",
        factory="finetuning_type use_dora quantization_bit quantization_method use_llama_pro"
        " freeze_trainable_layers freeze_trainable_modules",
        note="an adapter over 16-bit weights is `lora` or `dora`, over 4-bit ones `qlora` or `bnb_dora`, over"
        " HQQ's `hqq_lora` or `hqq_dora`; without adapter `full`. 8 bits are HQQ's"),
    _rule("--adapter", same("adapter"), axolotl="lora_model_dir", factory="adapter_name_or_path",
        note="its rank, alpha and targets hold"),
    _rule("--train_embeddings", values.trained_modules, hf="lora_modules_to_save modules_to_save",
        axolotl="lora_modules_to_save", factory="additional_target", note="embedding and head together"),
    _rule("--lora_rank", same("lora_rank"), hf="lora_r r", axolotl="lora_r", factory="lora_rank"),
    _rule("--lora_target_modules", values.target_modules, hf="lora_target_modules target_modules",
        axolotl="lora_target_linear", factory="lora_target", note="names with commas, or all"),
    _rule("--vision_targets", images.vision_targets, hf="finetune_vision_layers", axolotl="freeze_mm_modules",
        factory="freeze_vision_tower freeze_multi_modal_projector",
        note="projector or all; the vision parts are frozen by default"),
    _rule("--lora_target_modules", images.language_parts,
        hf="finetune_language_layers finetune_attention_modules finetune_mlp_modules",
        factory="freeze_language_model", note="all linears of the text model by default"),
    _rule("--use_rslora", switch("use_rslora"), hf="use_rslora", axolotl="peft_use_rslora"),
)
DATA = (
    _rule("--dataset", rows.dataset, hf="dataset_name dataset_config dataset_train_split",
        note="a file, a folder or a hub id; `name:config:split@revision`"),
    _rule("--dataset, --dataset_format, --columns", lost("several sets: --dataset 'a.jsonl,b.jsonl'"),
        hf="datasets dataset_mixture dataset_mixer", axolotl="datasets pretraining_dataset",
        note="names with commas; types become formats, and names of columns --columns ([data](data.md))"),
    _rule("--eval_dataset", lost("it is part of --eval_dataset: name:config:split"),
        hf="dataset_test_split", note="`name:config:split@revision`"),
    _rule("--text_column", same("text_column"), hf="dataset_text_field"),
    _rule("--chat_template", rows.chat_template, hf="chat_template chat_template_path",
        axolotl="chat_template chat_template_jinja", factory="template",
        note="chatml, llama3, gemma, qwen, or a file with a template; unset = the tokenizer's"),
    _rule("--eval_dataset", same("eval_dataset"), axolotl="test_datasets"),
    _rule("--eval_share", rows.share_of_rows, hf="test_split_size", axolotl="val_set_size",
        factory="val_size", note="a share of the rows, not their number"),
    _rule("--dataset_samples", same("dataset_samples"), factory="max_samples"),
    _rule("--context_length", rows.context_length, hf="max_length max_seq_length model_max_length",
        axolotl="sequence_len", factory="cutoff_len"),
    _rule("", rows.answers_only, hf="assistant_only_loss completion_only_loss",
        note="answers alone are learned; `completion` learns all of a text"),
    _rule("--image_folder", same("image_folder"), factory="media_dir", note="unset = the data file's folder"),
    _rule("--image_size", images.image_size, axolotl="image_size", note="the longest side, in pixels"),
    _rule("--image_size", images.image_area, factory="image_max_pixels",
        note="there an area, here the longest side: that of a square of this area"),
    _rule("--packing", switch("packing"), hf="packing", axolotl="sample_packing",
        factory="neat_packing", note="each row attends to itself alone, as with `neat_packing`"),
)
STEPS = (
    _rule("--batch_size", same("batch_size"), hf="per_device_train_batch_size", axolotl="micro_batch_size",
        launcher="train_micro_batch_size_per_gpu"),
    _rule("--batch_size", parallel.found_batch, hf="auto_find_batch_size",
        note="`auto` finds the largest that fits, before the run"),
    _rule("--effective_batch_size", parallel.rows_of_a_step, axolotl="batch_size",
        launcher="train_batch_size", note="rows of a whole step, on all GPUs together"),
    _rule("--lr", same("lr"), hf="learning_rate", axolotl="learning_rate",
        launcher="optimizer.params.lr scheduler.params.warmup_max_lr"),
    _rule("--lora_plus_ratio", values.lora_plus_ratio, axolotl="loraplus_lr_ratio",
        factory="loraplus_lr_ratio", note="LoRA+"),
    _rule("--lr_scheduler", values.schedule, hf="lr_scheduler_type", axolotl="lr_scheduler",
        launcher="scheduler.type", note="constant, linear, or cosine, which ends at a tenth of --lr"),
    _rule("--lr_warmup", values.warmup, hf="warmup_ratio warmup_steps", axolotl="warmup_ratio warmup_steps",
        launcher="scheduler.params.warmup_num_steps",
        note="a share of the steps. --warmup_steps here counts the profiler's"),
    _rule("--num_epochs", values.epochs, hf="num_train_epochs", axolotl="num_epochs", note="whole epochs"),
    _rule("--optimizer", values.optimizer, hf="optim", axolotl="optimizer", launcher="optimizer.type"),
    _rule("--wd", same("wd"), hf="weight_decay", axolotl="weight_decay",
        launcher="optimizer.params.weight_decay"),
    _rule("--grad_norm, --apply_gradient_clipping", values.gradient_norm, hf="max_grad_norm",
        axolotl="max_grad_norm", launcher="gradient_clipping", note="0 is no clipping"),
    _rule("--seed", same("seed"), hf="random_state"),
    _rule("--deterministic", switch("deterministic"), hf="full_determinism"),
)
MEMORY_AND_GPUS = (
    _rule("--precision", parallel.precision, hf="bf16 fp16", axolotl="bf16 fp16 bfloat16 float16 float32",
        factory="pure_bf16", launcher="mixed_precision bf16.enabled fp16.enabled",
        note="`auto` is bf16 with adapters in fp32; fp16 is `fp16_autocast`"),
    _rule("--use_gradient_checkpointing, --use_activation_cpu_offload", parallel.checkpointing,
        hf="gradient_checkpointing activation_checkpointing activation_offloading",
        axolotl="gradient_checkpointing", factory="disable_gradient_checkpointing",
        launcher="fsdp_activation_checkpointing activation_checkpointing.cpu_checkpointing",
        note="axolotl's value `offload` is both options"),
    _rule("--compile", switch("compile"), hf="torch_compile",
        launcher="dynamo_backend dynamo_config.dynamo_backend",
        note="auto, the default, compiles where possible"),
    _rule("--sharding_strategy, --hybrid_shard_size, --use_cpu_offload", parallel.sharding, hf="fsdp",
        axolotl="fsdp",
        launcher="distributed_type fsdp_sharding_strategy fsdp_reshard_after_forward fsdp_offload_params"
        " zero_stage offload_optimizer_device offload_param_device zero_optimization.stage"
        " zero_optimization.offload_optimizer.device zero_optimization.offload_param.device"
        " zero_optimization.cpu_offload zero_optimization.zero_hpz_partition_size"
        " zero_optimization.mics_shard_size", note="see the next two tables"),
    _rule("--world_size", parallel.processes, launcher="num_processes num_machines",
        note="on several nodes torchrun starts them: [nodes.md](nodes.md)"),
    _rule("", parallel.gpu_ids, launcher="gpu_ids", note="CUDA_VISIBLE_DEVICES chooses GPUs"),
    _rule("--master_port", parallel.port, launcher="main_process_port"),
)
SAVING_AND_LOGS = (
    _rule("--save_every", values.steps_between("save_every", "save_steps", "save_strategy"),
        hf="save_steps save_strategy", axolotl="save_steps save_strategy"),
    _rule("", lost("it counts steps: --save_every, --eval_every"),
        axolotl="saves_per_epoch evals_per_epoch", note="--save_every and --eval_every count steps"),
    _rule("--keep", same("keep"), hf="save_total_limit", axolotl="save_total_limit"),
    _rule("--eval_every",
        values.steps_between("eval_every", "eval_steps", "eval_strategy", "evaluation_strategy"),
        hf="eval_steps eval_strategy evaluation_strategy", axolotl="eval_steps eval_strategy",
        note="with --eval_share or --eval_dataset"),
    _rule("--resume", values.resumed, hf="resume_from_checkpoint", axolotl="auto_resume_from_checkpoints",
        note="auto, or a RUN of this program; other programs' checkpoints are not read"),
    _rule("--overwrite", switch("overwrite"), hf="overwrite_output_dir"),
    _rule("--output_dir", same("output_dir"), hf="save_path"),
    _rule("--log_to", values.logs, hf="report_to", axolotl="use_wandb use_tensorboard",
        note="tqdm, stdout, wandb or tensorboard: one of them ([logs](logs.md))"),
    _rule("--log_every", values.steps_between("log_every", "logging_steps", "logging_strategy"),
        hf="logging_steps logging_strategy", axolotl="logging_steps",
        note="of plain lines; metrics.jsonl has every step"),
    _rule("--log_to wandb --project_name", values.wandb_project, axolotl="wandb_project"),
    _rule("--entity", same("entity"), axolotl="wandb_entity"),
    _rule("--name", same("name"), hf="run_name", axolotl="wandb_name wandb_run_id"),
)
# fmt: on
SUBJECTS = {
    "Model and method": MODEL_AND_METHOD,
    "Data": DATA,
    "Steps and learning rate": STEPS,
    "Memory and GPUs": MEMORY_AND_GPUS,
    "Checkpoints, evaluation, logs": SAVING_AND_LOGS,
}

# fmt: off
# Foreign options that nothing here is equal to, by reason.
LOST = {
    "metrics go to metrics.jsonl, and to wandb or TensorBoard": "use_swanlab use_mlflow use_comet use_trackio"
        " mlflow_tracking_uri mlflow_experiment_name comet_project_name swanlab_project swanlab_run_name",
    "only NaN and infinite steps are counted: --max_bad_steps": "loss_watchdog_threshold"
        " loss_watchdog_patience",
    "--profile_memory and --profile record the first steps": "profiler_steps",
    "4-bit weights are NF4 or HQQ's": "gptq bnb_4bit_quant_type quantization_type",
    "images are resized as the model's own processor does it": "image_resize_algorithm image_min_pixels"
        " image_do_pan_and_scan crop_to_patches",
    "answers alone are learned, never the tokens of an image": "unmask_image_tokens",
    "rows are texts and images, not videos or sounds": "video_max_pixels video_min_pixels video_fps"
        " video_maxlen use_audio_in_video audio_sampling_rate",
    "no code of a model's repository is run": "trust_remote_code",
    "only adapters are trained beside frozen weights":
        "unfrozen_parameters"
        " freeze_extra_modules lora_bias bias lisa_n_layers lisa_step_interval lisa_layers_attribute"
        " train_from_scratch random_init_weights mixture_of_depths",
    "A is drawn as in PEFT's default, B is zero":
        "init_lora_weights peft_init_lora_weights loftq_config peft_init pissa_init pissa_iter pissa_convert",
    "rates are --lr, and --lora_plus_ratio times that":
        "loraplus_lr_embedding lr_groups embedding_lr embedding_lr_scale",
    "the template decides: --chat_template FILE": "tool_format default_system default_system_message"
        " enable_thinking",
    "the tokenizer is used as it is": "tokens special_tokens added_tokens_overrides new_special_tokens"
        " resize_vocab resize_token_embeddings_to_32x eos_token add_tokens"
        " add_special_tokens tokenizer_config eot_tokens shrink_embeddings mean_resizing_embeddings"
        " split_special_tokens new_special_tokens_config init_special_tokens",
    "prompts are never learned; the format `completion` learns all of a text":
        "train_on_inputs train_on_prompt mask_history roles_to_train train_on_eos",
    "data sets are read whole": "dataset_streaming streaming shards shards_idx dataset_shard_num"
        " interleave_probs mix_strategy dataset_exact_deduplication min_sample_len",
    "no noise is added to embeddings": "neftune_noise_alpha noisy_embedding_alpha",
    "the loss is plain cross-entropy": "label_smoothing_factor loss_type use_dft_loss use_eaft_loss",
    "--lora_expert_rank R puts adapters on all linears of all experts": "lora_target_parameters",
    "set output_router_logits and router_aux_loss_coef in the model's config.json":
        "router_aux_loss_coef moe_aux_loss_coef",
    "optimizers are those of --optimizer":
        "use_galore use_apollo use_badam use_adam_mini use_muon galore_rank optim_args"
        " optim_target_modules adam_beta3 adam_epsilon2 galore_target galore_scale galore_update_interval"
        " galore_layerwise apollo_rank apollo_target apollo_scale apollo_scale_type apollo_layerwise"
        " apollo_update_interval badam_mode badam_switch_mode badam_switch_interval badam_update_ratio",
    "--lr_scheduler has no such part": "lr_scheduler_kwargs cosine_min_lr_ratio cosine_constant_lr_ratio"
        " lr_quadratic_warmup relora_steps relora_warmup_steps jagged_restart_steps",
    "rows are drawn by --seed, in no other order": "group_by_length train_sampling_strategy shuffle_dataset"
        " curriculum_sampling data_seed disable_shuffling sample_packing_sequentially",
    "one sequence stays on one GPU": "sequence_parallel_degree context_parallel_size tensor_parallel_size"
        " sequence_parallel_size parallelism_config dp_shard_size dp_replicate_size tensor_parallel"
        " parallelism_config_cp_size parallelism_config_tp_size",
    "weights are not trained in fp8 or with fake quantization; with a 4-bit base see --base_matmul":
        "fp8 fp8_config qat quantization enable_fp8 fp8_backend",
    "DeepSpeed does not run here; give its file to `python -m tools.migrate`": "deepspeed"
        " deepspeed_config_file deepspeed_config",
    "it is accelerate's own: give the file to `python -m tools.migrate`": "config_file",
    "results stay in --output_dir; `python export.py RUN` makes a folder to publish":
        "push_to_hub hub_model_id hub_strategy hub_private_repo hub_always_push hub_revision push_model"
        " save_model_hub export_dir export_size export_device export_legacy_format export_hub_model_id"
        " export_quantization_bit export_quantization_dataset export_quantization_nsamples"
        " export_quantization_maxlen",
    "rows to evaluate are cut at --context_length": "eval_sequence_len",
    "evaluation has --batch_size":
        "per_device_eval_batch_size eval_batch_size eval_accumulation_steps eval_packing eval_sample_packing"
        " eval_delay eval_on_each_dataset eval_num_beams",
    "the model is that of its config.json; edit a copy, as for output_router_logits":
        "overrides_of_model_config model_config",
    "rope is that of config.json": "rope_scaling rope_theta"
        " pose_max_context_len pose_num_chunks pose_split_on_token_ids",
    "answers are trained on, not preferences or rewards":
        "rl reward_model process_reward_model pref_beta pref_loss"
        " dpo_beta rl_beta trl ref_model",
    "all layers get adapters; --lora_target_modules names their linears":
        "lora_layers_to_transform layers_to_transform peft_layers_to_transform layers_pattern rank_pattern"
        " alpha_pattern layer_replication peft_layers_pattern peft_layer_replication",
    "TPUs are not used": "tpu_name tpu_zone tpu_vm",
    "its fields are options here: docs/migrate.md": "fsdp_config",
    "without a GPU the CPU is used: CUDA_VISIBLE_DEVICES=": "use_cpu",
    "axolotl's plugins are not run": "plugins",
    "only supervised training: sft": "stage",
}

# Foreign options that need no equal here, by reason.
NEEDLESS = {
    "torch's attention kernels are chosen by themselves": "attn_implementation flash_attention flash_attn"
        " attention xformers_attention sdp_attention eager_attention s2_attention flex_attention"
        " shift_attn padding_free batch_flattening flash_attn_cross_entropy flash_attn_rms_norm"
        " flash_attn_fuse_qkv flash_attn_fuse_mlp flash_optimum flex_attn_compile_kwargs heads_k_stride"
        " ring_attn_func use_v1_kernels",
    "norms, MLP and loss are compiled": "use_liger_kernel liger_kernel_config enable_liger_kernel"
        " liger_rope liger_rms_norm liger_glu_activation liger_swiglu liger_layer_norm liger_cross_entropy"
        " liger_fused_linear_cross_entropy cut_cross_entropy unsloth_cross_entropy_loss lora_mlp_kernel"
        " lora_qkv_kernel lora_o_kernel use_unsloth torch_compile_backend torch_compile_mode"
        " unsloth_lora_mlp unsloth_lora_o unsloth_lora_qkv unsloth_rms_norm unsloth_rope",
    "the files of the model say it": "dtype torch_dtype infer_dtype model_type tokenizer_type"
        " tokenizer_use_fast tokenizer_legacy use_fast_tokenizer is_llama_derived_model"
        " is_mistral_derived_model is_qwen_derived_model is_falcon_derived_model pad_token model_init_kwargs"
        " low_cpu_mem_usage device_map lora_fan_in_fan_out lora_task_type use_cache base_model_config"
        " base_model_ignore_patterns use_kv_cache embeddings_skip_upcast",
    "NF4 with double quantization": "use_bnb_nested_quant bnb_4bit_use_double_quant"
        " bnb_4bit_compute_dtype bnb_4bit_quant_storage double_quantization"
        " bnb_config_kwargs quantization_device_map upcast_layernorm upcast_lmhead_output",
    "batches are padded to their longest row": "special_tokens.pad_token pad_to_sequence_len"
        " pad_to_multiple_of pad_packed_sequences truncation_mode packing_strategy"
        " ignore_pad_token_for_loss sample_packing_bin_size sample_packing_eff_est"
        " sample_packing_group_size pretrain_multipack_attn pretrain_multipack_buffer_size"
        " multipack_real_batches",
    "metrics.jsonl has every step": "logging_first_step logging_dir log_level"
        " log_level_replica log_on_each_node logging_nan_inf_filter include_num_input_tokens_seen"
        " include_tokens_per_second plot_loss disable_tqdm debug wandb_watch wandb_log_model"
        " wandb_mode skip_memory_metrics project trackio_space_id trackio_bucket_id trackio_static_space_id"
        " steps_per_print wall_clock_breakdown eval_table_size eval_max_new_tokens compute_accuracy"
        " print_param_status",
    "the best step is kept in best/, and checkpoints are complete":
        "load_best_model_at_end metric_for_best_model greater_is_better"
        " save_only_model save_safetensors save_on_each_node save_first_step enable_jit_checkpoint"
        " restore_callback_states_from_checkpoint ignore_data_skip stage3_gather_16bit_weights_on_model_save",
    "the loss is the mean over all learned tokens of a step": "average_tokens_across_devices"
        " prediction_loss_only label_names remove_unused_columns include_for_metrics batch_eval_metrics"
        " eval_do_concat_batches eval_use_gather_object eval_on_start",
    "this program only trains": "do_train do_eval do_predict predict_with_generate strict infer_backend"
        " merge_lora do_bench_eval do_causal_lm_eval fast_inference gpu_memory_utilization max_lora_rank"
        " float8_kv_cache",
    "rows are prepared once, before the run": "dataloader_num_workers dataset_num_proc dataset_processes"
        " preprocessing_num_workers overwrite_cache dataset_prepared_path tokenized_path"
        " dataset_kwargs dataset_keep_in_memory shuffle_merged_datasets dataloader_pin_memory"
        " dataloader_prefetch_factor dataloader_drop_last dataloader_persistent_workers dataloader_in_order"
        " dataloader_multiprocessing_context preprocessing_batch_size length_column_name"
        " skip_prepare_dataset cache_dir dataset_dir eval_dataset_dir buffer_size"
        " dataset_shard_idx preprocess_iterable",
    "torch.distributed is set up here": "local_rank ddp_timeout ddp_backend ddp_find_unused_parameters"
        " ddp_bucket_cap_mb ddp_broadcast_buffers ddp_static_graph accelerator_config"
        " ignore_bias_buffers compute_environment machine_rank main_process_ip rdzv_backend same_network"
        " main_training_function downcast_bf16 enable_cpu_affinity tpu_env tpu_use_cluster"
        " tpu_use_sudo commands command_file num_cpu_threads_per_process torch_empty_cache_steps"
        " dynamo_config dynamo_mode dynamo_use_fullgraph dynamo_use_dynamic"
        " dynamo_use_regional_compilation ray_num_workers ray_run_name deepspeed_multinode_launcher"
        " use_fsdp use_deepspeed"
        " multi_gpu gpu_memory_limit lora_on_cpu zero3_init_flag zero3_save_16bit_model mpirun_config ddp"
        " device offload_folder qlora_sharded_model_loading max_memory gc_steps resources_per_worker"
        " placement_strategy",
    "FSDP's units are decoder layers": "fsdp_version fsdp_auto_wrap_policy fsdp_backward_prefetch"
        " fsdp_forward_prefetch fsdp_cpu_ram_efficient_loading fsdp_state_dict_type"
        " fsdp_sync_module_states fsdp_use_orig_params fsdp_min_num_params fsdp_limit_all_gathers"
        " fsdp_transformer_layer_cls_to_wrap fsdp_activation_checkpointing_offload fsdp_final_state_dict_type"
        " fsdp_mixed_precision_policy",
    "checkpointing is non-reentrant": "gradient_checkpointing_kwargs activation_checkpointing_kwargs"
        " use_reentrant_gc use_unsloth_gc",
    "the image processor is that of the model's folder": "processor_type",
    "torch's defaults hold": "tf32 fp16_full_eval bf16_full_eval",
    "the token is that of `hf auth login`": "hub_token hf_hub_token use_auth_token hf_use_auth_token"
        " ms_hub_token om_hub_token",
}
# fmt: on

# Values of foreign options in LOST that change nothing, in lower case.
HARMLESS = {
    "stage": ("sft",),
    "loss_type": ("nll", "chunked_nll"),
    "bnb_4bit_quant_type": ("nf4",),
    "quantization_type": ("nf4",),
    "init_lora_weights": ("true",),
    "train_on_eos": ("turn",),
    "roles_to_train": ("assistant",),
    "mix_strategy": ("concat",),
    "lr_scheduler_kwargs": ("0.1",),
    "cosine_min_lr_ratio": ("0.1",),
    "train_sampling_strategy": ("random",),
    "plugins": (
        "axolotl.integrations.liger.ligerplugin",
        "axolotl.integrations.cut_cross_entropy.cutcrossentropyplugin",
    ),
}
ADAM = "adam_beta1 adam_beta2 adam_epsilon"


def _rules() -> tuple[Rule, ...]:
    """Return the rows of all subjects, and a row for each reason of LOST and NEEDLESS."""
    table = [row for rows_of_subject in SUBJECTS.values() for row in rows_of_subject]
    table.append(
        _rule("", values.adam_betas, hf=ADAM, launcher="optimizer.params.betas optimizer.params.eps")
    )
    table += [_rule("", lost(reason, HARMLESS), hf=names) for reason, names in LOST.items()]
    table += [_rule("", needless(reason), hf=names) for reason, names in NEEDLESS.items()]
    return tuple(table)


FOREIGN = ForeignOptions(_rules())
