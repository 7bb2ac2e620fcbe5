"""files/tokenizer.py: transformers' tokenizer compared with tokenizer.json, and incomplete folders."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import transformers
from packaging.version import Version
from tokenizers import Tokenizer, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast, Qwen2Tokenizer

import block_expansion
import export
from data.reading import ReadingOptions
from data.tokenizing import tokenize_dataset
from files.names import BLOCKS
from files.tokenizer import TEXTS, compare_with_files, read_tokenizer, save_to_texts
from options.errors import UserError
from tests.helpers import small_tokenizers, tiny
from tests.helpers.adapters import args_for
from tests.helpers.finished_runs import write_random_run
from tests.helpers.here import SINGLE_RANK
from tests.helpers.runs import make_job
from tests.helpers.small_tokenizers import BYTES

# None of them is in TEXTS of files/tokenizer.py.
SAMPLE_TEXTS = (
    "the Paris  is  x1",
    "  Paris\n\n \tis",
    "e\u0301t\u00e9 = 91234",
    "a</s>Paris</s> is<s> x",
    "",
    "\u65e5\u672c \U0001f642",
)


def three_digit_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE that keeps three digits together, as Llama 3's does, and merges them."""
    tokenizer_json = json.loads(small_tokenizers.crossing().backend_tokenizer.to_str())
    vocabulary = tokenizer_json["model"]["vocab"]
    vocabulary |= {"12": len(vocabulary), "34": len(vocabulary) + 1}
    tokenizer_json["model"]["merges"] += [["1", "2"], ["3", "4"]]
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(tokenizer_json)), bos_token="<s>", eos_token="</s>"
    )


