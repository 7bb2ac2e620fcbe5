"""--adapter: what it takes from the adapter, what it records, and what it refuses."""

from __future__ import annotations

import dataclasses
import json
import shutil

import huggingface_hub
import pytest
import torch
import yaml
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import train
from checkpoints.same_run import check_same_run
from files.names import ADAPTER, ADAPTER_CONFIG
from finished.finished_run import load_model, open_run
from finished.model_card import render_card
from options.config import dump_yaml
from options.errors import UserError
from options.train import parse
from tests.helpers.adapters import args_for, save_peft_adapter
from tests.helpers.finished_runs import damage_adapter, write_random_run
from tests.helpers.hub_cache import FIRST, SECOND, add_to_hub_cache
from tests.helpers.layers import ALPHA, R
from tests.helpers.logits import IDS
from tests.helpers.runs import full_run, outputs


@pytest.fixture(scope="module")
def saved(checkpoints, tmp_path_factory):
    """PEFT's LoRA adapter; read-only."""
    return save_peft_adapter(checkpoints(), tmp_path_factory.mktemp("saved") / "adapter")


@pytest.fixture
def check(checkpoints, short_rows, saved, tmp_path):
    """check(option=value ...) -> the job of a qlora run that continues `saved`; nothing is started."""

    def check(**options):
        good = {"model_name": checkpoints(), "dataset": short_rows, "train_type": "qlora", "adapter": saved}
        good |= {"output_dir": tmp_path / "out", "world_size": 1}
        given = {name: value for name, value in (good | options).items() if value is not None}
        return train.check_run(parse([f"--{name}={value}" for name, value in given.items()])[0])

    return check


@pytest.fixture
def changed(saved, tmp_path):
    """changed(key=value ...) -> a copy of `saved` with other settings."""

    def change(**settings):
        folder = shutil.copytree(saved, tmp_path / "changed", dirs_exist_ok=True)
        written = json.loads((folder / ADAPTER_CONFIG).read_text())
        (folder / ADAPTER_CONFIG).write_text(json.dumps(written | settings))
        return folder

    return change


def adopted(job) -> tuple:
    config = job.config
    return config.lora_rank, config.lora_alpha, {*config.lora_target_modules.split(",")}


def test_rank_alpha_and_targets_are_the_adapters(check, saved, changed):
    """The demo's own defaults do not count as given."""
    job = check()
    assert adopted(job) == (R, ALPHA, {"q_proj", "down_proj"})
    assert f"--adapter {saved}: trained further, with lora_rank {R}, lora_alpha" in "".join(job.remarks)
    written = yaml.safe_load(dump_yaml(job.config))
    assert written["adapter"] == str(saved) and written["lora_rank"] == R
    again = check(lora_rank=R, lora_alpha=ALPHA, lora_target_modules="mlp.down_proj,self_attn.q_proj")
    assert again.config.lora_target_modules == "mlp.down_proj,self_attn.q_proj", "the same linears"
    assert [check(adapter=changed(use_rslora=value)).config.use_rslora for value in (True, None)] == [
        True,
        False,
    ]
    names = {f"model.layers.{i}.{name}" for i in range(3) for name in ("self_attn.q_proj", "mlp.down_proj")}
    assert adopted(check(adapter=changed(target_modules=r".*\.(q|down)_proj")))[2] == names
    assert adopted(check(adapter=changed(target_modules=["q_proj", "down_proj", "c_attn"])))[2] == {
        "q_proj",
        "down_proj",
    }, "PEFT ignores names that match nothing"


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [
        ("lora_rank", 64, "--lora_rank 64: contradicts --adapter {saved}, which has 8; leave the option out"),
        ("lora_alpha", 1.5, "--lora_alpha 1.5: contradicts --adapter {saved}, which has 20"),
        ("use_rslora", "true", "--use_rslora true: contradicts --adapter {saved}, which has false"),
        ("lora_target_modules", "all", "--lora_target_modules all: contradicts --adapter {saved}"),
        ("train_type", "bnb_dora", "is a LoRA adapter, which --train_type bnb_dora does not train; choose"),
        ("train_type", "full", "--adapter has no effect with --train_type full"),
        ("adapter", "", "--adapter: needs a RUN"),
    ],
)
def test_options_that_contradict_the_adapter(option, value, words, check, saved):
    with pytest.raises(UserError) as refused:
        check(**{option: value})
    assert words.format(saved=saved) in str(refused.value)


def test_dora_into_a_lora_train_type(check, changed):
    with pytest.raises(UserError, match="is a DoRA adapter, which --train_type qlora does not train; choose"):
        check(adapter=changed(use_dora=True))


