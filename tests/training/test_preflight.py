"""Bad input ends a run before it starts (DESIGN.md, "Bad input").

The status is 2, one line on stderr names the error, its location and the remedy, and nothing is written.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import shutil
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

import block_expansion
import train
from files.names import INDEX
from launch import processes as launch
from launch import ranks
from models.registry import FAMILIES
from tests.helpers.data_files import to_jsonl, write_file
from tests.helpers.images import write_image

KNOWN = ", ".join(FAMILIES)
TENSOR = "model.layers.1.mlp.up_proj.weight"  # [160, 64]
ELSEWHERE = "model.embed_tokens.weight"  # in another shard
SHARD = "model-00002-of-00004.safetensors"


@pytest.fixture
def folder(checkpoints, tmp_path):
    """A copy of a checkpoint, to damage."""
    return shutil.copytree(checkpoints(), tmp_path / "model")


@pytest.fixture
def refused(checkpoints, alpaca_file, tmp_path, monkeypatch, capsys):
    """refused(*words, option=value ...) -> the error line of a run with these options, otherwise good.

    Fails if the line lacks a word, or if the run starts, prints anything else, or writes anything.
    """
    monkeypatch.chdir(tmp_path)
    good = {"model_name": checkpoints(), "dataset": alpaca_file, "output_dir": tmp_path / "out"}

    def run(*words: str, **options) -> str:
        before = _listing(tmp_path)
        argv = [f"--{name}={value}" for name, value in (good | options).items()]
        status, shown = train.main(argv), capsys.readouterr()
        lines = shown.err.splitlines()
        assert status == 2 and len(lines) == 1, shown.err
        assert lines[0].startswith("error: ") and len(lines[0]) > len("error: ")
        assert [word for word in words if word not in lines[0]] == [], lines[0]
        assert _listing(tmp_path) == before
        return lines[0]

    return run


@pytest.fixture(autouse=True)
def no_start(monkeypatch):
    def start(*_):
        raise AssertionError("the run was started")

    monkeypatch.setattr(launch, "start", start)


def _listing(folder) -> dict:
    """Everything below a folder, with size and time of files."""
    found = ((p.relative_to(folder), p.is_file() and p.stat()) for p in folder.rglob("*"))
    return {str(path): stat and (stat.st_size, stat.st_mtime_ns) for path, stat in found}


def test_without_bad_input_the_run_starts(refused):
    with pytest.raises(AssertionError, match="the run was started"):
        refused()


# Options


@pytest.mark.parametrize(
    "options, words",
    [
        ({"lora_rnk": 8}, ["--lora_rnk", "did you mean --lora_rank?"]),
        ({"train_type": "qdora"}, ["--train_type", "'qdora'", "bnb_dora"]),
        ({"train_type": "full", "lora_rank": 8}, ["--lora_rank has no effect", "--train_type full"]),
        ({"resume": "some/run"}, ["--resume some/run", "no such folder"]),
        ({"lora_rank": 0}, ["--lora_rank 0", "positive"]),
        ({"batch_size": 0}, ["--batch_size 0", "positive"]),
        ({"n_bits": 8}, ["--n_bits has no effect", "for the hqq train types"]),
        ({"train_type": "hqq_lora", "n_bits": 5}, ["--n_bits: 5", "8, 4, 3, 2"]),
        ({"train_type": "hqq_lora", "n_bits": 0}, ["--n_bits: 0", "8, 4, 3, 2"]),
        ({"train_type": "hqq_dora", "group_size": 100}, ["--group_size 100", "multiple of 8"]),
        ({"train_type": "hqq_dora", "group_size": 1536}, ["--group_size 1536", "does not divide", "q_proj"]),
        ({"context_length": -5}, ["--context_length -5", "2 or more"]),
        (
            {"use_activation_cpu_offload": "true", "use_gradient_checkpointing": "false"},
            ["--use_gradient_ch"],
        ),
        ({"hybrid_shard_size": 2}, ["--hybrid_shard_size", "hybrid --sharding_strategy"]),
        (
            {"sharding_strategy": "hybrid_full_shard", "hybrid_shard_size": 3, "world_size": 2},
            ["--hybrid_shard_size 3", "2 processes"],
        ),
        ({"lora_target_modules": "q_proj,nope"}, ["--lora_target_modules", "'nope'", "q_proj", "down_proj"]),
        ({"lora_target_modules": "proj"}, ["'proj' matches no linear"]),  # names match by whole segments
        ({"lora_target_modules": "q_proj,"}, ["--lora_target_modules", "''"]),
        ({"config": "none.yaml"}, ["--config none.yaml", "No such file"]),
    ],
)
def test_options(refused, options, words):
    refused(*words, **options)


def test_more_ranks_than_gpus(refused, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    refused("--world_size 2", "1 GPU", world_size=2)


def test_ranks_share_a_gpu_if_nccl_allows_it(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("NCCL_MULTI_RANK_GPU_ENABLE", "1")
    assert [ranks.resolve_world_size(wanted) for wanted in (-1, 1, 4)] == [1, 1, 4]


def test_bf16_on_hardware_without_it(refused, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: False)
    for precision in ("bf16", "bf16_autocast", "bf16_buffers_autocast"):
        refused(f"--precision {precision}", "use auto, fp16_autocast or fp32", precision=precision)


@pytest.fixture
def no_wandb_login(monkeypatch, tmp_path_factory):
    """wandb without a login. It has one session per process, which ends here."""
    import wandb

    wandb.teardown()
    for name in ("WANDB_MODE", "WANDB_API_KEY", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path_factory.mktemp("home")))
    yield
    wandb.teardown()


def test_wandb_without_a_login(refused, no_wandb_login):
    refused("--log_to wandb", "wandb login", "WANDB_MODE=offline", log_to="wandb")


def test_tensorboard_without_its_package(refused, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    refused("--log_to tensorboard: needs", "`pip install tensorboard`", log_to="tensorboard")


# Where the result goes


@pytest.mark.parametrize("below", ["", "/deeper/down"])
def test_output_dir_at_or_below_a_file(refused, tmp_path, below):
    (tmp_path / "file").write_text("kept")
    refused("--output_dir", "cannot be written (Not a directory)", output_dir=f"{tmp_path}/file{below}")


def test_output_dir_with_an_impossible_name(refused):
    refused("--output_dir", "cannot be written (File name too long)", output_dir="x" * 300)


@pytest.mark.parametrize(
    "name", ["config.yaml", "adapter_model.safetensors", "model-00001-of-00002.safetensors"]
)
def test_output_dir_that_holds_a_run(refused, tmp_path, name):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).write_text("of an earlier run")
    refused("--output_dir", "out: holds a run already", "--overwrite")
    with pytest.raises(AssertionError, match="the run was started"):
        refused(overwrite="true")


def test_output_dir_that_is_the_model(refused, folder):
    refused("--output_dir", "--model_name", model_name=folder, output_dir=folder, overwrite="true")


# The model


def remove(*patterns):
    return lambda folder: [path.unlink() for pattern in patterns for path in folder.glob(pattern)]


def write(name, content):
    return lambda folder: (folder / name).write_text(content)


def edit(**values):
    """Set values in config.json."""

    def damage(folder):
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return damage


def reshard(change, tensor=TENSOR):
    """Call change(tensors, weight_map) on the shard that has `tensor`, and on the index."""

    def damage(folder):
        index = json.loads((folder / INDEX).read_text())
        path = folder / index["weight_map"][tensor]
        tensors = load_file(path)
        change(tensors, index["weight_map"])
        save_file(tensors, path, metadata={"format": "pt"})
        (folder / INDEX).write_text(json.dumps(index))

    return damage


def put(tensor, value, in_shard_of=TENSOR):
    return reshard(lambda tensors, _: tensors.update({tensor: value}), in_shard_of)


def reindex(file):
    return reshard(lambda _, weight_map: weight_map.update({TENSOR: file}))


def pop(tensors, *weight_map):
    for names in (tensors, *weight_map):
        del names[TENSOR]


def only_pickle(folder):
    remove("*.safetensors", INDEX)(folder)
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x02.")


def only_gguf(folder):
    remove("*.safetensors", INDEX)(folder)
    (folder / "model.Q4_K_M.gguf").touch()


def truncate(folder):
    (folder / SHARD).write_bytes((folder / SHARD).read_bytes()[:-100])


MODELS = {
    "no config": (remove("config.json"), ["--model_name", "no config.json"]),
    "config is not JSON": (write("config.json", "{"), ["config.json", "not a valid JSON"]),
    "config is a list": (write("config.json", "[]"), ["config.json", "not a JSON object"]),
    "known elsewhere": (edit(model_type="gpt2"), ["config.json", "'gpt2'", KNOWN]),
    "known nowhere": (edit(model_type="nonsense"), ["config.json", "'nonsense'", KNOWN]),
    "size is a text": (edit(hidden_size="64"), ["config.json", "'hidden_size' expected int"]),
    "sizes disagree": (edit(num_attention_heads=3), ["config.json", "not a multiple"]),
    "no heads": (edit(num_attention_heads=0), ["config.json", "by zero"]),
    "no such activation": (edit(hidden_act="nope"), ["config.json", "llama", "'nope'"]),
    "no such padding": (edit(pad_token_id=5000), ["config.json", "Padding_idx"]),
    "no weights": (remove("*.safetensors", INDEX), ["--model_name", "no weights", "model.safetensors"]),
    "only a pickle": (only_pickle, ["pytorch_model.bin is a pickle", "convert it to safetensors"]),
    "only GGUF files": (only_gguf, ["quantized already (GGUF)", "take the model that it was made from"]),
    "shard is missing": (remove(SHARD), [f"{SHARD} is missing", INDEX]),
    "shard is truncated": (truncate, [SHARD, "truncated"]),
    "shard is a text": (write(SHARD, "not found"), [SHARD, "not a safetensors file"]),
    "another shape": (put(TENSOR, torch.zeros(159, 64)), [TENSOR, "shape [159, 64]", "json says [160, 64]"]),
    "tensor nowhere": (reshard(pop), [f"tensor {TENSOR} is missing from the weights"]),
    "tensor only in the index": (reshard(lambda t, _: pop(t)), [f"{TENSOR} is missing; {INDEX} says"]),
    "tensor too many": (
        put("model.gate", torch.zeros(2)),
        [".safetensors", "model.gate belongs to no parameter of"],
    ),
    "tensor in two shards": (put(TENSOR, torch.zeros(160, 64), ELSEWHERE), [TENSOR, "as well"]),
    "tensor is quantized": (put(TENSOR, torch.zeros(2).char()), [TENSOR, "as I8", "expected floating-point"]),
    "index leads outside": (reindex("../model.safetensors"), [INDEX, "'../model.safetensors'", "plain file"]),
    "index is absolute": (reindex("/etc/passwd"), [INDEX, "'/etc/passwd'", "plain file name"]),
    "index holds a number": (reindex(5), [INDEX, "5 is not a plain file name"]),
    "index is not JSON": (write(INDEX, "{"), [INDEX, "not a valid JSON"]),
    "index without map": (write(INDEX, "{}"), [INDEX, "weight_map"]),
    "no tokenizer": (remove("tokenizer*"), ["--model_name", "there is no tokenizer.json"]),
    "tokenizer is not JSON": (write("tokenizer.json", "{"), ["--model_name", "no usable tokenizer"]),
    "tokenizer is a dummy": (write("tokenizer.json", '{"added_tokens": []}'), ["no usable tokenizer"]),
}


@pytest.mark.parametrize("name", MODELS)
def test_model(refused, folder, name):
    damage, words = MODELS[name]
    damage(folder)
    assert str(folder) in refused(*words, model_name=folder)


def test_a_weight_of_64_bits(refused, folder):
    """bitsandbytes does not pack it, hqq does. A norm is never packed."""
    put(TENSOR, torch.zeros(160, 64).double())(folder)
    norm = "model.layers.1.input_layernorm.weight"
    put(norm, torch.ones(64).double(), norm)(folder)
    words = [str(folder), f"{TENSOR} is stored as torch.float64", "bitsandbytes does not pack"]
    for train_type in ("qlora", "bnb_dora"):
        refused(*words, model_name=folder, train_type=train_type)
    for train_type in ("hqq_lora", "full"):
        with pytest.raises(AssertionError, match="the run was started"):
            refused(model_name=folder, train_type=train_type)


@pytest.mark.parametrize(
    "name, words",
    [
        ("./no/such/folder", ["no such folder", "owner/name"]),
        ("~nobody-here/model", ["no such folder", "owner/name"]),
        ("own/unreachable", ["no such folder", "the hub cannot be reached"]),
        ("x" * 300, ["no such folder"]),
    ],
)
def test_model_that_is_nowhere(refused, name, words):
    refused(f"--model_name {name}", *words, model_name=name)


@pytest.mark.parametrize("train_type", ["llama_pro", "bnb_llama_pro"])
@pytest.mark.parametrize("option", ["model_name", "llama_pro_path"])
def test_llama_pro_on_a_model_that_is_not_expanded(refused, folder, train_type, option):
    words = ["config.json", "no llama_pro_new_layers", "block_expansion.py --model_name"]
    refused(str(folder), *words, train_type=train_type, **{option: folder})


@pytest.mark.parametrize("layers", [[], [0], [3], [2, 1], [1, 1], [-1], ["1"], [True], 1, {"1": 2}])
def test_new_layers_that_do_not_fit(refused, folder, layers):
    edit(llama_pro_new_layers=layers)(folder)
    words = [f"llama_pro_new_layers {layers}", "num_hidden_layers 3", "from 1 to 2"]
    refused(*words, train_type="llama_pro", model_name=folder)


def test_new_layers_that_bf16_would_keep_silent(refused, checkpoints, tmp_path):
    folder = tmp_path / "expanded"
    assert (
        block_expansion.main(
            [f"--model_name={checkpoints('gemma3')}", f"--output_dir={folder}", "--new_blocks=1"]
        )
        == 0
    )
    for precision in ("bf16", "bf16_buffers_autocast"):
        words = [str(folder), "layernorm.weight is -1", "--lr 0.0002", "--precision auto"]
        refused(*words, train_type="llama_pro", model_name=folder, precision=precision)


@pytest.mark.parametrize("path", ["./no/such/folder", "own/unreachable", ""])
def test_llama_pro_path_that_is_no_model(refused, path):
    refused(f"--llama_pro_path {path}", "block_expansion.py", train_type="llama_pro", llama_pro_path=path)


@pytest.mark.parametrize("damage", [remove("*"), remove("*.safetensors", INDEX), remove("tokenizer*")])
def test_errors_name_llama_pro_path(refused, checkpoints, tmp_path, damage):
    """They do not name --model_name, which is not read with it."""
    folder = shutil.copytree(checkpoints("llama_pro"), tmp_path / "expanded")
    damage(folder)
    line = refused(train_type="llama_pro", llama_pro_path=folder)
    assert line.startswith(f"error: --llama_pro_path {folder}: ") and "--model_name" not in line


def test_libraries_print_nothing_with_the_error(refused, folder, caplog, monkeypatch):
    """Their handlers have an older stderr than the test's, so the test reads the records."""
    edit(pad_token_id=5001)(folder)  # a new value: the same warning comes only once
    monkeypatch.setattr(logging.getLogger("transformers"), "handlers", [caplog.handler])
    refused(model_name=folder)
    assert caplog.records == []


DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
DEFAULT = {"rope_type": "default", "rope_theta": 1e4}


@pytest.mark.parametrize(
    ("kind", "rope"),
    [
        ("llama", {"rope_parameters": DYNAMIC}),
        ("llama", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}),
        ("gemma3", {"rope_parameters": {"sliding_attention": DEFAULT, "full_attention": DYNAMIC}}),
    ],
)
def test_rope_that_depends_on_the_longest_row(refused, checkpoints, alpaca_file, tmp_path, kind, rope):
    """A row of training, of evaluation or of samples may be too long. With shorter rows or another RoPE type
    the run starts."""
    folder = shutil.copytree(checkpoints(kind), tmp_path / "model")
    (tmp_path / "short.jsonl").write_text(ROW)
    edit(max_position_embeddings=400, **{"rope_parameters": None} | rope)(folder)
    words = [str(folder), "dynamic", "more than 400 tokens", "lower --context_length"]
    short = {"model_name": folder, "dataset": tmp_path / "short.jsonl", "sample_prompts": "short.jsonl"}
    assert refused(*words, model_name=folder).endswith("--context_length")
    assert refused(*words, eval_dataset=alpaca_file, **short, sample_every=1).endswith("--context_length")
    refused(*words, "--sample_tokens", **short, sample_every=1, sample_tokens=300)
    with pytest.raises(AssertionError, match="the run was started"):
        refused(**short, sample_every=1)
    with pytest.raises(AssertionError, match="the run was started"):
        refused(model_name=folder, context_length=400)
    edit(rope_parameters=None, rope_scaling=None)(folder)
    with pytest.raises(AssertionError, match="the run was started"):
        refused(model_name=folder)


