"""Profiles: memory after each phase (always), memory over time (--profile_memory), traces (--profile).

The loop makes single calls: `start_phase`, `step` after each optimizer step, `finish`. They read counters
that torch keeps on the host, so none of them waits for the GPU.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.autograd import DeviceType

from files.atomic_writes import write_text
from files.names import split_revision
from files.output_folder import output_folder
from launch.memory import GIB, PEAK_MEMORY, bytes_in_use
from launch.ranks import RankInfo
from monitoring.host_time import format_host_time, host_time
from monitoring.memory_history import BETWEEN_STEPS, MemoryHistory, Recording
from monitoring.memory_page import write_pages
from options.config import Config
from options.errors import UserError

# --profile_memory: the first step, which compiles and makes the optimizer's states, and two ordinary ones.
HISTORY_STEPS = 3
TABLE_ROWS = 25  # of the table of operations
TRACES = "iteration_*/*rank[0-9]*_*"  # the files of --profile in --profiling_output


class NoProfiler:
    """The interface of a profiler; this one records nothing.

    Attributes:
        phase_bytes: phase -> bytes in use when it ended last; the same dict throughout, updated in place.
    """

    def __init__(self):
        self.phase_bytes: dict[str, int] = {}

    def start_phase(self, name: str) -> None:
        """End the current phase and start: wrap, load, forward, backward, optimizer, or BETWEEN_STEPS."""

    def step(self) -> bool:
        """End an optimizer step; return whether files were written, which takes time. Collective."""
        return False

    def finish(self) -> None:
        """End the run: write the files that are not written yet. Collective."""


NO_PROFILER = NoProfiler()


class Profiler(NoProfiler):
    """Measures memory after each phase and drives the recorders.

    As a context manager, it lets them write what they have when the run fails.
    """

    def __init__(self, device: torch.device, recorders: list[Recorder]):
        super().__init__()
        self.device, self.recorders = device, recorders
        self.current, self.steps, self.is_in_step = BETWEEN_STEPS, 0, False

    def start_phase(self, name: str) -> None:
        """Measure the memory after the current phase and start the next; the first forward starts a step."""
        self.phase_bytes[self.current] = bytes_in_use(self.device)
        PEAK_MEMORY.enter_phase(name)
        if name == "forward" and not self.is_in_step:
            self.steps, self.is_in_step = self.steps + 1, True
        self.current = name
        for recorder in self.recorders:
            recorder.start_phase(name, self.steps)

    def step(self) -> bool:
        """End the step on all recorders; return whether one of them wrote files. Collective."""
        self.is_in_step = False
        wrote = [recorder.step(self.steps) for recorder in self.recorders]  # all of them: no short circuit
        return any(wrote)

    def finish(self) -> None:
        for recorder in self.recorders:
            recorder.finish()

    def max_phase_gib(self, *phases: str) -> dict[str, float]:
        """Return {after_<phase>_gib: GiB in use after it on the fullest rank} of the phases. Collective."""
        sizes = torch.tensor([self.phase_bytes[p] for p in phases], dtype=torch.float64, device=self.device)
        dist.all_reduce(sizes, dist.ReduceOp.MAX)
        return {f"after_{p}_gib": b / GIB for p, b in zip(phases, sizes.tolist(), strict=True)}

    def __enter__(self) -> Profiler:
        return self

    def __exit__(self, kind: type | None, *_) -> None:
        if kind is not None and issubclass(kind, Exception) and not issubclass(kind, UserError):
            for recorder in self.recorders:
                recorder.fail()


class Recorder:
    """The interface to which a Profiler passes phases and steps; its methods do nothing."""

    def start_phase(self, name: str, step: int) -> None:
        """Start a phase of a step (from 1; 0 before the first)."""

    def step(self, step: int) -> bool:
        """End a step; return False, since nothing is written. Collective."""
        return False

    def finish(self) -> None:
        """Write what is recorded at the end of the run. Collective."""

    def fail(self) -> None:
        """Write what there is: this rank's run failed. Must not call collectives."""