@pytest.mark.parametrize(
    "settings",
    [
        {"use_rslora": "yes"},
        {"rank_pattern": {"q_proj": 2}},
        {"alpha_pattern": {"q_proj": 2}},
        {"bias": "all"},
        {"modules_to_save": ["score"]},
        {"fan_in_fan_out": True},
        {"layers_to_transform": [1]},
        {"trainable_token_indices": [1]},
        {"target_parameters": ["experts"]},
        {"use_qalora": True},
        {"init_lora_weights": "pissa"},
        {"peft_type": "IA3"},
        {"r": True},
        {"lora_alpha": -1},
        {"target_modules": ["lm_head"]},
        {"target_modules": ["q_proj", "lm_head"]},
    ],
    ids=str,
)
def test_settings_that_are_not_computed_here(settings, check, changed):
    with pytest.raises(UserError, match=rf"{ADAPTER_CONFIG}: {next(iter(settings))}[: ]"):
        check(adapter=changed(**settings))


@pytest.mark.parametrize("change", ["shape", "dtype", "nan", "missing", "surplus"])
def test_tensors_that_do_not_fit(change, check, checkpoints, tmp_path):
    targets = ["up_proj"]
    folder = save_peft_adapter(checkpoints(), tmp_path / "adapter", target_modules=targets)
    damage_adapter(folder, change)
    words = {"shape": "has shape", "dtype": "stored as I8", "nan": "NaN", "missing": "is missing"}
    with pytest.raises(UserError, match=rf"{ADAPTER}.*{words.get(change, 'belongs to no adapter')}"):
        check(adapter=folder)


def test_folders_without_an_adapter(check, changed, checkpoints, tmp_path):
    with pytest.raises(UserError, match=r"--adapter .*: holds no adapter \(no adapter_config\.json\)"):
        check(adapter=checkpoints())
    with pytest.raises(UserError, match="--adapter no/such: no such folder, and the hub cannot be reached"):
        check(adapter="no/such")
    folder = changed()
    (folder / ADAPTER).rename(folder / "adapter_model.bin")
    with pytest.raises(UserError, match=r"adapter_model\.bin is a pickle, which is never loaded"):
        check(adapter=folder)
    folder = changed()
    with pytest.raises(UserError, match="is the folder of --adapter"):
        check(adapter=folder, output_dir=folder, overwrite="true")
    (folder / ADAPTER).rename(tmp_path / "elsewhere")
    (folder / ADAPTER).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="is a link out of the folder"):
        check(adapter=folder)


def test_the_base_of_a_peft_adapter_is_told_by_name(check, changed, checkpoints):
    assert "could be compared" not in "".join(check().remarks)
    other = check(adapter=changed(base_model_name_or_path="owner/other"))
    assert "names owner/other as its base" in "".join(other.remarks)
    with pytest.raises(UserError, match="has shape"):
        check(model_name=checkpoints("gemma2"), adapter=changed(base_model_name_or_path="owner/other"))


def test_pefts_recorded_folder_is_compared(check, changed, checkpoints, tmp_path):
    """A copy of the base is the base; other weights or another config of the same shapes are not."""
    copy = shutil.copytree(checkpoints(), tmp_path / "copy")
    adapter = changed(base_model_name_or_path=str(copy))
    assert "could be compared" not in "".join(check(adapter=adapter).remarks)
    written = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(written | {"rms_norm_eps": 0.5}))
    with pytest.raises(UserError, match=rf"was trained on another model than {checkpoints()}: on {copy}"):
        check(adapter=adapter)
    (copy / "config.json").write_text(json.dumps(written))
    shard = sorted(copy.glob("*.safetensors"))[0]
    save_file({n: t + 1 for n, t in load_file(shard).items()}, shard, metadata={"format": "pt"})
    with pytest.raises(UserError, match=rf"was trained on other weights than {checkpoints()}: on {copy}"):
        check(adapter=adapter)
    shard.unlink()
    assert "could be compared" in "".join(check(adapter=adapter).remarks), "half a folder is told"


@pytest.mark.parametrize(("way", "is_told"), [("int8", True), ("16bit", False), ("fp4", False), ([], False)])
def test_other_matmuls_of_the_base_are_told(way, is_told, check, changed):
    told = [line for line in check(adapter=changed(base_matmul=way)).remarks if "--base_matmul" in line]
    assert [line.partition(": ")[2] for line in told] == [
        "was trained with --base_matmul int8; this run has 16bit"
    ] * is_told


def test_pefts_recorded_hub_id_is_compared(check, changed, checkpoints, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    add_to_hub_cache(tmp_path, "owner/base", checkpoints(), FIRST, "main")
    same = check(model_name="owner/base", adapter=changed(base_model_name_or_path="Owner/Base"))
    assert "could be compared" not in "".join(same.remarks)
    older = changed(base_model_name_or_path="owner/base", revision=SECOND)
    told = "".join(check(model_name="owner/base", adapter=older).remarks)
    assert f"was trained on commit {SECOND} of owner/base, not {FIRST}" in told
    changed(revision=None)
    packed = check(model_name="owner/base", adapter=changed(base_model_name_or_path="x/base-bnb-4bit"))
    assert "could be compared" in "".join(packed.remarks)
    with pytest.raises(UserError, match="was trained on owner/other, not on owner/base; name that model"):
        check(model_name="owner/base", adapter=changed(base_model_name_or_path="owner/other"))


def test_pefts_embedding_layers_need_the_option(check, checkpoints, saved, tmp_path):
    """As PEFT saves them without modules_to_save after a resize; with the option they are continued."""
    folder = shutil.copytree(saved, tmp_path / "adapter")
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(checkpoints()), saved)
    model.save_pretrained(folder, save_embedding_layers=True)
    with pytest.raises(UserError, match=r"in full \(PEFT's save_embedding_layers\); --train_embeddings true"):
        check(adapter=folder)
    assert check(adapter=folder, train_embeddings="true").config.train_embeddings


