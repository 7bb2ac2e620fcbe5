"""Wrappers trained on text: Gemma 3 and Mistral Small 3, in all that differs from their text models."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import signal
import warnings

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import Ministral3Config

import export
import train
from data.batches import Batch
from data.rows import IGNORE
from files.config_parts import eos_token_id
from files.model_folder import CheckpointFiles
from files.names import ADAPTER, BLOCKS, CARD
from files.weight_headers import WeightHeaders
from finished.finished_run import load_model, open_run
from models.family import unwrapped_name, wrap_family
from models.redundant import is_tied_by_default
from models.registry import FAMILIES, build_on_meta, open_headers, open_weights, read_config
from monitoring.layer_memory import layer_widths
from options.errors import UserError
from options.methods import METHODS
from tests.helpers import tiny
from tests.helpers.adapters import args_for, build_peft_model, save_peft_adapter
from tests.helpers.auto_classes import load_transformers_model
from tests.helpers.bnb_checkpoints import make_single_rank_job, pack_like_the_hub, without_quantizing
from tests.helpers.expansion import all_tensors, edit_config, expand, read_config_json
from tests.helpers.finished_runs import write_random_run
from tests.helpers.logits import IDS, transformers_logits
from tests.helpers.parity import arguments
from tests.helpers.resuming import Signals, run
from tests.helpers.runs import (
    dense_state,
    dense_tensors,
    outputs,
    set_up,
    trained_tensors,
    transformers_model,
)
from tests.helpers.spellings import SPELLINGS, is_of_a_tower, respell
from tests.helpers.stored import write_dense
from training.planned_model import open_planned_model

KINDS = ["gemma3_wrapper", "mistral3"]
TYPES = ["lora", "dora", "qlora", "bnb_dora", "hqq_dora"]


@pytest.mark.slow  # bnb_dora, against the same model of PEFT, is in test_equal_to_peft.py
@pytest.mark.parametrize("train_type", TYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_gradients_are_pefts(kind, train_type, checkpoints, alpaca_file, one_rank):
    """PEFT over the wrapper as transformers loads it, on the dequantized weights."""
    args = args_for(checkpoints(kind), alpaca_file, train_type)
    loss, gradients, state, adapters = one_rank(loss_and_gradients, args)[0]
    model = build_peft_model(checkpoints(kind), state, adapters, METHODS[train_type].adapter == "dora").eval()
    theirs = torch.nn.functional.cross_entropy(
        model(input_ids=IDS).logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten(), reduction="sum"
    )
    theirs.backward()
    assert loss == pytest.approx(theirs.item(), rel=1e-5)
    expected = {peft_name(name): p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert gradients.keys() == expected.keys() and not any("vision" in name for name in gradients)
    for name, gradient in gradients.items():
        scale = expected[name].abs().max().item()
        assert scale > 1e-3, name
        torch.testing.assert_close(gradient, expected[name], rtol=1e-5, atol=1e-5 * scale, msg=name)


def loss_and_gradients(rank_info, args):
    """Return (loss sum, {trained tensor: gradient}, dense weights, trained tensors) on IDS."""
    _, model = set_up(rank_info, args)
    targets = IDS.roll(-1, 1)
    targets[:, -1] = IGNORE
    loss = train.loss_sum(model.eval(), Batch(IDS, targets))
    loss.backward()
    gradients = {unwrapped_name(n): p.grad for n, p in model.named_parameters() if p.requires_grad}
    return loss.item(), gradients, dense_tensors(model), trained_tensors(model)


def peft_name(name: str) -> str:
    """Return this program's name of a trained tensor of PEFT's model."""
    name = name.removeprefix("base_model.model.").replace(".default", "")
    name = name.replace("lora_magnitude_vector.weight", "magnitude_change")
    return name.removesuffix(".weight")


@pytest.mark.parametrize("kind", ["gemma3_wrapper", pytest.param("mistral3", marks=pytest.mark.slow)])
def test_an_adapter_of_peft_is_trained_further(kind, checkpoints, alpaca_file, one_rank, tmp_path):
    """Both ways: its names are those of PEFT over the wrapper, and so are those that a run saves."""
    exclude = r".*(vision_tower|multi_modal_projector).*"
    theirs = save_peft_adapter(checkpoints(kind), tmp_path / "peft", exclude_modules=exclude)
    args = ["--model_name", checkpoints(kind), "--dataset", alpaca_file, "--train_type", "lora"]
    ours = one_rank(outputs, [*args, "--adapter", theirs], IDS)[0][0]
    model = peft.PeftModel.from_pretrained(load_transformers_model(checkpoints(kind)), theirs).eval()
    with torch.no_grad():
        torch.testing.assert_close(ours, model(input_ids=IDS).logits, rtol=1e-4, atol=1e-4)
    more = ["--lora_target_modules", "q_proj,down_proj"]
    write_random_run(one_rank, tmp_path / "run", args_for(checkpoints(kind), alpaca_file, "lora", *more))
    assert load_file(tmp_path / "run" / ADAPTER).keys() == load_file(theirs / ADAPTER).keys()


@pytest.mark.parametrize("targets", [["q_proj"], "all-linear"])
@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("mistral3", r"model\.[vm].*: adapters on vision_tower and multi_modal_projector are not supported"),
        ("gemma3_wrapper", r"adapts model\.vision_tower\..*; --images true loads the vision parts;"),
    ],
)
def test_an_adapter_of_peft_on_the_tower_is_refused(kind, words, targets, checkpoints, alpaca_file, tmp_path):
    """PEFT's names of linears match those of the tower, too, without exclude_modules. The run is on text."""
    base = checkpoints(kind)
    theirs = save_peft_adapter(base, tmp_path / "peft", target_modules=targets)
    options = ["--train_type", "lora", "--adapter", theirs, "--images", "false"]
    with pytest.raises(UserError, match=f"{words} .*exclude_modules"):
        make_single_rank_job(base, alpaca_file, *options)


