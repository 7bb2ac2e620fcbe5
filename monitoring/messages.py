"""The lines that a run prints about itself: its data, its weights, how it went, its files and what can be typed next."""

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
from monitoring.metrics import Metrics, too_many
from options.config import TOY_DATASET, TOY_MODEL, TOY_PROMPT, Config
from options.errors import describe

MUCH_PADDING = 0.3  # share of the batches above which a run is told of --packing


def describe_data(rows: TokenizedRows, sampler: StepSampler, context_length: int) -> str:
    """The line about the data; where much of the batches is padding, a second one on what packing would bring."""
    cut = f", {rows.cut:,} cut at the context length" if rows.cut else ""
    padding = sampler.padding_share()
    line = (
        f"data: {len(rows):,} rows kept, {rows.dropped:,} dropped{cut}; {rows.tokens.numel():,} tokens,"
        f" {int(rows.targets().sum()):,} of them learned; padding {padding:.0%} of the batches"
    )
    dealt = (rows, sampler.batch_size, sampler.accumulation, sampler.rank, sampler.world, sampler.seed)
    if isinstance(sampler, PackSampler):
        unpacked = StepSampler(*dealt).padding_share()
        return f"{line} ({unpacked:.0%} without --packing); {sampler.count():,} packs of up to {sampler.width:,} tokens"
    if padding <= MUCH_PADDING:
        return line
    faster = sampler.positions() / PackSampler(*dealt, context_length).positions()
    return (
        f"{line}\n--packing true would train these rows about {faster:.1f} times as fast: as full lines of"
        f" {context_length:,} tokens, which --batch_size then counts"
    )


def summary(history: list[Metrics], seconds: float, stages: dict[str, float], done: int = 0) -> str:
    """Three lines on how the run went; speed is the median of the steps after the first, which warms up; memory is
    the highest of all steps. seconds: of the steps after the first `done`, which were before the run was resumed;
    stages: as in run.json."""
    rates = sorted(m.tokens_per_second for m in history[1:] or history)
    gib = {name.removeprefix("after_").removesuffix("_gib"): value for name, value in stages.items()}
    for phase in ("forward", "backward"):
        gib[phase] = max(getattr(m, f"memory_after_{phase}_gib") for m in history)
    after = ", ".join(f"{value:.2f} GiB after {name}" for name, value in gib.items())
    bad = f"; {history[-1].bad_steps} skipped as NaN or infinite" if history[-1].bad_steps else ""
    steps = f"{len(history)} steps" + (f", the last {len(history) - done} of them" if done else "")
    return (
        f"{steps} in {seconds:.0f} s, the first in {history[0].step_seconds:.1f} s, {rates[len(rates) // 2]:,.0f} tokens/s on all ranks (median){bad}\n"
        f"memory of the fullest rank: {after}, peak {max(m.memory_allocated_gib for m in history):.2f} GiB\n"
        f"loss {history[0].loss:.4f} at the first step, {history[-1].loss:.4f} at the last"
    )


def describe_stop(reason: str, history: list[Metrics], total_steps: int, folder: Path) -> str:
    """The line of a run that was asked to stop."""
    return f"stopped at step {history[-1].step} of {total_steps} ({reason}); go on with: {going_on(folder)}"


def going_on(folder: Path) -> str:
    """The command that resumes a run, where it is not torchrun's."""
    if is_under_torchrun():  # whose options are not known here
        return "the command that started it, with --resume auto"
    return shlex.join([*shell_command("train.py"), "--config", f"{folder}/{OPTIONS}", "--resume", "auto"])


def describe_unsaved(error: OSError, folder: Path, step: int | None) -> str:
    """The line of a run whose result could not be written. step: of the last whole checkpoint."""
    way = (
        f"make room there, then: {going_on(folder)}, which saves it from the checkpoint of step {step}"
        if step
        else "there is no checkpoint to save it from; make room there before the run is repeated, with --save_every"
    )
    return f"--output_dir {folder}: the trained model could not be saved ({describe(error)}); {way}"


def describe_end(
    config: Config,
    history: list[Metrics],
    total_steps: int,
    done: int,
    seconds: float,
    stages: dict[str, float],
    stopped: str,
    saved: bool,
    sampled: bool,
) -> str:
    """The lines at the end of a run. done: steps before it was resumed; seconds: of the steps after them; stages: as in
    run.json; stopped: why it was asked to stop, or ""; saved: whether there is a result; sampled: whether samples were
    asked for."""
    folder = output_folder(config)
    if stopped:
        return describe_stop(stopped, history, total_steps, folder)
    told = [summary(history, seconds, stages, done), *describe_evaluations(history, total_steps, config)]
    return "\n".join([*told, describe_files(config, saved, sampled, folder)])


def describe_files(config: Config, saved: bool, sampled: bool, folder: Path) -> str:
    """The run's files, and what can be typed next. saved: whether there is a result; sampled: whether samples were asked
    for."""
    result = {"adapter": "adapter_model.safetensors", "model": "the model"}[config.method.saves]
    result = BLOCKS if config.llama_pro_save == "blocks" else result
    what = f"{result}, " if saved else ""
    what += "samples.jsonl, " if sampled else ""
    what += "memory.html, memory.png, " if config.profile_memory else ""
    what += "memory_snapshot.pickle, " if (folder / "memory_snapshot.pickle").exists() else ""
    again = [
        *shell_command("train.py"),
        "--config",
        f"{folder}/{OPTIONS}",
        "--output_dir",
        f"{folder}-again",
    ]
    lines = [
        f"in {folder}: {what}report.html, {METRICS}, loss.png, {OPTIONS}",
        f"next: {shlex.join(again)}",
    ]
    if config.profile:
        lines.insert(1, f"in {config.profiling_output}: traces of single steps, for https://ui.perfetto.dev")
    if saved:
        demo = (config.model_name, config.dataset) == (TOY_MODEL, TOY_DATASET)
        question = f' --prompt "{TOY_PROMPT}"' if demo else ""  # without one it is a conversation
        lines.append(f"try: {shlex.join([*shell_command('generate.py'), str(folder)])}{question}")
    return "\n".join(lines)


def kept_in(folder: Path, step: int) -> str:
    """Whether the best step is in best/, as the end of a line."""
    try:
        kept = json.loads((folder / SCORE).read_text(encoding="utf-8"))["step"]
    except FileNotFoundError:
        return ", which could not be kept"
    return f", in {folder}" if kept == step else f", which could not be kept; {folder} has step {kept}"


def _eval_loss(metrics: Metrics) -> float:
    """To compare by: infinite if it is NaN."""
    loss = metrics.eval_loss
    return math.inf if loss is None or math.isnan(loss) else loss


def describe_evaluations(history: list[Metrics], total_steps: int, config: Config) -> list[str]:
    """Lines for the end of a run: the evaluations, and why it ended before its last step."""
    evaluated = [m for m in history if m.eval_loss is not None]
    if not evaluated:
        return []
    last, best = evaluated[-1], min(evaluated, key=_eval_loss)
    line = (
        f"evaluation loss {last.eval_loss:.4f} (perplexity {last.eval_perplexity:,.2f}) at step {last.step}"
    )
    if len(evaluated) > 1:
        where = kept_in(output_folder(config) / BEST, best.step) if config.keeps_best else ""
        line += f"; best {best.eval_loss:.4f} at step {best.step}{where}"
    if len(history) == total_steps or too_many(history[-1].bad_steps, config.max_bad_steps):
        return [line]
    patience = config.early_stopping_patience
    return [
        line,
        f"stopped at step {last.step} of {total_steps}: {patience} evaluations were no better than the best",
    ]
