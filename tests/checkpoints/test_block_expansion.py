"""Expanded models equal the base model before training, and are complete folders."""

from __future__ import annotations

import dataclasses
import itertools
import json
import shutil
import sys
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoTokenizer, Qwen3MoeConfig

import block_expansion
import train
from checkpoints import model_writer
from checkpoints.block_expansion import expanded_config, expanded_tensors, insertion_points
from data.packing import make_sampler
from files.model_folder import CheckpointFiles
from files.names import BLOCKS, INDEX
from files.tensors import list_tensors
from launch.precision import Precision
from models.adapters import apply_method
from models.family import Family
from models.llama_pro import NEW_LAYERS, source_layers, spread_new_blocks
from models.registry import FAMILIES, build_on_meta, read_config
from monitoring.tracking import NoTracker
from options.train import parse
from quantization.layer import Linear4bit
from tests.helpers import tiny
from tests.helpers.adapters import args_for
from tests.helpers.auto_classes import load_transformers_model
from tests.helpers.expansion import all_tensors, edit_config, expand, read_config_json, text_config_json
from tests.helpers.image_models import QWEN, loss_of_transformers
from tests.helpers.logits import IDS, transformers_logits
from tests.helpers.proc import status
from tests.helpers.products import slow
from tests.helpers.runs import set_up

OUTPUTS = {"self_attn.o_proj": 0.0, "mlp.down_proj": 0.0}
NORMS = {"post_attention_layernorm": -1.0, "post_feedforward_layernorm": -1.0}
ZERO_NORMS = dict.fromkeys(NORMS, 0.0)


# The expanded model


@pytest.fixture(scope="module")
def base_logits(checkpoints):
    """base_logits(kind) -> transformers' logits of the checkpoint. Computed once."""
    return cache(lambda kind: transformers_logits(checkpoints(kind)))


@pytest.mark.parametrize(
    "kind, new_blocks",
    # of 3 layers: neither 2 nor 5 divides them
    [
        *itertools.product(["llama_bias", "qwen2", "qwen3"], [1, 2, 3, 5]),
        *itertools.product(
            [kind for kind in tiny.QUICK if kind not in ("llama_bias", "qwen2", "qwen3")], [2]
        ),
        *slow((kind, 2) for kind in tiny.OTHERS),
    ],
)
def test_logits_are_the_base_models(kind, new_blocks, checkpoints, base_logits, tmp_path):
    folder = expand(checkpoints(kind), tmp_path / "out", "--new_blocks", new_blocks)
    assert torch.equal(transformers_logits(folder), base_logits(kind))
    before, after = (text_config_json(each) for each in (checkpoints(kind), folder))
    assert after["num_hidden_layers"] == before["num_hidden_layers"] + new_blocks
    assert len(after[NEW_LAYERS]) == new_blocks


@torch.no_grad()
def test_features_of_images_come_in_after_the_same_layers(checkpoints, tmp_path):
    """Qwen3-VL adds them after its layers 0 and 1, so a new block follows layer 1 at the earliest."""
    base = checkpoints("qwen3_vl")
    folder = expand(base, tmp_path / "out", "--after", "1,2")
    before, after = (load_transformers_model(each, dtype=torch.float32).eval() for each in (base, folder))
    assert torch.equal(*(loss_of_transformers(model, 1, QWEN) for model in (before, after)))


@pytest.mark.parametrize(
    "kind, identity_init",
    [
        *(("llama_bias", OUTPUTS), ("qwen2", OUTPUTS), ("gemma2", NORMS), ("gemma3", NORMS)),
        *slow([("olmo2", ZERO_NORMS)]),
    ],
)
def test_new_blocks_are_copies_that_add_nothing(kind, identity_init, checkpoints, tmp_path):
    base = all_tensors(checkpoints(kind))
    folder = expand(checkpoints(kind), tmp_path / "out", "--after", "2, 0,2")
    expanded, new = all_tensors(folder), read_config_json(folder)[NEW_LAYERS]
    assert new == [1, 4, 5]
    source = [0, 0, 1, 2, 2, 2]
    wanted, silenced = {n: t for n, t in base.items() if not n.startswith("model.layers.")}, 0
    for i, layer in enumerate(source):
        for name, tensor in base.items():
            if name.startswith(f"model.layers.{layer}."):
                rest = name.removeprefix(f"model.layers.{layer}.")
                value = identity_init.get(rest.rpartition(".")[0]) if i in new else None
                silenced += value is not None
                wanted[f"model.layers.{i}.{rest}"] = (
                    tensor if value is None else torch.full_like(tensor, value)
                )
    assert silenced == len(new) * (4 if kind == "llama_bias" else 2)  # with their biases
    assert expanded.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert expanded[name].dtype == tensor.dtype and torch.equal(expanded[name], tensor), name


