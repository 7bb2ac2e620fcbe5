"""Training on images on a GPU: compiled layers follow plain ones, for each family that takes images."""

from __future__ import annotations

import pytest

from tests.helpers.compiled import compiled_on_gpu
from tests.helpers.image_runs import image_arguments
from tests.helpers.parity import follows
from tests.helpers.runs import train_run


@pytest.mark.gpu
@pytest.mark.parametrize("more", [(), ("--packing", "--context_length", "300")], ids=["padded", "packed"])
@pytest.mark.parametrize("kind", ["gemma3", "qwen3_vl", "qwen2_5_vl"])
def test_compiled_layers_follow_plain_ones(kind, more, one_rank, tmp_path):
    args = image_arguments(tmp_path, kind, *more, "--precision", "auto", "--vision_targets", "all")
    if kind == "gemma3":
        args += ["--chat_template", "chatml"]
    plain = one_rank(train_run, [*args, "--compile", "false"])[0]
    compiled, graphs = one_rank(compiled_on_gpu, args)[0]
    assert graphs
    follows(plain, compiled)
