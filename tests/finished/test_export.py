"""export.py: a merged model computes what training computed, or what PEFT merges over the original base."""

from __future__ import annotations

import contextlib
import io
import json
import re
import shutil
import sys
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

import export
import finished.export
from checkpoints import model_writer
from files.model_folder import TOY_BASE
from files.names import ADAPTER, INDEX
from finished import finished_run, layerwise
from models.registry import read_config
from quantization.nf4 import NF4
from tests.helpers import tiny
from tests.helpers.adapters import args_for
from tests.helpers.auto_classes import auto_class, load_transformers_model
from tests.helpers.bnb_checkpoints import pack_like_the_hub
from tests.helpers.expansion import all_tensors, read_config_json
from tests.helpers.finished_runs import write_random_run
from tests.helpers.logits import IDS
from tests.helpers.parity import biased_checkpoint
from tests.helpers.proc import status
from tests.helpers.resuming import run as train_here
from tests.helpers.runs import dense_state, transformers_model

DIFFERENCE = r"largest logit difference from the trained model: (\S+), of logits up to (\S+) "


def exported(run: Path, out: Path, *more, to: str = "merged") -> str:
    """Export a run; return what export.py prints."""
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown):
        assert export.main([str(run), "--to", to, "--out", str(out), *map(str, more)]) == 0
    return shown.getvalue()


def difference(shown: str) -> float:
    return float(re.search(DIFFERENCE, shown)[1])


def loaded(folder: Path):
    model, report = load_transformers_model(
        folder, output_loading_info=True, dtype=torch.float32, attn_implementation="eager"
    )
    assert not any(report.values()), report
    return model.eval()


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model(input_ids=IDS).logits


def close(a, b) -> None:
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


# Slow: DoRA's export has LoRA's in it.
@pytest.mark.parametrize("train_type", [pytest.param("qlora", marks=pytest.mark.slow), "bnb_dora"])
@pytest.mark.parametrize("kind", tiny.KINDS)
def test_every_family(kind, train_type, checkpoints, alpaca_file, one_rank, tmp_path):
    """`dequantized` is the trained model; `original` is what PEFT merges over the original base.

    alpha/rank is 2.5, and the adapters are random.
    """
    run = tmp_path / "run"
    trained = write_random_run(one_rank, run, args_for(checkpoints(kind), alpaca_file, train_type))
    shown = exported(run, tmp_path / "dequantized")
    close(logits(loaded(tmp_path / "dequantized")), trained)
    assert all_tensors(tmp_path / "dequantized").keys() == all_tensors(checkpoints(kind)).keys()
    card = (tmp_path / "dequantized" / "README.md").read_text()
    assert f"{auto_class(read_config(checkpoints(kind))[0]).__name__}.from_pretrained" in card
    assert difference(shown) < 1e-4 and "rows of the data" in shown
    exported(run, tmp_path / "original", "--base", "original", "--check", "false")
    merged = logits(loaded(tmp_path / "original"))
    theirs = peft.PeftModel.from_pretrained(loaded(checkpoints(kind)), run).merge_and_unload()
    close(merged, logits(theirs))
    assert (merged - trained).abs().max() > 0.01, "the bases do not differ: nothing was compared"
    assert (merged - logits(loaded(checkpoints(kind)))).abs().max() > 0.01, "nothing was merged"


@pytest.mark.parametrize("train_type", ["qlora", "bnb_dora"])
def test_rank_stabilized_adapters(train_type, checkpoints, alpaca_file, one_rank, tmp_path):
    """alpha / sqrt(rank): PEFT, generate.py's model and the merged folder compute what was trained."""
    run, args = tmp_path / "run", args_for(checkpoints(), alpaca_file, train_type, "--use_rslora", "true")
    trained = write_random_run(one_rank, run, args)
    base = transformers_model(checkpoints(), one_rank(dense_state, args)[0])
    close(logits(peft.PeftModel.from_pretrained(base, run).eval()), trained)
    opened = finished_run.load_model(finished_run.open_run(run), torch.device("cpu"), torch.float32)
    close(logits(opened), trained)
    assert difference(exported(run, tmp_path / "merged")) < 1e-4
    close(logits(loaded(tmp_path / "merged")), trained)
    settings = run / "adapter_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"use_rslora": False}))
    plain = transformers_model(checkpoints(), one_rank(dense_state, args)[0])
    theirs = logits(peft.PeftModel.from_pretrained(plain, run).eval())
    assert (theirs - trained).abs().max() > 0.01, "the scale does not show"