def one_step(rank_info, args) -> tuple[float, float]:
    """Return (gradient norm, relative change of the logits) of the first update."""
    job, model = set_up(rank_info, args)
    with torch.no_grad():
        before = model(input_ids=IDS, use_cache=False).logits.clone()
        sampler = make_sampler(job.config, job.rows, rank_info.rank, rank_info.world)
        with torch.enable_grad():
            history = train.train(job, model, rank_info, sampler, NoTracker())
        after = model.eval()(input_ids=IDS, use_cache=False).logits
    return history[0].grad_norm, ((after - before).norm() / before.norm()).item()


def first_update(folder: Path, alpaca_file, one_rank) -> tuple[float, float]:
    options = ["--max_steps", "1", "--batch_size", "2", "--context_length", "256", "--precision", "fp32"]
    return one_rank(one_step, args_for(folder, alpaca_file, "llama_pro", *options))[0]


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_the_first_update_hardly_moves_the_model(kind, checkpoints, alpaca_file, one_rank, tmp_path):
    """At the default learning rate: the new blocks are the identity, and stay close to it."""
    folder = expand(checkpoints(kind), tmp_path / "out", "--new_blocks", 2)
    norm, change = first_update(folder, alpaca_file, one_rank)
    assert 0 < change < 0.02 and 0 < norm < 10


@pytest.mark.parametrize("kind", ["gemma2", "gemma3", *slow(["olmo2"])])
def test_zeroed_outputs_before_a_norm_last_only_one_step(
    kind, checkpoints, alpaca_file, one_rank, tmp_path, monkeypatch
):
    """If a family does not name the norms after its outputs, the logits differ after one step."""
    name = read_config(checkpoints(kind))[0].model_type
    monkeypatch.setitem(FAMILIES, name, dataclasses.replace(FAMILIES[name], identity_init=()))
    folder = expand(checkpoints(kind), tmp_path / "out", "--new_blocks", 2)
    norm, change = first_update(folder, alpaca_file, one_rank)
    assert change > 0.1 and norm > 100


@pytest.mark.parametrize("kind", ["llama_bias", "gemma2"])
def test_new_blocks_with_random_values_change_the_logits(kind, checkpoints):
    """tiny.save_expanded makes random blocks: the equalities above would fail for them."""
    folder = checkpoints(f"{kind}_pro")
    base = folder.with_name(f"{folder.name}_base")
    assert (transformers_logits(folder) - transformers_logits(base)).abs().max() > 0.1


@pytest.mark.parametrize("layers", range(1, 40))
def test_blocks_are_spread_evenly(layers):
    for new in range(1, 2 * layers + 2):
        after = spread_new_blocks(layers, new)
        assert len(after) == new and after == sorted(after) and after[-1] == layers - 1
        if new <= layers:
            stretches = [b - a for a, b in zip([-1, *after], after, strict=False)]
            assert sum(stretches) == layers and max(stretches) - min(stretches) <= 1
        source = source_layers(layers, after)
        assert list(dict.fromkeys(source)) == list(range(layers)) and source == sorted(source)
        assert len(source) == layers + new and set(after) <= set(range(layers))
    assert spread_new_blocks(32, 8) == list(range(3, 32, 4))  # the paper's: one after every fourth layer


@pytest.mark.parametrize("rate, new", [(0.1, 1), (0.5, 2), (0.34, 1), (1, 3), (1.6, 5)])
def test_expansion_rate(rate, new, checkpoints, tmp_path):
    folder = expand(checkpoints(), tmp_path / "out", "--expansion-rate", rate)
    assert len(read_config_json(folder)[NEW_LAYERS]) == new