@pytest.mark.parametrize("flat", [False, True])
def test_longrope_of_some_layers(refused, checkpoints, tmp_path, flat):
    """Also from a single rope_scaling. tests/data/test_packing.py has longrope for all layers."""
    folder = shutil.copytree(checkpoints("gemma3"), tmp_path / "model")
    factors = {f"{kind}_factor": [1.0] * 16 for kind in ("short", "long")}
    rope = (
        DEFAULT | factors | {"rope_type": "longrope", "original_max_position_embeddings": 32, "factor": 2.0}
    )
    layers = {"sliding_attention": DEFAULT, "full_attention": rope}
    edit(**({"rope_parameters": None, "rope_scaling": rope} if flat else {"rope_parameters": layers}))(folder)
    refused(str(folder), "longrope for some kinds of layers", model_name=folder)


# The data

ROW = '{"instruction": "Say red.", "output": "red"}\n'
CHAT = '{"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]}\n'
DATA = {
    "empty.jsonl": (b"", {}, ["is empty"]),
    "header.csv": ("instruction,output\n", {}, ["is empty"]),
    "broken.jsonl": (ROW + "\n{oops\n", {}, ["broken.jsonl:3", "not JSON"]),
    "broken.json": ("[\n{},\n{oops}]", {}, ["broken.json:3", "not JSON"]),
    "list.jsonl": (ROW + "[1]\n", {}, ["list.jsonl:2", "not a JSON object"]),
    "latin.jsonl": (ROW.encode() + b'{"instruction": "caf\xe9"}\n', {}, ["latin.jsonl:2", "not UTF-8"]),
    "short.csv": ("instruction,output\na,b\nc\n", {}, ["short.csv:3", "columns"]),
    "long.csv": ("instruction,output\na,b,c\n", {}, ["long.csv:2", "columns"]),
    "damaged.parquet": (b"PAR1 and nothing behind it", {}, ["not a parquet file"]),
    "named.jsonl": (
        ROW,
        {"dataset_format": "qa"},
        ["named.jsonl:1", "question", "instruction, output; --columns says"],
    ),
    "unknown.jsonl": ('{"a": "x", "b": "y"}\n', {}, ["a, b", "alpaca: instruction, output"]),
    "mixed.jsonl": (
        ROW + CHAT,
        {},
        ["different formats", "1 alpaca", "mixed.jsonl:1", "1 chat", "mixed.jsonl:2"],
    ),
    "forms.jsonl": (
        '{"prompt": "a", "completion": "b"}\n{"prompt": "a", "response": "b"}\n',
        {},
        ["1 prompt_completion", "forms.jsonl:1", "1 qa of prompt, response", "forms.jsonl:2", "docs/data.md"],
    ),
    "sharegpt.jsonl": (
        '{"conversations": [{"from": "alien", "value": "x"}]}\n',
        {},
        ["sharegpt.jsonl:1", "message 1: from is alien", "docs/data.md"],
    ),
    "named.csv": (
        "a,b\nx,y\n",
        {"columns": "question=a,answer=c"},
        ["--columns answer=c: the data has no column c; its columns are a, b", "docs/data.md"],
    ),
    "unread.csv": (
        "a,b\nx,y\n",
        {"columns": "question=a,anwser=b"},
        ["--columns anwser=b: no format reads a column anwser; the columns are messages,", "docs/data.md"],
    ),
    "apart.csv": (
        "a,b\nx,y\n",
        {"columns": "question=a,output=b"},
        ["--columns question=a, --columns output=b: no format reads the columns question, output together"],
    ),
    "other.csv": (
        "a,b\nx,y\n",
        {"columns": "question=a,answer=b", "dataset_format": "alpaca"},
        ["--columns question=a: the format alpaca does not read a column question; the columns are"],
    ),
    "body.csv": ("body\nx\n", {"text_column": "text"}, ["--text_column text: the data has no column text"]),
    "infinite.jsonl": (ROW + '{"instruction": "x", "output": 1e400}\n', {}, ["infinite.jsonl:2", "1e400"]),
    "null.jsonl": (ROW + '{"instruction": "x", "output": null}\n', {}, ["null.jsonl:2", "output"]),
    "nested.jsonl": (ROW + '{"instruction": "x", "output": {}}\n', {}, ["nested.jsonl:2", "output"]),
    "long.jsonl": (ROW * 3, {"context_length": 8}, ["none of the 3 rows", "--context_length 8"]),
    "chat.jsonl": (CHAT, {}, ["chat.jsonl:1", "no chat template"]),
}


