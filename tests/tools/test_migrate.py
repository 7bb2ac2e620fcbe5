"""tools.migrate on configurations written from the documentation of the programs that they are of.

The expected values are written by hand from that documentation, and from docs/options.md.
"""

from __future__ import annotations

import json
import pickle
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from options.foreign_files import ADAPTER_DEFAULTS, DEFAULTS
from options.foreign_values import as_number
from options.train import COMMAND, parse
from tests.helpers.installed_options import NOT_LITERAL, declared_options
from tests.helpers.programs import ROOT
from tools.migrate import main

FOLDER = ROOT / "tests" / "tools" / "migrate"
# Options whose values the printed command must have.
EXPECTED = {
    "axolotl_qlora_fsdp.yml": (
        "--train_type qlora --lora_rank 8 --lora_alpha 16.0 --lora_dropout 0.05 "
        "--lora_target_modules all --model_name meta-llama/Meta-Llama-3-70B "
        "--dataset tatsu-lab/alpaca --dataset_format alpaca --context_length 512 --batch_size 1 "
        "--gradient_accumulation_steps 4 --num_epochs 4 --optimizer adamw --lr 1e-05 "
        "--lr_scheduler cosine --wd 0.0 --eval_share 0.05 --sharding_strategy full_shard "
        "--use_cpu_offload true --use_gradient_checkpointing true --precision auto --packing false "
        "--output_dir ./out/qlora-70b --log_to tqdm --log_every 1"
    ),
    "axolotl_lora_chat.yml": (
        "--train_type hqq_lora --n_bits 8 --lora_rank 32 --dataset_format chat --chat_template llama3 "
        "--optimizer adamw_8bit --eval_every 50 --save_every 100 --early_stopping_patience 3 "
        "--lr_warmup 0.1 --log_to wandb --project_name chats --entity team --name first"
    ),
    "axolotl_full_fsdp1.yml": (
        "--train_type full --dataset mlabonne/FineTome-100k --dataset_format chat --packing true "
        "--batch_size 2 --lr 2e-05 "
        "--optimizer fused_adamw --use_cpu_offload true --eval_share 0.02"
    ),
    "axolotl_full_fsdp2.yml": (
        "--train_type full --sharding_strategy shard_grad_op --use_gradient_checkpointing true "
        "--use_cpu_offload false --max_steps 200 --num_epochs 200 --lr_warmup 0.1 --lr_scheduler linear "
        "--batch_size 16 --wd 0.01"
    ),
    "axolotl_dora.yml": (
        "--train_type bnb_dora --lora_rank 64 --lora_alpha 16.0 --use_rslora true "
        "--lora_target_modules q_proj,k_proj,v_proj,o_proj "
        "--model_name mistralai/Mistral-7B-v0.1@26bca36bde8333b5d7f72e9ed20ccda6a618af24 "
        "--dataset data/chats.jsonl,data/more.jsonl --dataset_format chat --eval_dataset data/test.jsonl "
        "--num_epochs 3 --grad_norm 0.3 "
        "--seed 7 --optimizer paged_adamw_8bit --lr_scheduler constant --lr_warmup 0.03 "
        "--use_gradient_checkpointing true --use_activation_cpu_offload true"
    ),
    "axolotl_completion.yml": (
        "--train_type full --dataset_format completion --columns text=body --precision fp16_autocast "
        "--resume auto "
        "--use_gradient_checkpointing false --batch_size 8 --lr_scheduler cosine --lr_warmup 0.03"
    ),
    "trl_minimal.yaml": (
        "--train_type full --model_name Qwen/Qwen2.5-0.5B --dataset stanfordnlp/imdb --lr 0.0001 "
        "--lr_scheduler cosine --lr_warmup 0.0 --batch_size 8 --num_epochs 3 --context_length 1024 "
        "--save_every 500"
    ),
    "trl_lora.yaml": (
        "--train_type lora --lora_rank 32 --lora_alpha 16.0 --lora_dropout 0.05 "
        "--lora_target_modules default --packing true --batch_size 2 --gradient_accumulation_steps 8 "
        "--lr 0.0002 --lr_scheduler linear --lr_warmup 0.0 --eval_every 100 "
        "--dataset trl-lib/Capybara --eval_dataset trl-lib/Capybara::test"
    ),
    "trl_qlora.yaml": (
        "--train_type bnb_dora --lora_rank 16 --lora_alpha 32.0 --lora_target_modules all "
        "--max_steps 500 --optimizer paged_adamw_32bit --lr_scheduler constant --lr_warmup 0.03 "
        "--save_every 0 --seed 1 --apply_gradient_clipping false --use_activation_cpu_offload true "
        "--log_to wandb --name llama --overwrite true --model_name meta-llama/Llama-3.1-8B-Instruct"
    ),
    "handbook_qlora.yaml": (
        "--train_type qlora --lora_rank 16 --lora_alpha 16.0 "
        "--dataset HuggingFaceH4/ultrachat_200k::train_sft,HuggingFaceH4/ultrachat_200k::test_sft "
        "--lora_target_modules q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj --lr 0.0002 "
        "--keep 1 --save_every 100 --lr_warmup 0.1 --batch_size 4 --gradient_accumulation_steps 2 "
        "--max_steps -1 --context_length 2048 --log_to tensorboard"
    ),
    "handbook_full.yaml": (
        "--train_type full --dataset HuggingFaceTB/Magpie-Pro-300K-Filtered-H4::train_sft,"
        "HuggingFaceTB/OpenHermes-2.5-H4::train_sft --lr 0.001 "
        "--save_every 0 --context_length 2048 --log_to wandb"
    ),
    "factory_lora.yaml": (
        "--train_type lora --lora_rank 8 --lora_alpha 16.0 --lora_target_modules all "
        "--dataset_samples 1000 --dataset {data}/identity.json,{data}/alpaca_en_demo.json "
        "--dataset_format chat "
        "--context_length 2048 --eval_share 0.1 --eval_every 500 --save_every 500 --overwrite true "
        "--lr 0.0001 --gradient_accumulation_steps 8"
    ),
    "factory_qlora_hqq.yaml": (
        "--train_type hqq_lora --n_bits 3 --lora_rank 8 --use_rslora true "
        "--lora_target_modules q_proj,v_proj "
        "--dataset owner/chats --dataset_format chat --packing true --lr_scheduler linear "
        "--lr_warmup 0.0 --lora_plus_ratio 16.0"
    ),
    "factory_full.yaml": (
        "--train_type full --precision bf16 --resume auto --overwrite false --dataset no_such_name "
        "--num_epochs 3 --lr 1e-05"
    ),
    "factory_images.yaml": (
        "--train_type lora --vision_targets all --image_size 512 --image_folder data/pictures "
        "--model_name Qwen/Qwen2.5-VL-7B-Instruct --dataset no_such_name"
    ),
    "axolotl_images.yml": (
        "--train_type qlora --vision_targets none --image_size 1024 --dataset_format chat "
        "--dataset HuggingFaceH4/llava-instruct-mix-vsft --context_length 8192"
    ),
    "factory_llama_pro.yaml": (
        "--train_type llama_pro --model_name models/llama3-8b-pro --precision fp16_autocast"
    ),
    "accelerate_fsdp1.yaml": "--sharding_strategy shard_grad_op --use_cpu_offload true --world_size 2",
    "accelerate_fsdp2.yaml": (
        "--sharding_strategy full_shard --precision fp16_autocast --use_gradient_checkpointing true "
        "--use_cpu_offload false --world_size -1"
    ),
    "accelerate_zero3.yaml": (
        "--sharding_strategy full_shard --use_cpu_offload true --grad_norm 0.5 "
        "--gradient_accumulation_steps 4 --world_size 8"
    ),
    "accelerate_multi_gpu.yaml": (
        "--sharding_strategy ddp --world_size 2 --precision fp32 --master_port 29511"
    ),
    "ds_zero2.json": "--sharding_strategy shard_grad_op --use_cpu_offload true --precision auto",
    "ds_zero3.json": (
        "--sharding_strategy hybrid_full_shard --hybrid_shard_size 8 --use_cpu_offload true "
        "--batch_size 4 --gradient_accumulation_steps 2 --world_size 8 --optimizer adamw --lr 3e-05 "
        "--lr_scheduler linear --lr_warmup 0.05 --wd 0.1 --grad_norm 0.7 --precision fp16_autocast "
        "--use_activation_cpu_offload true"
    ),
}
# Words of the comments: what has no equal, and what was decided.
SAID = {
    "axolotl_qlora_fsdp.yml": ["warmup_steps: 10: --lr_warmup is a share: 10 / the", "evals_per_epoch: 4"],
    "axolotl_lora_chat.yml": ["8-bit weights are HQQ's"],
    "axolotl_full_fsdp1.yml": ["split train[:20%]: whole splits are read", "cosine ends at a tenth of --lr"],
    "axolotl_dora.yml": ["neftune_noise_alpha: 5", "2.5 of them end by --max_steps",
                         "deepspeed_configs/zero2.json"],
    "trl_lora.yaml": ["push_to_hub", "eos_token: <|im_end|>"],
    "handbook_qlora.yaml": ["test_split_size: 1000", "once an epoch",
                            "write its text to a file: --chat_template FILE"],
    "handbook_full.yaml": ["weight 0.001, a share of its rows: all are used"],
    "factory_lora.yaml": ["trust_remote_code: true"],
    "factory_full.yaml": ["no_such_name: not in", "--resume auto, not --overwrite"],
    "factory_images.yaml": ["video_max_pixels: 16384: rows are texts and images", "the longest side"],
    "axolotl_images.yml": ["image_resize_algorithm: bilinear: images are resized as the model's own"],
    "factory_llama_pro.yaml": ["block_expansion.py makes the expanded model"],
    "accelerate_fsdp2.yaml": ["torchrun --nnodes 2 --nproc_per_node 8 train.py", "add --model_name"],
    "accelerate_multi_gpu.yaml": ["gpu_ids: 0,1: CUDA_VISIBLE_DEVICES=0,1 before the command"],
    "ds_zero2.json": ["weights are offloaded with the optimizer", "gathered for forward and backward"],
    "ds_zero3.json": ["64 rows per step = 8 GPUs x 4 x 2", "curriculum_learning", "betas", "not to a disk"],
}  # fmt: skip


