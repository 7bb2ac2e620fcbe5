"""Which calls of decoder layers are replayed from CUDA graphs (--cuda_graphs), and which are not.

A layer runs as ever until its arguments have had the same shapes a few times, in forward and backward. Then
it is recorded, and it and all layers that are alike are replayed for such arguments. Other calls run as ever:
those with other shapes (an odd last batch, packs of varying rows), with dropout, or with an argument that is
no tensor and no plain value. `--verbose` says why.

Layers are alike if their modules, the shapes of their parameters and their attributes are equal. As a
safeguard, the first replay of each layer is compared with the layer itself (parallel/replay_check.py). A
layer that differs is not replayed.
"""

from __future__ import annotations

import contextlib
from collections import Counter, deque
from collections.abc import Callable, Hashable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import ActivationWrapper

from launch.memory import PEAK_MEMORY, gpu_room, is_out_of_memory
from launch.ranks import RankInfo
from options.config import Config
from parallel.fixed_tensors import Slots
from parallel.graph_memory import GraphMemory
from parallel.layer_kinds import describe_kind, has_dropout, put_together, take_apart
from parallel.recorded_layer import (
    LayerCall,
    LayerParameters,
    NotRecordable,
    Recording,
    Replay,
)
from parallel.replay_check import replay_agrees

# Calls of a layer with the same shapes before it is recorded. The first compiles it, forward and backward.
CALLS_BEFORE = 3
# Recordings of one kind of layer. Each has its own kernels, and with more than a few shapes none is repeated
# often.
MAX_RECORDINGS = 4
MAX_COUNTED = 64  # kinds of calls of a layer that are counted
# `auto` records once the GPU was less than a layer behind the host at WAITING_SHARE of the last MARKS_WATCHED
# starts of layers. If it waits less often, the copies that graphs need cost more time than is saved.
MARKS_WATCHED, WAITING_SHARE = 128, 0.5
FREE_SHARE = 0.1  # of the GPU's memory: `auto` leaves it free


class GpuWaits:
    """Tells whether the GPU waits for the host.

    The host marks the start of each layer, in forward and in backward. A host that is fast enough is layers
    ahead: as it sets a mark, the GPU has not come to the mark before.
    """

    def __init__(self):
        self.last: torch.cuda.Event | None = None
        self.waited: deque[bool] = deque(maxlen=MARKS_WATCHED)

    def mark(self) -> None:
        """Look whether the GPU is past the last mark, and set the next."""
        if self.last is None:
            self.last = torch.cuda.Event()
        else:
            self.waited.append(self.last.query())
        self.last.record()

    def mark_backward(self, result: Tensor) -> None:
        """Also set a mark where backward comes to the layer that has this result."""
        if result.requires_grad:
            result.register_hook(lambda gradient: self.mark())

    def forget(self) -> None:
        """Begin to count anew."""
        self.waited.clear()

    def are_frequent(self) -> bool:
        """Return whether the GPU waited at WAITING_SHARE of the last MARKS_WATCHED marks."""
        return sum(self.waited) >= WAITING_SHARE * MARKS_WATCHED


class PredictedMemory(NamedTuple):
    """Bytes of a GPU that a run should take with its longest rows, which may come late; 0 = is not known.

    Attributes:
        peak: without graphs.
        graphs: that graphs may add.
    """

    peak: float = 0.0
    graphs: float = 0.0


NOT_PREDICTED = PredictedMemory()


def keep_random_state() -> contextlib.AbstractContextManager:
    """Return a context that draws no random number from the run's generators.

    A layer with dropout that `has_dropout` does not see is refused. Until then it has drawn some.
    """
    devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
    return torch.random.fork_rng(devices)


def _has_room(predicted: PredictedMemory) -> bool:
    """Return whether graphs leave FREE_SHARE of the GPU free, at the peak so far and at the predicted one."""
    room = gpu_room(torch.device("cuda", torch.cuda.current_device()))
    PEAK_MEMORY.enter_phase(PEAK_MEMORY.phase)  # the peak of the current phase so far counts, too
    peak = max(predicted.peak, *PEAK_MEMORY.by_phase.values())
    return peak + predicted.graphs < (1 - FREE_SHARE) * room


