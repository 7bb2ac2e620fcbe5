"""files/tokenizer.py: transformers' tokenizer against what tokenizer.json says, and folders that do not say enough."""

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
from data.tokenizing import prepare
from files.names import BLOCKS
from files.tokenizer import compare_with_files, read_tokenizer
from options.errors import UserError
from tests.helpers import small_tokenizers, tiny
from tests.helpers.adapters import args_for
from tests.helpers.finished_runs import saved_run
from tests.helpers.here import HERE
from tests.helpers.runs import make_job
from tests.helpers.small_tokenizers import BYTES

# None of them is one of those that tokenizers are compared on.
SOME = (
    "the Paris  is  x1",
    "  Paris\n\n \tis",
    "e\u0301t\u00e9 = 91234",
    "a</s>Paris</s> is<s> x",
    "",
    "\u65e5\u672c \U0001f642",
)


def digits_apart() -> PreTrainedTokenizerFast:
    """Byte-level BPE that keeps three digits together, as Llama 3's does, and merges them."""
    backend = small_tokenizers.crossing().backend_tokenizer
    said = json.loads(backend.to_str())
    said["model"]["vocab"] |= {"12": len(said["model"]["vocab"]), "34": len(said["model"]["vocab"]) + 1}
    said["model"]["merges"] += [["1", "2"], ["3", "4"]]
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(said)), bos_token="<s>", eos_token="</s>"
    )


def write_tokenizer(folder: Path, tokenizer, model_type: str, kind: str, **config) -> Path:
    """A folder whose tokenizer_config.json names the class `kind`."""
    folder.mkdir(exist_ok=True)
    tokenizer.backend_tokenizer.save(str(folder / "tokenizer.json"))
    described = {"tokenizer_class": kind, "bos_token": "<s>", "eos_token": "</s>", **config}
    (folder / "tokenizer_config.json").write_text(json.dumps(described))
    if not (folder / "config.json").exists():
        (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    return folder


ADDED = {"added_tokens_decoder": {"265": {"content": "<|user|>", "special": True}}}
# the tokenizer of tokenizer.json, config.json's model_type, the class and more of tokenizer_config.json; what is told
DIFFERENT = {
    "Llama 2": (
        small_tokenizers.byte_fallback, ("llama", "LlamaTokenizerFast"), {},
        "LlamaTokenizer splits text otherwise than tokenizer.json says (normalizer, pre_tokenizer, ", "' ' is nothing instead of '▁'."),
    "Unigram under Llama's class": (
        small_tokenizers.unigram, ("llama", "LlamaTokenizer"), {},
        "LlamaTokenizer splits text otherwise", "'b' '▁' '<s>' instead of '▁' 'b' '▁'."),
    "normalized by Qwen's class": (
        small_tokenizers.crossing, ("qwen3", "Qwen2Tokenizer"), {},
        "Qwen2Tokenizer splits text otherwise than tokenizer.json says (normalizer, pre_tokenizer, ", "'Ã' '©' instead of 'e' 'Ì' 'ģ'."),
    "digits under Qwen's class": (
        digits_apart, ("qwen2", "Qwen2Tokenizer"), {},
        "Qwen2Tokenizer splits text otherwise than tokenizer.json says (normalizer, pre_tokenizer, "),
    "Gemma's class": (
        small_tokenizers.byte_fallback, ("gemma2", "GemmaTokenizer"), {},
        "GemmaTokenizer splits text otherwise", "'a' is 'a' instead of '▁' 'a'."),
    "a token that only tokenizer_config.json has": (
        small_tokenizers.trimming, ("mistral", "PreTrainedTokenizerFast"), ADDED,
        "splits text otherwise than tokenizer.json says (added_tokens): ", "'<|user|>' 'b' 'Ġ' instead of '<' '|' 'u'."),
}  # fmt: skip


@pytest.mark.parametrize("case", DIFFERENT)
def test_a_tokenizer_that_does_not_follow_its_file(case, tmp_path):
    """The file to save makes transformers' tokens by itself, and below transformers; then nothing is left to tell."""
    make, (model_type, kind), config, *words = DIFFERENT[case]
    folder = write_tokenizer(tmp_path / "model", make(), model_type, kind, **config)
    tokenizer = read_tokenizer(folder, "here")
    use = compare_with_files(folder, tokenizer)
    assert not any("\n" in remark for remark in use.remarks)
    lacking = "tokenizer.json lacks '<|user|>' (id 265)" if config else " this id; "
    assert [remark for remark in use.remarks[1:] if lacking not in remark] == [] and len(use.remarks) < 3
    assert [word for word in words if word not in use.remarks[0]] == [], use.remarks
    assert list(use.files) == ["tokenizer.json"]
    texts = [*SOME, *(f"{text}<|user|>{text}" for text in SOME)]
    theirs = [AutoTokenizer.from_pretrained(folder)(text)["input_ids"] for text in texts]
    before = [Tokenizer.from_file(str(folder / "tokenizer.json")).encode(text).ids for text in texts]
    assert before != theirs
    (folder / "tokenizer.json").write_text(use.files["tokenizer.json"])
    assert [Tokenizer.from_file(str(folder / "tokenizer.json")).encode(text).ids for text in texts] == theirs
    again = read_tokenizer(folder, "here")
    assert [again(text)["input_ids"] for text in texts] == theirs
    assert compare_with_files(folder, again).remarks == []


NEWER = pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.23"),
    reason="LlamaTokenizer rebuilds byte-level files there",
)


