"""--train_embeddings: the embedding and the head beside an adapter, saved as PEFT's modules_to_save."""

from __future__ import annotations

import contextlib
import io
import json
import re
import shutil
import warnings

import peft
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import export
import train
from files.names import ADAPTER, ADAPTER_CONFIG
from finished import generation
from finished.finished_run import load_model, open_run
from launch.precision import choose_precision
from models.lora import adapters_off
from options.errors import UserError
from options.train import parse
from tests.helpers.adapters import args_for, save_peft_adapter
from tests.helpers.finished_runs import write_random_run
from tests.helpers.logits import IDS
from tests.helpers.parity import assert_same
from tests.helpers.products import slow
from tests.helpers.resuming import adapter as adapter_tensors
from tests.helpers.resuming import repeatable_metrics
from tests.helpers.runs import full_run, outputs, train_run
from training import job

CPU = torch.device("cpu")
EMBEDDING, HEAD = "base_model.model.model.embed_tokens.weight", "base_model.model.lm_head.weight"


def embedding_args(model, data, train_type: str, *more) -> list:
    """Return arguments of a run of four steps that trains the embeddings too."""
    options = "--train_embeddings true --lr 2e-3 --max_steps 4 --context_length 256 --batch_size 4".split()
    return args_for(model, data, train_type, *options, *more)


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model(input_ids=IDS).logits


@pytest.mark.parametrize("kind", [*slow(["llama"]), "qwen2"])  # untied and tied
def test_two_ranks_train_as_one_does(kind, checkpoints, short_rows, one_rank, two_ranks):
    args = embedding_args(checkpoints(kind), short_rows, "bnb_dora")
    one = one_rank(train_run, args)[0]
    assert_same(one, two_ranks(train_run, [*args[:-1], "2"])[0])
    names = {"model.embed_tokens.weight"} | ({"lm_head.weight"} if kind == "llama" else set())
    for i in range(3):
        linears = [f"self_attn.{x}_proj" for x in "qkvo"]
        linears += [f"mlp.{x}_proj" for x in ("gate", "up", "down")]
        for linear in linears:
            names |= {f"model.layers.{i}.{linear}.{x}" for x in ("lora_A", "lora_B", "magnitude_change")}
    assert set(one[1]) == names


def mixed_run(rank_info, args) -> tuple[torch.Tensor, list[float], set]:
    """Train as on a GPU with bf16; return (logits before, losses, dtypes of what is trained)."""
    original, job.detect_precision = job.detect_precision, lambda _: choose_precision("auto", True, True)
    try:
        before = outputs(rank_info, args, IDS)[0]
        losses, tensors, _ = train_run(rank_info, args)
        return before, losses, {tensor.dtype for tensor in tensors.values()}
    finally:
        job.detect_precision = original


# Slow: bf16 is emulated on many CPUs.
@pytest.mark.parametrize("kind", [pytest.param("llama", marks=pytest.mark.slow), "qwen2"])
def test_fp32_weights_in_a_bf16_model(kind, checkpoints, short_rows, one_rank, two_ranks):
    """The weights stay in fp32; the layers compute in bf16, also where nothing is sharded."""
    args = embedding_args(checkpoints(kind), short_rows, "dora")
    exact, losses = one_rank(outputs, args, IDS)[0][0], one_rank(train_run, args)[0][0]
    for ranks, size in ((one_rank, "4"), (two_ranks, "2")):
        before, rounded, dtypes = ranks(mixed_run, [*args[:-1], size])[0]
        assert before.dtype == torch.bfloat16 and dtypes == {torch.float32}
        assert (before.float() - exact).norm() < 0.03 * exact.norm()
        assert rounded == pytest.approx(losses, rel=0.02)


BIASED = slow(["phi", "phi_tied"])  # their heads have a bias


@pytest.fixture(
    scope="module", params=["llama", "qwen2", *BIASED], ids=["untied", "tied", "biased", "tied and biased"]
)
def trained(request, checkpoints, short_rows, two_ranks, tmp_path_factory):
    """(A RUN of two ranks over a base that is not packed, with best/ and checkpoints; its base)."""
    folder, base = tmp_path_factory.mktemp("trained") / "run", checkpoints(request.param)
    args = embedding_args(base, short_rows, "dora", *f"--output_dir {folder} --world_size 2".split())
    args += "--save_every 2 --eval_share 0.2 --eval_every 2 --log_to stdout --batch_size 2".split()
    args += "--sample_every 4 --sample_tokens 4".split()
    two_ranks(full_run, train.check_run(parse([*map(str, args)])[0]))
    return folder, base


def test_peft_loads_it_and_computes_the_same(trained, tmp_path):
    """And so do generate.py and evaluate.py, best/, and an exported model, over the same base."""
    run, base = trained
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    base_logits, embedding = logits(plain), plain.get_input_embeddings().weight.clone()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Found missing adapter keys")
        theirs = peft.PeftModel.from_pretrained(plain, run).eval()
    expected = logits(theirs)
    assert (adapter_tensors(run)[EMBEDDING] - embedding).abs().max() > 1e-3, "it was trained"
    ours = load_model(open_run(run), CPU, torch.float32)
    torch.testing.assert_close(logits(ours), expected, rtol=1e-4, atol=1e-4)
    with adapters_off(ours):
        torch.testing.assert_close(logits(ours), base_logits, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(logits(ours), expected, rtol=1e-4, atol=1e-4)
    best = load_model(open_run(run / "best"), CPU, torch.float32)
    assert (logits(best) - base_logits).abs().max() > 0.01
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown):
        assert export.main([str(run), "--to", "merged", "--out", str(tmp_path / "merged")]) == 0
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    torch.testing.assert_close(logits(merged), expected, rtol=1e-4, atol=1e-4)
    assert merged.config.tie_word_embeddings == plain.config.tie_word_embeddings
    difference = float(re.search(r"difference from the trained model: (\S+),", shown.getvalue())[1])
    assert difference < 1e-4