def write_tokenizer(folder: Path, tokenizer, model_type: str, kind: str, **config) -> Path:
    """Write a tokenizer into a folder; tokenizer_config.json names the class `kind` and holds `config`."""
    folder.mkdir(exist_ok=True)
    tokenizer.backend_tokenizer.save(str(folder / "tokenizer.json"))
    described = {"tokenizer_class": kind, "bos_token": "<s>", "eos_token": "</s>", **config}
    (folder / "tokenizer_config.json").write_text(json.dumps(described))
    if not (folder / "config.json").exists():
        (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    return folder


ADDED = {"added_tokens_decoder": {"265": {"content": "<|user|>", "special": True}}}
# (the tokenizer of tokenizer.json, (config.json's model_type, tokenizer_config.json's class), further
# settings of tokenizer_config.json, words of the remark)
DIFFERENT = {
    "Llama 2": (
        small_tokenizers.byte_fallback, ("llama", "LlamaTokenizerFast"), {},
        "LlamaTokenizer splits text differently from tokenizer.json (normalizer, pre_tokenizer, ",
        "' ' is nothing instead of '▁'."),
    "Unigram under Llama's class": (
        small_tokenizers.unigram, ("llama", "LlamaTokenizer"), {},
        "LlamaTokenizer splits text differently", "'b' '▁' '<s>' instead of '▁' 'b' '▁'."),
    "normalized by Qwen's class": (
        small_tokenizers.crossing, ("qwen3", "Qwen2Tokenizer"), {},
        "Qwen2Tokenizer splits text differently from tokenizer.json (normalizer, pre_tokenizer, ",
        "'Ã' '©' instead of 'e' 'Ì' 'ģ'."),
    "digits under Qwen's class": (
        three_digit_tokenizer, ("qwen2", "Qwen2Tokenizer"), {},
        "Qwen2Tokenizer splits text differently from tokenizer.json (normalizer, pre_tokenizer, "),
    "Gemma's class": (
        small_tokenizers.byte_fallback, ("gemma2", "GemmaTokenizer"), {},
        "GemmaTokenizer splits text differently", "'a' is 'a' instead of '▁' 'a'."),
    "a token that only tokenizer_config.json has": (
        small_tokenizers.trimming, ("mistral", "PreTrainedTokenizerFast"), ADDED,
        "splits text differently from tokenizer.json (added_tokens): ",
        "'<|user|>' 'b' 'Ġ' instead of '<' '|' 'u'."),
}  # fmt: skip


@pytest.mark.parametrize("name", DIFFERENT)
def test_saved_texts_make_the_same_tokens(name, tmp_path):
    """With an added token, beside an adapter: without config.json, whose model_type chooses the class."""
    make, (model_type, kind), config, *_ = DIFFERENT[name]
    tokenizer = read_tokenizer(write_tokenizer(tmp_path / "base", make(), model_type, kind, **config), "base")
    tokenizer.add_tokens(["<|im_end|>"], special_tokens=True)
    tokenizer.chat_template = "{{ messages[0].content }}"
    (tmp_path / "adapter").mkdir()
    for file, text in save_to_texts(tokenizer).items():
        (tmp_path / "adapter" / file).write_text(text)
    saved = AutoTokenizer.from_pretrained(tmp_path / "adapter")
    texts = [*TEXTS, *SAMPLE_TEXTS, "a <|im_end|>\n b"]
    assert saved(texts)["input_ids"] == tokenizer(texts)["input_ids"]
    assert saved.chat_template == tokenizer.chat_template


@pytest.mark.parametrize("case", DIFFERENT)
def test_a_tokenizer_that_does_not_follow_its_file(case, tmp_path):
    """The file to save makes transformers' tokens, alone and under transformers, and leaves no remark."""
    make, (model_type, kind), config, *words = DIFFERENT[case]
    folder = write_tokenizer(tmp_path / "model", make(), model_type, kind, **config)
    tokenizer = read_tokenizer(folder, "here")
    differences = compare_with_files(folder, tokenizer)
    assert not any("\n" in remark for remark in differences.remarks)
    lacking = "tokenizer.json lacks '<|user|>' (id 265)" if config else " this id; "
    assert [remark for remark in differences.remarks[1:] if lacking not in remark] == []
    assert len(differences.remarks) < 3
    assert [word for word in words if word not in differences.remarks[0]] == [], differences.remarks
    assert list(differences.files) == ["tokenizer.json"]
    texts = [*SAMPLE_TEXTS, *(f"{text}<|user|>{text}" for text in SAMPLE_TEXTS)]
    theirs = [AutoTokenizer.from_pretrained(folder)(text)["input_ids"] for text in texts]
    before = [Tokenizer.from_file(str(folder / "tokenizer.json")).encode(text).ids for text in texts]
    assert before != theirs
    (folder / "tokenizer.json").write_text(differences.files["tokenizer.json"])
    assert [Tokenizer.from_file(str(folder / "tokenizer.json")).encode(text).ids for text in texts] == theirs
    again = read_tokenizer(folder, "here")
    assert [again(text)["input_ids"] for text in texts] == theirs
    assert compare_with_files(folder, again).remarks == []


NEEDS_NEW_TRANSFORMERS = pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.23"),
    reason="LlamaTokenizer rebuilds byte-level files there",
)


@pytest.mark.parametrize(
    ("make", "named"),
    [
        # Byte-level: transformers keeps it, from some version after 5.17 on.
        pytest.param(lambda: BYTES, ("llama", "LlamaTokenizer"), marks=NEEDS_NEW_TRANSFORMERS),
        (small_tokenizers.trimming, ("llama", "PreTrainedTokenizerFast")),
        (small_tokenizers.byte_fallback, ("mistral", "LlamaTokenizer")),
        (small_tokenizers.unigram, ("phi3", "LlamaTokenizerFast")),
        (small_tokenizers.ending, ("qwen3", "TokenizersBackend")),
    ],
)
def test_a_tokenizer_that_follows_its_file(make, named, tmp_path):
    """There is no remark and no file to write. Padding and truncation in a file are no difference."""
    tokenizer = make()
    tokenizer.backend_tokenizer.enable_padding(length=7, pad_id=1, pad_token="</s>")
    tokenizer.backend_tokenizer.enable_truncation(1)
    folder = write_tokenizer(tmp_path / "model", tokenizer, *named)
    tokenizer.backend_tokenizer.no_padding()
    tokenizer.backend_tokenizer.no_truncation()
    differences = compare_with_files(folder, read_tokenizer(folder, "here"))
    assert (differences.remarks, differences.files) == ([], {})


