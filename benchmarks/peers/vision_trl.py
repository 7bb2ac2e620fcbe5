"""Peer of benchmarks.vision: TRL's SFTTrainer + PEFT + bitsandbytes."""

import tempfile

import torch
from datasets import Dataset
from stopwatch import Stopwatch, select_device
from trainer import StepTimer
from transformers import AutoTokenizer
from trl import SFTConfig, SFTTrainer
from vision_work import load_model, lora_config, make_batch, read_vision_work

work, device = read_vision_work(), select_device()
model = load_model(work, device)
batch = make_batch(work, model, device)
config = SFTConfig(
    output_dir=tempfile.mkdtemp(),
    per_device_train_batch_size=work.batch_size,
    max_steps=work.steps,
    max_length=None,
    bf16=torch.cuda.is_available(),
    gradient_checkpointing=True,
    gradient_checkpointing_kwargs={"use_reentrant": False},
    learning_rate=1e-4,
    optim="adamw_torch_fused",
    logging_steps=1,
    save_strategy="no",
    report_to="none",
    dataset_kwargs={"skip_prepare_dataset": True},
    remove_unused_columns=False,
    dataloader_pin_memory=False,  # the batch is on the GPU
)
tokenizer = AutoTokenizer.from_pretrained(work.model_name)
tokenizer.pad_token = tokenizer.eos_token
timer = StepTimer()
trainer = SFTTrainer(
    model=model,
    args=config,
    train_dataset=Dataset.from_dict({"row": list(range(work.batch_size * work.steps))}),
    processing_class=tokenizer,
    data_collator=lambda rows: dict(batch),
    peft_config=lora_config(work),
    callbacks=[timer],
)
timer.watch = Stopwatch(trainer.model)
trainer.train()
timer.watch.print_result()