class LayerGraphs:
    """The recordings of a model's layers, and the decision which layers are recorded.

    Args:
        memory: where graphs are recorded.
        waits: tells whether it is worth it; None = it always is (--cuda_graphs true).
        report: takes a line that says why something is not replayed, or that it is.
        predicted: memory that the run should take.
    """

    def __init__(
        self,
        memory: GraphMemory,
        waits: GpuWaits | None,
        report: Callable[[str], None],
        predicted: PredictedMemory = NOT_PREDICTED,
    ):
        self.memory, self.waits, self._report, self.predicted = memory, waits, report, predicted
        self.slots = Slots()
        self.recordings: dict[tuple[int, Hashable], Recording | None] = {}  # None: was refused
        self.kinds: dict[Hashable, int] = {}
        self.per_kind: Counter[Hashable] = Counter()
        self.reported: set[str] = set()

    def report(self, text: str) -> None:
        """Report a line, once."""
        if text not in self.reported:
            self.reported.add(text)
            self._report(f"--cuda_graphs: {text}")

    def loss_memory(self) -> contextlib.AbstractContextManager:
        """Return the context in which the loss allocates: the graphs' memory, unused then, once there is one.

        So the two do not add up.
        """
        return self.memory.allocating() if any(self.recordings.values()) else contextlib.nullcontext()

    def kind_of(self, layer: nn.Module) -> int:
        """Return the number of the layer's kind."""
        return self.kinds.setdefault(describe_kind(layer), len(self.kinds))

    def find(
        self, kind: int, key: Hashable, trained: Hashable, record: Callable[[], Recording]
    ) -> Recording | None:
        """Return the recording of a kind of layer for a kind of call, made now if it is due; or None.

        Args:
            kind: of `kind_of`.
            key: of the call.
            trained: which inputs need a gradient. The first layer's does not, so it has its own recordings.
            record: makes the recording.
        """
        if (kind, key) in self.recordings:
            return self.recordings[kind, key]
        if self.waits and not self.waits.are_frequent():
            if len(self.waits.waited) == MARKS_WATCHED:
                self.report("the GPU rarely waits for the host: layers run without")
            return None
        if self.waits and not _has_room(self.predicted):
            self.waits.forget()  # the question costs time
            self.report(
                f"graphs would leave less than {FREE_SHARE:.0%} of the GPU's memory free: layers run without"
            )
            return None
        if self.per_kind[kind, trained] >= MAX_RECORDINGS:
            self.report(f"more than {MAX_RECORDINGS} kinds of micro-batches: others run without graphs")
            return None
        made = None
        try:
            with keep_random_state():
                made = record()
            self.per_kind[kind, trained] += 1
        except NotRecordable as e:
            self.report(f"a layer runs without graphs: {e}")
        except RuntimeError as e:
            reason = "there is no memory for it" if is_out_of_memory(e) else str(e).partition("\n")[0]
            self.report(f"a layer runs without graphs: {reason}")
        self.recordings[kind, key] = made
        if not any(self.recordings.values()):
            self.slots = Slots()  # the memory of a recording that failed
        return made


class RecordedCall(NamedTuple):
    """A call of a layer for which there is a recording."""

    recording: Recording
    inputs: list[Tensor]  # the tensors among the arguments
    call: Callable[[Sequence[Tensor]], Any]  # calls the layer with other tensors in their place