def test_bos_is_compared(tmp_path):
    folder = write_tokenizer(
        tmp_path / "model", small_tokenizers.trimming(), "llama", "PreTrainedTokenizerFast"
    )
    tokenizer = read_tokenizer(folder, "here")
    tokenizer.add_bos_token = False
    differences = compare_with_files(folder, tokenizer)
    assert "(post_processor): 'a' is 'a' instead of '<s>' 'a'." in differences.remarks[0]
    assert Tokenizer.from_str(differences.files["tokenizer.json"]).encode("a").tokens == ["a"]


def tokenizer_without_bos() -> PreTrainedTokenizerFast:
    tokenizer = small_tokenizers.crossing()
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel()
    return tokenizer


@pytest.mark.parametrize("make", [small_tokenizers.trimming, small_tokenizers.ending, tokenizer_without_bos])
def test_flags_that_contradict_the_tokenizer(make, tmp_path):
    """transformers uses tokenizer.json, llama.cpp's converter the flags of tokenizer_config.json."""
    does = {
        "add_bos_token": make is not tokenizer_without_bos,
        "add_eos_token": make is small_tokenizers.ending,
    }
    for name, flag in does.items():
        config = does | {name: not flag, "model_max_length": 9}
        folder = write_tokenizer(tmp_path / "model", make(), "llama", "PreTrainedTokenizerFast", **config)
        differences = compare_with_files(folder, read_tokenizer(folder, "here"))
        assert (
            len(differences.remarks) == 1
            and f"says {name}: {str(not flag).lower()}, but the tokenizer adds" in differences.remarks[0]
        )
        written = json.loads(differences.files["tokenizer_config.json"])
        assert written == json.loads((folder / "tokenizer_config.json").read_text()) | does
    (folder / "tokenizer_config.json").write_text(differences.files["tokenizer_config.json"])
    assert compare_with_files(folder, read_tokenizer(folder, "here")).remarks == []


# Incomplete folders

VOCABULARY = {"vocab.json": '{"a": 0, "</s>": 1}', "merges.txt": "#version: 0.2\n"}
SPM_FILE = "tokenizer.model"
# (files of the folder instead of tokenizer.json and tokenizer_config.json, words of the error)
INCOMPLETE_FOLDERS = {
    "nothing": ({}, "there is no tokenizer.json)"),
    "SentencePiece's model": (
        {SPM_FILE: "x"},
        f"there is no tokenizer.json, and {SPM_FILE} alone does not say how to split text: make"
        " tokenizer.json"),
    "SentencePiece's model, and a config": (
        {SPM_FILE: "x", "tokenizer_config.json": "{}"},
        "where sentencepiece and protobuf are installed, by transformers'"
        " AutoTokenizer.from_pretrained(folder).save_pretrained(folder), and compare its tokens"),
    "SentencePiece's model, and special tokens": (
        {SPM_FILE: "x", "special_tokens_map.json": "{}"}, f"{SPM_FILE} alone does not say"),
    "Mistral's own file": ({"tekken.json": "{}"}, "tekken.json alone does not say"),
    "a vocabulary": (VOCABULARY, "vocab.json alone does not say"),
    "a vocabulary without merges": (
        {"vocab.json": "{}", "tokenizer_config.json": "{}"}, "vocab.json alone does not"),
    "tokenizer.json alone": (
        {"tokenizer.json": BYTES.backend_tokenizer.to_str()},
        "there is no tokenizer_config.json, so what its BOS, EOS and chat template are is unknown)"),
    "tokenizer.json and a template": (
        {"tokenizer.json": BYTES.backend_tokenizer.to_str(), "chat_template.jinja": "{{ bos_token }}"},
        "there is no tokenizer_config.json"),
    "a config of nothing": (
        {"tokenizer.json": BYTES.backend_tokenizer.to_str(), "tokenizer_config.json": "{}"},
        "eos_token is in neither tokenizer_config.json nor special_tokens_map.json"),
    "a config of a class": (
        {"tokenizer.json": BYTES.backend_tokenizer.to_str(),
         "tokenizer_config.json": '{"tokenizer_class": "Qwen2Tokenizer", "bos_token": "<s>"}'},
        "eos_token is in neither"),
    "special tokens without EOS": (
        {"tokenizer.json": BYTES.backend_tokenizer.to_str(),
         "special_tokens_map.json": '{"bos_token": "<s>"}'},
        "eos_token is in neither"),
    "special tokens that are not read": (
        {"tokenizer.json": BYTES.backend_tokenizer.to_str(),
         "tokenizer_config.json": '{"added_tokens_decoder": {}}',
         "special_tokens_map.json": '{"eos_token": "</s>"}'},
        "tokenizer_config.json has no eos_token"),
    "a vocabulary and merges, without EOS": (
        VOCABULARY | {"tokenizer_config.json": '{"tokenizer_class": "Qwen2Tokenizer"}'},
        "eos_token is in neither"),
}  # fmt: skip