def test_gguf_ready_of_a_trained_base(one_rank, tmp_path):
    """Trained weights, stored in bf16 under a tied head: rounding to bf16 hardly moves their logits."""
    trained = write_random_run(one_rank, tmp_path / "run", args_for("toy", "toy", "bnb_dora"))
    shown = exported(tmp_path / "run", tmp_path / "out", to="gguf-ready")
    assert {tensor.dtype for tensor in all_tensors(tmp_path / "out").values()} == {torch.bfloat16}
    merged = logits(loaded(tmp_path / "out"))
    scale = trained.abs().max()
    assert difference(shown) < 0.02 * scale and (merged - trained).abs().max() < 0.02 * scale
    assert (merged - logits(loaded(TOY_BASE))).abs().max() > 0.1 * scale, "nothing was merged"


@pytest.mark.parametrize("train_type", ["lora", "dora", "hqq_dora --n_bits 3", "hqq_lora --n_bits 2"])
def test_other_quantizers_and_none(train_type, checkpoints, alpaca_file, one_rank, tmp_path):
    name, *more = train_type.split()
    args = args_for(checkpoints("llama_bias"), alpaca_file, name, "--lora_target_modules", "o_proj", *more)
    trained = write_random_run(one_rank, tmp_path / "run", args)
    assert difference(exported(tmp_path / "run", tmp_path / "out")) < 1e-4
    close(logits(loaded(tmp_path / "out")), trained)
    if not more:  # nothing was packed: both bases are the files' weights
        exported(tmp_path / "run", tmp_path / "same", "--base", "original", "--check", "false")
        assert all_tensors(tmp_path / "same").keys() == all_tensors(tmp_path / "out").keys()
        for key, tensor in all_tensors(tmp_path / "same").items():
            assert torch.equal(tensor, all_tensors(tmp_path / "out")[key])


@pytest.fixture(scope="module")
def made(checkpoints, alpaca_file, one_rank, tmp_path_factory):
    """A finished bnb_dora run of llama_bias; read-only."""
    folder = tmp_path_factory.mktemp("made") / "run"
    write_random_run(one_rank, folder, args_for(checkpoints("llama_bias"), alpaca_file, "bnb_dora"))
    steps = [{"step": i, "epoch": i / 4, "loss": 3.0 - i} for i in (1, 2)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps))
    return folder


@pytest.fixture
def run(made, tmp_path):
    """A copy of `made`."""
    return shutil.copytree(made, tmp_path / "run")


def test_what_was_packed_without_an_adapter_is_dequantized(checkpoints, alpaca_file, one_rank, tmp_path):
    base = checkpoints("llama_bias")
    args = args_for(base, alpaca_file, "qlora", "--lora_target_modules", "q_proj")
    write_random_run(one_rank, tmp_path / "run", args)
    exported(tmp_path / "run", tmp_path / "out", "--check", "false")
    before, after = all_tensors(base), all_tensors(tmp_path / "out")
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if name.endswith("_proj.weight")}
    name = "model.layers.1.mlp.up_proj.weight"
    shape = tuple(before[name].shape)
    expected = NF4().dequantize(
        *NF4().quantize(before[name]), NF4().table(torch.device("cpu")), shape, torch.float32
    )
    assert torch.equal(after[name], expected)


@pytest.mark.parametrize("train_type", ["full", "llama_pro", "bnb_llama_pro"])
def test_whole_models_are_copied(train_type, checkpoints, alpaca_file, one_rank, tmp_path, capsys):
    run, out = tmp_path / "run", tmp_path / "out"
    trained = write_random_run(
        one_rank, run, args_for(checkpoints(biased_checkpoint(train_type)), alpaca_file, train_type)
    )
    shown = exported(run, out)
    assert read_config_json(out) == read_config_json(run)
    before, after = all_tensors(run), all_tensors(out)
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert "Base model" in (out / "README.md").read_text()
    if train_type == "bnb_llama_pro":  # the old layers are the original ones again, unless asked for
        assert difference(shown) > 0.01
        assert difference(exported(run, tmp_path / "trained", "--base", "dequantized")) < 1e-4
        close(logits(loaded(tmp_path / "trained")), trained)
        return
    assert difference(shown) < 1e-4
    close(logits(loaded(out)), trained)
    for more in (["--base", "dequantized"], ["--base_model", "x"], ["--to", "adapter"]):
        assert export.main([str(run), "--to", "merged", "--out", str(tmp_path / "no"), *more]) == 2
        assert "whole model" in capsys.readouterr().err


