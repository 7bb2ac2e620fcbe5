"""Options of other programs: what train.py answers to them, and that the table is complete and right."""

from __future__ import annotations

import pytest

from options import evaluate
from options.config import FIELDS
from options.errors import UserError
from options.foreign_rules import FOREIGN
from options.foreign_values import OPTIMIZERS, SCHEDULES
from options.train import parse
from tests.helpers.installed_options import declared_options


def error_of(*argv: str) -> str:
    """Return the error for these options."""
    with pytest.raises(UserError) as error:
        parse(list(argv))
    return str(error.value)


@pytest.mark.parametrize(
    ("line", "answer"),
    [
        ("--learning_rate 2e-4", "--learning_rate: here it is --lr 2e-4"),
        ("--learning-rate=2e-4", "--learning_rate: here it is --lr 2e-4"),
        ("--per_device_train_batch_size 2", "here it is --batch_size 2"),
        ("--micro_batch_size 4", "here it is --batch_size 4"),
        ("--auto_find_batch_size true", "here it is --batch_size auto"),
        ("--train_batch_size 64", "here it is --effective_batch_size 64"),
        ("--sequence_len 4096", "here it is --context_length 4096"),
        ("--max_seq_length 2048", "here it is --context_length 2048"),
        ("--max_length 1024", "here it is --context_length 1024"),
        ("--cutoff_len 1024", "here it is --context_length 1024"),
        ("--load_in_4bit", "here it is --train_type qlora"),
        ("--load_in_4bit True --use_dora", "--use_dora, --load_in_4bit: here it is --train_type bnb_dora"),
        ("--use_dora true", "here it is --train_type dora"),
        ("--qdora", "here it is --train_type bnb_dora"),
        ("--load_in_8bit true", "here it is --train_type hqq_lora --n_bits 8 (8-bit weights are HQQ's)"),
        ("--finetuning_type full", "here it is --train_type full"),
        ("--finetuning_type lora --quantization_bit 4", "here it is --train_type qlora"),
        ("--quantization_bit 2 --quantization_method hqq", "here it is --train_type hqq_lora --n_bits 2"),
        ("--quantization_method hqq", "--quantization_method: is not needed here: --train_type says what"),
        ("--load_in_4bit false", "--load_in_4bit: is not needed here: --train_type says what is trained"),
        ("--freeze_trainable_layers 2", "has no equal here: layers cannot be frozen one by one"),
        ("--lora_r 16", "here it is --lora_rank 16"),
        ("--lora_target_linear true", "here it is --lora_target_modules all"),
        ("--lora_target q_proj,v_proj", "here it is --lora_target_modules q_proj,v_proj"),
        ("--target_modules all-linear", "here it is --lora_target_modules all"),
        ("--bf16 true", "--bf16: is not needed here: --precision auto is bf16"),
        ("--bf16 false", "here it is --precision fp32"),
        ("--fp16", "here it is --precision fp16_autocast"),
        ("--gradient_checkpointing false", "here it is --use_gradient_checkpointing false"),
        ("--activation_offloading", "--use_gradient_checkpointing true --use_activation_cpu_offload true"),
        ("--warmup_ratio 0.03", "here it is --lr_warmup 0.03"),
        ("--save_steps 500", "here it is --save_every 500"),
        ("--save_steps 0.1", "has no equal here: a share of the run: --save_every counts steps"),
        ("--save_strategy epoch", "has no equal here: once an epoch: --save_every counts steps"),
        ("--eval_steps 50 --eval_strategy steps", "here it is --eval_every 50"),
        ("--num_train_epochs 3.0", "here it is --num_epochs 3"),
        ("--num_train_epochs 1.5", "here it is --num_epochs 2 (whole epochs only; 1.5 of them end by"),
        ("--lr_scheduler_type linear", "here it is --lr_scheduler linear"),
        ("--lr_scheduler_type cosine", "--lr_scheduler cosine (cosine ends at a tenth of --lr, not at 0)"),
        ("--lr_scheduler_type polynomial", "--lr_scheduler_type: has no equal here: polynomial"),
        ("--optim paged_adamw_8bit", "here it is --optimizer paged_adamw_8bit"),
        ("--optim adamw_torch_fused", "here it is --optimizer fused_adamw"),
        ("--optim lion_8bit", "--optim: has no equal here: --optimizer adamw, the default, stays"),
        ("--weight_decay 0.01", "here it is --wd 0.01"),
        ("--max_grad_norm 0.3", "here it is --grad_norm 0.3"),
        ("--max_grad_norm 0", "here it is --apply_gradient_clipping false"),
        ("--sample_packing true", "here it is --packing true"),
        ("--report_to wandb", "here it is --log_to wandb"),
        ("--report_to tensorboard", "here it is --log_to tensorboard"),
        ("--report_to mlflow", "--report_to: has no equal here: not to mlflow; metrics.jsonl is always"),
        ("--logging_steps 10", "here it is --log_every 10"),
        ("--wandb_project my_runs", "here it is --log_to wandb --project_name my_runs"),
        ("--fsdp full_shard,auto_wrap,offload", "--sharding_strategy full_shard --use_cpu_offload true"),
        ("--fsdp_sharding_strategy 4", "here it is --sharding_strategy hybrid_full_shard"),
        ("--zero_stage 2", "--zero_stage: here it is --sharding_strategy shard_grad_op ("),
        ("--deepspeed ds.json", "has no equal here: DeepSpeed does not run here; give its file to"),
        ("--dataset_name trl-lib/Capybara", "here it is --dataset trl-lib/Capybara"),
        ("--dataset_text_field body", "here it is --text_column body"),
        ("--dataset_train_split train_sft", "they are part of --dataset: name:config:split"),
        ("--adapter_name_or_path saves/one", "here it is --adapter saves/one"),
        ("--lora_modules_to_save embed_tokens,lm_head", "here it is --train_embeddings true"),
        ("--additional_target norm", "has no equal here: norm: only the embedding and the head"),
        ("--template llama3", "here it is --chat_template llama3"),
        ("--chat_template_path my.jinja", "here it is --chat_template my.jinja"),
        ("--template mistral", "--template: has no equal here: the tokenizer's own is used; or name one"),
        ("--model_name_or_path a/b --model_revision v2", "here it is --model_name a/b@v2"),
        ("--neftune_noise_alpha 5", "has no equal here: no noise is added to embeddings"),
        ("--stage dpo", "--stage: has no equal here: only supervised training: sft; leave it out"),
        ("--stage sft", "--stage: is not needed here: it changes nothing; leave it out"),
        ("--flash_attention true", "--flash_attention: is not needed here: torch's attention kernels"),
        ("--resume_from_checkpoint true", "here it is --resume auto"),
        ("--warmup_steps 100", "--warmup_steps: has no effect without --profile: it counts steps of the"
         " profiler; the learning rate's warm-up is --lr_warmup"),
        ("--optimizer adamw_torch", "paged_adamw_8bit; here it is adamw"),
        ("--lora_target_modules q_proj v_proj", "--lora_target_modules: values are separated by commas:"
         " --lora_target_modules q_proj,v_proj"),
        ("--learning_rate 2e-4 --lora_target_modules q_proj v_proj", "_rate: here it is --lr 2e-4$"),
        ("--lora_target_modules q_proj v_proj --learning_rate", "--learning_rate: here it is --lr ...$"),
        ("--warmup_ratio", "--warmup_ratio: here it is --lr_warmup ...$"),
        ("--loraplus_lr_ratio 16", "here it is --lora_plus_ratio 16$"),
        ("--loraplus_lr_ratio null", "is not needed here: it is off"),
        ("--peft_use_rslora true", "here it is --use_rslora true$"),
        ("--dataset_name a/b --dataset_config main", "here it is --dataset a/b:main$"),
        ("--dataset a/b --dataset_train_split sft", "--dataset_train_split: here it is --dataset a/b::sft$"),
        ("--completion_only_loss false", "has no equal here: prompts are never learned"),
        ("--assistant_only_loss false", "has no equal here: prompts are never learned"),
        ("--assistant_only_loss true", "is not needed here: answers alone are learned"),
        ("--max_length null", "has no equal here: rows are not cut there; --context_length N cuts them"),
        ("--lr_scheduler_type polynomial", "polynomial; --lr_scheduler constant, the default, holds"),
        ("--lora_target_modules all-linear", "--lora_target_modules all-linear; here it is all$"),
        ("--lr_scheduler cosine_with_warmup", "linear, cosine; here it is cosine (cosine ends at"),
        ("--num_epochs 1.5", "'1.5' is not a whole number; here it is 2 (whole epochs only;"),
        ("--chat_template llama-3", "--chat_template llama-3; here it is llama3$"),
        ("--adapter qlora", "--adapter qlora; here it is --train_type qlora$"),
        ("--adapter lora", "--adapter lora; here it is --train_type lora$"),
        ("--config_file a.yaml", "give the file to `python -m tools.migrate`"),
        ("--deepspeed_config ds.json", "give its file to `python -m tools.migrate`"),
        ("--dynamo_backend inductor", "here it is --compile true$"),
        ("--dynamo_backend no", "is not needed here"),
        ("--fast_inference true", "is not needed here: this program only trains"),
        ("--eval_sequence_len 4096", "has no equal here: rows to evaluate are cut at --context_length"),
        ("--export_dir out", "`python export.py RUN` makes a folder"),
        ("--media_dir pictures", "--media_dir: here it is --image_folder pictures$"),
        ("--image_max_pixels 262144", "here it is --image_size 512 (the longest side; a model whose images"),
        ("--image_size 1024,768", "--image_size: '1024,768' is not a whole number; here it is 1024 (the"),
        ("--image_resize_algorithm bicubic", "has no equal here: images are resized as the model's own"),
        ("--freeze_vision_tower true", "is not needed here: the vision parts are frozen by default"),
        ("--freeze_vision_tower false", "here it is --vision_targets all$"),
        ("--freeze_multi_modal_projector false", "here it is --vision_targets projector$"),
        ("--freeze_multi_modal_projector false --freeze_vision_tower false", "--vision_targets all$"),
        ("--finetuning_type full --freeze_vision_tower false", "has no equal here: vision parts are trained"),
        ("--train_type full --freeze_vision_tower false", "has no equal here: vision parts are trained by"),
        ("--freeze_mm_modules true", "is not needed here: the vision parts are frozen by default"),
        ("--finetune_vision_layers True", "here it is --vision_targets all$"),
        ("--finetune_vision_layers False", "is not needed here: the vision parts are frozen by default"),
        ("--finetune_mlp_modules true", "is not needed here: all linears of the text model"),
        ("--finetune_mlp_modules false", "has no equal here: --lora_target_modules names the linears"),
        ("--freeze_language_model true", "has no equal here: the text model always gets adapters"),
        ("--video_fps 2", "has no equal here: rows are texts and images, not videos or sounds"),
        ("--no_such_option 1", "unknown option --no_such_option; see --help"),
    ],
)  # fmt: skip
def test_the_answer_on_a_command_line(line, answer):
    """An answer with $ is the end of the line."""
    error = error_of(*line.split())
    assert error.endswith(answer[:-1]) if answer.endswith("$") else answer in error