@pytest.mark.parametrize(
    ("kind", "spelling"),
    [
        ("gemma3_wrapper", "hub"),
        *[
            pytest.param("gemma3_wrapper", name, marks=pytest.mark.slow)
            for name in SPELLINGS
            if name != "hub"
        ],
        pytest.param("mistral3", "hub", marks=pytest.mark.slow),
    ],
)
def test_files_that_bitsandbytes_packed(kind, spelling, checkpoints, alpaca_file, one_rank, tmp_path):
    """In each spelling: nothing is packed again, and the merged folder is dense, the tower's linears too.

    The config of the text model says that they are packed, where transformers reads it, too.
    """
    folder, dense = tmp_path / "4bit", tmp_path / "dense"
    base = respell(checkpoints(kind), dense, SPELLINGS[spelling])
    expected = pack_like_the_hub(base, folder)
    assert any(is_of_a_tower(name) and ".quant_state." in name for name in all_tensors(folder))
    say_packed_in_text_config(folder)
    args = args_for(folder, alpaca_file, "qlora")
    ours = one_rank(without_quantizing, outputs, args, IDS, False)[0][0]
    write_dense(base, expected)
    torch.testing.assert_close(ours, transformers_logits(base), rtol=1e-5, atol=1e-5)
    trained = write_random_run(one_rank, tmp_path / "run", args)
    exported = ["--to", "merged", "--out", tmp_path / "out", "--dtype", "float32", "--check", "false"]
    assert export.main([str(word) for word in (tmp_path / "run", *exported)]) == 0
    torch.testing.assert_close(transformers_logits(tmp_path / "out"), trained, rtol=1e-4, atol=1e-4)
    merged = all_tensors(tmp_path / "out")
    assert merged.keys() == expected.keys()
    assert all(torch.equal(merged[name], expected[name]) for name in expected if is_of_a_tower(name))


def say_packed_in_text_config(folder) -> None:
    """Move quantization_config of config.json into text_config."""
    config = read_config_json(folder)
    text = config["text_config"] | {"quantization_config": config["quantization_config"]}
    edit_config(folder, quantization_config=None, text_config=text)


@pytest.mark.parametrize("train_type", ["qlora", pytest.param("hqq_lora", marks=pytest.mark.slow)])
def test_a_cache_serves_every_spelling(train_type, checkpoints, alpaca_file, one_rank, tmp_path):
    """It is made from files in one spelling, and used with those in another."""
    base, cache = checkpoints("mistral3"), ["--quantized_cache", tmp_path / "cache"]
    first = one_rank(dense_state, args_for(base, alpaca_file, train_type, *cache))[0]
    other = respell(base, tmp_path / "other", SPELLINGS["memory"])
    args = args_for(other, alpaca_file, train_type, *cache)
    later = one_rank(without_quantizing, dense_state, args)[0]
    assert first.keys() == later.keys() and all(torch.equal(first[name], later[name]) for name in first)