@pytest.mark.parametrize("case", INCOMPLETE_FOLDERS)
@pytest.mark.parametrize("model_type", ["llama", "qwen3", "gemma2"])
def test_an_incomplete_folder(case, model_type, tmp_path):
    files, words = INCOMPLETE_FOLDERS[case]
    for name, text in ({"config.json": json.dumps({"model_type": model_type})} | files).items():
        (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=r"^here: no usable tokenizer ") as raised:
        read_tokenizer(tmp_path, "here")
    assert words in str(raised.value)


def test_special_tokens_in_special_tokens_map(tmp_path):
    """transformers 4 wrote this file in addition to tokenizer_config.json."""
    folder = write_tokenizer(tmp_path / "model", BYTES, "llama", "PreTrainedTokenizerFast")
    (folder / "tokenizer_config.json").unlink()
    (folder / "special_tokens_map.json").write_text(
        '{"bos_token": "<s>", "eos_token": {"content": "</s>", "lstrip": false}}'
    )
    tokenizer = read_tokenizer(folder, "here")
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (BYTES.bos_token_id, BYTES.eos_token_id)
    (remark,) = compare_with_files(folder, tokenizer).remarks
    assert remark.endswith(
        "no tokenizer_config.json; BOS and EOS are those of special_tokens_map.json, and there is no chat"
        " template"
    )


def test_a_vocabulary_and_merges(tmp_path):
    """Byte-level BPE as its slow tokenizer saved it, compared with one made of the same vocabulary."""
    model = json.loads(small_tokenizers.crossing().backend_tokenizer.to_str())["model"]
    vocabulary, merges = model["vocab"], [tuple(pair) for pair in model["merges"]]
    folder = write_tokenizer(tmp_path / "model", BYTES, "qwen3", "Qwen2Tokenizer")
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges))
    tokenizer = read_tokenizer(folder, "here")
    differences = compare_with_files(folder, tokenizer)
    assert differences.remarks[0].startswith(
        "tokenizer: no tokenizer.json; transformers builds Qwen2Tokenizer out of vocab.json and merges.txt."
    )
    (remark,) = differences.remarks[1:]
    assert "no file gives '<|endoftext|>' (unk_token, pad_token, id " in remark
    expected = Qwen2Tokenizer(vocabulary, merges, bos_token="<s>", eos_token="</s>")
    for text in SAMPLE_TEXTS:
        ids = Tokenizer.from_str(differences.files["tokenizer.json"]).encode(text).ids
        assert ids == tokenizer(text)["input_ids"] == expected(text)["input_ids"]