def test_the_expansion_rate_of_fsdp_qloras_example(checkpoints):
    options = block_expansion.parse("--model_name a --output_dir b --expansion_rate 0.1".split())
    assert len(insertion_points(options, 32)) == 3  # its blk_exp-32-35


@pytest.fixture(scope="module")
def deep(tmp_path_factory):
    """A base of 34 layers."""
    folder = tmp_path_factory.mktemp("deep") / "base"
    return tiny.save_checkpoint(
        "llama", folder, shard="1MB", num_hidden_layers=34, hidden_size=16, intermediate_size=32
    )


def test_layer_3_is_not_layer_30(deep, tmp_path):
    base, folder = all_tensors(deep), expand(deep, tmp_path / "out", "--after", "2,29")
    expanded = all_tensors(folder)
    assert read_config_json(folder)[NEW_LAYERS] == [3, 31]
    for name, tensor in base.items():
        if name.startswith("model.layers."):
            _, _, number, rest = name.split(".", 3)
            moved = int(number) + (int(number) > 2) + (int(number) > 29)
            assert torch.equal(expanded[f"model.layers.{moved}.{rest}"], tensor), name
    assert len(expanded) == len(base) + 2 * 9
    config, family = read_config(folder)
    model = build_on_meta(config, family)
    options, _ = parse(["--train_type", "bnb_llama_pro", "--model_name", str(folder)])
    apply_method(model, family, options, Precision(torch.bfloat16, torch.float32), CheckpointFiles(folder))
    for i, layer in enumerate(model.model.layers):
        new = i in (3, 31)
        assert all(p.requires_grad == new for p in layer.parameters())
        assert any(isinstance(m, Linear4bit) for m in layer.modules()) != new
        assert layer.input_layernorm.weight.dtype == (torch.float32 if new else torch.bfloat16)
    assert sum(p.requires_grad for p in model.parameters()) == 2 * 9


def test_a_complete_folder(checkpoints, tmp_path):
    """Small files are copied, shards no larger than the base's, the index is right, bf16 stays bf16."""
    base = tiny.save_checkpoint("qwen2", tmp_path / "base", torch.bfloat16, shard="100KB")
    (base / "chat_template.jinja").write_text("{{ messages }}")
    (base / "notes.txt").write_text("mine")
    folder = expand(base, tmp_path / "out", "--new_blocks", 2)
    for name in ("generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (folder / name).read_bytes() == (base / name).read_bytes()
    assert not list(folder.glob("*.tmp")) and not (folder / "notes.txt").exists()
    assert AutoTokenizer.from_pretrained(folder)("abc").input_ids
    tensors, index = all_tensors(folder), json.loads((folder / INDEX).read_text())
    assert {t.dtype for t in tensors.values()} == {torch.bfloat16}
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors.values())
    assert index["weight_map"].keys() == tensors.keys()
    data = [
        max(sum(t.nbytes for t in load_file(path).values()) for path in model.glob("model-*.safetensors"))
        for model in (base, folder)
    ]
    assert data[1] <= data[0]
    changed = {"num_hidden_layers", "layer_types", "max_window_layers", NEW_LAYERS}
    assert {k: v for k, v in read_config_json(folder).items() if k not in changed} == {
        k: v for k, v in read_config_json(base).items() if k not in changed
    }


def test_a_single_file_becomes_several(tmp_path):
    base = tiny.save_checkpoint("llama", tmp_path / "base", shard="1GB")
    edit_config(base, eos_token_id=[257, 258, 259])  # as long as a list of layers
    tensors = load_file(base / "model.safetensors")
    # Old checkpoints have the rotary frequencies, which are not copied.
    frequencies = torch.tensor([10000.0 ** (-i / 8) for i in range(8)])
    tensors["model.layers.1.self_attn.rotary_emb.inv_freq"] = frequencies
    save_file(tensors, base / "model.safetensors")
    folder = expand(base, tmp_path / "out", "--new_blocks", 2)
    # No file is larger than the base's.
    assert len(list(folder.glob("*.safetensors"))) > 1 and (folder / INDEX).exists()
    assert read_config_json(folder)["eos_token_id"] == [257, 258, 259]
    assert read_config_json(folder)["architectures"] == ["LlamaForCausalLM"]
    assert not any("inv_freq" in name for name in all_tensors(folder))