def migrated(capsys, *files) -> tuple[dict, str]:
    """Return (the Config's values of the printed command, the comments)."""
    assert main([str(file) for file in files]) == 0
    printed = capsys.readouterr()
    python, program, *argv = shlex.split(printed.out.replace("\\\n", " "))
    assert (python, program) == ("python", "train.py")
    assert all(line.startswith("#") for line in printed.err.splitlines())
    return vars(parse(argv)[0]), printed.err


def error_of(capsys, *files) -> str:
    """Return the error for these files: one line, status 2, and nothing on stdout."""
    assert main([str(file) for file in files]) == 2
    printed = capsys.readouterr()
    assert not printed.out and printed.err.startswith("error: ") and printed.err.count("\n") == 1
    return printed.err


def test_there_are_twenty_configurations_of_all_programs():
    names = {path.name for path in FOLDER.iterdir() if path.is_file()}
    assert names == set(EXPECTED) and len(names) >= 20


@pytest.mark.parametrize("name", EXPECTED)
def test_the_command_of_a_configuration(name, capsys):
    found, comments = migrated(capsys, FOLDER / name)
    expected = COMMAND.read(EXPECTED[name].format(data=FOLDER / "data").split())
    assert {option: found[option] for option in expected} == expected
    assert "not known to this tool" not in comments
    for words in SAID.get(name, []):
        assert words in comments


