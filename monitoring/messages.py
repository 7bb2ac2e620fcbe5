"""Lines that a run prints about its data, its training, its files, and the commands that can follow."""

from __future__ import annotations

import json
import math
import shlex
from pathlib import Path

from data.batches import StepSampler
from data.packing import PackSampler
from data.rows import TokenizedRows
from files.names import BEST, BLOCKS, METRICS, OPTIONS, SCORE
from files.output_folder import output_folder
from launch.program import is_under_torchrun, shell_command
from monitoring.best_step import find_better_step
from monitoring.metrics import Metrics, exceeds_bad_steps
from options.config import TOY_DATASET, TOY_MODEL, TOY_PROMPT, Config
from options.errors import describe

HIGH_PADDING = 0.3  # share of the batches above which a line recommends --packing


def describe_data(rows: TokenizedRows, sampler: StepSampler, context_length: int) -> str:
    """Return the line about the data, and lines about its dropped and cut rows by reason.

    If much of the batches is padding, a last line is about packing.
    """
    cut = f", {rows.cut:,} cut at the context length" if rows.cut else ""
    padding = sampler.padding_share()
    line = (
        f"data: {len(rows):,} rows kept, {rows.dropped:,} dropped{cut}{_describe_sets(rows, sampler)};"
        f" {rows.tokens.numel():,} tokens,"
        f" {int(rows.targets().sum()):,} of them learned{_describe_images(rows)};"
        f" padding {padding:.0%} of the batches"
    )
    reasons = [f"data: {each}" for each in rows.describe_reasons()]
    sampling = (rows, sampler.batch_size, sampler.accumulation, sampler.rank, sampler.world, sampler.seed)
    if isinstance(sampler, PackSampler):
        unpacked = StepSampler(*sampling).padding_share()
        images = f" and {sampler.most_images} images" if sampler.most_images else ""
        packs = f"{sampler.items_per_epoch():,} packs of up to {sampler.width:,} tokens{images}"
        return "\n".join([f"{line} ({unpacked:.0%} without --packing); {packs}", *reasons])
    if padding <= HIGH_PADDING:
        return "\n".join([line, *reasons])
    speedup = sampler.count_positions() / PackSampler(*sampling, context_length).count_positions()
    advice = (
        f"--packing true would train these rows about {speedup:.1f} times as fast: as full lines of"
        f" {context_length:,} tokens, which --batch_size then counts"
    )
    return "\n".join([line, *reasons, advice])


def _describe_images(rows: TokenizedRows) -> str:
    """Return the number of images, their tokens and the largest one, after "; "; "" without images."""
    refs = rows.images.refs
    if not refs:
        return ""
    tokens, largest = rows.count_image_tokens(), max(refs, key=lambda ref: ref.width * ref.height)
    return (
        f"; {len(refs):,} images of {tokens:,} tokens, {tokens / rows.tokens.numel():.0%} of all, the largest"
        f" of {largest.width:,} x {largest.height:,} pixels"
    )


def _describe_sets(rows: TokenizedRows, sampler: StepSampler) -> str:
    """Return the number of rows that each set of a mixture gives to an epoch, after "; "; "" without sets."""
    if not rows.sets:
        return ""
    total = sampler.rows_per_epoch()
    sets = [
        f"{each.per_epoch:,} of {each.name} ({each.per_epoch / total:.1%}; it has {each.size:,})"
        for each in rows.sets
    ]
    is_fixed = isinstance(sampler, PackSampler) and any(each.per_epoch % each.size for each in rows.sets)
    same = " (with --packing the same ones in every epoch)" if is_fixed else ""
    return f"; an epoch has {total:,} rows{same}: {', '.join(sets)}"


