"""The vision parts of models in files: loaded, packed, saved in PEFT's form, merged, trained further.

Gemma 3's files have several spellings of names. Qwen3-VL's linears include those of its projector.
"""

from __future__ import annotations

import dataclasses
import json
import shutil

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

import export
from files.names import ADAPTER, ADAPTER_CONFIG
from finished.finished_run import load_model, open_run
from launch.ranks import RankInfo
from models.adapters import replace_adapters
from models.lora import adapters_off
from models.registry import read_config
from options.errors import UserError
from tests.helpers.adapters import BARE_MATRIX, args_for, save_peft_adapter
from tests.helpers.auto_classes import load_transformers_model
from tests.helpers.bnb_checkpoints import pack_like_the_hub, without_quantizing
from tests.helpers.expansion import all_tensors
from tests.helpers.finished_runs import write_random_run
from tests.helpers.image_models import (
    GEMMA,
    IMAGES,
    MODELS,
    PACKED,
    PROJECTOR,
    ROWS,
    TOWER,
    TinyModel,
    loss_of_transformers,
    padded,
)
from tests.helpers.products import slow
from tests.helpers.runs import dense_state, make_job, set_up, trained_tensors
from tests.helpers.spellings import SPELLINGS, is_of_a_tower, respell

ONE_RANK = RankInfo(0, 1, 0, 1, torch.device("cpu"))


def loss_of_rows(model, of: TinyModel = GEMMA) -> torch.Tensor:
    """Return the summed loss of all rows, of a model of this program."""
    return model(**padded(ROWS, of=of).inputs())


def expected_loss(model, of: TinyModel = GEMMA) -> torch.Tensor:
    """Return the summed loss of all rows, of transformers' model or of PEFT's."""
    return torch.stack([loss_of_transformers(model, row, of) for row in ROWS]).sum()


@pytest.mark.parametrize(
    "spelling", [pytest.param(s, marks=() if s == "hub" else pytest.mark.slow) for s in SPELLINGS]
)
def test_the_vision_parts_load_from_every_spelling(spelling, checkpoints, alpaca_file, one_rank, tmp_path):
    base = respell(checkpoints("gemma3_wrapper"), tmp_path / "base", SPELLINGS[spelling])
    ours = one_rank(dense_state, args_for(base, alpaca_file, "lora", *IMAGES))[0]
    theirs = load_transformers_model(base, dtype=torch.float32).state_dict()
    names = {name for name in theirs if is_of_a_tower(name)}
    assert names == {name for name in ours if is_of_a_tower(name)} and len(names) > 30
    for name in names:
        torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=0)


@pytest.mark.parametrize(
    ("name", "precision"),
    [
        ("gemma3", "bf16"),
        ("gemma3", "fp16_autocast"),
        ("qwen3_vl", "bf16"),
        *slow([("qwen3_vl", "fp16_autocast")]),
    ],
)
def test_the_tower_in_16_bits(name, precision, checkpoints, alpaca_file, one_rank):
    """The memory of the weights is checked by `set_up`. Buffers are transformers' own, bit for bit."""
    of = MODELS[name]
    args = args_for(checkpoints(of.kind), alpaca_file, "lora", *IMAGES)
    loss, *_ = one_rank(loss_in, args, "fp32", of)[0]
    found, dtypes, buffers = one_rank(loss_in, args, precision, of)[0]
    assert found == pytest.approx(loss, rel=0.03)
    theirs = load_transformers_model(checkpoints(of.kind), dtype=torch.bfloat16)
    expected = {name: buffer for name, buffer in theirs.named_buffers() if is_of_a_tower(name)}
    assert buffers.keys() == expected.keys()
    for name, buffer in expected.items():
        torch.testing.assert_close(buffers[name], buffer, rtol=0, atol=0)
    linears = {
        dtypes[name] for name in dtypes if (".encoder." in name or ".blocks." in name) and "norm" not in name
    }
    others = {*dtypes.values()} - linears
    assert linears == {torch.bfloat16 if precision == "bf16" else torch.float16}
    assert others == (set() if precision == "bf16" else {torch.float32}), "the stream of hidden states"


