"""What can be watched of a run: memory after each phase (always), memory over time (--profile_memory), traces
(--profile).

It hangs on the run in single calls: `phase` where one begins, `step` after each optimizer step, `finish`. They read
counters that torch keeps on the host, so none of them waits for the GPU.
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

from files.atomic_writes import write_text
from files.names import split_revision
from files.output_folder import output_folder
from launch.memory import GIB, PEAK_MEMORY, bytes_in_use
from launch.ranks import RankInfo
from monitoring.memory_history import BETWEEN, History, Recording
from monitoring.memory_page import write_pages
from options.config import Config
from options.errors import UserError

# Of --profile_memory: the first, which compiles and makes the optimizer's states, and two like all others.
HISTORY_STEPS = 3
ROWS = 25  # of a table of operations
TRACES = "iteration_*/*rank[0-9]*_*"  # the files of --profile in --profiling_output


class NoProfiler:
    """Watches nothing. held: bytes in use when each phase ended the last time, by its name; always the same dict."""

    def __init__(self):
        self.held: dict[str, int] = {}

    def phase(self, name: str) -> None:
        """A phase begins, and the one before it ends: wrap, load, forward, backward, optimizer, or BETWEEN."""

    def step(self) -> bool:
        """An optimizer step is done. Collective. Returns whether files were written, which took its time."""
        return False

    def finish(self) -> None:
        """The last step is done. Collective."""


NO_PROFILER = NoProfiler()


class Profiler(NoProfiler):
    """Memory after each phase, and what the `recorders` record. As a context it leaves what they have when the run
    fails."""

    def __init__(self, device: torch.device, recorders: list[Recorder]):
        super().__init__()
        self.device, self.recorders = device, recorders
        self.current, self.steps, self.in_step = BETWEEN, 0, False

    def phase(self, name: str) -> None:
        self.held[self.current] = bytes_in_use(self.device)
        PEAK_MEMORY.enter_phase(name)
        if name == "forward" and not self.in_step:
            self.steps, self.in_step = self.steps + 1, True
        self.current = name
        for recorder in self.recorders:
            recorder.phase(name, self.steps)

    def step(self) -> bool:
        self.in_step = False
        wrote = [recorder.step(self.steps) for recorder in self.recorders]  # all of them, not up to the first
        return any(wrote)

    def finish(self) -> None:
        for recorder in self.recorders:
            recorder.finish()

    def fullest(self, *phases: str) -> dict[str, float]:
        """GiB that the fullest rank used after each of these phases, as `after_<phase>_gib`. Collective."""
        held = torch.tensor([self.held[p] for p in phases], dtype=torch.float64, device=self.device)
        dist.all_reduce(held, dist.ReduceOp.MAX)
        return {f"after_{p}_gib": b / GIB for p, b in zip(phases, held.tolist(), strict=True)}

    def __enter__(self) -> Profiler:
        return self

    def __exit__(self, kind: type | None, *_) -> None:
        if kind is not None and issubclass(kind, Exception) and not issubclass(kind, UserError):
            for recorder in self.recorders:
                recorder.fail()


class Recorder:
    """Something that a Profiler tells of phases and steps."""

    def phase(self, name: str, step: int) -> None: ...

    def step(self, step: int) -> bool:
        """Returns whether it wrote files."""
        return False

    def finish(self) -> None: ...

    def fail(self) -> None:
        """This rank's run failed: no collectives."""


class MemoryRecorder(Recorder):
    """--profile_memory: from the beginning to the end of the first HISTORY_STEPS steps, or of the run."""

    def __init__(self, rank_info: RankInfo, folder: Path, title: str):
        self.rank_info, self.folder, self.title = rank_info, folder, title
        self.history: History | None = History(rank_info.device)

    def phase(self, name: str, step: int) -> None:
        if self.history:
            self.history.phase(name, step)

    def step(self, step: int) -> bool:
        return step == HISTORY_STEPS and self._write_together()

    def finish(self) -> None:
        if self.history:
            self._write_together()

    def fail(self) -> None:
        """Also of an out-of-memory error: this rank's memory up to it."""
        if not self.history:
            return
        try:
            recording = self._stop()
            if recording.parts:
                write_pages(self.folder / f"memory_rank{self.rank_info.rank}", [recording], self.title)
        except OSError as e:  # the failure itself is what must be told
            print(f"--profile_memory: {self.folder}: cannot be written ({e.strerror})", flush=True)

    def _write_together(self) -> bool:
        """Rank 0 writes the page and the picture of all ranks; each writes its snapshot. Collective."""
        recording = self._stop()
        recordings: list[Any] | None = [None] * self.rank_info.world if self.rank_info.rank == 0 else None
        dist.gather_object(recording, recordings)
        if recordings:
            write_pages(self.folder / "memory", recordings, self.title)
        return True

    def _stop(self) -> Recording:
        self.folder.mkdir(parents=True, exist_ok=True)
        suffix = f"_rank{self.rank_info.rank}" if self.rank_info.rank else ""
        assert self.history is not None
        recording = self.history.stop(self.rank_info.rank, self.folder / f"memory_snapshot{suffix}.pickle")
        self.history = None
        return recording