class MemoryRecorder(Recorder):
    """--profile_memory: records from the start to the end of step HISTORY_STEPS, or of the run."""

    def __init__(self, rank_info: RankInfo, folder: Path, title: str):
        self.rank_info, self.folder, self.title = rank_info, folder, title
        self.history: MemoryHistory | None = MemoryHistory(rank_info.device)

    def start_phase(self, name: str, step: int) -> None:
        if self.history:
            self.history.start_phase(name, step)

    def step(self, step: int) -> bool:
        """Write the files after step HISTORY_STEPS; return whether this is that step. Collective."""
        if step != HISTORY_STEPS:
            return False
        self._write_all_ranks()
        return True

    def finish(self) -> None:
        if self.history:
            self._write_all_ranks()

    def fail(self) -> None:
        """Write this rank's memory up to the failure, an out-of-memory error included."""
        if not self.history:
            return
        try:
            recording = self._stop()
            if recording.parts:
                write_pages(self.folder / f"memory_rank{self.rank_info.rank}", [recording], self.title)
        except OSError as e:  # the caller reports the failure of the run
            print(f"--profile_memory: {self.folder}: cannot be written ({e.strerror})", flush=True)

    def _write_all_ranks(self) -> None:
        """Stop; write memory.html and .png of all ranks on rank 0, and each rank's snapshot. Collective."""
        recording = self._stop()
        recordings: list[Any] | None = [None] * self.rank_info.world if self.rank_info.rank == 0 else None
        dist.gather_object(recording, recordings)
        if recordings:
            write_pages(self.folder / "memory", recordings, self.title)

    def _stop(self) -> Recording:
        """Stop and return this rank's Recording; on a GPU, also write its memory_snapshot."""
        self.folder.mkdir(parents=True, exist_ok=True)
        suffix = f"_rank{self.rank_info.rank}" if self.rank_info.rank else ""
        assert self.history is not None
        recording = self.history.stop(self.rank_info.rank, self.folder / f"memory_snapshot{suffix}.pickle")
        self.history = None
        return recording


class TraceRecorder(Recorder):
    """--profile: runs torch.profiler in cycles of training steps.

    A cycle's files are in the folder iteration_<steps done>, by rank.
    """

    def __init__(self, config: Config, rank_info: RankInfo, title: str):
        self.config, self.rank_info, self.title = config, rank_info, title
        self.folder = Path(config.profiling_output)
        if rank_info.local_rank == 0:
            for path in self.folder.glob(TRACES):  # from an earlier run; `check_traces` allowed it
                path.unlink()
        # torch warns in every cycle but the first. Each cycle is written before the next one begins.
        warnings.filterwarnings("ignore", message=".*Profiler clears events at the end of each cycle")
        activities = [torch.profiler.ProfilerActivity.CPU]
        if rank_info.device.type == "cuda":
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        wait, warmup, active = cycle_steps(config)
        # Without `verbose` the stacks stay empty: https://github.com/pytorch/pytorch/issues/100253
        verbose = torch.profiler._ExperimentalConfig(verbose=True) if config.with_stack else None
        self.profiler = torch.profiler.profile(
            activities=activities,
            schedule=torch.profiler.schedule(wait=wait, warmup=warmup, active=active, repeat=config.repeat),
            on_trace_ready=self._export,
            record_shapes=config.with_shapes,
            with_stack=config.with_stack,
            experimental_config=verbose,
        )
        self.range: contextlib.AbstractContextManager = contextlib.nullcontext()
        self.is_started = self.has_written = False
        self.history: MemoryHistory | None = None

    def start_phase(self, name: str, step: int) -> None:
        """From step 1 on, start a range `name` in the trace; the first one starts the profiler."""
        if not step:
            return
        if not self.is_started:
            self.profiler.start()
            self.is_started = True
            self._record_memory()
        self.range.__exit__(None, None, None)
        is_phase = name != BETWEEN_STEPS
        self.range = torch.profiler.record_function(name) if is_phase else contextlib.nullcontext()
        self.range.__enter__()
        if self.history:
            self.history.start_phase(name, step)

    def step(self, step: int) -> bool:
        """End a step of torch's profiler; at the end of a cycle it calls `_export`, and this returns True."""
        self.has_written = False
        self.profiler.step()
        self._record_memory()
        return self.has_written

    def finish(self) -> None:
        self.profiler.stop()

    def _record_memory(self) -> None:
        """With --export_memory_timeline, start recording memory if the next step is in the recorded part."""
        actions = torch.profiler.ProfilerAction.RECORD, torch.profiler.ProfilerAction.RECORD_AND_SAVE
        is_recorded = self.profiler.current_action in actions
        if self.config.export_memory_timeline and is_recorded and not self.history:
            self.history = MemoryHistory(self.rank_info.device)

    def _export(self, profiler: torch.profiler.profile) -> None:
        """Write this rank's files of the cycle that ended: memory, trace, stacks, tables."""
        config, self.has_written = self.config, True
        prefix = self.folder / f"iteration_{profiler.step_num}" / f"rank{self.rank_info.rank}"
        prefix.parent.mkdir(parents=True, exist_ok=True)
        if self.history:
            self._export_memory(prefix)
        if config.export_trace:
            _export_file(prefix, "trace.json.gz", profiler.export_chrome_trace)
        sort = "self_cuda_time_total" if self.rank_info.device.type == "cuda" else "self_cpu_time_total"
        if config.with_stack:
            _export_file(prefix, "stacks.txt", lambda path: profiler.export_stacks(path, sort))
        averages = profiler.key_averages(config.with_shapes, 5 if config.with_stack else 0)
        table = averages.table(sort_by=sort, row_limit=TABLE_ROWS)
        write_text(prefix.with_name(f"{prefix.name}_key_averages.txt"), table)
        on_host = [e for e in profiler.events() or () if e.device_type == DeviceType.CPU and not e.is_async]
        seconds = host_time(on_host, config.active_steps)
        text = format_host_time(seconds, config.active_steps)
        write_text(prefix.with_name(f"{prefix.name}_host_time.txt"), text)

    def _export_memory(self, prefix: Path) -> None:
        """Stop recording memory and write the cycle's as <prefix>_memory_timeline.html, .png and .json.

        The profiler's export_memory_timeline is deprecated, and fails on what FSDP2 does to parameters; torch
        recommends the allocator's record instead.
        """
        name = f"{prefix.name}_memory_timeline"
        assert self.history is not None
        snapshot = prefix.with_name(f"{prefix.name}_memory_snapshot.pickle")
        recording = self.history.stop(self.rank_info.rank, snapshot)
        self.history = None
        if recording.parts:
            write_pages(prefix.with_name(name), [recording], self.title)
            write_text(prefix.with_name(f"{name}.json"), json.dumps(dataclasses.asdict(recording)))