def test_several_foreign_options_share_a_line_if_it_is_short():
    line = error_of(
        "--learning_rate", "2e-4", "--lora_r", "8", "--lr_scheduler", "linear", "--weight_decay=0"
    )
    assert line.split("; ") == [
        "--learning_rate: here it is --lr 2e-4",
        "--lora_r: here it is --lora_rank 8",
        "--weight_decay: here it is --wd 0",
    ]
    many = ["--neftune_noise_alpha", "5", "--label_smoothing_factor", "0.1", "--loftq_config", "x", "--fp16"]
    line = error_of("--learning_rate", "2e-4", *many)
    assert line.startswith("--learning_rate: here it is --lr 2e-4; and 4 more such options: `python -m tools")


def test_the_answer_to_a_file(tmp_path):
    file = tmp_path / "sft.yaml"
    file.write_text("learning-rate: 1.0e-4\nlora_target_modules: [q_proj]\nreport_to: [wandb]\nseed: 3\n")
    assert error_of("--config", str(file)) == (
        f"--config {file}: learning_rate: here it is `lr: 1.0e-4`; report_to: here it is `log_to: wandb`"
    )
    file.write_text("base_model: a/b\ndatasets:\n  - path: rows.jsonl\n    type: alpaca\n")
    assert error_of("--config", str(file)).endswith(
        f"`python -m tools.migrate {file}` translates another program's file"
    )
    file.write_text("peft_use_rslora: true\n")
    assert "here it is `use_rslora: true`" in error_of("--config", str(file))


