"""Fine-tune a language model too big for one GPU.

    python train.py                                   the embedded demo: a tiny model, GPUs or two CPU ranks
    python train.py --train_type bnb_dora --model_name meta-llama/Meta-Llama-3-8B --dataset alpaca
    torchrun --nproc_per_node 8 train.py ...          the same program, started by torchrun

The way of a run: options -> checks, without a GPU -> one process per GPU -> load and quantize -> adapters
-> wrap -> the loop -> save. docs/architecture.md has the map.
"""

from __future__ import annotations

import gc
import sys

from launch.program import outlast, parse_or_exit, prepare_environment, report, run_command, under_torchrun
from options.command_line import parse
from options.errors import needs_no_traceback

if __name__ == "__main__":
    # Before the imports below, which take seconds: --help and wrong options are answered at once.
    outlast()
    PARSED = parse_or_exit(sys.argv[1:], parse)
    prepare_environment()
    gc.disable()  # as in launch/rank_imports.py

import dataclasses
import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from huggingface_hub.utils import logging as hub_logging
from torch import nn
from transformers.utils import logging as transformers_logging

from checkpoints import resume
from checkpoints.adapter import save_adapter
from checkpoints.manager import Checkpoints
from checkpoints.storage import steps_in
from checkpoints.trained_model import save_blocks, save_expanded, save_model
from data.batches import StepSampler
from data.packing import longest_line, make_sampler
from data.prefetch import ahead
from files.atomic_writes import write_text
from files.disk_room import despite_full_disk
from files.lock import Alone
from files.model_folder import base_digest
from files.output_folder import clear_output
from files.weight_cache import writing
from launch import memory, nodes, torchrun
from launch import processes as launch
from launch.precision import precision_here, use_deterministic
from launch.ranks import Place, resolve_workers
from launch.signals import NEVER, NeverStop, Stopping
from models.adapters import (
    apply_method,
    peft_targets,
)
from models.attention import choose_attention
from models.causal_lm import loss_sum
from models.registry import FAMILIES, build_on_meta
from monitoring.deferred import Later
from monitoring.memory_history import BETWEEN
from monitoring.memory_model import Share, check_loaded, expect
from monitoring.messages import (
    describe_data,
    describe_files,
    describe_model,
    describe_stop,
    describe_unsaved,
    summary,
)
from monitoring.metrics import Lap, Meter, Reading
from monitoring.profiling import NO_PROFILER, NoProfiler, Profiler, make_profiler
from monitoring.report import PAGE, write_report
from monitoring.run_facts import FACTS, describe_run
from monitoring.tracking import make_tracker
from options import config as options
from options.config import TOY_MODEL, Config
from options.errors import UserError
from parallel.activation_checkpointing import ActivationBudget, Keep, compiler, compiles
from parallel.optimizers import make_optimizer, make_schedule
from parallel.shards import whole
from quantize_layers import load_weights
from training.bad_steps import BadSteps, conclude
from training.evaluator import Evaluator, describe_evaluations
from training.out_of_memory import explained
from training.preflight import Job, check, identity, read_tokenizer, total_steps
from wrapping import STRATEGIES, WRAP_POLICIES, make_mesh, offload_policy, sync_gradients, wrap


def set_up(job: Job, place: Place, profiler: NoProfiler = NO_PROFILER) -> tuple[nn.Module, Share]:
    """The model of the train type, sharded and filled, and what this rank holds of it. Raises AssertionError if that
    is not what it should hold."""
    profiler.phase("wrap")
    config, family = job.config, FAMILIES[job.model_config.model_type]
    precision, device = precision_here(config.precision), place.device
    longest = longest_line(config, job.rows)
    attention = choose_attention(job.model_config, family, precision.matmul, config.packing, longest)
    model = build_on_meta(job.model_config, family, attention)
    expected = expect(model, family, config, precision, job.files, place)  # before anything is changed
    apply_method(model, family, config, precision, job.files)
    mesh = make_mesh(device.type, place.world, config.sharding_strategy, config.hybrid_shard_size)
    wrap(
        model,
        family,
        mesh,
        strategy=STRATEGIES[config.sharding_strategy],
        units=WRAP_POLICIES[config.wrap_policy](family),
        cast=precision.gathered,
        offload=offload_policy(config.use_cpu_offload, device.type),
        keep=Keep.NOTHING if config.use_gradient_checkpointing else Keep.ALL,
        run=compiler() if compiles(config.compile, device, family) else None,
        offload_activations=config.use_activation_cpu_offload,
    )
    profiler.phase("load")
    home = torch.device("cpu") if config.use_cpu_offload else device
    workers = resolve_workers(config.loading_workers, place.processors)
    before = memory.allocated()
    with writing(job.cache, place) as cache:
        load_weights(model, family, job.files, place, home, config.seed, workers, cache)
        check_loaded(model, expected, before)
    profiler.phase(BETWEEN)
    torch.manual_seed(config.seed + place.rank)  # of dropout; adapters and the data order have their own
    return model, expected