def test_pefts_embedding_layers_over_a_tied_base(check, checkpoints, tmp_path):
    """One tensor for both, or two equal ones, are continued; two different ones are refused."""
    base = checkpoints("qwen2")
    folder = save_peft_adapter(base, tmp_path / "adapter")
    embedding = AutoModelForCausalLM.from_pretrained(base).get_input_embeddings().weight.detach()
    names = [f"base_model.model.{name}.weight" for name in ("model.embed_tokens", "lm_head")]
    adapter = load_file(folder / ADAPTER)
    for count in (1, 2):
        save_file(adapter | {name: embedding.clone() for name in names[:count]}, folder / ADAPTER)
        check(model_name=base, adapter=folder, train_embeddings="true")
    save_file(adapter | {names[0]: embedding, names[1]: embedding + 1}, folder / ADAPTER)
    with pytest.raises(UserError, match="trained apart the embedding and the head"):
        check(model_name=base, adapter=folder, train_embeddings="true")


def test_an_adapter_of_another_base(checkpoints, short_rows, one_rank, tmp_path, capsys):
    """By a RUN's digest: the same shapes, but other weights. One line, exit status 2, nothing written."""
    write_random_run(one_rank, tmp_path / "run", args_for(checkpoints(), short_rows, "qlora"))
    other = shutil.copytree(checkpoints(), tmp_path / "other")
    shard = sorted(other.glob("*.safetensors"))[0]
    save_file({n: t + 1 for n, t in load_file(shard).items()}, shard, metadata={"format": "pt"})
    options = {"model_name": other, "dataset": short_rows, "train_type": "qlora", "adapter": tmp_path / "run"}
    argv = [f"--{name}={value}" for name, value in options.items()]
    assert train.main([*argv, f"--output_dir={tmp_path / 'out'}"]) == 2
    error = capsys.readouterr().err
    assert error.startswith(
        f"error: --adapter {tmp_path / 'run'}: was trained on other weights than those in"
    )
    assert error.count("\n") == 1 and not (tmp_path / "out").exists()


def test_from_the_hub(check, saved, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    add_to_hub_cache(tmp_path, "owner/adapter", saved, FIRST, "main", "v1")
    for name in ("owner/adapter", "owner/adapter@v1"):
        job = check(adapter=name)
        assert job.config.adapter == f"owner/adapter@{FIRST}" and adopted(job)[0] == R


def test_a_run_is_continued(checkpoints, short_rows, one_rank, two_ranks, tmp_path):
    """Step 0 computes what the RUN computed, on one rank and two. The result names what it continued."""
    args = args_for(checkpoints("llama_bias"), short_rows, "bnb_dora")
    logits = write_random_run(one_rank, tmp_path / "run", args)
    args = [*args[:6], "--adapter", tmp_path / "run", "--batch_size", "4"]
    for ranks in (one_rank, two_ranks):
        torch.testing.assert_close(ranks(outputs, args, IDS, False)[0][0], logits, rtol=1e-5, atol=1e-5)
    out = ["--output_dir", tmp_path / "more", "--max_steps", "2", "--lr", "1e-3", "--save_every", "1"]
    config, _ = parse([*map(str, [*args, *out]), "--world_size", "1"])
    printed = one_rank(full_run, train.check_run(config))[0]
    run = open_run(tmp_path / "more")
    assert run.config.lora_rank == R and run.config.adapter == str(tmp_path / "run")
    assert json.loads((run.folder / "run.json").read_text())["model"]["adapter"] == str(tmp_path / "run")
    assert f"continued from adapter <b>{tmp_path / 'run'}</b>" in (run.folder / "report.html").read_text()
    card = render_card(run.config, run.folder, "owner/base", "title", "", "peft")
    assert f"Continued from the adapter: `{tmp_path / 'run'}`" in card
    assert "error" not in printed
    with torch.no_grad():
        now = load_model(run, torch.device("cpu"), torch.float32)(input_ids=IDS).logits
    assert 0 < (now - logits).abs().max() < 1, "trained from the adapter, for two steps"
    # A resumed run must name the same adapter.
    resumed = train.check_run(parse([*map(str, [*args, *out]), "--world_size", "1", "--resume", "auto"])[0])
    assert resumed.saved.step == 2
    with pytest.raises(UserError, match=rf"was started with --adapter {tmp_path / 'run'}; that adapter is"):
        check_same_run(resumed.saved, resumed.config, resumed.run_identity() | {"adapter": "another"})
    without = dataclasses.replace(resumed.config, adapter=None, lora_rank=64)
    with pytest.raises(UserError, match=rf"started with --adapter {tmp_path / 'run'};.*it is left out here"):
        check_same_run(resumed.saved, without, resumed.run_identity() | {"adapter": ""})
