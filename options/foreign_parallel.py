"""Translations of foreign settings of several GPUs and of memory: sharding, offload, batches, precision."""

from __future__ import annotations

from options.foreign import Settings, Translation, is_off
from options.foreign_values import as_number, first, is_on, whole

STRATEGIES = {  # of accelerate and transformers; numbers are those of torch's ShardingStrategy
    "full_shard": "full_shard",
    "1": "full_shard",
    "shard_grad_op": "shard_grad_op",
    "2": "shard_grad_op",
    "no_shard": "ddp",
    "3": "ddp",
    "hybrid_shard": "hybrid_full_shard",
    "4": "hybrid_full_shard",
    "hybrid_shard_zero2": "hybrid_shard_grad_op",
    "_hybrid_shard_zero2": "hybrid_shard_grad_op",
    "5": "hybrid_shard_grad_op",
}
ZERO_STAGES = {"0": "ddp", "1": "shard_grad_op", "2": "shard_grad_op", "3": "full_shard"}
KINDS = {"MULTI_GPU": "ddp", "FSDP": "full_shard", "DEEPSPEED": "shard_grad_op"}  # distributed_type
OFFLOADS = (
    "fsdp_offload_params",
    "offload_optimizer_device",
    "offload_param_device",
    "zero_optimization.offload_optimizer.device",
    "zero_optimization.offload_param.device",
    "zero_optimization.cpu_offload",
)


def precision(given: Settings, _settings: Settings) -> Translation:
    """Translate the dtypes of the computation."""
    mixed = given.get("mixed_precision", "").lower()
    half, bf16 = is_on(given, "fp16", "float16", "fp16.enabled"), is_on(given, "bf16", "bf16.enabled")
    if mixed == "fp8":
        return Translation(note="matmuls are not in fp8", lost=True)
    if is_on(given, "bfloat16", "pure_bf16"):
        return Translation({"precision": "bf16"}, "trained weights in bf16 as well")
    if half or (mixed == "fp16" and not bf16):
        return Translation({"precision": "fp16_autocast"})
    if not bf16 and mixed != "bf16" and ("bf16" in given or mixed == "no" or is_on(given, "float32")):
        return Translation({"precision": "fp32"})
    return Translation(note="--precision auto is bf16 on GPUs that have it")


def checkpointing(given: Settings, _settings: Settings) -> Translation:
    """Translate activation checkpointing and the offload of what it saves."""
    own = ("gradient_checkpointing", "activation_checkpointing")
    saved = is_on(given, *own, "fsdp_activation_checkpointing")
    in_host = any(given.get(name, "").lower() in ("offload", "offload_disk") for name in own)
    if in_host or is_on(given, "activation_offloading", "activation_checkpointing.cpu_checkpointing"):
        return Translation({"use_gradient_checkpointing": "true", "use_activation_cpu_offload": "true"})
    if saved or set(own) & set(given):
        return Translation({"use_gradient_checkpointing": str(saved).lower()})
    if is_on(given, "disable_gradient_checkpointing"):
        return Translation({"use_gradient_checkpointing": "false"})
    return Translation(note="--use_gradient_checkpointing is on by default")


def sharding(given: Settings, _settings: Settings) -> Translation:
    """Translate FSDP's and DeepSpeed's strategies, and their offload."""
    values = {name: value.strip() for name, value in given.items()}
    words = values.get("fsdp", "").replace(",", " ").lower().split()
    options, notes = {}, []
    stage = first(values, "zero_stage", "zero_optimization.stage")
    strategy = _strategy(values, words, stage)
    if strategy:
        options["sharding_strategy"] = strategy
    if stage in ("1", "2"):
        notes.append("weights are sharded as well, and gathered for forward and backward together")
    group = first(values, "zero_optimization.zero_hpz_partition_size", "zero_optimization.mics_shard_size")
    if group not in ("", "1", "-1"):
        options |= {"sharding_strategy": "hybrid_full_shard", "hybrid_shard_size": group}
    devices = {name: values[name].lower() for name in OFFLOADS if not is_off(values.get(name, ""))}
    if devices or "offload" in words:
        options["use_cpu_offload"] = "true"
        if any("nvme" in device for device in devices.values()):
            notes.append("to host memory, not to a disk")
        elif devices and all("optimizer" in name for name in devices):
            notes.append("weights are offloaded with the optimizer")
    if options:
        return Translation(options, "; ".join(notes))
    return Translation(note="--sharding_strategy auto shards over all GPUs")