def describe_training(
    history: list[Metrics], seconds: float, gib: dict[str, float], steps_before: int = 0
) -> str:
    """Return three lines about time, memory and loss.

    The speed is the median of the steps after the first, which warms up. The memory is the highest of the
    steps after a resume, since their ranks and GPUs may be others than before it.

    Args:
        history: all steps of the run.
        seconds: the time of the steps after the first `steps_before`.
        gib: memory after each stage, and predicted, as in run.json.
        steps_before: steps before the run was resumed.
    """
    first, last = history[0], history[-1]
    rates = sorted(m.tokens_per_second for m in history[1:] or history)
    skipped = f"; {last.bad_steps} skipped as NaN or infinite" if last.bad_steps else ""
    resumed = f", the last {len(history) - steps_before} of them" if steps_before else ""
    return (
        f"{len(history)} steps{resumed} in {seconds:.0f} s, the first in {first.step_seconds:.1f} s,"
        f" {rates[len(rates) // 2]:,.0f} tokens/s on all ranks (median){skipped}\n"
        f"{describe_memory(history[steps_before:] or history, gib)}\n"
        f"loss {first.loss:.4f} at the first step, {last.loss:.4f} at the last"
    )


def describe_memory(history: list[Metrics], gib: dict[str, float]) -> str:
    """Return the line about the memory of the fullest rank: after each phase, at the peak, and predicted.

    history: the steps that count; gib: as for `describe_training`.
    """
    after = {name: value for name, value in gib.items() if name.startswith("after_")}
    for phase in ("forward", "backward"):
        after[f"after_{phase}_gib"] = max(getattr(m, f"memory_after_{phase}_gib") for m in history)
    phases = [f"{v:.2f} GiB {name.removesuffix('_gib').replace('_', ' ')}" for name, v in after.items()]
    peak, predicted = max(m.memory_allocated_gib for m in history), gib.get("predicted_peak_gib")
    compared = f", {peak / predicted:.2f} times the predicted {predicted:.2f} GiB" if predicted else ""
    return f"memory of the fullest rank: {', '.join(phases)}, peak {peak:.2f} GiB{compared}"


def describe_stop(reason: str, history: list[Metrics], total_steps: int, folder: Path) -> str:
    """Return the line about a run that was asked to stop: why, at which step, and how to resume it.

    Args:
        reason: a signal's name or an option, as in StopRequests.
        history: all steps of the run; at least one.
        total_steps: the steps that were planned.
        folder: the RUN.
    """
    step = f"step {history[-1].step} of {total_steps}"
    return f"stopped at {step} ({reason}); resume with: {resume_command(folder)}"


def describe_nothing_done(steps_done: int) -> str:
    """Return what follows an error line about the first step after a start: why it wrote no checkpoint.

    steps_done: those before the run was resumed.
    """
    if steps_done:
        return f"; the checkpoint of step {steps_done} stays"
    return "; no step was done, so there is no checkpoint"


def resume_command(folder: Path) -> str:
    """Return the command that resumes the run in `folder`; under torchrun, words that describe it."""
    if is_under_torchrun():  # its options are not known here
        return "the command that started it, with --resume auto"
    return shlex.join([*shell_command("train.py"), "--config", f"{folder}/{OPTIONS}", "--resume", "auto"])


def describe_unsaved(error: OSError, folder: Path, step: int | None) -> str:
    """Return the line about a trained model that could not be written, and how to save it.

    step: that of the last complete checkpoint; None or 0 if there is none.
    """
    remedy = (
        f"make room there, then: {resume_command(folder)}, which saves it from the checkpoint of step {step}"
        if step
        else "there is no checkpoint to save it from;"
        " make room there before the run is repeated, with --save_every"
    )
    return f"--output_dir {folder}: the trained model could not be saved ({describe(error)}); {remedy}"