def loss_in(rank_info, args, precision, of) -> tuple[float, dict, dict]:
    """Return (loss sum of all rows, {parameter of the vision parts: its dtype}, their buffers)."""
    job, model = set_up(rank_info, [*args, "--precision", precision])
    with torch.no_grad(), job.precision.context(rank_info.device.type):
        loss = loss_of_rows(model, of).item()
    dtypes = {name: p.dtype for name, p in model.named_parameters() if is_of_a_tower(name)}
    return loss, dtypes, {name: b.clone() for name, b in model.named_buffers() if is_of_a_tower(name)}


@pytest.mark.parametrize(
    ("name", "train_type"),
    [("gemma3", "full"), *slow([("gemma3", "bnb_dora"), ("qwen3_vl", "full"), ("qwen3_vl", "bnb_dora")])],
)
def test_a_run_is_opened_with_its_vision_parts(
    name, train_type, checkpoints, alpaca_file, one_rank, tmp_path
):
    """A whole model has its base's tower, bit for bit, in the base's spelling."""
    of = MODELS[name]
    base = respell(checkpoints(of.kind), tmp_path / "base", SPELLINGS["hub"])
    args = args_for(base, alpaca_file, train_type, *IMAGES, "--precision", "bf16")
    write_random_run(one_rank, tmp_path / "run", args)
    run = open_run(tmp_path / "run")
    model = load_model(run, torch.device("cpu"), torch.float32)
    if train_type == "full":
        before, after = all_tensors(base), all_tensors(tmp_path / "run")
        assert before.keys() == after.keys()
        assert all(torch.equal(before[name], after[name]) for name in before if is_of_a_tower(name))
        theirs = load_transformers_model(tmp_path / "run", dtype=torch.float32).eval()
        with torch.no_grad():
            expected = expected_loss(theirs, of)
            torch.testing.assert_close(loss_of_rows(model, of), expected, rtol=1e-5, atol=0)
    assert run.is_base_verified and run.family.has_images


def test_images_for_a_model_of_text_alone(checkpoints):
    with pytest.raises(UserError, match=r"llama takes no images here; .* do: qwen2_5_vl, qwen3_vl, gemma3$"):
        read_config(checkpoints("llama"), images=True)


@pytest.mark.parametrize(
    ("name", "spelling", "train_type", "options"),
    [
        *slow([("gemma3", "hub", "dora", TOWER)]),
        ("gemma3", "hub", "lora", [*PROJECTOR, "--use_rslora", "true"]),
        ("qwen3_vl", "hub", "dora", TOWER),
        *slow(("gemma3", spelling, "dora", TOWER) for spelling in SPELLINGS if spelling != "hub"),
        *slow(("gemma3", spelling, "lora", TOWER) for spelling in SPELLINGS),
        *slow((name, "hub", "dora", []) for name in MODELS),
        *slow(
            (name, "hub", "dora", [*TOWER, "--lora_target_modules", "v_proj,mlp.up_proj"]) for name in MODELS
        ),
        *slow((name, "hub", "dora", PROJECTOR) for name in ("qwen3_vl", "qwen2_5_vl")),
        *slow([("qwen3_vl", "without head", "dora", TOWER)]),
    ],
)
def test_a_saved_adapter_loads_in_peft_and_merges(
    name, spelling, train_type, options, checkpoints, alpaca_file, one_rank, tmp_path
):
    """PEFT finds each tensor of the file, and misses none. The merged folder loads in transformers."""
    of, folder = MODELS[name], tmp_path
    base = respell(checkpoints(of.kind), tmp_path / "base", SPELLINGS[spelling])
    args = args_for(base, alpaca_file, train_type, *IMAGES, *options)
    write_random_run(one_rank, folder / "run", args)
    run = open_run(folder / "run")
    ours = load_model(run, torch.device("cpu"), torch.float32)
    theirs = peft.PeftModel.from_pretrained(
        load_transformers_model(base, dtype=torch.float32), folder / "run"
    )
    saved = load_file(folder / "run" / ADAPTER)
    assert peft.get_peft_model_state_dict(theirs).keys() == saved.keys()
    assert any(is_of_a_tower(name.removeprefix("base_model.model.")) for name in saved) == bool(options)
    assert isinstance(json.loads((folder / "run" / ADAPTER_CONFIG).read_text())["target_modules"], list)
    assert (
        export.main([str(word) for word in (folder / "run", "--to", "merged", "--out", folder / "out")]) == 0
    )
    merged = load_transformers_model(folder / "out", dtype=torch.float32)
    before, after = all_tensors(base), all_tensors(folder / "out")
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert sum(map(is_of_a_tower, changed)) == of.n_adapted(options, train_type)
    with torch.no_grad():
        loss = loss_of_rows(ours, of)
        for model in (theirs.eval(), merged.eval()):
            torch.testing.assert_close(loss, expected_loss(model, of), rtol=1e-5, atol=0)
        with adapters_off(ours):
            loss = loss_of_rows(ours, of)
        replace_adapters(ours, run.family, dataclasses.replace(run.config, vision_targets="none"))
        with adapters_off(ours):  # the base is the one that was loaded
            torch.testing.assert_close(loss_of_rows(ours, of), loss, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("name", "spelling"), [("gemma3", "memory"), *slow([("gemma3", "hub"), ("qwen3_vl", "memory")])]
)
def test_a_tower_that_bitsandbytes_packed(name, spelling, checkpoints, alpaca_file, one_rank, tmp_path):
    """It is not packed again, and a merge into the dequantized weights has it."""
    of = MODELS[name]
    base = respell(checkpoints(of.kind), tmp_path / "base", SPELLINGS[spelling])
    expected = pack_like_the_hub(base, tmp_path / "4bit")
    args = args_for(tmp_path / "4bit", alpaca_file, "bnb_dora", *IMAGES, *TOWER)
    dense = one_rank(without_quantizing, dense_state, args)[0]
    if spelling == "memory":
        assert expected.keys() == dense.keys() - ({"lm_head.weight"} if of is GEMMA else set())  # is tied
        assert all(torch.equal(dense[name], tensor) for name, tensor in expected.items())
    write_random_run(one_rank, tmp_path / "run", args)
    ours = load_model(open_run(tmp_path / "run"), torch.device("cpu"), torch.float32)
    exported = ["--to", "merged", "--out", tmp_path / "out", "--dtype", "float32", "--check", "false"]
    assert export.main([str(word) for word in (tmp_path / "run", *exported)]) == 0
    merged = load_transformers_model(tmp_path / "out", dtype=torch.float32).eval()
    with torch.no_grad():
        torch.testing.assert_close(loss_of_rows(ours, of), expected_loss(merged, of), rtol=1e-5, atol=0)


