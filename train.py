"""Fine-tune a language model too big for one GPU.

    python train.py                                   the embedded demo: a tiny model, GPUs or two CPU ranks
    python train.py --train_type bnb_dora --model_name meta-llama/Meta-Llama-3-8B --dataset alpaca
    torchrun --nproc_per_node 8 train.py ...          the same program, started by torchrun

A run's stages: parse options -> check them without a GPU -> start one process per GPU -> build the model on
meta -> add adapters -> wrap -> load and quantize -> training loop -> save. docs/architecture.md has the map.
"""

from __future__ import annotations

import gc
import sys

from launch.program import parse_or_exit, prepare_environment, prepare_long_run, quiet_libraries, run_command
from options.train import parse

if __name__ == "__main__":
    # The imports below take seconds; --help and wrong options are answered before them.
    prepare_long_run()
    PARSED = parse_or_exit(sys.argv[1:], parse)
    prepare_environment()
    gc.disable()  # as in launch/fork_server.py

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel

from checkpoints import adapter
from data.batches import StepSampler
from data.packing import make_sampler, max_sequence_length
from data.prefetch import PrefetchedSteps
from files.config_parts import text_config
from files.lock import FolderLock
from files.weight_cache import open_cache_writer
from launch import memory, ranks
from launch.precision import enable_determinism
from launch.ranks import RankInfo
from launch.signals import NO_STOP_REQUESTS, NoStopRequests, StopRequests
from launch.start import start
from models.adapters import apply_method
from models.attention import choose_attention
from models.causal_lm import loss_sum
from models.registry import build_on_meta
from models.router_loss import report_routing
from monitoring import weight_memory
from monitoring.layer_memory import layer_input_bytes
from monitoring.memory_history import BETWEEN_STEPS
from monitoring.messages import describe_data, describe_nothing_done
from monitoring.metrics import Lap, Metrics, Reading
from monitoring.profiling import NO_PROFILER, NoProfiler, Profiler, make_profiler
from monitoring.run_facts import run_facts_json
from monitoring.tracking import NoTracker
from options.config import Config
from options.strategies import STRATEGIES
from parallel.activation_checkpointing import SavedActivations, compile_run_layer, should_compile
from parallel.layer_graphs import NOT_PREDICTED, PredictedMemory, make_layer_graphs
from parallel.optimizers import make_schedule
from parallel.shards import full_tensor
from quantize_layers import load_weights
from training.auto_sizes import settle_sizes
from training.base_matmul import try_base_matmul
from training.job import Job
from training.loop_components import make_loop_components
from training.memory_prediction import describe_prediction, predict_memory, prediction_facts
from training.out_of_memory import explain_out_of_memory
from training.preflight import check_run
from training.run_folder import describe_no_result, finish_run, start_run_folder, unsaved_error
from training.sample_weights import fill_with_samples
from training.saved_result import save, save_best
from training.shown_rows import show_rows, without_output
from training.trial import Trial
from training.trial_rank import record_trial
from wrapping import WRAP_POLICIES, make_mesh, make_offload_policy, set_gradient_sync, wrap


def set_up(
    job: Job,
    rank_info: RankInfo,
    profiler: NoProfiler = NO_PROFILER,
    *,
    load: Callable = load_weights,
    predicted: PredictedMemory = NOT_PREDICTED,
) -> tuple[PreTrainedModel, weight_memory.ExpectedMemory]:
    """Build, shard and load the model of the train type. Collective.

    Args:
        job: the checked run.
        rank_info: this process.
        profiler: measures the memory of each phase.
        load: fills the model's parameters.
        predicted: memory that the run should take of this GPU.

    Returns:
        (the model, the memory that its weights should take on this rank).

    Raises UserError for weights that cannot be used, or if the GPU does not multiply as --base_matmul says,
    and AssertionError if the weights take another amount of memory.
    """
    profiler.start_phase("wrap")
    config, family, precision, device = job.config, job.family, job.precision, rank_info.device
    try_base_matmul(config.base_matmul, device)
    max_tokens = max_sequence_length(config, job.rows)
    attention = choose_attention(job.model_config, family, precision.matmul_dtype, config.packing, max_tokens)
    model = build_on_meta(job.model_config, family, attention)
    # Computed from the unchanged model, before any method is applied.
    expected = weight_memory.expected_memory(model, family, config, precision, job.files, rank_info)
    apply_method(model, family, config, precision, job.files)
    report_routing(model, family)
    mesh = make_mesh(device.type, rank_info.world, config.sharding_strategy, config.hybrid_shard_size)
    text = text_config(job.model_config)
    layer_input = layer_input_bytes(config, precision, max_tokens, text.hidden_size)
    on_host = config.use_activation_cpu_offload * text.num_hidden_layers * layer_input
    wrap(
        model,
        family,
        mesh,
        strategy=STRATEGIES[config.sharding_strategy],
        units=WRAP_POLICIES[config.wrap_policy](family),
        gather_dtype=precision.gather_dtype,
        offload=make_offload_policy(config.use_cpu_offload, model, mesh, on_host),
        saved_activations=SavedActivations.INPUT
        if config.use_gradient_checkpointing
        else SavedActivations.ALL,
        compiled_run=compile_run_layer(cpus=rank_info.cpus)
        if should_compile(config.compile, device, family)
        else None,
        graphs=make_layer_graphs(config, rank_info, predicted),
        offload_activations=config.use_activation_cpu_offload,
    )
    profiler.start_phase("load")
    param_device = torch.device("cpu") if config.use_cpu_offload else device
    workers = ranks.resolve_workers(config.loading_workers, rank_info.cpus)
    allocated_before = memory.gpu_bytes_allocated()
    with open_cache_writer(job.cache, rank_info) as cache:
        load(model, family, job.files, rank_info, param_device, config.seed, workers, cache)
        weight_memory.check_loaded(model, expected, allocated_before)
    if job.adapter:
        adapter.load_adapter(model, job.adapter.path)
    if config.use_cpu_offload:
        memory.release_page_locked()  # of the load: where a limit holds, FSDP needs it for the weights
    profiler.start_phase(BETWEEN_STEPS)
    # This seed is dropout's; adapters and the data order have their own generators.
    torch.manual_seed(config.seed + rank_info.rank)
    return model, expected


