"""The one model of memory: what a run takes on each GPU.

The planner (plan.py), the line that train.py prints at start, the trials of --batch_size auto and the advice
when memory runs out (training/out_of_memory.py) all use `estimate_memory`. layer_memory.py counts the
activations of a layer, weight_memory.py the weights, host_memory.py what is in host memory. docs/memory.md
explains the parts, and compares the results with what was measured.

Shapes: T tokens of the longest sequence, N tokens of a micro-batch, V vocabulary, H hidden features.
"""

from __future__ import annotations

from dataclasses import dataclass

from launch.gpus import Gpu
from launch.memory import GIB, MIB
from launch.precision import Precision
from launch.ranks import resolve_workers
from models.loss import HIDDEN_BYTES, LOGITS_BYTES, TILE
from monitoring.host_memory import host_bytes
from monitoring.layer_memory import LayerMemory, is_compiled, layer_memory, mask_bytes
from monitoring.sizes import RunSizes, optimizer_state_bytes
from monitoring.vision_memory import vision_memory
from options.config import Config
from options.strategies import STRATEGIES, shards_of
from parallel.optimizers import UNPAGED

# cuBLAS's workspaces of the two threads that call it: 32 MiB each from Hopper on, 8 MiB before
# (https://docs.nvidia.com/cuda/cublas/#cublassetworkspace).
WORKSPACE_BYTES = {True: 2 * 32 * MIB, False: 2 * 8 * MIB}
# While loading: a tensor that is packed, and those that the other loading workers have packed before.
PACKING_BYTES = 200 * MIB
# Code that is not compiled holds a chunk of logits in 16 bits twice, and four copies in fp32.
EAGER_LOGITS = 10


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes that a run takes: on the GPU of the fullest rank, and in the host memory of a node.

    Attributes:
        load: on the GPU after the load.
        forward, backward: after a forward, and after a backward, once the optimizer has its states.
        optimizer: most while the optimizer updates the weights.
        peak: most of all.
        host: of all processes of a node together.
        graphs: that CUDA graphs may add to the peak with `--cuda_graphs auto`, which records only where there
            is room for it; no other figure has them.
    """

    load: float
    forward: float
    backward: float
    optimizer: float
    peak: float
    host: float
    graphs: float = 0.0


@dataclass(frozen=True)
class _Shared:
    """Bytes of weights and what belongs to them, on one GPU.

    Attributes:
        weights: after the load.
        resident: in use between steps: weights, optimizer states, buffers, workspaces.
        gradients: of all trained weights, as the optimizer sees them.
        unit: a unit that is gathered while it computes, with what is fetched ahead of it.
        kept: units that stay gathered between forward and backward, and gradients that --no_sync holds.
        unit_gradients: of a unit, in the dtype that it computes in; 0 where they are the optimizer's already.
        reduced: the same and their copies in fp32, on their way to the ranks' shards.
    """

    weights: float
    resident: float
    gradients: float
    unit: float
    kept: float
    unit_gradients: float
    reduced: float


def estimate_memory(
    config: Config, precision: Precision, sizes: RunSizes, gpu: Gpu | None, cpus: int = 4
) -> MemoryEstimate:
    """Estimate the memory that a run takes.

    Args:
        config: resolved, with its world_size.
        precision: dtypes of the run.
        sizes: of its model and data.
        gpu: the kind of its GPUs; None for a run on CPUs, whose weights are in host memory.
        cpus: CPUs of a rank, which the number of compiling processes follows.
    """
    shared = _shared_bytes(config, precision, sizes, gpu)
    layer = layer_memory(
        config,
        precision,
        sizes.widths,
        gpu,
        tokens=sizes.tokens,
        branches=sizes.branches,
    )
    masks = mask_bytes(config, precision, sizes.widths, gpu, sizes.tokens, sizes.pixels > 0)
    images = vision_memory(config, precision, sizes.vision, sizes.pixels)
    saved, waiting = _saved_bytes(config, precision, sizes, layer)
    rows = config.batch_size * sizes.tokens
    graphs = config.cuda_graphs if is_compiled(config, sizes.widths, gpu) else "false"
    fixed, copied = _graph_bytes(config, sizes, layer) if graphs == "true" else (0, 0)
    # The last norm's input and the gradient of the hidden states, which the loss forms.
    ends = 2 * layer.input
    loss = _loss_bytes(config, precision, sizes, gpu, rows)
    vocabulary_gradient = sizes.vocabulary_bytes * (4 / precision.trained.itemsize)  # formed in fp32
    # Gradients stay over all micro-batches of a step; a single one's grow while its activations are freed.
    # With --no_sync FSDP reduces them only in the last one; until then `kept` has them.
    holds_gradients = config.gradient_accumulation_steps > 1 and not (config.no_sync and shared.reduced)
    accumulated = shared.gradients if holds_gradients else 0
    before_masks = shared.resident + fixed + shared.kept + accumulated + images.held
    before = before_masks + masks
    after_forward = before + saved + ends + vocabulary_gradient
    forward = max(
        after_forward + loss,
        before + saved + waiting + layer.forward + shared.unit if config.use_gradient_checkpointing else 0,
        # The vision parts run after the embedding, and before the masks are made.
        before_masks + layer.input + shared.unit + images.forward,
    )
    one_layer = layer.backward if config.use_gradient_checkpointing else layer.last_backward
    one_layer = shared.unit + max(one_layer + shared.unit_gradients, shared.reduced)
    growing = shared.gradients - accumulated
    of_images = shared.unit + max(images.backward + shared.unit_gradients, shared.reduced)
    of_images = of_images if images.backward else 0
    own = _vocabulary_backward_bytes(config, precision, sizes)
    backward = max(
        after_forward + (2 if shared.reduced else 1.5) * vocabulary_gradient,  # the head's gradient
        before + saved + waiting + one_layer,  # the last layer
        before + growing + layer.input + one_layer - own.gradient,  # the first layer
        before + growing + layer.input + own.extra,  # the embedding
        before + growing + layer.input + of_images,
    )
    after_load, after_backward = shared.weights, shared.resident + fixed + shared.gradients
    step = after_backward + _update_ratio(config) * shared.gradients
    peak = max(_load_peak(config, sizes, shared, cpus), forward + copied, backward + copied, step)
    host = host_bytes(config, precision, sizes, gpu, layer_input=layer.input, peak=peak, cpus=cpus)
    added = _added_graph_bytes(config, sizes, layer) if graphs == "auto" else 0
    return MemoryEstimate(after_load, after_forward, after_backward, step, peak, host, added)


def _added_graph_bytes(config: Config, sizes: RunSizes, layer: LayerMemory) -> float:
    """Return the bytes that CUDA graphs of `--cuda_graphs auto` may take beside a run's peak without them.

    Beside their fixed tensors, their memory is that of one layer in forward and backward. A call that is not
    replayed, of a longer row for example, takes as much again.
    """
    one_layer = layer.backward if config.use_gradient_checkpointing else layer.saved + layer.last_backward
    return one_layer + sum(_graph_bytes(config, sizes, layer))


def _graph_bytes(config: Config, sizes: RunSizes, layer: LayerMemory) -> tuple[float, float]:
    """Return the bytes of CUDA graphs' fixed tensors, and of copies while one is replayed.

    Fixed are a layer's parameters and input (parallel/recorded_layer.py). The result and the gradient, and
    without gradient checkpointing all that forward saves, are in the graphs' memory and in a copy.
    """
    saved = 0 if config.use_gradient_checkpointing else layer.saved
    return sizes.unit + layer.input, 2 * layer.input + saved


def _update_ratio(config: Config) -> float:
    """Return what the optimizer's update takes beside its states, per byte of gradients.

    torch's optimizers for all parameters at a time (foreach) keep intermediate results; fused ones do not.
    """
    if config.optimizer == "adadelta":
        return 2.0
    return 1.0 if config.optimizer == "sgd" and config.wd else 0.0


def _shared_bytes(config: Config, precision: Precision, sizes: RunSizes, gpu: Gpu | None) -> _Shared:
    """Return the bytes of weights, gradients and optimizer states, and of units that are gathered."""
    strategy = STRATEGIES[config.sharding_strategy]
    shards = shards_of(config)
    trained, offload = sizes.weights.trained, config.use_cpu_offload
    weights = (sizes.weights.total - sizes.on_host) / shards
    gradients = trained / shards
    states = optimizer_state_bytes(config.optimizer, gradients, precision.trained.itemsize)
    if config.optimizer in UNPAGED:  # managed memory, which leaves the GPU when it is full
        states = 0
    if offload:
        weights = gradients = states = 0
    casts = precision.gather_dtype is not None and sizes.trains_layers
    ratio = precision.frozen.itemsize / precision.trained.itemsize if casts else 1
    is_wrapped = config.world_size > 1 or casts or offload  # as in wrapping.py
    unit = sizes.unit * ratio if is_wrapped else 0
    reads_peers = bool(gpu and gpu.reads_peers) and shards > 1
    buffers, ahead = 0.0, 0.0
    if reads_peers:  # two buffers for gathered units, one for the gradients of adapters (copy_engines.py)
        buffers = 2 * unit + (0 if sizes.trains_layers else sizes.trained_unit)
        buffers += sizes.vocabulary_bytes * ratio
    elif shards > 1:
        ahead = unit  # the next unit's gathered bytes
    keeps = shards > 1 and not strategy.reshard_after_forward
    kept = unit * sizes.layers + (sizes.vision.weights if sizes.vision else 0) if keeps else 0.0
    if is_wrapped and config.no_sync and config.gradient_accumulation_steps > 1:
        kept += trained  # gradients that are not reduced yet
    unit_gradients = sizes.trained_unit * ratio if is_wrapped else 0
    reduced = unit_gradients + sizes.trained_unit if is_wrapped else 0
    workspace = WORKSPACE_BYTES[bool(gpu) and gpu.capability >= (9, 0)] if gpu else 0
    return _Shared(
        weights=weights,
        resident=weights + states + buffers + workspace,
        gradients=gradients,
        unit=0 if keeps else unit + ahead,
        kept=kept,
        unit_gradients=unit_gradients,
        reduced=reduced,
    )


def _saved_bytes(
    config: Config, precision: Precision, sizes: RunSizes, layer: LayerMemory
) -> tuple[float, float]:
    """Return the bytes that all layers save for backward, and those of copies to or from the host.

    With gradient checkpointing these are their inputs.
    """
    if not config.use_gradient_checkpointing:
        casts = precision.trained.itemsize > precision.matmul_dtype.itemsize and config.method.adapter
        narrow = precision.matmul_dtype.itemsize / precision.trained.itemsize
        copies = sizes.trained_unit * narrow if casts else 0  # of A and B in the matmuls' dtype
        return sizes.saved_layers * (layer.input + layer.saved + copies), 0
    # -1 takes what is free after the second step, and less if less is free: nothing needs to fit.
    budget = min(max(config.activation_budget, 0) * GIB, sizes.saved_layers * layer.matmuls)
    if config.use_activation_cpu_offload:
        return layer.input + budget, 2 * layer.input  # of two more layers on their way
    return sizes.saved_layers * layer.input + budget, 0


def _loss_bytes(config: Config, precision: Precision, sizes: RunSizes, gpu: Gpu | None, rows: int) -> float:
    """Return the most bytes that head and loss take beside what is saved (models/loss.py)."""
    width, hidden = precision.matmul_dtype.itemsize, sizes.widths.hidden
    shards = shards_of(config)
    is_trained = sizes.vocabulary_bytes > 0
    if is_trained:
        shards = 1  # gathered
    compiled = is_compiled(config, sizes.widths, gpu)
    columns = -(-sizes.vocabulary // shards)
    tokens = (LOGITS_BYTES if compiled else LOGITS_BYTES // 4) // (columns * width)
    if shards > 1:
        tokens = min(tokens, HIDDEN_BYTES // (4 * hidden))
    tokens = min(tokens - tokens % TILE if tokens > TILE else max(tokens, 1), rows * shards)
    logits = tokens * columns * width
    states = 3 * tokens * hidden * width
    if shards > 1:
        states += 2 * tokens * hidden * 4  # in fp32, to be summed over the ranks
    peak = logits * (2 if compiled else EAGER_LOGITS) + states
    head = sizes.vocabulary * hidden * width / shards
    if is_trained:  # the product that is added to the head's gradient; and the gathered head
        casts = precision.gather_dtype is not None
        return max(peak, logits + head + states) + (head if casts or config.world_size > 1 else 0)
    is_copied = precision.frozen.itemsize != width or config.use_cpu_offload
    return peak + (head if is_copied else 0)


@dataclass(frozen=True)
class _VocabularyBackward:
    """Bytes of the embedding's gradient, and of what its backward takes beside all gradients."""

    gradient: float = 0
    extra: float = 0


