"""Evaluation while a run trains: validation loss, the best step kept, early stopping, samples.

The loop calls `begin` once, `due` and `after` once per step, on every rank; what is due is decided here.
Losses and answers come from training/evaluation.py, which leaves nothing behind in the model and draws no
random numbers, so a run with evaluation trains exactly as one without.
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

from data.answers import answer_text
from data.evaluation_sets import EvaluationData
from files.atomic_writes import make_staging_folder, remove_folder, replace_folder, staging_path, write_text
from files.disk_room import append_lines
from files.names import BEST, SCORE
from launch.ranks import RankInfo
from models.family import longrope_threshold
from monitoring.metrics import Meter, Metrics
from monitoring.tracking import NoTracker
from options.errors import describe
from training.evaluation import PROMPTS_AT_ONCE, Context, LossSum, greedy, grouped, mean_loss, perplexity


class Evaluator:
    """What hangs on the loop. stop: the loop is to end (--early_stopping_patience); best_step, best_loss: of
    the best evaluation so far; worse: evaluations since then; kept_step, kept_loss: of that in best/, which
    is an older or a later one where the disk did not take the best.

    Args:
        data: rows to evaluate on and prompts to answer; either may be missing.
        total_steps: optimizer steps of the run; the last one evaluates and samples in any case.
        batch_size: rows of a rank's batch.
        eval_every, sample_every: optimizer steps between evaluations, and between samples; 0 = only at the
        end. sample_tokens: longest sample, in tokens. patience: evaluations in a row that may be no better
        than the best; 0 = any number. keep_best: whether the best step is kept in folder/best. folder: the
        RUN. loss_sum: loss_sum(model, batch), as the loop's. context: context(), around every forward. save:
        save(folder) saves what is trained, collectively. tokenizer: rank 0's, if there are prompts.
    """

    def __init__(
        self,
        data: EvaluationData,
        model: PreTrainedModel,
        rank_info: RankInfo,
        *,
        total_steps: int,
        batch_size: int,
        eval_every: int,
        sample_every: int,
        sample_tokens: int,
        patience: int,
        keep_best: bool,
        folder: Path,
        loss_sum: LossSum,
        context: Context,
        save: Callable[[Path], None],
        meter: Meter,
        tracker: NoTracker,
        tokenizer,
    ):
        self.data, self.model, self.rank_info, self.total, self.folder = (
            data,
            model,
            rank_info,
            total_steps,
            folder,
        )
        self.batch_size, self.eval_every, self.patience = batch_size, eval_every, patience
        self.sample_every, self.sample_tokens, self.keep_best = sample_every, sample_tokens, keep_best
        self.loss_sum, self.context, self.save = loss_sum, context, save
        self.meter, self.tracker, self.tokenizer = meter, tracker, tokenizer
        self.stop, self.best_step, self.best_loss, self.worse = False, 0, math.inf, 0
        self.kept_step, self.kept_loss = 0, math.inf

    def state_dict(self) -> dict:
        return {
            "best_step": self.best_step,
            "best_loss": self.best_loss,
            "worse": self.worse,
            "stop": self.stop,
            "kept_step": self.kept_step,
            "kept_loss": self.kept_loss,
        }

    def load_state_dict(self, state: dict) -> None:
        self.best_step, self.best_loss = state["best_step"], state["best_loss"]
        self.worse, self.stop = state["worse"], state["stop"]
        # A checkpoint that is older than these two is of a run that had kept its best.
        self.kept_step = state.get("kept_step", self.best_step)
        self.kept_loss = state.get("kept_loss", self.best_loss)

    def begin(self, done: int) -> None:
        """Before the first step: samples of the base model, if no steps are done."""
        if self.data.prompts and not done:
            self._sample(0)
            self.meter.restart()

    def after(self, metrics: Metrics) -> Metrics:
        """After each step: what is due at it. Returns its metrics, with the evaluation's if there was one."""
        evaluates = self._evaluates(metrics.step)
        if evaluates:
            loss = self._loss()
            metrics = dataclasses.replace(metrics, eval_loss=loss, eval_perplexity=perplexity(loss))
            self._judge(metrics.step, loss, trained=bool(metrics.applied_steps))
        samples = self._samples(metrics.step) or (bool(self.data.prompts) and self.stop)
        if samples:
            self._sample(metrics.step)
        if evaluates or samples:
            self.meter.restart()
        return metrics

    def due(self, step: int) -> bool:
        """Whether `after` evaluates or samples at this step, between it and the next one."""
        return self._evaluates(step) or self._samples(step)

    def _evaluates(self, step: int) -> bool:
        return self.data.rows is not None and self._due(self.eval_every, step)

    def _samples(self, step: int) -> bool:
        return bool(self.data.prompts) and self._due(self.sample_every, step)

    def _due(self, every: int, step: int) -> bool:
        return step == self.total or (every > 0 and step % every == 0)

    def _loss(self) -> float:
        options = (self.batch_size, self.loss_sum, self.rank_info, self.context)
        assert self.data.rows is not None
        return mean_loss(self.model, self.data.rows, *options)

    def _judge(self, step: int, loss: float, trained: bool) -> None:
        """Keeps and counts. Every rank has the same loss, so all of them keep and stop together, and when
        they stop does not depend on what could be kept. trained: whether any step so far changed the weights;
        before, there is no result to keep."""
        if loss < self.best_loss:  # never of a NaN
            self.best_step, self.best_loss, self.worse = step, loss, 0
        else:
            self.worse += 1
        self.stop = 0 < self.patience <= self.worse
        if self.keep_best and trained and loss < self.kept_loss and self._keep(step, loss):
            self.kept_step, self.kept_loss = step, loss

    def _keep(self, step: int, loss: float) -> bool:
        """Puts what is trained into best/. If the disk does not take it, what is there stays, a warning is
        printed, and False returned, on every rank. Collective."""
        best = self.folder / BEST
        failures: list[OSError] = []
        if self.rank_info.rank == 0:
            with _noting(failures):
                make_staging_folder(best)
        with _noting(failures):
            self.save(staging_path(best))  # needs all ranks, whatever became of the folder
            if self.rank_info.rank == 0 and not failures:
                score = {"step": step, "eval_loss": loss, "eval_perplexity": perplexity(loss)}
                write_text(staging_path(best) / SCORE, json.dumps(score) + "\n")
                replace_folder(best)
        if failures:
            remove_folder(staging_path(best))
            stays = f"that of step {self.kept_step} stays" if self.kept_step else "there is no other one"
            self.tracker.say(
                f"WARNING: {best}: step {step} could not be kept ({describe(failures[0])}); {stays}, and training goes on"
            )
        kept = torch.tensor([not failures], dtype=torch.uint8, device=self.rank_info.device)
        if self.rank_info.world > 1:
            dist.broadcast(kept, 0)
        return bool(kept.item())

    def _sample(self, step: int) -> None:
        """Writes lines of step, prompt and text to samples.jsonl, and shows them."""
        prompts, tokens = self.data.prompts, self.sample_tokens
        lengths = torch.tensor([len(prompt.ids) for prompt in prompts])
        answers: dict[int, list[int]] = {}
        parts = grouped(lengths, PROMPTS_AT_ONCE, longrope_threshold(self.model.config), growth=tokens)
        for batch in itertools.chain(*parts):
            chosen = batch.tolist()
            options = (tokens, self.data.stops, self.rank_info, self.context)
            made = greedy(self.model, [prompts[i].ids for i in chosen], *options)
            answers |= zip(chosen, made, strict=True)
        if self.rank_info.rank != 0:
            return
        lines = ""
        for i, prompt in enumerate(prompts):
            text = answer_text(answers[i], self.tokenizer, self.data.stops, prompt.marker)
            lines += (
                json.dumps({"step": step, "prompt": prompt.text, "text": text}, ensure_ascii=False) + "\n"
            )
            asked = " ".join(prompt.text.split())[-60:]
            self.tracker.say(f"sample, step {step}: {asked!r} -> {text!r}")
        append_lines(self.folder / "samples.jsonl", lines, self.tracker.say)


@contextlib.contextmanager
def _noting(failures: list[OSError]) -> Iterator[None]:
    try:
        yield
    except OSError as e:
        failures.append(e)