def train(
    job: Job,
    model: PreTrainedModel,
    rank_info: RankInfo,
    sampler: StepSampler,
    tracker,
    profiler: NoProfiler = NO_PROFILER,
    stopping: NoStopRequests = NO_STOP_REQUESTS,
) -> list[Metrics]:
    """Run the training loop. Return the metrics of every step, on rank 0 with those before a resume.

    Collective. Saves checkpoints and the best step's weights, but not the result.

    Args:
        job: the checked run.
        model: the model, from `set_up`.
        rank_info: this process.
        sampler: deals the training rows to this rank.
        tracker: a NoTracker or Tracker, which logs the metrics; its history has the steps before a resume.
        profiler: measures the memory of each phase.
        stopping: why and when the run is asked to stop or to save.
    """
    config, precision, total_steps = job.config, job.precision, job.total_steps(sampler)
    save_best_to = partial(save_best, job, model)
    loop = make_loop_components(job, model, rank_info, total_steps, tracker, profiler, stopping, save_best_to)
    optimizer, scaler, deferred, meter = loop.optimizer, loop.scaler, loop.deferred, loop.meter
    router_loss = loop.router_loss
    guard, evaluator, budget, checkpoints = loop.guard, loop.evaluator, loop.budget, loop.checkpoints
    history, trained_params = list(tracker.history), [p for p in model.parameters() if p.requires_grad]
    steps_done = checkpoints.restore()
    assert config.lr_warmup is not None  # resolved
    schedule = make_schedule(optimizer, total_steps, config.lr_warmup, config.lr_scheduler, steps_done)

    def log_step(reading: Reading, lap: Lap) -> None:
        """Measure, check and log a completed step, and evaluate after it if that is due."""
        metrics = guard.check_step(meter.measure(reading, lap), reading.step)
        budget.after_step(metrics.memory_allocated_gib)
        history.append(evaluator.evaluate_if_due(metrics))
        tracker.log(history[-1])

    model.train()
    evaluator.before_first_step(steps_done)
    step_numbers = (
        () if evaluator.should_stop or guard.should_stop else range(steps_done + 1, total_steps + 1)
    )
    pin = rank_info.device.type == "cuda"
    decoders = ranks.resolve_workers(config.loading_workers, rank_info.cpus)
    steps = PrefetchedSteps(sampler.steps(config.num_epochs, steps_done), rank_info.device, pin, decoders)
    if job.rows.images.refs and step_numbers:
        with ranks.errors_on_all_ranks(rank_info.world, describe_nothing_done(steps_done)):
            steps.raise_next_error()
        stopping.watch_data(steps.next_error)
    for index, step in zip(step_numbers, steps, strict=False):
        loss = torch.zeros((), device=rank_info.device)
        for i, batch in enumerate(step.batches, 1):
            profiler.start_phase("forward")
            batch = batch.to(rank_info.device)
            is_last = i == len(step.batches)
            set_gradient_sync(model, is_last or not config.no_sync, batch.images is not None)
            # The sum over micro-batches and ranks is exactly the mean over the step's targets: each
            # micro-batch is divided by their number on all ranks; backward and FSDP only sum gradients.
            with precision.context(rank_info.device.type):
                micro_loss = loss_sum(model, batch) / step.n_targets
                whole_loss = router_loss.add_to(micro_loss, len(step.batches))
            deferred.run_all()  # log the previous step, while the GPU computes this forward
            profiler.start_phase("backward")
            scaler.scale(whole_loss).backward()
            loss += micro_loss.detach()
        profiler.start_phase("optimizer")
        scaler.unscale_(optimizer)
        # No variable holds the list: it would keep these gradients in memory until the next step's exist.
        grad_norm = full_tensor(
            nn.utils.get_total_norm([p.grad for p in trained_params if p.grad is not None])
        )
        if config.apply_gradient_clipping:
            nn.utils.clip_grads_with_norm_(trained_params, config.grad_norm, grad_norm)
        lr, auxiliary = float(schedule.get_last_lr()[0]), router_loss.pop_step()
        reading = meter.read(index, step.without_batches(), lr, loss, grad_norm, auxiliary)
        guard.step(optimizer, reading)
        optimizer.zero_grad(set_to_none=True)
        profiler.start_phase(BETWEEN_STEPS)
        deferred.defer(partial(log_step, reading, meter.lap()))
        # The next step depends on these metrics; otherwise they wait for its forward.
        if guard.needs_metrics() or budget.needs_metrics() or evaluator.is_due(index):
            deferred.run_all()
        scaler.update()
        schedule.step()
        if profiler.step():
            meter.restart()
        finished = evaluator.should_stop or guard.should_stop
        interrupted = checkpoints.save_if_due(index, last=index == total_steps or finished)
        if finished or interrupted:
            break
    steps.close()
    deferred.run_all()
    checkpoints.finish()
    profiler.finish()
    return history