@pytest.mark.parametrize(
    ("make", "named"),
    [
        # Byte-level: transformers leaves it alone, from some version after 5.17 on.
        pytest.param(lambda: BYTES, ("llama", "LlamaTokenizer"), marks=NEWER),
        (small_tokenizers.trimming, ("llama", "PreTrainedTokenizerFast")),
        (small_tokenizers.byte_fallback, ("mistral", "LlamaTokenizer")),
        (small_tokenizers.unigram, ("phi3", "LlamaTokenizerFast")),
        (small_tokenizers.ending, ("qwen3", "TokenizersBackend")),
    ],
)
def test_a_tokenizer_that_follows_its_file(make, named, tmp_path):
    """Nothing is told, and its file is copied as it is. Padding and truncation that a file has are no difference."""
    tokenizer = make()
    tokenizer.backend_tokenizer.enable_padding(length=7, pad_id=1, pad_token="</s>")
    tokenizer.backend_tokenizer.enable_truncation(1)
    folder = write_tokenizer(tmp_path / "model", tokenizer, *named)
    tokenizer.backend_tokenizer.no_padding()
    tokenizer.backend_tokenizer.no_truncation()
    use = compare_with_files(folder, read_tokenizer(folder, "here"))
    assert (use.remarks, use.files) == ([], {})


def test_bos_is_compared(tmp_path):
    folder = write_tokenizer(
        tmp_path / "model", small_tokenizers.trimming(), "llama", "PreTrainedTokenizerFast"
    )
    tokenizer = read_tokenizer(folder, "here")
    tokenizer.add_bos_token = False
    use = compare_with_files(folder, tokenizer)
    assert "(post_processor): 'a' is 'a' instead of '<s>' 'a'." in use.remarks[0]
    assert Tokenizer.from_str(use.files["tokenizer.json"]).encode("a").tokens == ["a"]


def without_bos() -> PreTrainedTokenizerFast:
    tokenizer = small_tokenizers.crossing()
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel()
    return tokenizer


@pytest.mark.parametrize("make", [small_tokenizers.trimming, small_tokenizers.ending, without_bos])
def test_flags_that_contradict_the_tokenizer(make, tmp_path):
    """transformers goes by tokenizer.json, llama.cpp's converter by tokenizer_config.json."""
    does = {"add_bos_token": make is not without_bos, "add_eos_token": make is small_tokenizers.ending}
    for name, flag in does.items():
        config = does | {name: not flag, "model_max_length": 9}
        folder = write_tokenizer(tmp_path / "model", make(), "llama", "PreTrainedTokenizerFast", **config)
        use = compare_with_files(folder, read_tokenizer(folder, "here"))
        assert (
            len(use.remarks) == 1
            and f"says {name}: {str(not flag).lower()}, but the tokenizer adds" in use.remarks[0]
        )
        written = json.loads(use.files["tokenizer_config.json"])
        assert written == json.loads((folder / "tokenizer_config.json").read_text()) | does
    (folder / "tokenizer_config.json").write_text(use.files["tokenizer_config.json"])
    assert compare_with_files(folder, read_tokenizer(folder, "here")).remarks == []