def train(
    job: Job,
    model: nn.Module,
    place: Place,
    sampler: StepSampler,
    tracker,
    profiler: NoProfiler = NO_PROFILER,
    stopping: NeverStop = NEVER,
) -> list:
    """The loop. Returns the metrics of every step, on rank 0 also of those before a resumed run was stopped."""
    config = job.config
    total = total_steps(config, sampler)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = make_optimizer(trained, config.optimizer, config.lr, config.wd)
    precision = precision_here(config.precision)
    scaler = precision.scaler("cpu" if config.use_cpu_offload else place.device.type)
    meter, history = Meter(place.device, profiler.held), list(tracker.history)
    evaluator = make_evaluator(job, model, place, total, meter, tracker)
    guard = BadSteps(config.max_bad_steps, job.rows, Path(config.output_dir), scaler, place.rank, tracker)
    parts = {"scaler": scaler, "evaluator": evaluator, "tracker": tracker, "guard": guard}
    untold = Later()
    checkpoints = make_checkpoints(job, model, optimizer, parts, place, tracker.say, stopping, untold)
    done = checkpoints.load()
    schedule = make_schedule(optimizer, total, config.lr_warmup, config.lr_scheduler, done)
    budget = make_budget(job, model, place)

    def tell(reading: Reading, lap: Lap) -> None:
        metrics = guard.judge(meter.measure(reading, lap), reading.step)
        budget.after_step(metrics.memory_allocated_gib)
        history.append(evaluator.after(metrics))
        tracker.log(history[-1])

    model.train()
    evaluator.begin(done)
    todo = range(done + 1, total + 1) if not (evaluator.stop or guard.stop) else ()
    steps = ahead(sampler.steps(config.num_epochs, done), place.device, memory.can_pin(place.device.type))
    for index, step in zip(todo, steps, strict=False):
        loss = torch.zeros((), device=place.device)
        for i, batch in enumerate(step.batches, 1):
            profiler.phase("forward")
            batch = batch.to(place.device)
            sync_gradients(model, i == len(step.batches) or not config.no_sync)
            # Exactly the mean over the step's targets: divided by their number on all ranks and in all
            # micro-batches, while FSDP sums gradients over ranks and backward over micro-batches.
            with precision.context(place.device.type):
                share = loss_sum(model, batch) / step.n_targets
            untold.now()  # of the step before, while the GPU has this forward to do
            profiler.phase("backward")
            scaler.scale(share).backward()
            loss += share.detach()
        profiler.phase("optimizer")
        scaler.unscale_(optimizer)
        norm = whole(nn.utils.get_total_norm([p.grad for p in trained if p.grad is not None]))
        if config.apply_gradient_clipping:
            nn.utils.clip_grads_with_norm_(trained, config.grad_norm, norm)
        reading = meter.read(index, step, schedule.get_last_lr()[0], loss, norm)
        guard.step(optimizer, reading)
        optimizer.zero_grad(set_to_none=True)
        profiler.phase(BETWEEN)
        untold.put(partial(tell, reading, meter.lap()))
        if guard.decides() or budget.decides() or evaluator.due(index):  # what the next step goes by
            untold.now()
        scaler.update()
        schedule.step()
        if profiler.step():
            meter.restart()
        stop = evaluator.stop or guard.stop
        if checkpoints.after(index, last=index == total or stop) or stop:
            break
    untold.now()
    checkpoints.finish()
    profiler.finish()
    return history


def make_budget(job: Job, model: nn.Module, place: Place) -> ActivationBudget:
    config, family = job.config, FAMILIES[job.model_config.model_type]
    itemsize = precision_here(config.precision).matmul.itemsize
    tokens = config.batch_size * longest_line(config, job.rows)
    return ActivationBudget(model, family, config.activation_budget, tokens, itemsize, place.device)


def make_evaluator(job: Job, model: nn.Module, place: Place, total: int, meter: Meter, tracker) -> Evaluator:
    config, precision = job.config, precision_here(job.config.precision)
    # Of an expanded model only the new blocks: the rest is gigabytes that do not change from step to step.
    kept = dataclasses.replace(config, llama_pro_save="blocks") if config.method.expansion else config

    def save_best(folder: Path) -> None:
        save(dataclasses.replace(job, config=kept), model, folder)
        if place.rank == 0:
            write_text(folder / "config.yaml", options.dump_yaml(kept))

    tokenizer = read_tokenizer(job.files.folder) if job.evaluation.prompts and place.rank == 0 else None
    tools = (loss_sum, lambda: precision.context(place.device.type), save_best, meter, tracker, tokenizer)
    return Evaluator(config, job.evaluation, model, place, total, *tools)