def test_new_blocks_are_put_into_their_model(checkpoints, alpaca_file, one_rank, tmp_path, capsys):
    args = args_for(checkpoints("llama_bias_pro"), alpaca_file, "bnb_llama_pro", "--llama_pro_save", "blocks")
    trained = write_random_run(one_rank, tmp_path / "run", args)
    assert difference(exported(tmp_path / "run", tmp_path / "out")) > 0.01
    blocks, out = all_tensors(tmp_path / "run"), all_tensors(tmp_path / "out")
    expected = all_tensors(checkpoints("llama_bias_pro")) | blocks
    assert out.keys() == expected.keys() and all(torch.equal(out[name], expected[name]) for name in out)
    assert difference(exported(tmp_path / "run", tmp_path / "trained", "--base", "dequantized")) < 1e-4
    close(logits(loaded(tmp_path / "trained")), trained)
    assert export.main([str(tmp_path / "run"), "--to", "adapter", "--out", str(tmp_path / "no")]) == 2
    assert "holds new blocks, trained without an adapter" in capsys.readouterr().err


def test_a_base_that_is_packed_already(checkpoints, alpaca_file, one_rank, tmp_path, capsys):
    base = checkpoints("llama_bias")
    pack_like_the_hub(base, tmp_path / "4bit")
    trained = write_random_run(
        one_rank, tmp_path / "run", args_for(tmp_path / "4bit", alpaca_file, "bnb_dora")
    )
    shutil.copy(base / "tokenizer.json", tmp_path / "4bit")
    assert difference(exported(tmp_path / "run", tmp_path / "out")) < 1e-4
    close(logits(loaded(tmp_path / "out")), trained)
    assert "quantization_config" not in read_config_json(tmp_path / "out")
    assert {t.dtype for t in all_tensors(tmp_path / "out").values()} == {torch.float32}  # config.json's dtype
    arguments = [str(tmp_path / "run"), "--to", "merged", "--out", str(tmp_path / "no"), "--base", "original"]
    assert export.main(arguments) == 2
    assert "4-bit weights only" in capsys.readouterr().err and not (tmp_path / "no").exists()
    exported(tmp_path / "run", tmp_path / "original", "--base", "original", "--base_model", base)
    theirs = peft.PeftModel.from_pretrained(loaded(base), tmp_path / "run").merge_and_unload()
    close(logits(loaded(tmp_path / "original")), logits(theirs))


# Files next to the weights, and dtypes


def weight_files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("*.safetensors"))


def test_the_folder_is_complete(checkpoints, alpaca_file, one_rank, tmp_path, monkeypatch):
    """Shards and index, generation config, tokenizer and chat template, in the base's dtype; nothing else."""
    base = tiny.save_checkpoint("qwen2", tmp_path / "base", torch.bfloat16)
    (base / "chat_template.jinja").write_text("{{ messages[0].content }}")
    (base / "additional_chat_templates").mkdir()
    (base / "additional_chat_templates" / "tool_use.jinja").write_text("{{ tools[0].name }}")
    (base / "generation_config.json").write_text('{"do_sample": true, "temperature": 0.7}')
    write_random_run(one_rank, tmp_path / "run", args_for(base, alpaca_file, "bnb_dora"))
    monkeypatch.setattr(model_writer, "SHARD_BYTES", 100_000)
    out = tmp_path / "out"
    assert difference(exported(tmp_path / "run", out)) < 0.5  # rounded to bf16
    model = loaded(out)
    assert model.generation_config.temperature == 0.7
    tokenizer, messages = AutoTokenizer.from_pretrained(out), [{"role": "user", "content": "abc"}]
    assert tokenizer.apply_chat_template(messages, tokenize=False) == "abc"
    # Tools have a template of their own.
    assert tokenizer.apply_chat_template(messages, tools=[{"name": "f"}], tokenize=False) == "f"
    assert {t.dtype for t in all_tensors(out).values()} == {torch.bfloat16}
    assert read_config_json(out) == read_config_json(base)
    assert "lm_head.weight" not in all_tensors(out)  # it is tied
    index = json.loads((out / INDEX).read_text())
    assert len(weight_files(out)) > 3 and set(weight_files(out)) == set(index["weight_map"].values())
    assert {p.name for p in out.iterdir()} == {
        *weight_files(out), INDEX, "README.md", "config.json", "generation_config.json",
        "chat_template.jinja", "additional_chat_templates", *(p.name for p in base.glob("tokenizer*")),
    }  # fmt: skip


