"""What a run takes of a node's host memory: libraries, page-locked weights and activations, compilers."""

from __future__ import annotations

from launch.gpus import Gpu
from launch.memory import GIB, MIB
from launch.precision import Precision
from models.loss import LOGITS_BYTES
from monitoring.layer_memory import is_compiled
from monitoring.sizes import RunSizes, optimizer_state_bytes, round_up_to_power
from monitoring.vision_memory import pixel_bytes
from options.config import Config
from options.strategies import shards_of

# Resident sizes without data, measured with torch 2.11 and CUDA 13.0 on an H200 (2026-11-30): the process
# that starts the ranks, a rank with CUDA's context and libraries, a rank on a CPU, a process of the compiler.
LAUNCHER_BYTES, RANK_BYTES, CPU_RANK_BYTES = 0.4 * GIB, 2.17 * GIB, 0.45 * GIB
COMPILER_BYTES = 0.09 * GIB  # most of its pages are shared with the others
MOST_COMPILERS = 32  # torch's limit for a process
BUFFER_BYTES = 600 * MIB  # page-locked, for weights on their way to the GPU and batches


def host_bytes(
    config: Config,
    precision: Precision,
    sizes: RunSizes,
    gpu: Gpu | None,
    *,
    layer_input: float,
    peak: float,
    cpus: int,
) -> float:
    """Return the bytes of host memory of all ranks together, as if they were on one node.

    Args:
        config: resolved, with its world_size.
        precision: dtypes of the run.
        sizes: of its model and data.
        gpu: the kind of its GPUs; None = it runs on CPUs.
        layer_input: bytes of a layer's input.
        peak: bytes that a rank's tensors take at the peak of a step; on a CPU they are host memory too.
        cpus: CPUs of a rank: as many processes compile for it.
    """
    # A step's pixels are decoded while those of two others are in use, or wait for it (data/prefetch.py).
    micro_batch, accumulation = pixel_bytes(config, sizes.pixels), config.gradient_accumulation_steps
    if gpu is None:
        pixels = 3 * accumulation * micro_batch
        return LAUNCHER_BYTES + config.world_size * (CPU_RANK_BYTES + peak + pixels)
    rank = RANK_BYTES + sizes.page_locked
    if micro_batch:  # page-locked but for the step that is decoded
        rank += accumulation * (micro_batch + 2 * round_up_to_power(micro_batch))
    if not config.use_cpu_offload:  # which releases them before it page-locks the weights
        rank += BUFFER_BYTES
    compiled = is_compiled(config, sizes.widths, gpu)
    if compiled:
        rank += (min(cpus, MOST_COMPILERS) + 1) * COMPILER_BYTES
        # While Inductor times a kernel that works in place, it keeps the values in page-locked memory if the
        # GPU has no room for a copy: the MLP's, in the first backward. Small ones fit where the loss was.
        values = config.batch_size * sizes.tokens * sizes.widths.mlp * precision.matmul_dtype.itemsize
        rank += round_up_to_power(values) if values > LOGITS_BYTES else 0
    if config.save_every or config.save_minutes:
        trained = sizes.weights.trained / shards_of(config)
        states = optimizer_state_bytes(config.optimizer, trained, precision.trained.itemsize)
        # Copies that checkpoints are written from. With offload the copies count already (run_sizes.py), but
        # the states themselves then stay beside them.
        rank += states if config.use_cpu_offload else trained + states
    if config.use_activation_cpu_offload and config.use_gradient_checkpointing:
        rank += (sizes.saved_layers + 4) * layer_input
    # A compiled layer's last output, which DoRA's magnitudes need (wrapping.py).
    is_whole = config.wrap_policy == "layer" and not config.use_cpu_offload and config.method.quantizer
    if compiled and is_whole and config.method.adapter == "dora" and config.use_gradient_checkpointing:
        rank += sizes.saved_layers * layer_input * precision.matmul_dtype.itemsize / precision.frozen.itemsize
    return LAUNCHER_BYTES + config.world_size * rank