# Folders that do not say enough

VOCABULARY = {"vocab.json": '{"a": 0, "</s>": 1}', "merges.txt": "#version: 0.2\n"}
SPM = "tokenizer.model"
# what the folder has instead of tokenizer.json and tokenizer_config.json, what is said
HALF_KNOWN = {
    "nothing": ({}, "there is no tokenizer.json)"),
    "SentencePiece's model": ({SPM: "x"}, f"there is no tokenizer.json, and {SPM} alone does not say how to split text: make tokenizer.json"),
    "SentencePiece's model, and a config": (
        {SPM: "x", "tokenizer_config.json": "{}"},
        "where sentencepiece and protobuf are installed, by transformers' AutoTokenizer.from_pretrained(folder)"
        ".save_pretrained(folder), and compare its tokens"),
    "SentencePiece's model, and special tokens": ({SPM: "x", "special_tokens_map.json": "{}"}, f"{SPM} alone does not say"),
    "Mistral's own file": ({"tekken.json": "{}"}, "tekken.json alone does not say"),
    "a vocabulary": (VOCABULARY, "vocab.json alone does not say"),
    "a vocabulary without merges": ({"vocab.json": "{}", "tokenizer_config.json": "{}"}, "vocab.json alone does not"),
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
        {"tokenizer.json": BYTES.backend_tokenizer.to_str(), "special_tokens_map.json": '{"bos_token": "<s>"}'},
        "eos_token is in neither"),
    "special tokens that are not read": (
        {"tokenizer.json": BYTES.backend_tokenizer.to_str(), "tokenizer_config.json": '{"added_tokens_decoder": {}}',
         "special_tokens_map.json": '{"eos_token": "</s>"}'},
        "tokenizer_config.json has no eos_token"),
    "a vocabulary and merges, without EOS": (
        VOCABULARY | {"tokenizer_config.json": '{"tokenizer_class": "Qwen2Tokenizer"}'}, "eos_token is in neither"),
}  # fmt: skip


@pytest.mark.parametrize("case", HALF_KNOWN)
@pytest.mark.parametrize("model_type", ["llama", "qwen3", "gemma2"])
def test_a_folder_that_does_not_say_enough(case, model_type, tmp_path):
    files, words = HALF_KNOWN[case]
    for name, text in ({"config.json": json.dumps({"model_type": model_type})} | files).items():
        (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=r"^here: no usable tokenizer ") as raised:
        read_tokenizer(tmp_path, "here")
    assert words in str(raised.value)


def test_special_tokens_of_their_own_file(tmp_path):
    """As transformers 4 wrote it beside tokenizer_config.json."""
    folder = write_tokenizer(tmp_path / "model", BYTES, "llama", "PreTrainedTokenizerFast")
    (folder / "tokenizer_config.json").unlink()
    (folder / "special_tokens_map.json").write_text(
        '{"bos_token": "<s>", "eos_token": {"content": "</s>", "lstrip": false}}'
    )
    tokenizer = read_tokenizer(folder, "here")
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (BYTES.bos_token_id, BYTES.eos_token_id)
    (remark,) = compare_with_files(folder, tokenizer).remarks
    assert remark.endswith(
        "no tokenizer_config.json; BOS and EOS are those of special_tokens_map.json, and there is no chat template"
    )


def test_a_vocabulary_and_merges(tmp_path):
    """Byte-level BPE as its slow tokenizer saved it: the class's own, against one made of the same vocabulary by hand."""
    said = json.loads(small_tokenizers.crossing().backend_tokenizer.to_str())["model"]
    folder = write_tokenizer(tmp_path / "model", BYTES, "qwen3", "Qwen2Tokenizer")
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.json").write_text(json.dumps(said["vocab"]))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in said["merges"]))
    tokenizer = read_tokenizer(folder, "here")
    use = compare_with_files(folder, tokenizer)
    assert use.remarks[0].startswith(
        "tokenizer: no tokenizer.json; transformers builds Qwen2Tokenizer out of vocab.json and merges.txt."
    )
    (remark,) = use.remarks[1:]
    assert "no file gives '<|endoftext|>' (unk_token, pad_token, id " in remark
    byhand = Qwen2Tokenizer(
        said["vocab"], [tuple(pair) for pair in said["merges"]], bos_token="<s>", eos_token="</s>"
    )
    for text in SOME:
        ids = Tokenizer.from_str(use.files["tokenizer.json"]).encode(text).ids
        assert ids == tokenizer(text)["input_ids"] == byhand(text)["input_ids"]