def test_a_training_program_with_its_launcher(capsys):
    """The program's own settings win; the launcher's complete them."""
    found, comments = migrated(capsys, FOLDER / "accelerate_zero3.yaml", FOLDER / "trl_lora.yaml")
    assert (found["train_type"], found["sharding_strategy"], found["world_size"]) == ("lora", "full_shard", 8)
    assert (found["gradient_accumulation_steps"], found["grad_norm"]) == (8, 0.5)
    assert found["use_cpu_offload"] and "add --model_name" not in comments
    # transformers' own bf16, TRL's default, counts, not accelerate's "no".
    assert (
        migrated(capsys, FOLDER / "trl_lora.yaml", FOLDER / "accelerate_multi_gpu.yaml")[0]["precision"]
        == "auto"
    )


def test_paged_optimizers_are_not_combined_with_offload(capsys, tmp_path):
    """Preflight refuses it, after the parser."""
    found, comments = migrated(capsys, FOLDER / "trl_qlora.yaml", FOLDER / "ds_zero2.json")
    assert found["optimizer"] == "adamw" and found["use_cpu_offload"] and "paging has no effect" in comments


def edited(tmp_path: Path, name: str, **changes) -> Path:
    """Return a copy of a configuration with other values."""
    tree = yaml.safe_load((FOLDER / name).read_text()) | changes
    (tmp_path / name).write_text(
        yaml.safe_dump({key: each for key, each in tree.items() if each != "remove"})
    )
    return tmp_path / name


