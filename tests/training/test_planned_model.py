"""Models known by config and headers: the parameters planned for a run are those of the opened weights."""

from __future__ import annotations

import shutil

import pytest
import torch

from benchmarks.make_checkpoint import make_checkpoint
from models.registry import FAMILIES
from models.shapes import SHAPES, Gemma3Shape
from options.errors import UserError
from tests.helpers import tiny
from tests.helpers.bnb_checkpoints import pack_like_the_hub
from tests.helpers.expansion import all_tensors, edit_config, expand
from tests.helpers.planned import parameters_of_plan, parameters_of_run
from tests.helpers.stored import put_tensor
from training.expanded_model import expand_planned
from training.planned_model import open_planned_model

TYPES = ["full", "hqq_lora", "bnb_dora --train_embeddings"]


def copy_config(folder, target):
    target.mkdir()
    shutil.copy(folder / "config.json", target)
    return target


def test_every_family_has_a_tiny_config():
    assert {config().model_type for config in tiny.CONFIGS.values()} == FAMILIES.keys()


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_families(kind, checkpoints, tmp_path):
    """By the headers of a folder, and by its config.json alone."""
    folder = checkpoints(kind)
    by_headers = open_planned_model(str(folder))
    by_config = open_planned_model(str(copy_config(folder, tmp_path / "bare")))
    assert (by_headers.by_config, by_config.by_config) == (False, True)
    stored = [{n: t.torch_dtype for n, t in p.files.tensors.items()} for p in (by_headers, by_config)]
    assert stored[0] == stored[1]
    for options in TYPES:
        expected = parameters_of_run(folder, options)
        assert parameters_of_plan(by_headers, options) == parameters_of_plan(by_config, options) == expected


def test_an_expanded_model(checkpoints):
    folder = checkpoints("llama_pro")
    planned = open_planned_model(str(folder))
    for options in ("llama_pro", "bnb_llama_pro"):
        assert parameters_of_plan(planned, options) == parameters_of_run(folder, options)


@pytest.mark.parametrize("kind", ["llama3", "gemma2", "gemma3", "gemma3_wrapper", "qwen3_moe"])
def test_a_model_that_is_still_to_be_expanded(kind, checkpoints, tmp_path):
    """It has the parameters of what block_expansion.py writes."""
    written = expand(checkpoints(kind), tmp_path / "pro", "--new_blocks", 2)
    planned = expand_planned(open_planned_model(str(checkpoints(kind))), 2)
    for options in ("llama_pro", "bnb_llama_pro"):
        assert parameters_of_plan(planned, options) == parameters_of_run(written, options)
    with pytest.raises(UserError, match="is expanded already"):
        expand_planned(open_planned_model(str(written)), 2)


@pytest.mark.parametrize("kind", ["llama_bias", "gemma3_wrapper", "mixtral"])
@pytest.mark.parametrize("double", [True, False])
def test_packed_weights(double, kind, checkpoints, tmp_path):
    pack_like_the_hub(checkpoints(kind), tmp_path / "4bit", double)
    planned = open_planned_model(str(tmp_path / "4bit"))
    assert planned.files.prequantized
    assert parameters_of_plan(planned, "qlora") == parameters_of_run(tmp_path / "4bit", "qlora")
    with pytest.raises(UserError, match="no weights here"):  # the config does not say what is packed
        open_planned_model(str(copy_config(tmp_path / "4bit", tmp_path / "bare")))


def test_heads_that_the_files_untie(tmp_path):
    """Files of a model whose config ties head and embedding hold both: a copy, and another head."""
    for name, differs in (("copy", False), ("other", True)):
        folder = tiny.save_checkpoint("qwen2", tmp_path / name, tie_word_embeddings=False)
        tensors = all_tensors(folder)
        head = tensors["model.embed_tokens.weight"].clone() + differs
        put_tensor(folder, "lm_head.weight", head)
        edit_config(folder, tie_word_embeddings=True)
        planned = open_planned_model(str(folder))
        assert ("lm_head.weight" in planned.files.tensors) == differs
        assert parameters_of_plan(planned, "qlora") == parameters_of_run(folder, "qlora")


