"""Shared by the peers that train through TRL's SFTTrainer."""

import importlib.util
import tempfile

import torch
from datasets import Dataset
from stopwatch import Stopwatch, token_ids
from transformers import TrainerCallback
from trl import SFTConfig, SFTTrainer
from work import RANKS


def make_config(work, max_length: int | None, **more) -> SFTConfig:
    """Make SFTTrainer's options for the work, with Liger's kernels if installed; `more` adds or replaces.

    max_length: tokens at which TRL cuts a row; None: nowhere.
    """
    liger = importlib.util.find_spec("liger_kernel") is not None
    options = {"use_liger_kernel": liger} | more
    return SFTConfig(
        output_dir=tempfile.mkdtemp(),
        per_device_train_batch_size=work.batch_size,
        gradient_accumulation_steps=1,
        max_steps=work.steps,
        max_length=max_length,
        bf16=torch.cuda.is_available(),
        learning_rate=1e-4,
        optim="adamw_torch_fused",
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        dataset_kwargs={"skip_prepare_dataset": True},
        remove_unused_columns=False,
        **options,
    )


class StepTimer(TrainerCallback):
    """Callback that ends a step of the stopwatch."""

    watch: Stopwatch

    def on_step_end(self, *args, **kwargs):
        self.watch.end_step()


def train(work, model, tokenizer, config: SFTConfig, columns: tuple[str, ...], **more) -> None:
    """Train for work.steps steps and print the result line. columns: of the rows; more: for SFTTrainer."""
    row = token_ids(tokenizer, work.context_length)
    tokenizer.pad_token = tokenizer.eos_token
    column_values = {"input_ids": row, "labels": row, "attention_mask": [1] * len(row)}
    count = work.batch_size * RANKS * work.steps
    rows = Dataset.from_dict({name: [column_values[name]] * count for name in columns})
    timer = StepTimer()
    trainer = SFTTrainer(
        model=model, args=config, train_dataset=rows, processing_class=tokenizer, callbacks=[timer], **more
    )
    timer.watch = Stopwatch(trainer.model)
    trainer.train()
    timer.watch.print_result()