def test_a_resumed_run_ends_the_same(trained, two_ranks):
    run, _ = trained
    before, metrics = adapter_tensors(run), repeatable_metrics(run)
    again = ["--config", str(run / "config.yaml"), "--resume", str(run / "checkpoints" / "step-00000002")]
    two_ranks(full_run, train.check_run(parse(again)[0]))
    assert repeatable_metrics(run) == metrics
    for name, tensor in adapter_tensors(run).items():
        assert torch.equal(tensor, before[name]), name


def test_it_is_trained_further(trained, short_rows, one_rank, two_ranks):
    """--adapter adopts the embeddings too. Step 0 computes what the RUN computes."""
    run, base = trained
    expected = logits(load_model(open_run(run), CPU, torch.float32))
    args = ["--model_name", base, "--dataset", short_rows, "--train_type", "dora", "--adapter", run]
    for ranks in (one_rank, two_ranks):
        torch.testing.assert_close(ranks(outputs, args, IDS)[0][0], expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(UserError, match="--train_embeddings false: contradicts --adapter"):
        train.check_run(parse([*map(str, args), "--train_embeddings", "false"])[0])


def test_runs_over_one_base_with_and_without(trained, short_rows, one_rank, tmp_path):
    """The base's embedding comes back where a run did not train it."""
    run, base = trained
    write_random_run(one_rank, tmp_path / "plain", args_for(base, short_rows, "dora"))
    runs = [open_run(folder) for folder in (run, tmp_path / "plain", run)]
    models = generation.AnsweringModels(runs[:2], None, CPU, "fp32", compare=True)
    for opened in runs:
        with models.activate(str(opened.folder)):
            found = logits(models.model).clone()
        expected = logits(load_model(opened, CPU, torch.float32))
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_only_one_of_them_was_trained_by_peft(checkpoints, short_rows, one_rank, tmp_path):
    """Untied, the other one starts from the base. Tied, PEFT has trained another model than this program."""
    args = ["--dataset", short_rows, "--train_type", "lora", "--adapter"]
    for kind, modules in (("llama", ["embed_tokens"]), ("llama", ["lm_head"])):
        base = checkpoints(kind)
        saved = save_peft_adapter(base, tmp_path / kind / modules[0], modules_to_save=modules)
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        expected = logits(peft.PeftModel.from_pretrained(model, saved).eval())
        ours = one_rank(outputs, ["--model_name", base, *args, saved], IDS)[0][0]
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)
    for modules in (["embed_tokens"], ["embed_tokens", "lm_head"]):
        saved = save_peft_adapter(checkpoints("qwen2"), tmp_path / str(len(modules)), modules_to_save=modules)
        argv = [*map(str, ["--model_name", checkpoints("qwen2"), *args, saved])]
        with pytest.raises(UserError, match="trained apart the embedding and the head, which the base ties"):
            train.check_run(parse(argv)[0])


@pytest.mark.slow
def test_peft_has_tied_a_head_without_its_bias(checkpoints, short_rows, tmp_path):
    options = {"modules_to_save": ["embed_tokens", "lm_head"], "ensure_weight_tying": True}
    options["target_modules"] = ["q_proj"]
    saved = save_peft_adapter(checkpoints("phi_tied"), tmp_path, **options)
    argv = ["--model_name", checkpoints("phi_tied"), "--dataset", short_rows, "--adapter", saved]
    with pytest.raises(UserError, match=r"has no .*lm_head.bias: PEFT has trained the head without its bias"):
        train.check_run(parse([*map(str, argv), "--train_type", "lora"])[0])


def test_a_damaged_run_is_refused(trained, tmp_path):
    run, _ = trained
    copied = shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("checkpoints"))
    with safe_open(copied / ADAPTER, framework="pt") as f:
        metadata = f.metadata()
    tensors = load_file(copied / ADAPTER)
    del tensors[HEAD]
    save_file(tensors, copied / ADAPTER, metadata=metadata)
    with pytest.raises(UserError, match=f"{HEAD} is missing"):
        open_run(copied)
    settings = json.loads((copied / ADAPTER_CONFIG).read_text())
    (copied / ADAPTER_CONFIG).write_text(json.dumps(settings | {"modules_to_save": None}))
    shutil.copy(run / ADAPTER, copied)
    with pytest.raises(UserError, match=r"modules_to_save None, but config\.yaml makes it"):
        open_run(copied)


def test_train_types_without_an_adapter():
    for train_type in ("full", "llama_pro --llama_pro_path x"):
        with pytest.raises(UserError, match="--train_embeddings has no effect with --train_type"):
            parse(["--train_embeddings", "true", "--train_type", *train_type.split()])