class GraphedLayer(ActivationWrapper):
    """A checkpointed decoder layer, replayed from CUDA graphs where that can be done and is worth it.

    Args:
        layer: a CheckpointedModule.
        graphs: those of the model.
    """

    def __init__(self, layer: ActivationWrapper, graphs: LayerGraphs):
        super().__init__(layer)
        self.graphs, self.calls = graphs, Counter[Hashable]()
        self.has_dropout = has_dropout(layer)
        self.kind = 0
        self.parameters_now: LayerParameters | None = None
        self.agrees: dict[Recording, bool] = {}  # whether its replay equals the layer

    def forward(self, *args, **kwargs):
        """Return the layer's result."""
        layer, graphs = self._checkpoint_wrapped_module, self.graphs
        if not torch.is_grad_enabled():
            return layer(*args, **kwargs)
        found = self._find_recording(args, kwargs)
        if found and self._replays_right(found):
            parameters, inputs = self.find_parameters(), found.inputs
            trained = [p for p in parameters.current() if p.requires_grad]
            return Replay.apply(found.recording, parameters, len(inputs), *inputs, *trained)
        if graphs.waits:
            graphs.waits.mark()
        result = layer(*args, **kwargs)
        if graphs.waits and isinstance(result, Tensor):
            graphs.waits.mark_backward(result)
        return result

    def find_parameters(self) -> LayerParameters:
        """Return the layer's parameters; the first call must be while they are gathered."""
        if self.parameters_now is None:
            self.parameters_now = LayerParameters(self._checkpoint_wrapped_module)
            self.kind = self.graphs.kind_of(self._checkpoint_wrapped_module)
        return self.parameters_now

    def _take_apart(self, args: tuple, kwargs: dict) -> tuple[Hashable, list[Tensor]]:
        """Return (the arguments without their tensors, the tensors).

        Raises NotRecordable if such a call cannot be recorded.
        """
        tensors: list[Tensor] = []
        parts = take_apart([list(args), kwargs], tensors)
        if not tensors or self.has_dropout:
            raise NotRecordable("it has dropout" if tensors else "it is given no tensor")
        if len({tensor.device for tensor in tensors}) > 1:  # a kernel may be given the value itself
            raise NotRecordable("it is given tensors of several devices")
        return parts, tensors

    def _find_recording(self, args: tuple, kwargs: dict) -> RecordedCall | None:
        """Return a call with these arguments and its recording, if there is one, or one is due."""
        layer = self._checkpoint_wrapped_module
        try:
            parts, tensors = self._take_apart(args, kwargs)
        except NotRecordable as e:
            self.graphs.report(f"a layer runs without graphs: {e}")
            return None
        device = tensors[0].device.type
        autocast = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device)
        key = parts, layer.saved, layer.is_trained, layer.training, autocast
        if key in self.calls or len(self.calls) < MAX_COUNTED:
            self.calls[key] += 1
        if self.calls[key] <= CALLS_BEFORE:
            if self.graphs.recordings:
                self.graphs.report(
                    f"the first {CALLS_BEFORE} micro-batches of other shapes run without graphs"
                )
            return None
        parameters = self.find_parameters()

        def call(others: Sequence[Tensor]) -> Any:
            args, kwargs = put_together(parts, iter(others))
            return layer(*args, **kwargs)

        def record() -> Recording:
            return Recording(self.graphs.memory, self.graphs.slots, parameters, tensors, call)

        trained = tuple(tensor.requires_grad for tensor in tensors)
        recording = self.graphs.find(self.kind, key, trained, record)
        return RecordedCall(recording, tensors, call) if recording else None

    def _replays_right(self, found: RecordedCall) -> bool:
        """Return whether a replay equals this layer.

        They are compared at the first call, which may be replayed then. Were it not, both the graphs and the
        layers would take memory for a backward in that step. It waits for the GPU.
        """
        if found.recording not in self.agrees:
            self.agrees[found.recording] = self._compare(found)
        return self.agrees[found.recording]

    def _compare(self, found: RecordedCall) -> bool:
        """Return whether a replay agrees with the layer."""
        parameters = self.find_parameters()
        inputs = [tensor.detach().requires_grad_(tensor.requires_grad) for tensor in found.inputs]
        are_views = [tensor._is_view() for tensor in found.inputs]
        # Leaves of their own. Autograd would go on accumulating the parameters' gradients on the stream of
        # this call, and FSDP does not wait for that stream before it reduces them.
        values = [
            nn.Parameter(t.detach(), t.requires_grad) if isinstance(t, nn.Parameter) else t
            for t in parameters.current()
        ]
        own = LayerCall(parameters, values, inputs, are_views, found.call)
        try:
            with keep_random_state():
                agrees = bool(replay_agrees(found.recording, own, self.graphs.memory))
        except RuntimeError as e:
            if not is_out_of_memory(e):
                raise
            self.graphs.report("a layer runs without graphs: there is no memory to compare it with a replay")
            return False
        if agrees:
            self.graphs.report("layers are replayed as CUDA graphs")
        else:
            self.graphs.report("a layer differs from the one that is recorded: it runs without graphs")
        return agrees


def make_layer_graphs(config: Config, rank_info: RankInfo, predicted: PredictedMemory) -> LayerGraphs | None:
    """Return the graphs of a model's layers; None without a GPU, or if they are switched off.

    `auto` is off with several ranks, and if torch's profiler records steps of this run. On two GPUs a run
    with both stopped responding as the profiler began (2 H200, torch 2.11, 2026-11-30).

    Args:
        config: --cuda_graphs, --profile and --verbose.
        rank_info: this process; rank 0 prints what is replayed, and why something is not.
        predicted: memory that the run should take.
    """
    auto = config.cuda_graphs == "auto"
    if rank_info.device.type != "cuda" or config.cuda_graphs == "false":
        return None
    verbose = config.verbose and rank_info.rank == 0
    if auto and (rank_info.world > 1 or config.profile):
        if verbose:
            reason = "--profile is given" if config.profile else "there are several ranks"
            print(f"--cuda_graphs auto: layers run without graphs, because {reason}", flush=True)
        return None
    report = partial(print, flush=True) if verbose else lambda line: None
    return LayerGraphs(GraphMemory(rank_info.device), GpuWaits() if auto else None, report, predicted)