def _vocabulary_backward_bytes(config: Config, precision: Precision, sizes: RunSizes) -> _VocabularyBackward:
    """Return what the backward of a trained embedding takes: zeros if it is frozen."""
    if not sizes.vocabulary_bytes:
        return _VocabularyBackward()
    shards = shards_of(config)
    gradient = 0 if config.use_cpu_offload else sizes.vocabulary_bytes / shards
    elements = sizes.vocabulary_bytes / precision.trained.itemsize
    if config.world_size == 1 and precision.gather_dtype is None and not config.use_cpu_offload:
        return _VocabularyBackward(gradient)
    gathered = 0 if shards > 1 else precision.frozen.itemsize  # freed before
    return _VocabularyBackward(gradient, elements * (precision.frozen.itemsize + 4 + gathered))


def _load_peak(config: Config, sizes: RunSizes, shared: _Shared, cpus: int) -> float:
    """Return the most bytes on a GPU during the load (quantize_layers.py).

    The weights are allocated first, a tied embedding twice until the head's copy is dropped. Then tensors
    arrive as they are in their files. Threads use the GPU one at a time, so none packs while the largest
    arrives, but each other thread may have finished a tensor that waits for its turn. With several ranks, one
    of them casts the whole tensor and sends the shards while its threads go on.
    """
    packing = min(PACKING_BYTES, 4 * sizes.largest_tensor)
    if config.world_size > 1:
        arriving = sizes.largest_tensor * (1 + 1 / config.world_size) + packing
        arriving += sizes.largest_in_file if sizes.largest_in_file != sizes.largest_tensor else 0
    else:
        finished = (resolve_workers(config.loading_workers, cpus) - 1) * sizes.largest_read
        arriving = max(sizes.largest_in_file + finished, packing)
    allocated_twice = 0 if config.use_cpu_offload else sizes.tied / shards_of(config)
    return shared.weights + max(arriving, allocated_twice)