def test_named_shapes(tmp_path, monkeypatch):
    """A shape needs no file; a folder of the same name wins."""
    monkeypatch.chdir(tmp_path)
    shape = open_planned_model("Tiny")
    assert not any(tmp_path.iterdir())
    make_checkpoint(tmp_path / "random", "tiny", empty=True)
    assert parameters_of_plan(shape, "qlora") == parameters_of_run(tmp_path / "random", "qlora")
    images = open_planned_model("tiny-gemma3", images=True)
    make_checkpoint(tmp_path / "random-gemma3", "tiny-gemma3")
    expected = parameters_of_run(tmp_path / "random-gemma3", "qlora --images true", images=True)
    assert parameters_of_plan(images, "qlora --images true") == expected
    tiny.save_checkpoint("gemma2", tmp_path / "tiny")
    assert open_planned_model("tiny").model.config.model_type == "gemma2"


BUILT_SLOWLY = ("30b-a3b", "gpt-oss-120b")  # thousands of experts


def test_shapes_have_the_public_sizes():
    """Parameters as Meta, Qwen, OpenAI and Google publish them; Qwen2.5's without 3 biases of a layer."""
    public = {"3b": 3_212_749_824, "7b": 6_738_415_616, "8b": 8_030_261_248, "13b": 13_015_864_320,
              "14b": 14_770_033_664 - 48 * 7168, "32b": 32_763_876_352 - 64 * 7168, "70b": 70_553_706_496,
              "405b": 405_853_388_800, "30b-a3b": 30_532_122_624, "gemma3-4b": 4_300_079_472,
              "gpt-oss-20b": 20_914_757_184, "gpt-oss-120b": 116_829_156_672}  # fmt: skip
    assert {name: SHAPES[name].parameters() for name in public} == public


@pytest.mark.parametrize(
    "names",
    [
        [name for name in SHAPES if name not in BUILT_SLOWLY],
        pytest.param(BUILT_SLOWLY, marks=pytest.mark.slow),
    ],
    ids=["most", "many experts"],
)
def test_models_are_built_as_their_shapes_say(names):
    contexts = {"1b": 2**17, "3b": 2**17, "7b": 4096, "8b": 8192, "13b": 4096, "14b": 2**15, "32b": 2**15,
                "70b": 8192, "405b": 2**17, "30b-a3b": 40960, "gemma3-4b": 2**17,
                "gpt-oss-20b": 2**17}  # fmt: skip
    assert contexts.keys() <= SHAPES.keys()
    for name in names:
        planned = open_planned_model(name, images=isinstance(SHAPES[name], Gemma3Shape))
        assert sum(p.numel() for p in planned.model.parameters()) == SHAPES[name].parameters()
        assert planned.context_limit == contexts.get(name, planned.context_limit)


def test_an_unknown_name_lists_the_shapes():
    with pytest.raises(
        UserError, match=r"^--model_name 9b: no such folder, .*these are tiny, thin, 1b, .*, gemma3-4b$"
    ):
        open_planned_model("9b")
    with pytest.raises(UserError, match=r"the hub cannot be reached$"):
        open_planned_model("own/unreachable")


def test_damaged_headers(checkpoints, tmp_path):
    folder = shutil.copytree(checkpoints(), tmp_path / "model")
    put_tensor(folder, "model.norm.weight", torch.zeros(65))
    with pytest.raises(
        UserError, match=r"model\.norm\.weight has shape \[65\], but config\.json says \[64\]"
    ):
        open_planned_model(str(folder))
    put_tensor(folder, "model.norm.weight", torch.zeros(64, dtype=torch.int64))
    with pytest.raises(UserError, match=r"model\.norm\.weight is stored as I64"):
        open_planned_model(str(folder))