def test_a_cache_has_the_packed_tower(checkpoints, alpaca_file, one_rank, tmp_path):
    options = [*IMAGES, *PACKED, "--quantized_cache", tmp_path / "cache"]
    args = args_for(checkpoints("gemma3_wrapper"), alpaca_file, "qlora", *options)
    first = one_rank(dense_state, args)[0]
    later = one_rank(without_quantizing, dense_state, args)[0]
    assert first.keys() == later.keys() and all(torch.equal(first[name], later[name]) for name in first)
    args[args.index("--vision_bits") + 1] = "16"
    for other in (args, args_for(checkpoints("gemma3_wrapper"), alpaca_file, "qlora", *options[-2:])):
        with pytest.raises(UserError, match="made with --vision_bits 4, and this run has --vision_bits 16;"):
            make_job(ONE_RANK, other)
    args[args.index("--vision_bits") + 1] = "4"
    args[-1] = tmp_path / "text_alone"
    one_rank(dense_state, [*args_for(checkpoints("gemma3_wrapper"), alpaca_file, "qlora"), *args[-2:]])
    with pytest.raises(UserError, match="made without --vision_bits 4, and this run has --vision_bits 4;"):
        make_job(ONE_RANK, args)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([*TOWER, "--images", "false"], "--vision_targets all: has no effect without images; leave it out"),
        ([*PACKED, "--images", "false"], "--vision_bits 4: has no effect without images; leave it out"),
        (
            [*IMAGES, *PROJECTOR],
            "--vision_targets projector: this model's is a bare matrix, which PEFT adapts",
        ),
        (
            [*IMAGES, *PROJECTOR, "--train_type", "lora", "--lora_dropout", "0.1"],
            "without --lora_dropout; ch",
        ),
        ([*PACKED, "--train_type", "hqq_lora", "--n_bits", "8"], "with --n_bits 8; leave one of them out"),
        ([*PACKED, "--train_type", "lora"], "--vision_bits has no effect with --train_type lora"),
        ([*TOWER, "--train_type", "full"], "--vision_targets has no effect with --train_type full"),
    ],
)
def test_wrong_options(options, message, checkpoints, alpaca_file):
    args = ["--model_name", checkpoints("gemma3_wrapper"), "--dataset", alpaca_file]
    with pytest.raises(UserError, match=message):
        make_job(ONE_RANK, [*args, *options])