def test_rows_of_a_step_become_accumulation(capsys, tmp_path):
    """axolotl's total batch: rows / (GPUs x rows of a micro-batch), which a run computes for any GPUs."""
    file = edited(tmp_path, "axolotl_full_fsdp2.yml", batch_size=128, gradient_accumulation_steps="remove")
    assert migrated(capsys, file, FOLDER / "accelerate_fsdp1.yaml")[0]["gradient_accumulation_steps"] == 4
    found, comments = migrated(capsys, file)
    assert found["effective_batch_size"] == 128 and "a multiple of GPUs x 16" in comments
    beyond = edited(tmp_path, "axolotl_full_fsdp2.yml", batch_size="1e308", micro_batch_size="1e-300")
    assert "--batch_size: '1e-300' is not a whole number" in error_of(capsys, beyond)


def test_defaults_are_those_of_the_installed_programs():
    """TRL's own, then transformers'. LLaMA-Factory has transformers' where it has none of its own."""
    transformers = declared_options("transformers.training_args", "TrainingArguments")
    trl = transformers | declared_options("trl.trainer.base_config", "_BaseConfig")
    trl |= declared_options("trl.trainer.sft_config", "SFTConfig")
    trl |= declared_options("trl.trainer.model_config", "ModelConfig")
    # None means PEFT's choice, and bf16 unless fp16 is asked for.
    trl |= {"lora_target_modules": "default", "bf16": True}
    for theirs, program in ((transformers, "LLaMA-Factory"), (trl, "TRL")):
        ours = DEFAULTS[program] | ADAPTER_DEFAULTS[program]
        compared = [name for name in ours if name in theirs and theirs[name] is not NOT_LITERAL]
        assert len(compared) >= 6
        for name in compared:
            number = as_number(ours[name])
            value = str(theirs[name]).lower() if number is None else float(theirs[name])
            assert value == (ours[name] if number is None else number), (program, name)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("a: 1\n", "not a configuration of axolotl, TRL, LLaMA-Factory, accelerate or DeepSpeed"),
        ("- a\n", "expected `key: value` lines"),
        ("", "expected `key: value` lines"),
        ("train_type: qlora\nlr: 1e-4\n", "has train.py's own options: python train.py --config"),
        ("base_model: &a b\ndatasets: [*a]\n", "line 2: aliases"),
        ("base_model: !!python/object/apply:os.system [id]\n", "line 1 is not YAML that is read here"),
        ("base_model: a\nbase_model: b\n", "line 2: base_model is given a second time"),
        ("base_model: a\nx: " + "[" * 50 + "]" * 50, "nested deeper than 12 levels"),
        ("base_model: a\n? [1]\n: 2\n", "a key that is not a text"),
        ("base_model: {a: [\n", "is not YAML"),
        ("base_model: a\ndatasets: rows.jsonl\n", "datasets: expected a list of `path: ...`"),
        ("base_model: a\ndatasets: [{type: alpaca}]\n", "datasets: an entry without `path`"),
        ("base_model: a\nrl: dpo\n", "rl: dpo: answers are trained on, not preferences"),
        ("base_model: a\nadapter: llama-adapter\n", "adapter: llama-adapter: only LoRA, DoRA"),
        ("model_name_or_path: a\nstage: ppo\n", "stage: ppo: only supervised training"),
        ("base_model: a\nmicro_batch_size: 0\n", "--batch_size 0: must be positive"),
        ("base_model: a\nlearning_rate: fast\n", "--lr: 'fast' is not a number"),
        ('base_model: "a\\eb"\n', "--model_name: has characters that cannot be printed"),
        ("base_model: " + "a" * 2**21, "at most 1,048,576 are read"),
    ],
)
def test_files_that_are_refused(content, words, capsys, tmp_path):
    (tmp_path / "file.yaml").write_text(content)
    error = error_of(capsys, tmp_path / "file.yaml")
    assert words in error and "file.yaml" in error


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("ds.json", b'{"zero_optimization": {"stage": 3},}', "line 1: not a valid JSON file"),
        ("ds.json", b'{"train_batch_size": NaN}', "NaN is not a JSON value"),
        ("ds.json", b'{"train_batch_size": 1, "train_batch_size": 2}', "is repeated in an object"),
        ("ds.json", b'{"train_batch_size": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested too deeply"),
        ("a.yaml", b"base_model: \xff", "not a UTF-8 text"),
        ("none.yaml", None, "No such file"),
    ],
)
def test_bytes_that_are_refused(name, content, words, capsys, tmp_path):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    assert words in error_of(capsys, tmp_path / name)


