"""What the peers that train through TRL's SFTTrainer share."""

import importlib.util
import tempfile

import torch
from datasets import Dataset
from stopwatch import Stopwatch, token_ids
from transformers import TrainerCallback
from trl import SFTConfig, SFTTrainer
from work import RANKS


def make_config(work, **more) -> SFTConfig:
    """With Liger's kernels where they are installed, unless `more` says otherwise."""
    liger = importlib.util.find_spec("liger_kernel") is not None
    options = {"use_liger_kernel": liger} | more
    return SFTConfig(
        output_dir=tempfile.mkdtemp(),
        per_device_train_batch_size=work.batch_size,
        gradient_accumulation_steps=1,
        max_steps=work.steps,
        max_length=work.context_length,
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


class Laps(TrainerCallback):
    watch: Stopwatch

    def on_step_end(self, *args, **kwargs):
        self.watch.lap()


def train(work, model, tokenizer, config: SFTConfig, columns: tuple[str, ...], **more) -> None:
    """Trains for work.steps steps and prints the result. columns: of the rows; more: for SFTTrainer."""
    row = token_ids(tokenizer, work.context_length)
    tokenizer.pad_token = tokenizer.eos_token
    known = {"input_ids": row, "labels": row, "attention_mask": [1] * len(row)}
    count = work.batch_size * RANKS * work.steps
    rows = Dataset.from_dict({name: [known[name]] * count for name in columns})
    laps = Laps()
    trainer = SFTTrainer(
        model=model, args=config, train_dataset=rows, processing_class=tokenizer, callbacks=[laps], **more
    )
    laps.watch = Stopwatch(trainer.model)
    trainer.train()
    laps.watch.tell()