@pytest.mark.parametrize("name", DATA)
def test_dataset(refused, tmp_path, name):
    content, options, words = DATA[name]
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    refused(f"--dataset {tmp_path / name}", *words, dataset=tmp_path / name, **options)


def test_columns_that_are_not_read_are_printed_once(refused, tmp_path, capsys):
    (tmp_path / "rows.jsonl").write_text('{"instruction": "a", "output": "b", "id": 1, "source": "c"}\n' * 3)
    with pytest.raises(AssertionError, match="the run was started"):
        refused(dataset=tmp_path / "rows.jsonl")
    assert capsys.readouterr().out.splitlines().count("data: columns that are not read: id, source") == 1


@pytest.mark.parametrize(
    "name, words",
    [
        ("none.jsonl", ["--dataset none.jsonl", "no such file"]),
        ("alpacca", ["--dataset alpacca", "not a recipe (alpaca,", "toy", ".parquet", "owner/name"]),
        ("own/unreachable", ["--dataset own/unreachable", "could not be loaded"]),
    ],
)
def test_dataset_that_is_nowhere(refused, name, words):
    refused(*words, dataset=name)


# --verbose


@pytest.mark.parametrize(
    "argv, traced",
    [
        (["--dataset", "nope", "--verbose"], True),
        (["--dataset", "nope", "--verbose=true"], True),
        (["--nope", "--verbose"], True),
        (["--dataset", "nope", "--verbose", "false"], False),
        (["--dataset", "nope"], False),
    ],
)
def test_verbose_shows_the_traceback(checkpoints, tmp_path, capsys, argv, traced):
    status = train.main(["--model_name", str(checkpoints()), "--output_dir", str(tmp_path / "out"), *argv])
    shown = capsys.readouterr().err
    assert status == 2 and shown.splitlines()[-1].startswith("error: ")
    assert shown.startswith("Traceback") == traced and (len(shown.splitlines()) == 1) != traced


def test_layers_that_do_not_compile(refused, checkpoints, monkeypatch):
    folder = checkpoints("qwen3_moe")
    broken = dataclasses.replace(FAMILIES["qwen3_moe"], compiles=False)
    monkeypatch.setitem(FAMILIES, "qwen3_moe", broken)
    refused(
        "--compile true", "qwen3_moe does not compile", "auto or false", model_name=folder, compile="true"
    )
    with pytest.raises(AssertionError, match="the run was started"):
        refused(model_name=folder, compile="auto")


def test_images_of_a_model_of_texts(refused, tmp_path):
    """The rows, and the options about images, which have no effect without them."""
    write_image(tmp_path / "scan.png")
    row = {"question": "What is it?", "answer": "A cyst", "image": "scan.png"}
    rows = write_file(tmp_path / "scans.jsonl", to_jsonl([row]))
    refused("scans.jsonl:1: has an image", "--model_name", dataset=rows)
    refused("--image_size 448", "no row has an image", image_size=448)
    refused(f"--image_folder {tmp_path}", "no row has an image", image_folder=tmp_path)
    refused("--image_folder nowhere: no such folder", image_folder="nowhere")
    refused("--image_size", "from 28 to 16384", image_size=3)