# What is saved


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A model whose tokenizer, Llama 2's kind, transformers builds otherwise than its file says."""
    folder = tiny.save_checkpoint("llama", tmp_path_factory.mktemp("base") / "model", vocab_size=400)
    return write_tokenizer(
        folder, small_tokenizers.byte_fallback(), "llama", "LlamaTokenizer", add_bos_token=True
    )


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    file = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    texts = [{"text": f"  Paris is {i}</s>Paris  is"} for i in range(4)]
    file.write_text("".join(json.dumps(row) + "\n" for row in texts))
    return file


def assert_tokens_of_training(folder: Path, base: Path, rows: Path) -> None:
    """What tokenizer.json alone makes of the rows is what training had, and not what the base's file makes."""
    trained = prepare(str(rows), "auto", -1, 100, read_tokenizer(base, "here"))
    texts = [json.loads(line)["text"] for line in rows.read_text().splitlines()]
    for path, same in ((folder, True), (base, False)):
        file = Tokenizer.from_file(str(path / "tokenizer.json"))
        ids = [[*file.encode(text).ids, file.token_to_id("</s>")] for text in texts]
        assert (list(itertools.chain(*ids)) == trained.tokens.tolist()) == same
    assert prepare(str(rows), "auto", -1, 100, read_tokenizer(folder, "here")).tokens.equal(trained.tokens)


def test_it_is_told_at_the_start_of_training(base, rows, checkpoints, capsys):
    told = "tokenizer: transformers' LlamaTokenizer splits text otherwise than tokenizer.json says"
    job = make_job(HERE, args_for(base, rows, "qlora"))
    assert sum(told in remark for remark in job.remarks) == 1 and "tokenizer.json" in job.small_files
    remarks = make_job(HERE, args_for(checkpoints(), rows, "qlora")).remarks
    assert not any("tokenizer:" in remark for remark in remarks)


def test_a_saved_model_has_the_tokenizer_of_training(base, rows, one_rank, tmp_path, capsys):
    saved_run(one_rank, tmp_path / "run", args_for(base, rows, "full"))
    assert_tokens_of_training(tmp_path / "run", base, rows)
    assert (tmp_path / "run" / "tokenizer_config.json").read_text() == (
        base / "tokenizer_config.json"
    ).read_text()
    capsys.readouterr()
    assert export.main([str(tmp_path / "run"), "--to", "merged", "--out", str(tmp_path / "out")]) == 0
    assert_tokens_of_training(tmp_path / "out", base, rows)
    assert "tokenizer:" not in capsys.readouterr().out  # the RUN's file says what is used


@pytest.mark.parametrize("to", ["merged", "gguf-ready", "adapter"])
def test_an_exported_folder_has_the_tokenizer_of_training(to, base, rows, one_rank, tmp_path, capsys):
    saved_run(one_rank, tmp_path / "run", args_for(base, rows, "bnb_dora"))
    capsys.readouterr()
    assert export.main([str(tmp_path / "run"), "--to", to, "--out", str(tmp_path / "out")]) == 0
    assert_tokens_of_training(tmp_path / "out", base, rows)
    assert capsys.readouterr().out.count("LlamaTokenizer splits text otherwise than tokenizer.json says") == 1


def test_trained_blocks_in_place_have_the_tokenizer_of_training(base, rows, one_rank, tmp_path):
    expanded, whole = tiny.save_expanded(base, tmp_path / "pro"), tmp_path / "whole"
    assert (expanded / "tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()
    saved_run(one_rank, tmp_path / "run", args_for(expanded, rows, "llama_pro", "--llama_pro_save", "blocks"))
    command = [
        "--model_name",
        str(expanded),
        "--blocks",
        str(tmp_path / "run" / BLOCKS),
        "--output_dir",
        str(whole),
    ]
    assert block_expansion.main(command) == 0
    assert_tokens_of_training(whole, base, rows)