def describe_end(
    config: Config,
    history: list[Metrics],
    total_steps: int,
    steps_before: int,
    seconds: float,
    gib: dict[str, float],
    stopped: str,
    saved: bool,
    sampled: bool,
) -> str:
    """Return the lines that a run ends with: speed, memory, loss and files, or memory and why it was stopped.

    Args:
        history: all steps of the run.
        total_steps: the steps that were planned.
        steps_before: steps before the run was resumed.
        seconds: the time of the steps after them.
        gib: memory after each stage, and predicted, as in run.json.
        stopped: why the run was asked to stop, or "".
        saved: whether the trained weights were saved.
        sampled: whether samples were requested.
    """
    folder = output_folder(config)
    if stopped:
        memory = describe_memory(history[steps_before:] or history, gib)
        return f"{memory}\n{describe_stop(stopped, history, total_steps, folder)}"
    training = describe_training(history, seconds, gib, steps_before)
    evaluations = describe_evaluations(history, total_steps, config)
    return "\n".join([training, *evaluations, describe_files(config, saved, sampled, folder)])


def describe_files(config: Config, saved: bool, sampled: bool, folder: Path) -> str:
    """Return lines that name the run's files and the commands that can follow.

    If the best evaluation is not the last, its result in best/ comes first.

    Args:
        config: of the run.
        saved: whether the trained weights were saved.
        sampled: whether samples were requested.
        folder: the RUN.
    """
    result = {"adapter": "adapter_model.safetensors", "model": "the model"}[config.method.saves]
    result = BLOCKS if config.llama_pro_save == "blocks" else result
    names = [result] * saved + ["samples.jsonl"] * sampled
    names += ["memory.html", "memory.png"] * config.profile_memory
    names += ["memory_snapshot.pickle"] * (folder / "memory_snapshot.pickle").exists()
    names += ["report.html", METRICS, "loss.png", OPTIONS]
    again = ["--config", f"{folder}/{OPTIONS}", "--output_dir", f"{folder}-again"]
    better = find_better_step(folder) if saved else None
    lines = [f"in {better.folder}: {result} of step {better.step}, the best evaluation"] if better else []
    lines.append(f"in {folder}: {', '.join(names)}")
    if config.profile:
        lines.append(f"in {config.profiling_output}: traces of single steps, for https://ui.perfetto.dev")
    lines.append(f"next: {shlex.join([*shell_command('train.py'), *again])}")
    if saved:
        is_demo = (config.model_name, config.dataset) == (TOY_MODEL, TOY_DATASET)
        # Without a prompt, generate.py starts a conversation.
        prompt = f' --prompt "{TOY_PROMPT}"' if is_demo else ""
        asked = str(better.folder if better else folder)
        lines.append(f"try: {shlex.join([*shell_command('generate.py'), asked])}{prompt}")
    return "\n".join(lines)


def describe_best(folder: Path, step: int) -> str:
    """Return the end of a line on the best step: ", in <folder>" if best/ holds it, else that it does not."""
    try:
        saved_step = json.loads((folder / SCORE).read_text(encoding="utf-8"))["step"]
    except FileNotFoundError:
        return ", which could not be saved"
    return (
        f", in {folder}"
        if saved_step == step
        else f", which could not be saved; {folder} has step {saved_step}"
    )


def _comparable_loss(metrics: Metrics) -> float:
    """Return the evaluation's loss, infinite if it is NaN or missing."""
    loss = metrics.eval_loss
    return math.inf if loss is None or math.isnan(loss) else loss


def describe_evaluations(history: list[Metrics], total_steps: int, config: Config) -> list[str]:
    """Return the line about the evaluations, and one about early stopping if it happened; [] without any."""
    evaluated = [m for m in history if m.eval_loss is not None]
    if not evaluated:
        return []
    last, best = evaluated[-1], min(evaluated, key=_comparable_loss)
    line = (
        f"evaluation loss {last.eval_loss:.4f} (perplexity {last.eval_perplexity:,.2f}) at step {last.step}"
    )
    if len(evaluated) > 1:
        where = describe_best(output_folder(config) / BEST, best.step) if config.saves_best else ""
        line += f"; best {best.eval_loss:.4f} at step {best.step}{where}"
    if len(history) == total_steps or exceeds_bad_steps(history[-1].bad_steps, config.max_bad_steps):
        return [line]
    patience = config.early_stopping_patience
    return [
        line,
        f"stopped at step {last.step} of {total_steps}: {patience} evaluations were no better than the best",
    ]