# Saved models


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A model with a tokenizer like Llama 2's, which transformers does not build as its file says."""
    folder = tiny.save_checkpoint("llama", tmp_path_factory.mktemp("base") / "model", vocab_size=400)
    return write_tokenizer(
        folder, small_tokenizers.byte_fallback(), "llama", "LlamaTokenizer", add_bos_token=True
    )


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """A .jsonl of four texts with spaces and EOS inside."""
    file = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    texts = [{"text": f"  Paris is {i}</s>Paris  is"} for i in range(4)]
    file.write_text("".join(json.dumps(row) + "\n" for row in texts))
    return file


def assert_tokens_of_training(folder: Path, base: Path, rows: Path) -> None:
    """Check that the folder's tokenizer.json alone makes the tokens of training; the base's does not."""
    trained = tokenize_dataset(str(rows), ReadingOptions(read_tokenizer(base, "here"), context_length=100))
    texts = [json.loads(line)["text"] for line in rows.read_text().splitlines()]
    for path, same in ((folder, True), (base, False)):
        file = Tokenizer.from_file(str(path / "tokenizer.json"))
        ids = [[*file.encode(text).ids, file.token_to_id("</s>")] for text in texts]
        assert (list(itertools.chain(*ids)) == trained.tokens.tolist()) == same
    assert tokenize_dataset(
        str(rows), ReadingOptions(read_tokenizer(folder, "here"), context_length=100)
    ).tokens.equal(trained.tokens)


def test_training_starts_with_a_remark(base, rows, checkpoints, capsys):
    expected = "tokenizer: transformers' LlamaTokenizer splits text differently from tokenizer.json"
    job = make_job(SINGLE_RANK, args_for(base, rows, "qlora"))
    assert sum(expected in remark for remark in job.remarks) == 1 and "tokenizer.json" in job.small_files
    remarks = make_job(SINGLE_RANK, args_for(checkpoints(), rows, "qlora")).remarks
    assert not any("tokenizer:" in remark for remark in remarks)


def test_a_saved_model_has_the_tokenizer_of_training(base, rows, one_rank, tmp_path, capsys):
    write_random_run(one_rank, tmp_path / "run", args_for(base, rows, "full"))
    assert_tokens_of_training(tmp_path / "run", base, rows)
    saved, original = (folder / "tokenizer_config.json" for folder in (tmp_path / "run", base))
    assert saved.read_text() == original.read_text()
    capsys.readouterr()
    assert export.main([str(tmp_path / "run"), "--to", "merged", "--out", str(tmp_path / "out")]) == 0
    assert_tokens_of_training(tmp_path / "out", base, rows)
    assert "tokenizer:" not in capsys.readouterr().out  # the RUN's file is already the one in use


@pytest.mark.parametrize("to", ["merged", "gguf-ready", "adapter"])
def test_an_exported_folder_has_the_tokenizer_of_training(to, base, rows, one_rank, tmp_path, capsys):
    write_random_run(one_rank, tmp_path / "run", args_for(base, rows, "bnb_dora"))
    capsys.readouterr()
    assert export.main([str(tmp_path / "run"), "--to", to, "--out", str(tmp_path / "out")]) == 0
    assert_tokens_of_training(tmp_path / "out", base, rows)
    assert capsys.readouterr().out.count("LlamaTokenizer splits text differently from tokenizer.json") == 1


def test_trained_blocks_in_place_have_the_tokenizer_of_training(base, rows, one_rank, tmp_path):
    expanded, merged = tiny.save_expanded(base, tmp_path / "pro"), tmp_path / "whole"
    assert (expanded / "tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()
    write_random_run(
        one_rank, tmp_path / "run", args_for(expanded, rows, "llama_pro", "--llama_pro_save", "blocks")
    )
    command = ["--model_name", expanded, "--blocks", tmp_path / "run" / BLOCKS, "--output_dir", merged]
    assert block_expansion.main(list(map(str, command))) == 0
    assert_tokens_of_training(merged, base, rows)
