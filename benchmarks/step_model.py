"""A model of one optimizer step on many GPUs: computation, communication, waiting; and of a checkpoint.

All times are in seconds, sizes in bytes, rates per second. W ranks on nodes of G GPUs share a copy of the
model; there may be several copies. For a ring over W ranks on N nodes in which each rank receives r bytes

    ring = call + (W - N) link_latency + (N - 1) network_latency
           + max(r / link, r (W - G) / (W - 1) / network)

The latencies are NCCL's own model of its rings (src/graph/tuning.cc of NCCL, `ncclTopoTuneModel`). The last
term is the slower of the two kinds of links, which work at the same time: each GPU receives r over `link`,
and each node receives once what its own GPUs do not have. Of a step with units 1 to L
(monitoring/traffic.py):

    computation = FLOPs / flops * (1 + jitter * m(ranks)) + overhead
    forward     = gather(1) + sum over i of max(forward(i), gather(i + 1))
    backward    = sum over i of max(backward(i), gather(i - 1) + reduce(i + 1), copies(i + 1)) + what is left
    step        = computation + the communication that is longer than the computation beside it

m(n) is the expected maximum of n standard normal numbers (Blom 1958): all ranks wait for the slowest.
`copies` is the all-reduce of hybrid strategies between the nodes. The collectives of the embedding and the
loss (models/loss.py) hide behind nothing. Their number and their bytes grow with W.

Not modelled: other traffic on the network, nodes at different distances, NCCL's other algorithms, the
multiprocessors that NCCL's kernels take from matmuls, and a host that cannot keep up.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cache
from statistics import NormalDist

from checkpoints.disk_sizes import disk_sizes
from files.config_parts import text_config
from launch.precision import choose_precision
from models.loss import HIDDEN_BYTES
from monitoring.traffic import FP32, list_units, step_traffic
from monitoring.weight_memory import plan_parameters
from options.strategies import STRATEGIES, shards_of
from options.train import parse
from training.planned_model import PlannedModel, open_planned_model

GIGABIT = 1e9 / 8


@dataclass(frozen=True)
class Machines:
    """What the time of a step depends on besides the work.

    Attributes:
        gpus: of a node.
        flops: FLOP/s of a GPU over all computation of a step.
        overhead: seconds of a step that depend neither on tokens nor on ranks.
        jitter: standard deviation of a rank's computation, relative to its mean.
        link: bytes/s that a GPU receives from GPUs of its node.
        network: bytes/s that a node receives from other nodes, with all its cards.
        call, link_latency, network_latency: seconds of a collective, and of each of its messages.
        disk: bytes/s of the disk that all ranks write checkpoints to.
    """

    gpus: int
    flops: float
    overhead: float
    jitter: float
    link: float
    network: float = math.inf
    call: float = 8.4e-6
    link_latency: float = 3.4e-6
    network_latency: float = 9.6e-6
    disk: float = math.inf


@dataclass(frozen=True)
class UnitWork:
    """A unit of FSDP, on one rank.

    Attributes:
        gathered: bytes that it receives to gather the unit once.
        reduced: bytes that it receives to reduce the gradients within a copy of the model.
        gradients: bytes of its shard of the gradients, which the copies sum.
        forward, backward: FLOPs; backward includes recomputation.
        again: whether the unit is gathered in backward, too.
    """

    gathered: float
    reduced: float
    gradients: float
    forward: float
    backward: float
    again: bool


@dataclass(frozen=True)
class Work:
    """The work of one rank in a step with one micro-batch.

    Attributes:
        ranks: all ranks.
        shards: ranks of a copy of the model, W.
        tokens: of a rank.
        units: in the order of forward.
        vocabulary: bytes that it receives for the embedding and the loss.
        vocabulary_calls: collectives of the embedding and the loss.
        vocabulary_flops: of the head.
        weights: bytes of the weights on a rank.
        checkpoint: bytes of a checkpoint.
    """

    ranks: int
    shards: int
    tokens: int
    units: tuple[UnitWork, ...]
    vocabulary: float
    vocabulary_calls: int
    vocabulary_flops: float
    weights: float
    checkpoint: int


@dataclass(frozen=True)
class StepTime:
    """The seconds of a step: computation with its waiting for slow ranks, and exposed communication."""

    computation: float
    exposed: float

    @property
    def total(self) -> float:
        """Seconds of the step."""
        return self.computation + self.exposed


@cache
def _open(shape: str) -> PlannedModel:
    return open_planned_model(shape)


@cache
def make_work(shape: str, rows: int, context: int, lora_rank: int, ranks: int, options: str) -> Work:
    """Return the work of a step.

    Args:
        shape: a name of models/shapes.py.
        rows: of a rank.
        context: tokens of a row, all of which are learned.
        lora_rank: of adapters on all linears.
        ranks: all ranks.
        options: of train.py: train type and strategy, with --hybrid_shard_size for a hybrid one.
    """
    argv = f"--model_name {shape} --batch_size {rows} --context_length {context} --lora_rank {lora_rank}"
    config, _ = parse([*argv.split(), "--world_size", str(ranks), *options.split()])
    planned, precision = _open(shape), choose_precision("auto", has_gpu=True, has_bf16_gpu=True)
    model = planned.model, planned.family, config, precision, planned.files
    parameters, shards = plan_parameters(*model), shards_of(config)
    text, traffic, tokens = text_config(planned.model.config), step_traffic(*model, context), rows * context
    gathers_again = STRATEGIES[config.sharding_strategy].reshard_after_forward
    units = []
    for unit in list_units(parameters, planned.family, config, precision, tied=False):
        adapters = sum(math.prod(p.shape) for p in unit.parameters if p.kind == "trained")
        frozen = {p.name for p in unit.parameters if p.kind == "codes"}
        sizes = {name: math.prod(planned.files.tensors[name].shape) for name in frozen}
        matrices = sum(sizes.values())
        last = sum(n for name, n in sizes.items() if name.endswith(f".{planned.family.outputs[-1]}.weight"))
        # Causal attention: half of the pairs of tokens, two products, in forward; 2.5 times that in backward.
        attention = 2 * context * text.hidden_size * bool(frozen)
        forward = 2 * (matrices + adapters) + attention
        # Recomputation leaves out the last projection, whose output backward does not need.
        recomputed = (forward - 2 * last) * config.use_gradient_checkpointing
        backward = recomputed + 2 * matrices + 4 * adapters + 2.5 * attention
        shard, gradients = unit.sent_bytes(shards), unit.gradient_elements(shards) * FP32
        again = gathers_again and unit.in_backward
        others = shards - 1
        units.append(
            UnitWork(
                others * shard, others * gradients, gradients, forward * tokens, backward * tokens, again
            )
        )
    chunks = -(-tokens * shards * FP32 * text.hidden_size // HIDDEN_BYTES)
    return Work(
        ranks,
        shards,
        tokens,
        tuple(units),
        traffic.vocabulary,
        4 * chunks + 2 if shards > 1 else 0,  # a chunk: one for the embedding, three for the loss
        4 * text.vocab_size * text.hidden_size * tokens,
        sum(p.nbytes(shards) for p in parameters),
        disk_sizes(*model).checkpoint,
    )


def expected_max(n: int) -> float:
    """Return about the expected maximum of n standard normal numbers (Blom 1958); 0 for one."""
    return NormalDist().inv_cdf((n - 0.375) / (n + 0.25)) if n > 1 else 0.0


def ring_seconds(received: float, ranks: int, machines: Machines, calls: int = 1) -> float:
    """Return the time of `calls` all-gathers or reduce-scatters over consecutive ranks.

    received: bytes that a rank receives in all of them together.
    """
    if ranks == 1 or not calls:
        return 0.0
    per_node = min(machines.gpus, ranks)
    nodes = ranks / per_node
    messages = (ranks - nodes) * machines.link_latency + (nodes - 1) * machines.network_latency
    between = received * (ranks - per_node) / (ranks - 1) / machines.network
    return calls * (machines.call + messages) + max(received / machines.link, between)


def copies_seconds(gradients: float, copies: int, shards: int, machines: Machines) -> float:
    """Return the time to sum a shard's gradients over the copies of the model.

    A node's GPUs do that at the same time, each with its own shard. They share the network if copies are on
    several nodes, and else use the node's links.
    """
    if copies == 1:
        return 0.0
    ranks_of_node = min(shards, machines.gpus)
    nodes = max(copies * shards // machines.gpus, 1)
    messages = 2 * (copies - 1) * (machines.network_latency if nodes > 1 else machines.link_latency)
    moved = 2 * (copies - 1) / copies * gradients
    rate = machines.network / ranks_of_node if nodes > 1 else machines.link
    return machines.call + messages + moved / rate


def step_seconds(work: Work, machines: Machines) -> StepTime:
    """Return the time of a step."""
    slow = (1 + machines.jitter * expected_max(work.ranks)) / machines.flops
    copies = work.ranks // work.shards
    gathers = [ring_seconds(u.gathered, work.shards, machines) for u in work.units]
    reduces = [ring_seconds(u.reduced, work.shards, machines) if u.reduced else 0.0 for u in work.units]
    sums = [
        copies_seconds(u.gradients, copies, work.shards, machines) if u.gradients else 0.0 for u in work.units
    ]
    forward = [unit.forward * slow for unit in work.units]
    backward = [unit.backward * slow for unit in work.units]
    exposed = gathers[0]
    for compute, gather in zip(forward, [*gathers[1:], 0.0], strict=True):
        exposed += max(gather - compute, 0.0)
    again = [gather * unit.again for gather, unit in zip(gathers, work.units, strict=True)]
    # Backward goes from the last unit to the first. Its own gather is done when it begins.
    for i in reversed(range(len(work.units))):
        before = again[i - 1] if i else 0.0
        after = i + 1 < len(work.units)
        hidden = before + reduces[i + 1] if after else before
        exposed += max(hidden - backward[i], (sums[i + 1] if after else 0.0) - backward[i], 0.0)
    exposed += reduces[0] + sums[0]
    exposed += ring_seconds(work.vocabulary, work.shards, machines, work.vocabulary_calls)
    computation = sum(forward) + sum(backward) + work.vocabulary_flops * slow + machines.overhead
    return StepTime(computation, exposed)


def checkpoint_seconds(work: Work, machines: Machines, copy_rate: float = 25e9) -> float:
    """Return the time until a checkpoint is on the disk, while training goes on.

    Every rank copies its share to host memory and writes it; all write at the same time to one disk.

    copy_rate: bytes/s from a GPU to its host; 25e9 is assumed for PCIe 5.0.
    """
    return work.checkpoint / work.ranks / copy_rate + work.checkpoint / machines.disk


def with_network(machines: Machines, gigabits: float) -> Machines:
    """Return the machines with a network of so many Gbit/s per node."""
    return replace(machines, network=gigabits * GIGABIT)