def test_rows_of_zeros_are_told(checkpoints, alpaca_file, one_rank, tmp_path, capsys):
    """A pruned base: PEFT's DoRA divides 0 by 0 there; the merged model computes what was trained."""
    base = shutil.copytree(checkpoints(), tmp_path / "base")
    for path in base.glob("*.safetensors"):
        tensors = load_file(path)
        for name in {f"model.layers.0.mlp.{x}_proj.weight" for x in ("gate", "up")} & tensors.keys():
            tensors[name][:3] = 0
        save_file(tensors, path, metadata={"format": "pt"})
    run = tmp_path / "run"
    argv = ["--model_name", base, "--dataset", alpaca_file, "--train_type", "dora", "--max_steps", "1"]
    printed = one_rank(train_here, [str(a) for a in (*argv, "--output_dir", run)])[0]
    line = "adapter: 6 rows of the base's weights are zeros; PEFT's DoRA gives NaN over them"
    assert line in printed
    assert logits(peft.PeftModel.from_pretrained(loaded(base), run).eval()).isnan().any()
    assert export.main([str(run), "--to", "adapter", "--out", str(tmp_path / "adapter")]) == 0
    assert line in capsys.readouterr().out and line in (tmp_path / "adapter" / "README.md").read_text()
    exported(run, tmp_path / "merged")
    assert logits(loaded(tmp_path / "merged")).isfinite().all()
    assert line not in capsys.readouterr().out


def test_dtypes(run, tmp_path):
    """gguf-ready has 16 bits for any base and names its class; merged has --dtype."""
    name = "model.layers.0.self_attn.q_proj.weight"
    exported(run, tmp_path / "fp32", "--check", "false")
    reference = all_tensors(tmp_path / "fp32")
    assert read_config_json(tmp_path / "fp32")["dtype"] == "float32"
    for to, dtype, more in (
        ("gguf-ready", torch.bfloat16, []),
        ("gguf-ready", torch.float16, ["--dtype", "float16"]),
        ("merged", torch.bfloat16, ["--dtype", "bfloat16"]),
    ):
        out = tmp_path / "out"
        exported(run, out, "--overwrite", *more, to=to)
        assert {t.dtype for t in all_tensors(out).values()} == {dtype}
        assert read_config_json(out)["dtype"] == str(dtype).removeprefix("torch.")
        assert read_config_json(out)["architectures"] == ["LlamaForCausalLM"]
        assert torch.equal(all_tensors(out)[name], reference[name].to(dtype))  # rounded once, after merging
        close(
            all_tensors(out)["model.embed_tokens.weight"].float(),
            reference["model.embed_tokens.weight"].to(dtype).float(),
        )


def test_the_adapters_folder(made, checkpoints, tmp_path):
    out = tmp_path / "out"
    assert "difference" not in exported(made, out, to="adapter")
    assert (out / ADAPTER).read_bytes() == (made / ADAPTER).read_bytes()
    base = checkpoints("llama_bias")
    assert {p.name for p in out.iterdir()} == {
        ADAPTER, "adapter_config.json", "README.md", *(p.name for p in base.glob("tokenizer*")),
    }  # fmt: skip
    close(*(logits(peft.PeftModel.from_pretrained(loaded(base), folder).eval()) for folder in (made, out)))
    AutoTokenizer.from_pretrained(out)
    text = (out / "README.md").read_text()
    for words in (
        "library_name: peft",
        f"Base model: `{base}`",
        "`AutoModelForCausalLM.from_pretrained` loads",
        "| train_type | bnb_dora |",
        "| lora_rank | 8 |",
        "| lora_alpha | 20.0 |",
        "Final loss: 1.0000 after 2 steps (0.50 epochs)",
        "alpaca.jsonl",
    ):
        assert words in text
    assert "base_model:" not in text and "datasets:" not in text  # local paths, which the hub would refuse