def test_a_packed_tower_is_not_packed_again(checkpoints, alpaca_file, tmp_path):
    pack_like_the_hub(checkpoints("gemma3_wrapper"), tmp_path / "4bit")
    args = ["--model_name", tmp_path / "4bit", "--dataset", alpaca_file, *IMAGES, *PACKED]
    with pytest.raises(UserError, match="--vision_bits 4: the weights are packed already"):
        make_job(ONE_RANK, args)


def test_an_adapter_of_texts_goes_on_with_images(checkpoints, alpaca_file, one_rank, tmp_path):
    """A RUN's base is compared without its vision parts; those of a RUN with images are compared as well."""
    base = shutil.copytree(checkpoints("gemma3_wrapper"), tmp_path / "base")
    write_random_run(one_rank, tmp_path / "texts", args_for(base, alpaca_file, "dora"))
    args = ["--model_name", base, "--dataset", alpaca_file, "--train_type", "dora"]
    again = ["--adapter", tmp_path / "texts", *IMAGES]
    job = make_job(ONE_RANK, [*args, *again])
    assert job.family.has_images and job.config.vision_targets == "none"
    with pytest.raises(UserError, match=r"--vision_targets all: contradicts .* which has none"):
        make_job(ONE_RANK, [*args, *again, *TOWER])

    write_random_run(one_rank, tmp_path / "run", args_for(base, alpaca_file, "dora", *IMAGES, *TOWER))
    ours = one_rank(trained_by_adapter, [*args, *IMAGES, "--adapter", tmp_path / "run"])[0]
    saved = load_file(tmp_path / "run" / ADAPTER)
    name = "model.vision_tower.encoder.layers.1.mlp.fc1"
    assert torch.equal(ours[f"{name}.lora_B"], saved[f"base_model.model.{name}.lora_B.weight"])
    with pytest.raises(UserError, match=r"adapts model.vision_tower.*; --images true loads the vision parts"):
        make_job(ONE_RANK, [*args, "--adapter", tmp_path / "run", "--images", "false"])

    change_a_tower(base)
    open_run(tmp_path / "texts")
    with pytest.raises(UserError, match="trained with a vision tower that has other weights"):
        open_run(tmp_path / "run")


def test_an_adapter_on_a_bare_matrix_goes_on(checkpoints, alpaca_file, one_rank, tmp_path):
    """The adapter is made by PEFT. One of the tower's linears alone gets a new one on the matrix."""
    base, path = checkpoints("gemma3_wrapper"), "model.multi_modal_projector"
    targets = {"target_modules": ["q_proj"], "exclude_modules": r"(.*\.)?vision_tower(\..*)?"}
    theirs = save_peft_adapter(
        base, tmp_path / "peft", target_parameters=[f"{path}.{BARE_MATRIX}"], **targets
    )
    args = ["--model_name", base, "--dataset", alpaca_file, "--train_type", "lora", *IMAGES, "--adapter"]
    ours, saved = one_rank(trained_by_adapter, [*args, theirs])[0], load_file(theirs / ADAPTER)
    assert torch.equal(ours[f"{path}.lora_B"], saved[f"base_model.model.{path}.lora_B.weight"])
    with pytest.raises(
        UserError, match=r"^--lora_dropout 0.1: .*a bare matrix, .*, for which PEFT has no dropout"
    ):
        make_job(ONE_RANK, [*args, theirs, "--lora_dropout", "0.1"])

    targets = {"target_modules": r".*(vision_tower.*(_proj|fc1|fc2)|language_model.*q_proj)"}
    theirs = save_peft_adapter(base, tmp_path / "tower", **targets)
    ours = one_rank(trained_by_adapter, [*args, theirs])[0]
    assert ours[f"{path}.lora_A"].any() and not ours[f"{path}.lora_B"].any()


def trained_by_adapter(rank_info, args) -> dict:
    return trained_tensors(set_up(rank_info, args)[1])


def change_a_tower(folder) -> None:
    """Change a tensor of the vision tower in a checkpoint."""
    for path in folder.glob("*.safetensors"):
        tensors = load_file(path)
        for name in filter(is_of_a_tower, tensors):
            tensors[name] = tensors[name] + 1
        save_file(tensors, path, metadata={"format": "pt"})
