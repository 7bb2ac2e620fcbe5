"""Peer of benchmarks.vision: TRL's SFTTrainer + PEFT + bitsandbytes."""

from datasets import Dataset
from stopwatch import Stopwatch, select_device
from trainer import StepTimer, make_config
from transformers import AutoTokenizer
from trl import SFTTrainer
from vision_work import load_model, lora_config, make_batch, read_vision_work

work, device = read_vision_work(), select_device()
model = load_model(work, device)
batch = make_batch(work, model, device)
config = make_config(
    work,
    max_length=None,
    use_liger_kernel=False,
    gradient_checkpointing=True,
    gradient_checkpointing_kwargs={"use_reentrant": False},
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