@pytest.mark.parametrize("spelling", ["memory", pytest.param("hub", marks=pytest.mark.slow)])
def test_trained_models_are_complete_and_spelled_like_their_base(
    spelling, checkpoints, alpaca_file, one_rank, tmp_path
):
    """`full`, and new blocks alone, put into the expanded model by block_expansion.py."""
    base = respell(checkpoints("gemma3_wrapper"), tmp_path / "base", SPELLINGS[spelling])
    trained = write_random_run(one_rank, tmp_path / "full", args_for(base, alpaca_file, "full"))
    torch.testing.assert_close(transformers_logits(tmp_path / "full"), trained, rtol=1e-5, atol=1e-5)
    before, after = all_tensors(base), all_tensors(tmp_path / "full")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before if is_of_a_tower(name))

    expanded = expand(base, tmp_path / "expanded", "--new_blocks", 1)
    args = args_for(expanded, alpaca_file, "llama_pro", "--llama_pro_save", "blocks")
    trained = write_random_run(one_rank, tmp_path / "run", args)
    put_back = expand(expanded, tmp_path / "whole", "--blocks", tmp_path / "run" / BLOCKS)
    torch.testing.assert_close(transformers_logits(put_back), trained, rtol=1e-5, atol=1e-5)
    expected = all_tensors(expanded).keys()
    assert all_tensors(put_back).keys() == expected and without_numbers(expected) == without_numbers(before)


def without_numbers(names) -> set[str]:
    return {re.sub(r"\d+", "N", name) for name in names}


