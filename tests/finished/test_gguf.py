"""A gguf-ready folder through llama.cpp's converter: llama.cpp's logits equal those of transformers.

docs/export.md lists further comparisons. Needs LLAMA_CPP, a folder with llama.cpp's source, and the packages
llama-cpp-python and sentencepiece.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy
import pytest
import torch
from transformers import AutoModelForCausalLM, GemmaTokenizer, LlamaTokenizer

import export
from tests.helpers import tiny
from tests.helpers.adapters import args_for
from tests.helpers.finished_runs import write_random_run
from tests.helpers.programs import ROOT

CONVERTER = Path(os.environ.get("LLAMA_CPP", "")) / "convert_hf_to_gguf.py"
MISSING = [p for p in ("llama_cpp", "sentencepiece") if importlib.util.find_spec(p) is None]
pytestmark = pytest.mark.skipif(
    not CONVERTER.is_file() or bool(MISSING), reason="LLAMA_CPP is not set, or its packages are missing"
)
VOCABULARY = 640  # sentencepiece's pieces, and the tokens that Gemma's tokenizer adds
# Values that llama.cpp has as constants, or supports only as in published models. The sliding window is
# longer than IDS.
SUPPORTED = {
    "llama": {},
    "gemma2": {"query_pre_attn_scalar": 32, "sliding_window": 512},
}


def sentencepiece_files(folder: Path, tokenizer) -> None:
    """Write tokenizer.model, which the converter reads, and the same tokenizer for transformers."""
    import sentencepiece

    rows = [json.loads(line) for line in (ROOT / "datasets" / "toy.jsonl").read_text().splitlines()]
    (folder / "text").write_text("\n".join(" ".join(row.values()) for row in rows))
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "text"), model_prefix=str(folder / "tokenizer"), vocab_size=512, model_type="bpe",
        byte_fallback=True, unk_id=0, bos_id=1, eos_id=2, pad_id=-1, minloglevel=2,
    )  # fmt: skip
    for path in (folder / "text", folder / "tokenizer.vocab", *folder.glob("tokenizer*.json")):
        path.unlink()
    tokenizer.from_pretrained(folder).save_pretrained(folder)


@pytest.mark.parametrize("kind", SUPPORTED)
def test_llama_cpp_computes_the_same(kind, alpaca_file, one_rank, tmp_path):
    import llama_cpp

    base = tiny.save_checkpoint(
        kind, tmp_path / "base", vocab_size=VOCABULARY, bos_token_id=1, eos_token_id=2, **SUPPORTED[kind]
    )
    sentencepiece_files(base, GemmaTokenizer if kind == "gemma2" else LlamaTokenizer)
    write_random_run(one_rank, tmp_path / "run", args_for(base, alpaca_file, "bnb_dora"))
    out, file = tmp_path / "out", tmp_path / "out.gguf"
    assert export.main([str(tmp_path / "run"), "--to", "gguf-ready", "--out", str(out), "--check=false"]) == 0
    command = [sys.executable, CONVERTER, out, "--outtype", "f32", "--outfile", file]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    ids = torch.randint(3, 500, (1, 24), generator=torch.Generator().manual_seed(0))
    model = llama_cpp.Llama(str(file), n_ctx=64, logits_all=True, verbose=False)
    model.eval(ids[0].tolist())
    theirs = torch.from_numpy(numpy.array(model.scores[: ids.shape[1]]))
    model.close()
    ours = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        logits = ours(input_ids=ids).logits[0]
    # llama.cpp's cache is in fp16.
    torch.testing.assert_close(theirs, logits, rtol=0, atol=0.05)
    untrained = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        assert (untrained(input_ids=ids).logits[0] - theirs).abs().max() > 0.5