def _export_file(prefix: Path, name: str, export: Callable[[str], None]) -> None:
    """Call export(path) with a temporary path, then rename the file to <prefix>_<name>.

    The temporary name has the same extension, by which torch chooses the format.
    """
    temporary = prefix.with_name(f"tmp_{prefix.name}_{name}")
    export(str(temporary))
    temporary.rename(prefix.with_name(f"{prefix.name}_{name}"))


def cycle_steps(config: Config) -> tuple[int, int, int]:
    """Return the numbers of steps in a cycle of --profile: (waited, warmed up, recorded)."""
    rest = config.warmup_steps + config.active_steps
    wait = config.wait_steps if config.repeat else config.profiling_frequency - rest
    return wait, config.warmup_steps, config.active_steps


def check_traces(config: Config, total_steps: int) -> None:
    """Raise UserError if a cycle is longer than the run, or if there are traces that may not be replaced."""
    length = sum(cycle_steps(config))
    if total_steps < length:
        remedy = "give fewer --wait_steps" if config.repeat else "lower --profiling_frequency"
        raise UserError(f"--profile: a cycle takes {length} steps, and the run has {total_steps}; {remedy}")
    folder = Path(config.profiling_output)
    if not config.overwrite_profiling_output and any(folder.glob(TRACES)):
        raise UserError(
            f"--profiling_output {folder}: holds traces already; choose another folder, or leave out"
            " --overwrite_profiling_output false"
        )


def make_profiler(config: Config, rank_info: RankInfo) -> Profiler:
    """Return a Profiler with the recorders of --profile_memory and --profile. Prints a remark on CPUs."""
    recorders: list[Recorder] = []
    title = f"{Path(split_revision(config.model_name)[0]).name} · {config.train_type}"
    memory_options = [name for name in ("profile_memory", "export_memory_timeline") if getattr(config, name)]
    if memory_options and rank_info.rank == 0 and rank_info.device.type != "cuda":
        sampled = "there is no GPU: the resident size of each process is sampled instead"
        print(f"--{memory_options[0]}: {sampled}, and there is no memory_snapshot.pickle", flush=True)
    if config.profile_memory:
        recorders.append(MemoryRecorder(rank_info, output_folder(config), title))
    if config.profile:
        recorders.append(TraceRecorder(config, rank_info, title))
    return Profiler(rank_info.device, recorders)