@pytest.mark.slow
def test_a_stopped_run_resumes(checkpoints, short_rows, two_ranks, tmp_path):
    """The adapter is bit for bit that of a run that was not stopped."""
    options = [*arguments(checkpoints("gemma3_wrapper"), short_rows, "qlora"), "--resume", "auto"]
    args = [str(word) for word in options]
    two_ranks(run, [*args, "--output_dir", str(tmp_path / "whole")])
    stopped = [*args, "--output_dir", str(tmp_path / "stopped")]
    assert "stopped at step 2 of 5" in two_ranks(run, stopped, Signals({2: signal.SIGTERM}))[0]
    assert "5 steps, the last 3 of them in" in two_ranks(run, stopped)[0]
    whole, resumed = (load_file(tmp_path / name / ADAPTER) for name in ("whole", "stopped"))
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_the_end_of_an_answer_is_the_wrappers(checkpoints, tmp_path):
    """The hub's Gemma 3 lists its stops beside text_config."""
    folder = shutil.copytree(checkpoints("gemma3_wrapper"), tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    assert eos_token_id(read_config(folder)[0]) == config["text_config"]["eos_token_id"] == 257
    (folder / "config.json").write_text(json.dumps(config | {"eos_token_id": [1, 106]}))
    assert eos_token_id(read_config(folder)[0]) == [1, 106]


def test_a_head_that_only_the_wrappers_default_ties(checkpoints, tmp_path):
    """As in Mistral Small 3's config.json: planned and trained untied, with and without files."""
    folder = shutil.copytree(checkpoints("mistral3"), tmp_path / "model")
    edit_config(folder, tie_word_embeddings=None)
    config, family = read_config(folder)
    assert config.tie_word_embeddings and is_tied_by_default(config)
    files, _, untied_head = open_weights(folder, config, family)
    assert untied_head == "lm_head.weight" in files.tensors and not config.tie_word_embeddings
    (tmp_path / "bare").mkdir()
    shutil.copy(folder / "config.json", tmp_path / "bare")
    for planned in (open_planned_model(str(folder)), open_planned_model(str(tmp_path / "bare"))):
        assert planned.files.tensors.keys() == files.tensors.keys()
    headers = WeightHeaders(tmp_path / "elsewhere")
    headers.tensors = dict(CheckpointFiles(folder).tensors)
    open_headers(*read_config(folder), headers, is_local=False)
    assert headers.tensors.keys() == files.tensors.keys()


def test_ministral3s_text_model(checkpoints, alpaca_file, one_rank, tmp_path, monkeypatch):
    """Its queries are scaled from some position on, here within the rows."""
    rope = {"rope_type": "yarn", "rope_theta": 1000.0, "factor": 64.0, "original_max_position_embeddings": 8}
    rope |= {"llama_4_scaling_beta": 0.5, "beta_fast": 32.0, "beta_slow": 1.0}
    config = tiny.CONFIGS["mistral3"]()
    sizes = {key: value for key, value in tiny._COMMON.items() if key != "dtype"}
    config.text_config = Ministral3Config(**sizes, head_dim=16, sliding_window=None, rope_parameters=rope)
    monkeypatch.setitem(tiny.CONFIGS, "mistral3", lambda: config)
    folder = tiny.save_checkpoint("mistral3", tmp_path / "model")
    ours, state, adapters = one_rank(outputs, args_for(folder, alpaca_file, "bnb_dora"), IDS)[0]
    model = build_peft_model(folder, state, adapters, use_dora=True).eval()
    with torch.no_grad():
        torch.testing.assert_close(ours, model(input_ids=IDS).logits, rtol=1e-4, atol=1e-4)


def test_another_text_model_is_refused(checkpoints, tmp_path):
    shutil.copy(checkpoints("mistral3") / "config.json", tmp_path)
    edit_config(tmp_path, text_config={"model_type": "qwen2"})
    words = "text_config has the model_type 'qwen2'; in mistral3 known: mistral, ministral3"
    with pytest.raises(UserError, match=words):
        read_config(tmp_path)


@pytest.mark.parametrize("wrapper", [name for name, family in FAMILIES.items() if family.texts])
def test_a_wrapper_is_what_its_text_models_family_says(wrapper):
    """In all but names and classes, for each kind of text model; constant buffers get other names.

    transformers has no text model alone of Qwen-VL's types. They differ in the rotary embedding, and in how
    they get packed rows or features of images.
    """
    differing = {
        "model_class",
        "texts",
        "unused",
        "vision",
        "layers",
        "embedding",
        "norm",
        "rotary",
        "constant_buffers",
    }
    if wrapper == "gemma3":
        differing.add("logit_cap")  # transformers has none around Gemma 3's text model
    if wrapper.endswith("_vl"):
        differing |= {"rotary_class", "match_checkpoint"}
    parts = {"qwen2_5_vl_text": "qwen2", "qwen3_vl_text": "qwen3"}
    for text_type, family in FAMILIES[wrapper].texts.items():
        alone = FAMILIES[parts.get(text_type, text_type)]
        same = {field.name for field in dataclasses.fields(family)} - differing
        assert all(getattr(family, name) == getattr(alone, name) for name in same)
        config = tiny.CONFIGS["gemma3"]()
        ours, theirs = family.constant_buffers(config), alone.constant_buffers(config)
        assert list(ours) == [name.replace("model.", "model.language_model.") for name in theirs]


def test_a_wrapper_changes_its_text_model_like_the_family_alone(checkpoints, monkeypatch):
    """Its match_checkpoint gets the part of the wrapper that has the layers, with the text model's config."""
    changed = []
    text = dataclasses.replace(FAMILIES["mistral"], match_checkpoint=changed.append)
    wrapper = wrap_family({"mistral": text}, FAMILIES["mistral3"].model_class, FAMILIES["mistral3"].unused)
    monkeypatch.setitem(FAMILIES, "mistral3", wrapper)
    model, _ = build(checkpoints("mistral3"))
    assert changed == [model.model.language_model] and changed[0].config.model_type == "mistral"


def test_a_plan_sees_the_widths_of_the_text_model(checkpoints):
    """Gemma 3's are the same inside a wrapper and alone."""
    widths = [layer_widths(*build(checkpoints(kind))) for kind in ("gemma3", "gemma3_wrapper")]
    assert widths[0] == widths[1] and widths[0].query == 4 * 32 and widths[0].window == 16


def build(folder):
    """Return (model on meta, family)."""
    config, family = read_config(folder)
    return build_on_meta(config, family), family


@pytest.mark.slow
def test_a_trained_embedding(checkpoints, short_rows, one_rank, tmp_path):
    """PEFT finds it below the wrapper's names, and ties the head to it."""
    base, folder = checkpoints("gemma3_wrapper"), tmp_path / "run"
    args = [*arguments(base, short_rows, "qlora"), "--train_embeddings", "true", "--output_dir", folder]
    one_rank(run, [str(word) for word in args])
    opened = open_run(folder)
    ours = load_model(opened, torch.device("cpu"), torch.float32)
    state = one_rank(dense_state, args_for(base, short_rows, "qlora"))[0]
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Found missing adapter keys")
        theirs = peft.PeftModel.from_pretrained(transformers_model(base, state), folder).eval()
    with torch.no_grad():
        expected = theirs(input_ids=IDS).logits
        torch.testing.assert_close(ours(input_ids=IDS).logits, expected, rtol=1e-4, atol=1e-4)
    embedding = load_file(folder / ADAPTER)["base_model.model.model.language_model.embed_tokens.weight"]
    assert (embedding - state["model.language_model.embed_tokens.weight"]).abs().max() > 1e-3


def test_the_files_beside_an_exported_model(checkpoints, alpaca_file, one_rank, tmp_path):
    """A merged folder has the processor's; the card of an adapter names the class that loads its base."""
    base = shutil.copytree(checkpoints("mistral3"), tmp_path / "base")
    (base / "preprocessor_config.json").write_text("{}")
    write_random_run(one_rank, tmp_path / "run", args_for(base, alpaca_file, "lora"))
    for to in ("merged", "adapter"):
        exported = ["--to", to, "--out", tmp_path / to]
        assert export.main([str(word) for word in (tmp_path / "run", *exported)]) == 0
        assert "`AutoModelForImageTextToText.from_pretrained` loads" in (tmp_path / to / CARD).read_text()
    assert (tmp_path / "merged" / "preprocessor_config.json").read_text() == "{}"
