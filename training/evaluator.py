"""Evaluation while a run trains: validation loss, the best step's weights, early stopping, samples.

The loop calls `before_first_step` once, and `is_due` and `evaluate_if_due` once per step, on every rank. The
evaluator decides at which steps it evaluates. Losses and answers come from training/evaluation.py, which
leaves the model unchanged and draws no random numbers. So a run with evaluation trains exactly like one
without.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import PreTrainedModel

from data.answers import cut_repetition, decode_answer
from data.evaluation_data import EvaluationData, Prompt
from data.image_batches import ImageBatch, plan_prompt_images
from data.image_format import ImageFormat
from data.prefetch import decode_images
from files.atomic_writes import make_staging_folder, remove_folder, replace_folder, staging_path, write_text
from files.disk_room import append_lines
from files.names import BEST, SCORE
from launch.ranks import RankInfo, errors_on_all_ranks
from launch.signals import NoStopRequests
from models.family import longrope_threshold
from monitoring.loggers import Sample
from monitoring.messages import describe_nothing_done
from monitoring.metrics import Meter, Metrics
from monitoring.sample_images import find_copies, write_copies
from monitoring.tracking import NoTracker
from options.errors import describe
from training.evaluation import (
    PROMPT_BATCH_SIZE,
    Context,
    LossSum,
    generate_greedily,
    group_rows,
    mean_loss,
    perplexity,
)


class Evaluator:
    """Evaluates, samples and stores the best weights, at the steps that the options name.

    Attributes:
        should_stop: the loop has to end (--early_stopping_patience).
        best_step, best_loss: the best evaluation so far.
        evals_since_best: evaluations since the best one.
        saved_step, saved_loss: the evaluation whose weights are in best/: not the best one if the disk was
            full at that step.

    Args:
        data: rows to evaluate on and prompts to answer; either may be missing.
        model: the model, sharded or not.
        rank_info: this process.
        total_steps: optimizer steps of the run; the last one evaluates and samples in any case.
        batch_size: rows of a rank's batch.
        most_tokens: of such a batch, padding included: as many as a batch of training has.
        eval_every: optimizer steps between evaluations; 0 = only at the end.
        sample_every: optimizer steps between samples; 0 = only at the end.
        sample_tokens: most tokens of a sample.
        patience: evaluations in a row without a new best that end the run; 0 = any number.
        save_best: whether the best step's weights are stored in folder/best.
        folder: the RUN.
        loss_sum: loss_sum(model, batch), as in the loop.
        context: context() is entered around every forward.
        save: save(folder) writes what is trained, collectively.
        meter: restarted after an evaluation, whose time is no step's.
        stopping: asked to end the run if an image cannot be read.
        tracker: prints lines.
        tokenizer: rank 0's, if there are prompts.
    """

    def __init__(
        self,
        data: EvaluationData,
        model: PreTrainedModel,
        rank_info: RankInfo,
        *,
        total_steps: int,
        batch_size: int,
        most_tokens: int,
        eval_every: int,
        sample_every: int,
        sample_tokens: int,
        patience: int,
        save_best: bool,
        folder: Path,
        loss_sum: LossSum,
        context: Context,
        save: Callable[[Path], None],
        meter: Meter,
        stopping: NoStopRequests,
        tracker: NoTracker,
        tokenizer,
    ):
        self.data, self.model, self.rank_info = data, model, rank_info
        self.total_steps, self.folder = total_steps, folder
        self.batch_size, self.most_tokens = batch_size, most_tokens
        self.eval_every, self.patience, self.save_best = eval_every, patience, save_best
        self.sample_every, self.sample_tokens = sample_every, sample_tokens
        self.loss_sum, self.context, self.save = loss_sum, context, save
        self.meter, self.stopping, self.tracker, self.tokenizer = meter, stopping, tracker, tokenizer
        self.should_stop, self.best_step, self.best_loss, self.evals_since_best = False, 0, math.inf, 0
        self.saved_step, self.saved_loss = 0, math.inf

    def state_dict(self) -> dict:
        return {
            "best_step": self.best_step,
            "best_loss": self.best_loss,
            "worse": self.evals_since_best,
            "stop": self.should_stop,
            "kept_step": self.saved_step,
            "kept_loss": self.saved_loss,
        }

    def load_state_dict(self, state: dict) -> None:
        self.best_step, self.best_loss = state["best_step"], state["best_loss"]
        self.evals_since_best, self.should_stop = state["worse"], state["stop"]
        # Older checkpoints do not have these two: their runs ended if the best could not be stored.
        self.saved_step = state.get("kept_step", self.best_step)
        self.saved_loss = state.get("kept_loss", self.best_loss)

    def before_first_step(self, steps_done: int) -> None:
        """Write samples of the untrained model, unless a resumed run has steps done already. Collective.

        Raises UserError, on all ranks, if an image cannot be read.
        """
        if self.data.prompts and not steps_done:
            self._write_samples(0)
            self.meter.restart()

    def evaluate_if_due(self, metrics: Metrics) -> Metrics:
        """Evaluate and write samples if due at this step. Return its metrics with the results. Collective.

        An image that cannot be read ends the run after this step's checkpoint. A resumed run goes on with the
        next step, without this one's evaluation.
        """
        evaluates = self._is_eval_step(metrics.step)
        if evaluates:
            with self.stopping.stop_if_unreadable():
                loss = self._compute_loss()
                metrics = dataclasses.replace(metrics, eval_loss=loss, eval_perplexity=perplexity(loss))
            if metrics.eval_loss is not None:
                self._update_best(metrics.step, metrics.eval_loss, trained=bool(metrics.applied_steps))
        samples = self._is_sample_step(metrics.step) or (bool(self.data.prompts) and self.should_stop)
        if samples and not self.stopping.error:
            with self.stopping.stop_if_unreadable():
                self._write_samples(metrics.step)
        if evaluates or samples:
            self.meter.restart()
        return metrics

    def is_due(self, step: int) -> bool:
        """Return whether `evaluate_if_due` evaluates or samples at this optimizer step."""
        return self._is_eval_step(step) or self._is_sample_step(step)

    def _is_eval_step(self, step: int) -> bool:
        return self.data.rows is not None and self._is_nth_or_last(step, self.eval_every)

    def _is_sample_step(self, step: int) -> bool:
        return bool(self.data.prompts) and self._is_nth_or_last(step, self.sample_every)

    def _is_nth_or_last(self, step: int, every: int) -> bool:
        return step == self.total_steps or (every > 0 and step % every == 0)

    def _compute_loss(self) -> float:
        """Return the mean loss over the evaluation rows, the same on all ranks. Collective."""
        options = (self.batch_size, self.loss_sum, self.rank_info, self.context)
        assert self.data.rows is not None
        return mean_loss(self.model, self.data.rows, *options, self.most_tokens)

    def _update_best(self, step: int, loss: float, trained: bool) -> None:
        """Update the best evaluation and early stopping, and store a new best one's weights. Collective.

        Every rank has the same loss, so all of them store and stop together. A full disk does not change when
        they stop. trained: whether any step so far changed the weights; else there is nothing to store.
        """
        if loss < self.best_loss:  # never true of a NaN
            self.best_step, self.best_loss, self.evals_since_best = step, loss, 0
        else:
            self.evals_since_best += 1
        self.should_stop = 0 < self.patience <= self.evals_since_best
        if self.save_best and trained and loss < self.saved_loss and self._save_best(step, loss):
            self.saved_step, self.saved_loss = step, loss

    def _save_best(self, step: int, loss: float) -> bool:
        """Write what is trained into best/, and return whether that succeeded, on every rank. Collective.

        After a disk error, best/ is unchanged and a warning is printed.
        """
        best = self.folder / BEST
        failures: list[OSError] = []
        if self.rank_info.rank == 0:
            with _collect_os_errors(failures):
                make_staging_folder(best)
        with _collect_os_errors(failures):
            self.save(staging_path(best))  # needs all ranks, even if rank 0 could not make the folder
            if self.rank_info.rank == 0 and not failures:
                score = {"step": step, "eval_loss": loss, "eval_perplexity": perplexity(loss)}
                write_text(staging_path(best) / SCORE, json.dumps(score) + "\n")
                replace_folder(best)
        if failures:
            remove_folder(staging_path(best))
            stays = f"that of step {self.saved_step} stays" if self.saved_step else "there is no other one"
            self.tracker.print_line(
                f"WARNING: {best}: step {step} could not be saved ({describe(failures[0])}); {stays}, and"
                " training goes on"
            )
        succeeded = torch.tensor([not failures], dtype=torch.uint8, device=self.rank_info.device)
        if self.rank_info.world > 1:
            dist.broadcast(succeeded, 0)
        return bool(succeeded.item())

    def _write_samples(self, step: int) -> None:
        """Answer every prompt; rank 0 prints, writes and logs the answers. Collective.

        Raises UserError, on all ranks, if an image cannot be read.
        """
        prompts, tokens = self.data.prompts, self.sample_tokens
        lengths = torch.tensor([len(prompt.ids) for prompt in prompts])
        answers: dict[int, list[int]] = {}
        remark = "" if step else describe_nothing_done(0)
        groups = group_rows(
            lengths, PROMPT_BATCH_SIZE, longrope_threshold(self.model.config), max_growth=tokens
        )
        for batch in itertools.chain(*groups):
            indices = batch.tolist()
            options = (tokens, self.data.stop_ids, self.rank_info, self.context)
            asked = [prompts[i] for i in indices]
            images = _load_images(asked, self.data.image_format, self.rank_info, remark)
            generated = generate_greedily(self.model, [prompts[i].ids for i in indices], *options, images)
            answers |= zip(indices, generated, strict=True)
        if self.rank_info.rank != 0:
            return
        lines, samples = "", []
        for i, prompt in enumerate(prompts):
            text = decode_answer(answers[i], self.tokenizer, self.data.stop_ids, prompt.marker)
            line = {"step": step, "prompt": prompt.text, "text": text}
            line |= {"reference": prompt.answer} if prompt.answer else {}
            copies = write_copies(self.folder, prompt.images)
            line |= {"images": copies} if copies else {}
            samples.append(Sample(prompt.text, text, find_copies(self.folder, copies)))
            lines += json.dumps(line, ensure_ascii=False) + "\n"
            self.tracker.print_line(f"sample, step {step}: {prompt.describe()!r} -> {cut_repetition(text)!r}")
        append_lines(self.folder / "samples.jsonl", lines, self.tracker.print_line)
        self.tracker.log_samples(step, samples)


def _load_images(
    prompts: list[Prompt], image_format: ImageFormat | None, rank_info: RankInfo, remark: str
) -> ImageBatch | None:
    """Return the images of a batch of prompts, on the device; None if it has none. Collective.

    Args:
        prompts: the same on all ranks.
        image_format: how the model takes images.
        rank_info: this process.
        remark: what follows an error's line.

    Raises UserError, on all ranks, if one of them cannot read an image.
    """
    longest = max(len(prompt.ids) for prompt in prompts)
    asked = [(prompt.ids, prompt.images) for prompt in prompts]
    planned = plan_prompt_images(asked, longest, image_format)
    if planned is None:
        return None
    with errors_on_all_ranks(rank_info.world, remark):
        images = decode_images(planned)
    return images.map_tensors(lambda tensor: tensor.to(rank_info.device))


@contextlib.contextmanager
def _collect_os_errors(failures: list[OSError]) -> Iterator[None]:
    """Append an OSError that is raised within to `failures`."""
    try:
        yield
    except OSError as e:
        failures.append(e)