class TraceRecorder(Recorder):
    """--profile: torch.profiler over cycles of the training steps. A cycle's files are in the folder
    iteration_<steps done>, by rank."""

    def __init__(self, config: Config, rank_info: RankInfo, title: str):
        self.config, self.rank_info, self.title = config, rank_info, title
        self.folder = Path(config.profiling_output)
        if rank_info.local_rank == 0:
            for path in self.folder.glob(TRACES):  # of an earlier run; `check_traces` allowed it
                path.unlink()
        # Said of every cycle but the first. Each is written before the next one begins.
        warnings.filterwarnings("ignore", message=".*Profiler clears events at the end of each cycle")
        activities = [torch.profiler.ProfilerActivity.CPU]
        if rank_info.device.type == "cuda":
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        wait, warmup, active = cycle(config)
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
        self.started = self.wrote = False
        self.history: History | None = None

    def phase(self, name: str, step: int) -> None:
        if not step:
            return
        if not self.started:
            self.profiler.start()
            self.started = True
            self._record_memory()
        self.range.__exit__(None, None, None)
        self.range = contextlib.nullcontext() if name == BETWEEN else torch.profiler.record_function(name)
        self.range.__enter__()
        if self.history:
            self.history.phase(name, step)

    def step(self, step: int) -> bool:
        self.wrote = False
        self.profiler.step()
        self._record_memory()
        return self.wrote

    def finish(self) -> None:
        self.profiler.stop()

    def _record_memory(self) -> None:
        recorded = torch.profiler.ProfilerAction.RECORD, torch.profiler.ProfilerAction.RECORD_AND_SAVE
        if (
            self.config.export_memory_timeline
            and not self.history
            and self.profiler.current_action in recorded
        ):
            self.history = History(self.rank_info.device)

    def _export(self, profiler: torch.profiler.profile) -> None:
        config, self.wrote = self.config, True
        start = self.folder / f"iteration_{profiler.step_num}" / f"rank{self.rank_info.rank}"
        start.parent.mkdir(parents=True, exist_ok=True)
        if self.history:
            self._export_memory(start)
        if config.export_trace:
            _export(start, "trace.json.gz", profiler.export_chrome_trace)
        sort = "self_cuda_time_total" if self.rank_info.device.type == "cuda" else "self_cpu_time_total"
        if config.with_stack:
            _export(start, "stacks.txt", lambda path: profiler.export_stacks(path, sort))
        averages = profiler.key_averages(config.with_shapes, 5 if config.with_stack else 0)
        table = averages.table(sort_by=sort, row_limit=ROWS)
        write_text(start.with_name(f"{start.name}_key_averages.txt"), table)

    def _export_memory(self, start: Path) -> None:
        """The profiler's own export_memory_timeline is deprecated, and fails on what FSDP2 does to parameters; the
        allocator's record is what torch recommends in its place."""
        name = f"{start.name}_memory_timeline"
        assert self.history is not None
        recording = self.history.stop(
            self.rank_info.rank, start.with_name(f"{start.name}_memory_snapshot.pickle")
        )
        self.history = None
        if recording.parts:
            write_pages(start.with_name(name), [recording], self.title)
            write_text(start.with_name(f"{name}.json"), json.dumps(dataclasses.asdict(recording)))


def _export(start: Path, name: str, export: Callable[[str], None]) -> None:
    """export(path) under a temporary name, which ends as the real one: torch goes by that."""
    temporary = start.with_name(f"tmp_{start.name}_{name}")
    export(str(temporary))
    temporary.rename(start.with_name(f"{start.name}_{name}"))


def cycle(config: Config) -> tuple[int, int, int]:
    """Steps of a cycle: (waited, warmed up, recorded)."""
    rest = config.warmup_steps + config.active_steps
    wait = config.wait_steps if config.repeat else config.profiling_frequency - rest
    return wait, config.warmup_steps, config.active_steps


def check_traces(config: Config, steps: int) -> None:
    """Raises UserError if --profile would record nothing in a run of so many steps, or may not write."""
    length = sum(cycle(config))
    if steps < length:
        how = "give fewer --wait_steps" if config.repeat else "lower --profiling_frequency"
        raise UserError(f"--profile: a cycle takes {length} steps, and the run has {steps}; {how}")
    folder = Path(config.profiling_output)
    if not config.overwrite_profiling_output and any(folder.glob(TRACES)):
        raise UserError(
            f"--profiling_output {folder}: holds traces already; choose another folder, or leave out"
            " --overwrite_profiling_output false"
        )


def make_profiler(config: Config, rank_info: RankInfo) -> Profiler:
    recorders: list[Recorder] = []
    title = f"{Path(split_revision(config.model_name)[0]).name} · {config.train_type}"
    asked = [name for name in ("profile_memory", "export_memory_timeline") if getattr(config, name)]
    if asked and rank_info.rank == 0 and rank_info.device.type != "cuda":
        what = "there is no GPU: the resident size of each process is sampled instead"
        print(f"--{asked[0]}: {what}, and there is no memory_snapshot.pickle", flush=True)
    if config.profile_memory:
        recorders.append(MemoryRecorder(rank_info, output_folder(config), title))
    if config.profile:
        recorders.append(TraceRecorder(config, rank_info, title))
    return Profiler(rank_info.device, recorders)