def test_an_adapter_whose_folder_has_the_name_of_a_method(tmp_path, monkeypatch):
    (tmp_path / "lora").mkdir()
    monkeypatch.chdir(tmp_path)
    assert parse(["--train_type", "lora", "--adapter", "lora"])[0].adapter == "lora"


@pytest.mark.parametrize(
    ("module", "classes"),
    [
        ("transformers.training_args", ["TrainingArguments"]),
        ("trl.trainer.base_config", ["_BaseConfig"]),
        ("trl.trainer.sft_config", ["SFTConfig"]),
        ("trl.trainer.model_config", ["ModelConfig"]),
        ("trl.scripts.utils", ["ScriptArguments", "DatasetMixtureConfig"]),
        ("accelerate.commands.config.config_args", ["BaseConfig", "ClusterConfig"]),
    ],
)
def test_the_table_has_every_option_of_the_installed_versions(module, classes):
    names = set(declared_options(module, *classes)) - {"_VALID_DICT_FIELDS", "framework"}
    nested = {
        "deepspeed_config",
        "megatron_lm_config",
        "datasets",
    }  # read by tools/migrate.py, or lost as a whole
    assert len(names) > 3
    assert names - set(FOREIGN.by_name) - set(FIELDS) - nested == set()


def test_translations_are_options_that_train_accepts():
    """Each name with several kinds of values gives values of this program's options, or a reason."""
    for name in FOREIGN.by_name:
        for value in ("true", "false", "1", "3.0", "0.05", "adamw_torch", "cosine", "lora", "a/b"):
            translation = FOREIGN.by_name[name].apply({name: value})
            assert set(translation.options) <= set(FIELDS), name
            assert translation.options or translation.note, (name, value)
    for values, option in ((OPTIMIZERS, "optimizer"), (SCHEDULES, "lr_scheduler")):
        assert set(values.values()) <= set(FIELDS[option].metadata["choices"])


def test_only_train_knows_foreign_options():
    with pytest.raises(UserError, match=r"^unknown option --learning_rate"):
        evaluate.COMMAND.read(["RUN", "--learning_rate", "1"])