class Bomb:
    """Running code is what unpickling would do."""

    def __reduce__(self):
        return (exec, ("raise SystemExit(99)",))


@pytest.mark.parametrize("name", ["training_args.bin", "args.pt", "args.pkl", "renamed.yaml", "renamed.json"])
@pytest.mark.parametrize("write", [torch.save, lambda value, path: path.write_bytes(pickle.dumps(value))])
def test_pickles_are_never_read(name, write, capsys, tmp_path):
    write(Bomb(), tmp_path / name)
    assert "a pickle can run any code, so none is read; give the YAML" in error_of(capsys, tmp_path / name)


def test_two_files_of_a_kind_are_refused(capsys):
    assert "give one" in error_of(capsys, FOLDER / "trl_lora.yaml", FOLDER / "axolotl_dora.yml")
    assert "give one" in error_of(capsys, FOLDER / "ds_zero2.json", FOLDER / "ds_zero3.json")


def test_alpha_is_twice_the_rank_in_llama_factory(capsys, tmp_path):
    for name in ("lora_rank", "lora_r"):
        changes = {"lora_rank": "remove"} | {name: 12}
        assert migrated(capsys, edited(tmp_path, "factory_lora.yaml", **changes))[0]["lora_alpha"] == 24


def test_texts_for_pretraining(capsys, tmp_path):
    """axolotl's `pretraining_dataset` is a list of data sets or the name of one."""
    for value in ("a/b", [{"path": "a/b", "type": "pretrain"}], [{"path": "a/b"}]):
        file = edited(tmp_path, "axolotl_completion.yml", datasets="remove", pretraining_dataset=value)
        found = migrated(capsys, file)[0]
        assert (found["dataset"], found["dataset_format"]) == ("a/b", "completion")


def factory_info(tmp_path: Path, **changes) -> Path:
    """Return a configuration of one data set, with changes to its description (`info`) and to itself."""
    info = {"rows": {"file_name": "rows.json"} | changes.pop("info")}
    (tmp_path / "data").mkdir(exist_ok=True)
    (tmp_path / "data" / "dataset_info.json").write_text(json.dumps(info))
    return edited(tmp_path, "factory_lora.yaml", dataset="rows", **changes)