def test_the_card_of_the_best_step_has_its_loss(made, tmp_path):
    best = shutil.copytree(made, tmp_path / "best")
    (best / "metrics.jsonl").unlink()
    (best / "evaluation.json").write_text('{"step": 40, "eval_loss": 1.25, "eval_perplexity": 3.49}')
    exported(best, tmp_path / "out", to="adapter")
    text = (tmp_path / "out" / "README.md").read_text()
    assert "Evaluation loss: 1.2500 after 40 steps, the best of its run" in text


def test_the_card_of_the_last_step_names_a_better_one_first(run, tmp_path):
    """What is exported stays what was named; a line says that best/ is there."""
    steps = [{"step": i, "epoch": i / 4, "loss": 3.0 - i, "eval_loss": e} for i, e in ((1, 1.25), (2, 1.5))]
    (run / "metrics.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps))
    exported(run, tmp_path / "one", to="adapter")
    losses = "- Evaluation loss: 1.5000 after 2 steps\n- Final loss: 1.0000 after 2 steps (0.50 epochs)\n"
    text = (tmp_path / "one" / "README.md").read_text()
    assert f"alpaca.jsonl`\n{losses}\n" in text, "no best/, as of a run with a single evaluation"
    (run / "best").mkdir()
    (run / "best" / "evaluation.json").write_text('{"step": 1, "eval_loss": 1.25, "eval_perplexity": 3.49}')
    shown = exported(run, tmp_path / "out", to="adapter")
    told = f"{run}/best has the best evaluation: loss 1.2500 at step 1; {run} has the last step, 2, with 1.5"
    assert shown.startswith(f"{told}000\n")
    text = (tmp_path / "out" / "README.md").read_text()
    best = "Best evaluation loss of the run: 1.2500 after 1 steps; those weights are in the run's `best/`"
    assert f"alpaca.jsonl`\n- {best}, not here\n{losses}\n" in text
    assert (tmp_path / "out" / ADAPTER).read_bytes() == (run / ADAPTER).read_bytes()


def test_the_card_names_what_is_on_the_hub(made, tmp_path):
    import dataclasses

    from finished.finished_run import open_run
    from finished.model_card import render_card

    config = dataclasses.replace(open_run(made).config, dataset="alpaca")
    text = render_card(config, tmp_path, "meta-llama/Llama-2-7b-hf", "t", "w", "peft")
    assert "\nbase_model: meta-llama/Llama-2-7b-hf\ndatasets:\n- yahma/alpaca-cleaned\n" in text
    assert "Final loss: not known" in text
    assert "\npipeline_tag: text-generation\n" in text and "vision" not in text
    text = render_card(dataclasses.replace(config, base_matmul="fp8"), tmp_path, "x", "t", "w", "peft")
    assert "\n| base_matmul | fp8 |\n" in text
    config = dataclasses.replace(config, images="true", vision_targets="all", vision_bits=4, image_size=448)
    text = render_card(config, tmp_path, "google/gemma-3-4b-it", "t", "w", "peft")
    assert "\npipeline_tag: image-text-to-text\n" in text
    for row in ("images | true", "vision_targets | all", "vision_bits | 4", "image_size | 448"):
        assert f"\n| {row} |\n" in text


@pytest.mark.gpu
@pytest.mark.parametrize("base", ["original", "dequantized"])
def test_a_merge_on_a_gpu_is_the_cpus(base, made, tmp_path, monkeypatch):
    # bitsandbytes' CPU and GPU quantizers round some 8-bit codes of scales differently: use one for both.
    quantize = NF4.quantize
    monkeypatch.setattr(
        NF4, "quantize", lambda self, w: tuple(t.to(w.device) for t in quantize(self, w.cpu()))
    )
    folders = {device: tmp_path / device for device in ("cpu", "cuda")}
    for device, folder in folders.items():
        exported(made, folder, "--base", base, "--device", device, "--dtype", "float32")
    ours, expected = all_tensors(folders["cuda"]), all_tensors(folders["cpu"])
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)


