"""Options, choices and data sets of fsdp_qlora, a command of a public write-up, and its tokens of a row."""

from __future__ import annotations

# fsdp_qlora's options and choices, as DESIGN.md lists them, since existing commands must keep working.
FSDP_QLORA = """
    world_size train_type llama_pro_path batch_size context_length gradient_accumulation_steps
    num_epochs dataset dataset_samples sharding_strategy use_gradient_checkpointing
    reentrant_checkpointing use_cpu_offload use_activation_cpu_offload low_memory no_sync precision
    model_name save_model output_dir lora_rank lora_alpha lora_dropout lora_target_modules verbose lr
    apply_gradient_clipping grad_norm wd profile_memory optimizer lr_scheduler loading_workers log_to
    master_addr master_port seed project_name name group entity n_bits profile profiling_output
    overwrite_profiling_output with_stack with_shapes export_trace export_memory_timeline wait_steps
    warmup_steps active_steps repeat profiling_frequency max_steps
"""


CHOICES = {
    "train_type": "full lora qlora custom_lora custom_qlora hqq_lora hqq_dora bnb_dora bnb_llama_pro"
    " hqq_llama_pro dora llama_pro",
    "sharding_strategy": "auto full_shard shard_grad_op ddp hybrid_full_shard hybrid_shard_grad_op",
    "precision": "auto fp32 bf16 fp16_autocast bf16_autocast bf16_buffers_autocast",
    "optimizer": "adamw adam sgd adadelta fused_adamw fused_adam adamw_8bit paged_adamw_32bit"
    " paged_adamw_8bit",
    "lr_scheduler": "constant linear cosine",
    "log_to": "tqdm wandb stdout",
}


DATASETS = "alpaca alpaca_sample dummy guanaco sql orca_math uganda_clinical_guidelines oig_chip2 toy"


PUBLIC_COMMAND = """--train_type bnb_dora --model_name meta-llama/Meta-Llama-3-70B
    --dataset uganda_clinical_guidelines --dataset_samples 130 --batch_size 4
    --context_length 2048 --gradient_accumulation_steps 2 --sharding_strategy full_shard
    --use_gradient_checkpointing true --reentrant_checkpointing true --use_cpu_offload false
    --use_activation_cpu_offload false --project_name fsdp-quantized-ucg
    --save_model true --output_dir ../models/Llama-3-70b-ucg-bnb-QDoRA"""


# As in fsdp_qlora's train.py, which copies Stanford Alpaca's.
PROMPT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the"
    " request.\n\n### Instruction:\n{instruction}\n\n### Response:"
)
PROMPT_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. Write"
    " a response that appropriately completes the request.\n\n### Instruction:\n{instruction}\n\n"
    "### Input:\n{input}\n\n### Response:"
)


def tokens_and_labels(row: dict, tokenizer) -> tuple[list[int], list[int]]:
    """Return fsdp_qlora's (input_ids, labels) of an Alpaca row; -100 marks tokens that are not learned."""
    prompt = (PROMPT if row.get("input", "") == "" else PROMPT_INPUT).format_map(row)
    ids = [*tokenizer.encode(prompt + row["output"]), tokenizer.eos_token_id]
    prompt_length = len(tokenizer.encode(prompt))
    return ids, [-100] * prompt_length + ids[prompt_length:]