def make_checkpoints(
    job: Job,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    parts: dict,
    place: Place,
    say: Callable[[str], None],
    stopping: NeverStop,
    untold: Later,
) -> Checkpoints:
    config = job.config
    return Checkpoints(
        Path(config.output_dir),
        model,
        optimizer,
        parts,
        place,
        every=config.save_every,
        at_end=config.save_every > 0 or config.save_minutes > 0,
        keep=config.keep,
        describe_run=lambda: resume.about(config, **identity(job)),
        untold=untold,
        stopping=stopping,
        say=say,
        saved=job.saved,
    )


@explained
def run_rank(place: Place, job: Job) -> None:
    """What each process does, from loading to the saved result."""
    with Alone(Path(job.config.output_dir)) as alone, make_profiler(job.config, place) as profiler:
        run_profiled(place, job, profiler, alone)


def run_profiled(place: Place, job: Job, profiler: Profiler, alone: Alone) -> None:
    """The same, watched by a profiler."""
    config, start = job.config, time.perf_counter()
    if config.deterministic:
        use_deterministic()
    sampler = make_sampler(config, job.rows, place.rank, place.world)
    folder, total = Path(config.output_dir), total_steps(config, sampler)
    if place.rank == 0:
        print(describe_data(job.rows, sampler, config.context_length) + job.evaluation.describe(), flush=True)
    model, loaded = set_up(job, place, profiler)
    stages = profiler.fullest("wrap", "load")
    if place.rank == 0:
        alone.take()
        resume.check_still_so(config, job.saved)
        if job.saved is None:
            clear_output(folder)
        resume.tidy(folder, job.saved)
        write_text(folder / "config.yaml", options.dump_yaml(config))
        write_text(folder / FACTS, describe_run(job.rows, sampler, model, stages))
        print(f"{describe_model(loaded)}; ready after {time.perf_counter() - start:.1f} s", flush=True)
    if config.save_every or config.save_minutes:
        nodes.check_shared(folder / FACTS, place)
    before = job.saved.run["parts"] if job.saved else {"tracker": {}, "guard": {"count": 0}}
    tracker = make_tracker(config, place.rank, total, before["tracker"])
    tracker.stages(stages)
    done = len(tracker.history)
    stopping = Stopping(place.rank, job.started, config.max_minutes, config.save_minutes)
    start = time.perf_counter()
    history = train(job, model, place, sampler, tracker, profiler, stopping)
    seconds = time.perf_counter() - start
    if config.save_model and not stopping.reason:
        try:
            save(job, model, folder)
        except OSError as e:
            tracker.finish()
            raise UserError(describe_unsaved(e, folder, next(iter(steps_in(folder)), None))) from e
    tracker.finish()
    if place.rank == 0:
        with despite_full_disk(folder / PAGE):
            write_report(folder)
        told = [summary(history, seconds, stages, done), *describe_evaluations(history, total, config)]
        files = describe_files(config, bool(job.evaluation.prompts), folder)
        stop = describe_stop(stopping.reason, history, total, folder)
        print(*([stop] if stopping.reason else [*told, files]), sep="\n", flush=True)
    conclude(history[done:], before["guard"]["count"], config.max_bad_steps, folder)


def save(job: Job, model: nn.Module, folder: Path) -> None:
    config, family = job.config, FAMILIES[job.model_config.model_type]
    on_disk = config.model_name == TOY_MODEL or Path(config.model_name).expanduser().is_dir()
    base = str(job.files.folder.resolve()) if on_disk else config.model_name
    digest = base_digest(job.model_config, job.files)
    if config.llama_pro_save == "blocks":
        save_blocks(model, family, folder, job.files, base, digest)
    elif config.method.expansion:
        save_expanded(model, family, folder, job.files)
    elif config.method.saves == "adapter":
        save_adapter(model, folder, config, base, digest, peft_targets(family, config.lora_target_modules))
    else:
        save_model(model, folder, job.files)


def run(config: Config, remarks: list[str]) -> int:
    """Checks and starts a run. Returns the exit status: 0, 2 for something the user can put right, 1 for
    anything else."""
    if not config.verbose:  # the one line of an error says more than warnings around it
        transformers_logging.set_verbosity_error()
        transformers_logging.disable_progress_bar()
        hub_logging.set_verbosity_error()
    try:
        if under_torchrun():
            told = remarks if os.environ["RANK"] == "0" else []
            prepare = partial(nodes.prepare, lambda: announce(check(config), told))
            return torchrun.join(run_rank, prepare, config.verbose)
        job = announce(check(config), remarks)
        where = (config.master_addr, config.master_port)
        return launch.start(run_rank, job.config.world_size, (job,), *where, config.verbose)
    except (UserError, OSError) as e:
        if not needs_no_traceback(e):
            raise
        return report(e, config.verbose)


def announce(job: Job, remarks: list[str]) -> Job:
    print(*remarks, sep="\n", end="\n" * bool(remarks))
    return job


def main(argv: list[str]) -> int:
    """Options in, exit status out."""
    return run_command(argv, parse, lambda parsed: run(*parsed))


if __name__ == "__main__":
    gc.freeze()
    gc.enable()
    sys.exit(run(*PARSED))