def test_merged_then_quantized_again(made, checkpoints, tmp_path):
    """Quantizing the merged weights again adds an error of about NF4's own, whichever base was merged into.

    NF4 of the merged weights is not NF4 of the base plus the adapter. docs/export.md has the numbers of a
    larger model.
    """
    errors = {}
    for base in ("dequantized", "original"):
        exported(made, tmp_path / base, "--base", base, "--check", "false")
        for name, weight in all_tensors(tmp_path / base).items():
            if name.endswith("_proj.weight"):
                again = NF4().dequantize(
                    *NF4().quantize(weight), NF4().table(weight.device), tuple(weight.shape), torch.float32
                )
                errors.setdefault(base, []).append(((again - weight).norm() / weight.norm()).item())
    for values in errors.values():
        assert min(values) > 0.05 and max(values) < 0.12, values


# Memory, and a cut in the middle


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_stays_below_two_shards(made, alpaca_file, one_rank, tmp_path, monkeypatch):
    """140 MB of weights in files of 14 MB: the peak memory of the process stays below two files.

    An export before the measurement takes what the libraries allocate at their first call.
    """
    sizes = {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 28}
    base = tiny.save_checkpoint("llama", tmp_path / "base", shard="32MB", **sizes)
    write_random_run(one_rank, tmp_path / "run", args_for(base, alpaca_file, "bnb_dora"))
    exported(made, tmp_path / "small", "--check", "false")
    largest = max(path.stat().st_size for path in base.glob("*.safetensors"))
    adapter = (tmp_path / "run" / ADAPTER).stat().st_size
    monkeypatch.setattr(model_writer, "SHARD_BYTES", largest)
    assert sum(path.stat().st_size for path in base.glob("*.safetensors")) > 8 * largest
    Path("/proc/self/clear_refs").write_text("5")  # reset VmHWM
    before = status("VmRSS")
    exported(tmp_path / "run", tmp_path / "out", "--check", "false")
    grown = status("VmHWM") - before
    assert len(weight_files(tmp_path / "out")) > 8
    assert grown < 2 * largest + adapter, f"{grown / largest:.2f} shards"
    shutil.rmtree(tmp_path)


def test_the_check_holds_one_part_at_a_time(made, tmp_path, monkeypatch):
    """Only one submodule of a model is in memory at a time, and each is loaded once."""
    held, loaded_paths, original = [], [], layerwise._load_submodule

    def watched(model, path, *args):
        original(model, path, *args)
        real = {n: p.nbytes for n, p in model.named_parameters(remove_duplicate=False) if not p.is_meta}
        loaded_paths.append(path)
        held.append({n: b for n, b in real.items() if not n.startswith(f"{path}.")})

    monkeypatch.setattr(layerwise, "_load_submodule", watched)
    exported(made, tmp_path / "out")
    assert not any(held)
    wanted = ["model.embed_tokens", *(f"model.layers.{i}" for i in range(3)), "model.norm", "lm_head"]
    assert loaded_paths == 2 * wanted


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("failure", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_cut_in_the_middle_leaves_nothing(failure, overwrite, run, tmp_path, monkeypatch, capsys):
    """Neither half a model nor its new folders remain; a model that would be replaced is still there."""
    out = tmp_path / "a" / "out"
    if overwrite:
        exported(run, out, to="adapter")
    before = sorted(tmp_path.rglob("*"))
    original = finished.export.make_merged_entries

    def failing(*args):
        entries = original(*args)
        last = list(entries)[-3]
        entries[last] = finished.export.TensorEntry(
            entries[last].dtype, entries[last].shape, lambda: (_ for _ in ()).throw(failure)
        )
        return entries

    monkeypatch.setattr(finished.export, "make_merged_entries", failing)
    command = [str(run), "--to", "merged", "--out", str(out), f"--overwrite={str(overwrite).lower()}"]
    if isinstance(failure, OSError):
        assert export.main(command) == 2
        assert capsys.readouterr().err == "error: writing: No space left on device\n"
    else:
        with pytest.raises(KeyboardInterrupt):
            export.main(command)
    assert sorted(tmp_path.rglob("*")) == before