@pytest.mark.parametrize(
    ("info", "changes", "expected"),
    [
        ({}, {}, ("chat", None)),  # instructions become a chat with the template
        ({}, {"template": "alpaca"}, ("alpaca", None)),
        ({}, {"template": "remove"}, ("chat", None)),  # the tokenizer's own template
        ({"columns": {"prompt": "q", "response": "a", "query": "input"}}, {},
         ("chat", "instruction=q,output=a")),
        ({"columns": {"prompt": "body"}}, {"stage": "pt"}, ("completion", "text=body")),
        ({"formatting": "sharegpt"}, {}, ("chat", None)),
        ({"formatting": "sharegpt", "columns": {"messages": "talk", "tools": "functions"}}, {},
         ("chat", "messages=talk,tools=functions")),
        ({"formatting": "sharegpt", "columns": {"system": "rules"}}, {}, ("chat", "system=rules")),
        ({"formatting": "sharegpt", "columns": {"images": "pics"}}, {}, ("chat", "images=pics")),
        ({"columns": {"images": "images"}}, {}, ("chat", None)),
    ],
)  # fmt: skip
def test_columns_and_formats_of_dataset_info(info, changes, expected, capsys, tmp_path):
    found = migrated(capsys, factory_info(tmp_path, info=info, **changes))[0]
    assert (found["dataset_format"], found["columns"]) == expected
    assert found["dataset"] == str(tmp_path / "data" / "rows.json")


def test_what_an_entry_of_dataset_info_loses(capsys, tmp_path):
    """Sets to evaluate on are read as those to train on."""
    info = {"formatting": "sharegpt", "folder": "sub", "num_samples": 20, "columns": {"videos": "clips"},
            "tags": {"user_tag": "u", "assistant_tag": "gpt", "system_tag": "system"}}  # fmt: skip
    file = factory_info(tmp_path, info=info, eval_dataset="rows", template="remove")
    comments = migrated(capsys, file)[1]
    for key in ("dataset rows", "eval_dataset rows"):
        assert f"{key}: folder: sub" in comments and f"{key}: num_samples: 20" in comments
        assert f"{key}: columns: videos: clips" in comments
        assert f"{key}: tags: user_tag: u: write human in the rows" in comments
    assert "assistant_tag" not in comments and "no template: the tokenizer's own is used" in comments
    tags = {"role_tag": "role", "content_tag": "content", "assistant_tag": "assistant"}
    comments = migrated(capsys, factory_info(tmp_path, info={"formatting": "sharegpt", "tags": tags}))[1]
    assert "tags: user_tag: human: write user in the rows" in comments and "assistant_tag" not in comments
    hub = {"hf_hub_url": "a/b", "subset": "en", "split": "sft", "revision": "v1"}
    found = migrated(capsys, factory_info(tmp_path, info=hub, eval_dataset="rows"))[0]
    assert found["dataset"] == found["eval_dataset"] == "a/b:en:sft@v1"


def test_weights_of_several_sets(capsys, tmp_path):
    changes = {"dataset": "chats,identity", "mix_strategy": "interleave_over", "interleave_probs": "0.7,0.3"}
    file = edited(tmp_path, "factory_lora.yaml", dataset_dir=str(FOLDER / "data"), **changes)
    found, comments = migrated(capsys, file)
    assert found["dataset"] == f"owner/chats*0.7,{FOLDER / 'data' / 'identity.json'}*0.3"
    assert "an epoch uses the largest set once" in comments


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        (
            {"path": "a/b", "name": "en", "split": "train_sft", "revision": "v1"},
            ("a/b:en:train_sft@v1", "auto"),
        ),
        ({"path": "a/b", "split": "train", "type": "alpaca"}, ("a/b", "alpaca")),
        (
            {"path": "a.jsonl", "ds_type": "json", "split": "train", "type": "chat_template"},
            ("a.jsonl", "chat"),
        ),
        (
            {"path": "json", "data_files": ["a.jsonl", "b.jsonl"], "type": "alpaca"},
            ("a.jsonl,b.jsonl", "alpaca"),
        ),
    ],
)  # fmt: skip
def test_data_sets_of_axolotl(entry, expected, capsys, tmp_path):
    found = migrated(capsys, edited(tmp_path, "axolotl_lora_chat.yml", datasets=[entry]))[0]
    assert (found["dataset"], found["dataset_format"]) == expected