def test_mixed_dtypes_are_aligned(tmp_path):
    """fp32 norms among bf16 matrices of odd sizes: each element must be aligned to its size."""
    tensors = {"a": torch.randn(3).bfloat16(), "b": torch.randn(5), "c": torch.randn(1, 7).half()}
    save_file(tensors, tmp_path / "model.safetensors")
    entries = model_writer.file_entries(CheckpointFiles(tmp_path))
    model_writer.write_tensors(tmp_path / "again.safetensors", dict(sorted(entries.items())))
    again = load_file(tmp_path / "again.safetensors")
    assert all(t.dtype == again[n].dtype and torch.equal(t, again[n]) for n, t in tensors.items())
    for name, stored in list_tensors(tmp_path / "again.safetensors").items():
        assert stored.begin % tensors[name].dtype.itemsize == 0, name


@pytest.mark.parametrize("kind, written_out", [("qwen2", False), ("qwen3", True)], ids=["pattern", "list"])
def test_kinds_of_attention_go_with_their_layers(kind, written_out, checkpoints, base_logits, tmp_path):
    """Layer 0 has full attention, 1 and 2 a window shorter than the text.

    Configs of older versions say so by max_window_layers alone.
    """
    base = shutil.copytree(checkpoints(kind), tmp_path / "base")
    kinds = ["full_attention", "sliding_attention", "sliding_attention"]
    window = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}
    edit_config(base, **window, layer_types=kinds if written_out else None)
    expected = transformers_logits(base)
    assert (expected - base_logits(kind)).abs().max() > 0.1
    folder = expand(base, tmp_path / "out", "--after", "0,0,1")
    assert read_config_json(folder)["layer_types"] == [kinds[i] for i in (0, 0, 0, 1, 1, 2)]
    assert read_config_json(folder)["max_window_layers"] == 3
    assert torch.equal(transformers_logits(folder), expected)
    without = shutil.copytree(folder, tmp_path / "without")
    edit_config(without, layer_types=None)  # max_window_layers says the same
    assert torch.equal(transformers_logits(without), expected)


@pytest.mark.parametrize("given", [*slow([[1, 0, 1], None]), [1, 0, 1, 0]], ids=["list", "pattern", "longer"])
def test_layers_without_rope_stay_without(given, checkpoints, tmp_path):
    base = shutil.copytree(checkpoints("smollm3"), tmp_path / "base")
    edit_config(base, no_rope_layers=given, no_rope_layer_interval=2)
    folder = expand(base, tmp_path / "out", "--after", "0,1,1")
    assert read_config_json(folder)["no_rope_layers"] == [1, 1, 0, 0, 0, 1]
    assert torch.equal(transformers_logits(folder), transformers_logits(base))


@pytest.mark.parametrize("only, step", [([1], 1), ([], 2), ([3], 2), ([0, 4], 1)])
def test_layers_with_experts_keep_them(only, step):
    config = Qwen3MoeConfig(num_hidden_layers=5, mlp_only_layers=only, decoder_sparse_step=step)
    raw = json.loads(config.to_json_string())
    source = source_layers(5, [0, 2, 2, 4])
    new = Qwen3MoeConfig.from_dict(expanded_config(raw, config, source))

    def experts(c, layer):  # Qwen3MoeDecoderLayer's rule
        return layer not in c.mlp_only_layers and (layer + 1) % c.decoder_sparse_step == 0

    assert [experts(new, i) for i in range(9)] == [experts(config, layer) for layer in source]
    assert new.num_hidden_layers == 9