def _strategy(values: Settings, words: list[str], stage: str) -> str:
    """Return the --sharding_strategy of FSDP's or DeepSpeed's settings, or ""."""
    named = values.get("fsdp_sharding_strategy") or values.get("fsdp_reshard_after_forward", "")
    by_word = next((STRATEGIES[word] for word in words if word in STRATEGIES), "")
    reshards = {"true": "full_shard", "false": "shard_grad_op"}.get(named.lower(), "")
    known = STRATEGIES.get(named.lower().rpartition(".")[2]) or reshards
    kind = KINDS.get(values.get("distributed_type", "").upper(), "")
    return ZERO_STAGES.get(stage) or known or by_word or kind


def processes(given: Settings, settings: Settings) -> Translation:
    """Translate a number of processes; on several nodes torchrun starts them."""
    nodes = as_number(first(settings, "num_machines")) or 1
    count = as_number(first(given, "num_processes"))
    if nodes > 1:
        each = f" --nproc_per_node {count / nodes:g}" if count else ""
        start = f"torchrun --nnodes {nodes:g}{each} train.py"
        return Translation(note=f"start {start} on each node (docs/nodes.md)", lost=True)
    if not count:
        return Translation(note="it is one machine")
    return Translation({"world_size": whole(count)})


def gpu_ids(given: Settings, _settings: Settings) -> Translation:
    """Translate the numbers of the GPUs that are used."""
    numbers = given["gpu_ids"]
    if numbers in ("", "all"):
        return Translation(note="all GPUs are used")
    return Translation(note=f"CUDA_VISIBLE_DEVICES={numbers} before the command", lost=True)


def port(given: Settings, settings: Settings) -> Translation:
    """Translate the port of rank 0, which torchrun has on several nodes."""
    if (as_number(first(settings, "num_machines")) or 1) > 1:
        return Translation(note="torchrun has it")
    return Translation({"master_port": next(iter(given.values()))})


def found_batch(given: Settings, settings: Settings) -> Translation:
    """Translate transformers' search for a batch that fits, which begins with the given one."""
    if is_off(next(iter(given.values()))):
        return Translation(note="the batch is taken as it is given")
    if not first(settings, "per_device_train_batch_size", "micro_batch_size"):
        return Translation({"batch_size": "auto"}, "the largest that fits is found before the run")
    return Translation(note="a given batch is not lowered; --batch_size auto finds one", lost=True)


def rows_of_a_step(given: Settings, settings: Settings) -> Translation:
    """Translate the rows of a whole step: micro-batch x accumulation x GPUs."""
    total = as_number(next(iter(given.values())))
    # The training program's setting counts, not its launcher's.
    names = ("per_device_train_batch_size", "micro_batch_size", "train_micro_batch_size_per_gpu")
    micro = as_number(first(settings, *names)) or 1
    accumulation = as_number(first(settings, "gradient_accumulation_steps"))
    gpus = as_number(first(settings, "num_processes", "world_size"))
    if not total:
        return Translation(note="a step has --effective_batch_size rows on all GPUs together")
    if accumulation:
        count = total / (micro * accumulation)
        note = f"{total:g} rows per step = {count:g} GPUs x {micro:g} x {accumulation:g}"
        if gpus or count != int(count):
            return Translation(note=note, lost=gpus != count)
        return Translation({"world_size": whole(count)}, note)
    if gpus and total % (micro * gpus) == 0:
        options = {"gradient_accumulation_steps": whole(total / (micro * gpus))}
        return Translation(options, f"{total:g} rows per step / ({micro:g} x {gpus:g} GPUs)")
    note = f"{total:g} rows per step on all GPUs together, a multiple of GPUs x {micro:g}"
    return Translation({"effective_batch_size": whole(total)}, note)