@pytest.mark.parametrize(
    ("entry", "form", "columns", "words"),
    [
        ({"type": "alpaca:chat"}, "alpaca", None, "type: alpaca:chat: its prompt is another"),
        ({"type": "gpteacher"}, "alpaca", "output=response", ""),
        ({"type": "sharegpt"}, "chat", None, "type: sharegpt: its prompt is Vicuna's"),
        ({"type": "context_qa.load_v2"}, "auto", None, "type: context_qa.load_v2: no format here writes"),
        ({"type": "input_output"}, "auto", None, "type: input_output: no format here writes"),
        ({}, "auto", None, "no type: axolotl then takes rows of tokens"),
        (
            {"type": "chat_template", "roles_to_train": ["user"]},
            "chat",
            None,
            "roles_to_train: user: prompts",
        ),
        (
            {"type": "chat_template", "roles_to_train": ["assistant"], "train_on_eos": "turn"},
            "chat",
            None,
            "",
        ),
        ({"type": "chat_template", "message_field_training": "t"}, "chat", None, "message_field_training: t"),
        ({"type": "chat_template", "roles": {"assistant": ["n"]}}, "chat", None, "roles: {assistant: n}"),
        ({"type": "chat_template", "drop_system_message": True}, "chat", None, "drop_system_message: true"),
        ({"type": "alpaca", "shards": 10}, "alpaca", None, "shards: 10: data sets are read whole"),
        ({"type": {"field_system": "s"}}, "alpaca", None, "field_system: s"),
        ({"type": "alpaca", "auth_token": "hf_secret"}, "alpaca", None, "auth_token: (not shown)"),
    ],
)
def test_what_an_entry_of_axolotl_loses(entry, form, columns, words, capsys, tmp_path):
    file = edited(tmp_path, "axolotl_lora_chat.yml", datasets=[{"path": "a/b"} | entry])
    found, comments = migrated(capsys, file)
    assert (found["dataset_format"], found["columns"]) == (form, columns)
    assert f"datasets a/b: {words}" in comments if words else "datasets a/b" not in comments


def test_sets_of_axolotl_that_do_not_fit_together(capsys, tmp_path):
    """--columns and the format count for all sets, also for those to evaluate on."""
    texts = [{"path": name, "type": "completion", "field": field} for name, field in ("ab", "bc")]
    rows = {"path": "c", "type": "alpaca"}
    tests = [dict(texts[0]), rows]
    file = edited(tmp_path, "axolotl_lora_chat.yml", datasets=texts, test_datasets=tests)
    found, comments = migrated(capsys, file)
    assert (found["dataset"], found["eval_dataset"], found["columns"]) == ("a,b", "a,c", "text=b")
    assert "datasets b: columns: text=c: --columns counts for all sets" in comments
    assert "test_datasets c: format: alpaca; of the first set: completion" in comments
    assert "test_datasets a" not in comments


def test_files_of_a_hub_set_need_a_recipe(capsys, tmp_path):
    entry = {"path": "owner/name", "data_files": ["train/a.jsonl"], "type": "alpaca"}
    found, comments = migrated(capsys, edited(tmp_path, "axolotl_lora_chat.yml", datasets=[entry]))
    assert found["dataset"] == "owner/name"
    assert 'with the lines source = "owner/name"; data_files = "train/a.jsonl", for --dataset' in comments


def test_what_an_entry_of_a_mixture_loses(capsys, tmp_path):
    sets = [{"path": "a/b", "name": "en", "split": "sft", "data_dir": "sub", "columns": ["messages"]}]
    file = edited(tmp_path, "trl_minimal.yaml", dataset_name="remove", dataset_mixture={"datasets": sets})
    found, comments = migrated(capsys, file)
    assert found["dataset"] == "a/b:en:sft"
    assert "a/b:en:sft: data_dir: sub" in comments and "columns" not in comments


def test_templates_of_axolotls_sets(capsys, tmp_path):
    sets = [{"path": "a", "type": "chat_template", "chat_template": name} for name in ("chatml", "gemma")]
    found, comments = migrated(capsys, edited(tmp_path, "axolotl_lora_chat.yml", datasets=sets))
    assert found["chat_template"] == "chatml" and "chat_template: gemma: a run has one" in comments


def test_adapters_of_axolotl_have_no_defaults(capsys, tmp_path):
    """PEFT refuses such a configuration there."""
    removed = dict.fromkeys(("lora_target_linear", "lora_target_modules", "lora_alpha"), "remove")
    comments = migrated(capsys, edited(tmp_path, "axolotl_lora_chat.yml", **removed))[1]
    assert "no setting for --lora_alpha, and axolotl has no default: ours, 16.0, holds" in comments
    assert "no setting for --lora_target_modules" in comments and "for --lora_rank" not in comments


