"""The objects that the loop calls beside the model: optimizer, meter, evaluator, checkpoints and others."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from transformers import PreTrainedModel

from checkpoints.manager import CheckpointManager
from data.packing import max_sequence_length, mean_row_length
from launch.ranks import RankInfo
from launch.signals import NoStopRequests
from models.causal_lm import loss_sum
from models.expert_adapters import find_stacked_vectors
from models.lora import lora_b_parameters
from models.router_loss import NoRouterLoss, make_router_loss
from monitoring.deferred import DeferredCalls
from monitoring.metrics import Meter
from monitoring.profiling import NoProfiler
from monitoring.tracking import NoTracker
from parallel.activation_budget import ActivationBudget
from parallel.optimizers import make_optimizer
from training.bad_steps import BadStepGuard
from training.evaluator import Evaluator
from training.job import Job


@dataclass(frozen=True)
class LoopComponents:
    """The objects that the loop calls beside the model, each in single lines."""

    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler  # of the loss, for fp16
    meter: Meter
    guard: BadStepGuard
    evaluator: Evaluator
    budget: ActivationBudget
    checkpoints: CheckpointManager
    deferred: DeferredCalls
    router_loss: NoRouterLoss


def make_loop_components(
    job: Job,
    model: PreTrainedModel,
    rank_info: RankInfo,
    total_steps: int,
    tracker: NoTracker,
    profiler: NoProfiler,
    stopping: NoStopRequests,
    save_best: Callable[[Path], None],
) -> LoopComponents:
    """Build this rank's optimizer, scaler, meter, guard, evaluator, budget, checkpoint manager. Collective.

    Args:
        job: the checked run.
        model: the model, set up.
        rank_info: this process.
        total_steps: optimizer steps of the run.
        tracker: logs metrics and prints lines.
        profiler: measures memory of the phases.
        stopping: why and when the run is asked to stop.
        save_best: writes what is trained into a folder, collectively.
    """
    config, folder = job.config, Path(job.output_dir)
    trained = [p for p in model.parameters() if p.requires_grad]
    assert config.lr is not None
    lora_b, ratio = lora_b_parameters(model), config.lora_plus_ratio or 1.0
    vectors = find_stacked_vectors(model)
    optimizer = make_optimizer(trained, config.optimizer, config.lr, config.wd, lora_b, ratio, vectors)
    scaler = job.precision.scaler("cpu" if config.use_cpu_offload else rank_info.device.type)
    meter, deferred = Meter(rank_info.device, profiler.phase_bytes), DeferredCalls()
    guard = BadStepGuard(
        done=job.saved.step if job.saved else 0,
        max_bad_steps=config.max_bad_steps,
        rows=job.rows,
        folder=folder,
        scaler=scaler,
        rank=rank_info.rank,
        tracker=tracker,
    )
    batch_tokens = config.batch_size * max_sequence_length(config, job.rows)
    needs_tokenizer = bool(job.evaluation.prompts) and rank_info.rank == 0
    evaluator = Evaluator(
        job.evaluation,
        model,
        rank_info,
        total_steps=total_steps,
        batch_size=config.batch_size,
        most_tokens=batch_tokens,
        eval_every=config.eval_every,
        sample_every=config.sample_every,
        sample_tokens=config.sample_tokens,
        patience=config.early_stopping_patience,
        save_best=config.saves_best,
        folder=folder,
        loss_sum=loss_sum,
        context=partial(job.precision.context, rank_info.device.type),
        save=save_best,
        meter=meter,
        stopping=stopping,
        tracker=tracker,
        tokenizer=job.read_tokenizer() if needs_tokenizer else None,
    )
    budget = ActivationBudget(
        model,
        job.family,
        rank_info.device,
        gib=config.activation_budget,
        tokens=batch_tokens,
        row_length=mean_row_length(job.rows),
        itemsize=job.precision.matmul_dtype.itemsize,
    )
    checkpoints = CheckpointManager(
        model,
        optimizer,
        {"scaler": scaler, "evaluator": evaluator, "tracker": tracker, "guard": guard},
        rank_info,
        folder=folder,
        save_every=config.save_every,
        save_at_end=config.save_every > 0 or config.save_minutes > 0,
        keep=config.keep,
        describe_run=job.run_identity,
        deferred=deferred,
        stopping=stopping,
        print_line=tracker.print_line,
        checkpoint=job.saved,
    )
    return LoopComponents(
        optimizer=optimizer,
        scaler=scaler,
        meter=meter,
        guard=guard,
        evaluator=evaluator,
        budget=budget,
        checkpoints=checkpoints,
        deferred=deferred,
        router_loss=make_router_loss(model),
    )