def test_modules_are_silenced_by_dotted_segments():
    dense = Family(nn.Module, nn.Module)
    for rest, value in {
        "self_attn.o_proj.weight": 0,
        "self_attn.o_proj.bias": 0,
        "mlp.down_proj.weight": 0,
        "mlp.up_proj.weight": None,
        "self_attn.o_proj_norm.weight": None,
        "cross.self_attn.o_proj.weight": None,
        "mlp.experts.7.down_proj.weight": None,
    }.items():
        assert dense.identity_value(rest) == value, rest
    experts = Family(nn.Module, nn.Module, outputs=("self_attn.o_proj", "mlp.experts.*.down_proj"))
    assert experts.identity_value("mlp.experts.7.down_proj.weight") == 0
    assert experts.identity_value("mlp.experts.7.up_proj.weight") is None
    assert experts.identity_value("mlp.experts.7.8.down_proj.weight") is None
    normed = Family(nn.Module, nn.Module, identity_init=(("norm.weight", -1.0), ("norm.bias", 0.0)))
    assert [normed.identity_value(f"norm.{part}") for part in ("weight", "bias")] == [-1, 0]
    assert normed.identity_value("self_attn.o_proj.weight") is None
    assert dense.locate_layer("model.layers.30.mlp.down_proj.weight") == (30, "mlp.down_proj.weight")
    for name in (
        "model.norm.weight",
        "model.layers_3.weight",
        "model.layers.x.weight",
        "my.model.layers.3.weight",
    ):
        assert dense.locate_layer(name) == (None, name)


@pytest.mark.parametrize(
    "wrong",
    [
        {"outputs": ("self_attn.o_proj", "mlp.w2")},
        {"identity_init": (("post_attention_layernorm", 0.0), ("norm", 0.0))},
    ],
)
def test_a_new_block_that_is_not_the_identity_is_an_error(wrong, checkpoints):
    """A family with wrong names of output projections, or of the norms after them, is an error."""
    family = Family(nn.Module, nn.Module, **wrong)
    with pytest.raises(AssertionError, match="adds nothing"):
        expanded_tensors(CheckpointFiles(checkpoints()), family, source_layers(3, [1]))


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_stays_below_two_shards(tmp_path):
    """190 MB of weights in files of 32 MB; both commands. The process's peak is reset before each."""
    sizes = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 12}
    base = tiny.save_checkpoint("llama", tmp_path / "base", shard="32MB", **sizes)
    largest = max(path.stat().st_size for path in base.glob("*.safetensors"))
    assert sum(path.stat().st_size for path in base.glob("*.safetensors")) > 5 * largest

    def growth(command) -> int:
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
        before = status("VmRSS")
        command()
        return status("VmHWM") - before

    folder = tmp_path / "out"
    assert growth(lambda: expand(base, folder, "--new_blocks", 6)) < 2 * largest
    files, layers = CheckpointFiles(folder), read_config_json(folder)[NEW_LAYERS]
    new = {
        n: e
        for n, e in model_writer.file_entries(files).items()
        if FAMILIES["llama"].locate_layer(n)[0] in layers
    }
    metadata = {NEW_LAYERS: json.dumps(layers)}
    model_writer.write_tensors(tmp_path / BLOCKS, new, metadata)
    assert growth(lambda: expand(folder, tmp_path / "whole", "--blocks", tmp_path / BLOCKS)) < 2 * largest
    shutil.rmtree(tmp_path)


# Interruptions


def test_a_full_disk_leaves_nothing(checkpoints, tmp_path, monkeypatch, capsys):
    original = model_writer.write_tensors

    def fill_up(path, entries, *more):
        original(path, entries, *more)
        if "-00003-" in path.name:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(model_writer, "write_tensors", fill_up)
    command = ["--model_name", str(checkpoints()), "--output_dir", str(tmp_path / "out"), "--new_blocks", "2"]
    assert block_expansion.main(command) == 2
    assert capsys.readouterr().err == f"error: {tmp_path / 'out'}: No space left on device\n"
    assert not list((tmp_path / "out").iterdir())


def test_an_interrupted_run_leaves_no_model(checkpoints, base_logits, tmp_path, monkeypatch, capsys):
    """Interrupted between the weights and config.json; the next run replaces it."""
    command = ["--model_name", str(checkpoints()), "--output_dir", str(tmp_path / "out"), "--new_blocks", "2"]
    with monkeypatch.context() as patch:
        patch.setattr(model_writer, "copy_small_files", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            block_expansion.main(command)
    (tmp_path / "out" / "model-00001-of-00099.safetensors.tmp").write_text("of a run that was killed")
    assert not (tmp_path / "out" / "config.json").exists()
    assert block_expansion.main(command) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert block_expansion.main([*command, "--overwrite"]) == 0
    assert not list((tmp_path / "out").glob("*.tmp"))
    assert torch.equal(transformers_logits(tmp_path / "out"), base_logits("llama"))