def test_losses_and_lengths_of_trl(capsys, tmp_path):
    """Rows that are not cut there get no length of 1024 tokens, which is only the default."""
    file = edited(tmp_path, "trl_minimal.yaml", completion_only_loss=False, max_length=None)
    assert main([str(file)]) == 0
    printed = capsys.readouterr()
    assert "--context_length" not in printed.out and "max_length: null: rows are not cut there" in printed.err
    assert "completion_only_loss: false: prompts are never learned" in printed.err


def test_the_programs_micro_batch_counts_not_its_launchers(capsys, tmp_path):
    """128 rows of a step = 4 GPUs x 16 x 2, though the launcher's file says 8 rows for each GPU."""
    program = edited(tmp_path, "axolotl_full_fsdp2.yml", gradient_accumulation_steps="remove")
    launcher = {"train_batch_size": 128, "train_micro_batch_size_per_gpu": 8}
    (tmp_path / "ds.json").write_text(json.dumps(launcher | {"num_processes": 4}))
    assert migrated(capsys, program, tmp_path / "ds.json")[0]["gradient_accumulation_steps"] == 2


def test_a_template_is_for_conversations_only(capsys, tmp_path):
    """axolotl's type alpaca writes Alpaca's prompt, whatever the template; train.py refuses both together."""
    rows = {"path": "a.jsonl", "type": "alpaca"}
    found, comments = migrated(capsys, edited(tmp_path, "axolotl_lora_chat.yml", datasets=[rows]))
    assert found["chat_template"] is None and "no --chat_template: rows of alpaca" in comments


def test_an_adapter_to_train_further(capsys, tmp_path):
    """Its own rank and targets hold, so the file's are not repeated."""
    file = edited(tmp_path, "axolotl_dora.yml", lora_model_dir="out/first")
    assert main([str(file)]) == 0
    command = capsys.readouterr().out
    assert "--adapter out/first" in command and "--lora_" not in command
    modules = ["embed_tokens", "lm_head"]
    found = migrated(capsys, edited(tmp_path, "axolotl_dora.yml", lora_modules_to_save=modules))[0]
    assert found["train_embeddings"] and found["lora_rank"] == 64


def test_columns_of_axolotl(capsys, tmp_path):
    custom = {"path": "a.jsonl", "type": {"field_instruction": "q", "field_output": "a", "format": "{q}"}}
    found, comments = migrated(capsys, edited(tmp_path, "axolotl_lora_chat.yml", datasets=[custom]))
    assert (found["columns"], found["dataset_format"]) == ("instruction=q,output=a", "alpaca")
    assert "a type with a prompt of its own" in comments
    messages = {"path": "a.jsonl", "type": "chat_template", "field_messages": "talk",
                "message_property_mappings": {"role": "speaker", "content": "text"}}  # fmt: skip
    found, comments = migrated(capsys, edited(tmp_path, "axolotl_lora_chat.yml", datasets=[messages]))
    assert found["columns"] == "messages=talk" and "messages with speaker and text" in comments


def test_secrets_and_shells(capsys, tmp_path):
    """A value cannot end its word in the shell, nor become an option; a token is not shown."""
    file = edited(tmp_path, "trl_minimal.yaml", output_dir="a b; $(id) 'c'", run_name="--verbose",
                  hub_token="hf_secret", wandb_api_key="0123", no_such_setting="x\x1b[2J\nid")  # fmt: skip
    found, comments = migrated(capsys, file)
    assert (found["output_dir"], found["name"], found["verbose"]) == ("a b; $(id) 'c'", "--verbose", False)
    assert "hf_secret" not in comments and "0123" not in comments and "\x1b" not in comments
    assert "no_such_setting: x\\x1b[2J\\nid" in comments


def test_the_tool_as_a_program():
    command = [sys.executable, "-m", "tools.migrate"]
    done = subprocess.run([*command, FOLDER / "trl_lora.yaml"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith("python train.py --train_type lora ")
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