@explain_out_of_memory
def run_rank(rank_info: RankInfo, job: Job) -> None:
    """Run one rank of the training, from loading to the saved result. Collective."""
    assert not job.config.unsettled, job.config.unsettled
    with FolderLock(Path(job.output_dir)) as lock, make_profiler(job.config, rank_info) as profiler:
        run_profiled(rank_info, job, profiler, lock)


def run_profiled(rank_info: RankInfo, job: Job, profiler: Profiler, lock: FolderLock) -> None:
    """Load, train, and save the result, on one rank; the profiler records it. Collective.

    Args:
        rank_info: this process.
        job: the checked run.
        profiler: measures the memory of each phase, and writes the profiles that were requested.
        lock: the RUN's lock, still to be acquired.

    Raises UserError if the result cannot be written, or there is none.
    """
    config, began = job.config, time.perf_counter()
    if config.deterministic:
        enable_determinism()
    sampler = make_sampler(config, job.rows, rank_info.rank, rank_info.world)
    total_steps = job.total_steps(sampler)
    predicted = predict_memory(job, rank_info.cpus) if rank_info.rank == 0 else None
    if rank_info.rank == 0:
        data = describe_data(job.rows, sampler, config.context_length)
        print(data + job.evaluation.describe(), flush=True)
    room = ranks.smallest_gpu_room(rank_info) if job.gpu else 0.0
    if predicted:
        print(describe_prediction(predicted, room, config), flush=True)
    with_graphs = PredictedMemory(predicted.peak, predicted.graphs) if predicted else NOT_PREDICTED
    model, loaded = set_up(job, rank_info, profiler, predicted=with_graphs)
    gib = profiler.max_phase_gib("wrap", "load") | prediction_facts(predicted, config)
    ready = f"{loaded.describe()}; ready after {time.perf_counter() - began:.1f} s"
    facts = ""
    if rank_info.rank == 0:
        facts = run_facts_json(
            job.rows, sampler, model, gib, job.evaluation.rows, job.first_rows, config.adapter
        )
    tracker = start_run_folder(job, rank_info, lock, total_steps, facts, ready)
    steps_done = len(tracker.history)
    stopping = StopRequests(rank_info.rank, job.started, config.max_minutes, config.save_minutes)
    began = time.perf_counter()
    history = train(job, model, rank_info, sampler, tracker, profiler, stopping)
    seconds = time.perf_counter() - began
    no_result = (
        stopping.data_error if stopping.reason else describe_no_result(job, model, history[steps_done:])
    )
    if config.save_model and not stopping.reason and not no_result:
        try:
            save(job, model, Path(job.output_dir))
        except OSError as e:
            tracker.finish()
            raise unsaved_error(job, e) from e
    tracker.finish()
    finish_run(job, rank_info, history, total_steps, steps_done, seconds, gib, stopping.reason, no_result)


def try_rank(rank_info: RankInfo, trial: Trial, folder: str) -> None:
    """Take the steps of a trial, and write into `folder` what they take on this rank. Collective."""
    with record_trial(trial, rank_info, folder) as (job, profiler, history):
        if job.config.deterministic:
            enable_determinism()
        model, _ = set_up(job, rank_info, profiler, load=fill_with_samples)
        sampler = make_sampler(job.config, job.rows, rank_info.rank, rank_info.world)
        history += train(job, model, rank_info, sampler, NoTracker(), profiler)


def run(config: Config, remarks: list[str]) -> int:
    """Check and start a run. Return its exit status: 0, 2 for an error of the user's, 1 for any other."""
    if not config.verbose:
        quiet_libraries()
    return start(
        run_rank,
        partial(check_run, without_output(config) if config.show_rows else config),
        remarks,
        master_addr=config.master_addr,
        master_port=config.master_port,
        verbose=config.verbose,
        preload=["train"],
        show=show_rows if config.show_rows else None,
        settle=partial(settle_sizes, try_rank, check_run),
    )


def main(argv: list[str]) -> int:
    """Parse options and run. Return the exit status."""
    return run_command(argv, parse, lambda parsed: run(*parsed))


if __name__ == "__main__":
    gc.freeze()
    gc.enable()
    sys.exit(run(*PARSED))
