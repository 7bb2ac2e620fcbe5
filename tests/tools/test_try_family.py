"""tools.try_family: families derived by experiment, and comparisons that find what is wrong with one."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
import torch.distributed as dist

from launch.ranks import join_process_group
from models.registry import FAMILIES, read_config
from tests.helpers.tiny import CONFIGS
from tools.families import checks
from tools.families.calls import first_difference
from tools.families.derive import derive, describe_differences
from tools.families.tiny_model import find_untried_switches, make_tiny_model, tiny_config
from tools.try_family import main, read_changes, registered

# Without those whose layers differ, and wrappers.
PLAIN = [name for name, family in FAMILIES.items() if not family.select_linears and not family.unused]
FAST = ("llama", "gemma2", "phi3")
# By hand, from transformers' source.
EXPECTED = {
    "granite": {"logit_scale": "lambda config: 1 / config.logits_scaling"},
    "cohere": {"logit_scale": "lambda config: config.logit_scale"},
    "glm4": {"identity_init": (("post_self_attn_layernorm", 0.0), ("post_mlp_layernorm", 0.0))},
    "olmo2": {"identity_init": (("post_attention_layernorm", 0.0), ("post_feedforward_layernorm", 0.0))},
    "gemma": {
        "constant_buffers": 'lambda config: {"model.embed_tokens.embed_scale":'
        " torch.tensor(config.hidden_size**0.5)}"
    },
    "olmo": {
        "changed_results": 'lambda config: ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")'
    },
    "stablelm": {"passes_row_bounds": False},
    "gpt_neox": {
        "linears": ("attention.query_key_value", "attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"),
        "default_targets": ("query_key_value",),
        "sublayers": ("attention", "mlp"),
        "outputs": ("attention.dense", "mlp.dense_4h_to_h"),
        "layers": "gpt_neox.layers",
        "embedding": "gpt_neox.embed_in",
        "norm": "gpt_neox.final_layer_norm",
        "rotary": "gpt_neox.rotary_emb",
    },
}


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in FAST else pytest.mark.slow) for n in PLAIN]
)
def test_families_of_the_registry_are_derived(name):
    model = make_tiny_model(tiny_config(name))
    draft = derive(model)
    assert draft.missing == [] and describe_differences(draft.family(), FAMILIES[name], model.config) == []


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in ("glm4", "granite") else pytest.mark.slow) for n in EXPECTED]
)
def test_settings_of_other_families(name):
    draft = derive(make_tiny_model(tiny_config(name)))
    linears = {"linears": draft.settings.get("linears")} if name == "glm4" else {}
    assert draft.missing == []
    assert draft.settings == EXPECTED[name] | linears


def test_what_cannot_be_derived_is_named():
    found = derive(make_tiny_model(CONFIGS["qwen3_moe"]())).missing
    assert [text.partition(":")[0] for text in found] == [
        "the layers have different linears",
        "routed experts are stacked (mlp.experts.gate_up_proj, mlp.experts.down_proj)",
    ]


@pytest.mark.parametrize(("name", "expected"), [("qwen2_moe", False), ("qwen3_moe", True)])
def test_a_window_that_attention_does_not_get_is_found(name, expected):
    draft = derive(make_tiny_model(tiny_config(name)))
    assert draft.settings.get("passes_window", True) == expected


@pytest.mark.slow
def test_parts_of_a_wrapper_that_text_does_not_need_are_named():
    found = derive(make_tiny_model(tiny_config("gemma3"))).missing
    assert (
        "wrapper of gemma3_text, and text does not need model.multi_modal_projector, model.vision_tower"
        in found[0]
    )


def test_a_tiny_model_has_what_a_family_could_leave_out():
    """Sizes, and values that have no effect by default."""
    config = tiny_config("granite")
    assert (config.hidden_size, config.num_hidden_layers, config.num_key_value_heads) == (64, 4, 2)
    assert config.attention_bias and config.mlp_bias
    multipliers = ("embedding_multiplier", "residual_multiplier", "attention_multiplier", "logits_scaling")
    assert 1.0 not in [getattr(config, name) for name in multipliers]
    assert tiny_config("gemma3").text_config.sliding_window == 16
    assert tiny_config("qwen3").head_dim * 4 != 64
    assert tiny_config("qwen2").layer_types == ["full_attention"] * 2 + ["sliding_attention"] * 2


def test_the_first_module_that_differs_is_named():
    ours = make_tiny_model(CONFIGS["llama"]())
    theirs = copy.deepcopy(ours)
    assert first_difference(ours, theirs) is None
    with torch.no_grad():
        ours.model.layers[2].input_layernorm.weight[3] += 0.5
        ours.model.layers[1].mlp.up_proj.weight[3] += 0.5
    assert first_difference(ours, theirs).startswith("model.layers.1.mlp.up_proj (Linear): differs by up to")


@pytest.fixture
def subject(checkpoints, short_rows):
    """subject(kind, **changes) -> what the comparisons get: a checkpoint, its family with changes."""
    rank_info = join_process_group(0, 1, 0, dist.HashStore())
    yield lambda kind, model_type, **changes: checks.Subject(
        "",
        dataclasses.replace(FAMILIES[model_type], **changes),
        model_type,
        checkpoints(kind),
        short_rows,
        rank_info,
    )
    dist.destroy_process_group()


@pytest.mark.parametrize(
    ("kind", "model_type", "changes", "check", "found"),
    [
        ("llama", "llama", {}, checks.check_forward, None),
        ("llama", "llama", {"logit_scale": lambda config: 2.0}, checks.check_forward, "loss "),
        ("gemma2", "gemma2", {"logit_cap": lambda config: None}, checks.check_forward, "loss "),
        ("gemma2", "gemma2", {"identity_init": ()}, checks.check_expansion, "the first update changes"),
        ("llama", "llama", {}, checks.check_adapters("bnb_dora"), None),
        ("mistral", "mistral", {"attention": "causal_lines"}, checks.check_packing, "packed: loss"),
        ("phi3", "phi3", {}, checks.check_widths, None),
    ],
)
def test_a_wrong_setting_is_found(kind, model_type, changes, check, found, subject):
    tried = subject(kind, model_type, **changes)
    with registered(model_type, tried.family):
        line = check(tried)
    assert line is None if found is None else line.startswith(found), line


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["nonsense"], "model_type 'nonsense' is unknown to the installed transformers"),
        (["hunyuan-v1-dense"], "similar: hunyuan_v1_dense"),
        (["olmo", "--set", "clip"], "--set clip: expected NAME=VALUE"),
        (["olmo", "--set", "clip_kqv=8"], "--set clip_kqv: OlmoConfig of transformers has no such value"),
        (["t5"], "'t5' has an encoder"),
        (["mamba"], "'mamba' has a state space"),
        (["lfm2"], "'lfm2' has convolutions"),
        (["bloom"], "has no rotary embedding"),
        (["llama", "--family", "models/none.py"], "--family models/none.py: no such file"),
        (["llama", "--out", __file__], "exists; name another file"),
    ],
)
def test_bad_input(argv, words, capsys):
    assert main(argv) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1].startswith("error: ") and words in lines[-1]


def test_the_plan_of_memory_knows_all_parts_of_a_layer(subject, checkpoints):
    types = {kind: read_config(checkpoints(kind))[0].model_type for kind in CONFIGS}
    found = {kind: checks.check_widths(subject(kind, model_type)) for kind, model_type in types.items()}
    assert found == dict.fromkeys(CONFIGS)


@pytest.mark.parametrize("part", ["has_head_norms", "has_fused_qkv", "has_fused_gate"])
def test_parts_that_the_plan_of_memory_does_not_know_are_named(part, subject, monkeypatch):
    kind = "qwen3" if part == "has_head_norms" else "phi3"
    true = checks.layer_widths
    monkeypatch.setattr(
        checks, "layer_widths", lambda *args: dataclasses.replace(true(*args), **{part: False})
    )
    assert checks.check_widths(subject(kind, kind)) == f"layer_widths: {part} False instead of True"


def test_values_of_the_config_can_be_set():
    changes = read_changes(["qk_layernorm=true", "hidden_act=gelu", 'rope_parameters={"rope_theta": 5.0}'])
    config = tiny_config("stablelm", changes)
    assert (config.qk_layernorm, config.hidden_act, config.hidden_size) == (True, "gelu", 64)
    assert config.rope_parameters == {
        "rope_type": "default",
        "rope_theta": 5.0,
        "partial_rotary_factor": 0.25,
    }


def test_switches_with_values_that_were_not_compared_are_named():
    untried = find_untried_switches(tiny_config("stablelm", {"qk_layernorm": True}))
    assert untried == ["tie_word_embeddings=true", "use_parallel_residual=true"]


@pytest.mark.slow
def test_a_family_is_written_if_nothing_differs(tmp_path, capsys):
    assert main(["arcee", "--out", str(tmp_path / "arcee.py")]) == 0
    shown = capsys.readouterr().out
    assert shown.count("equal   ") == len(checks.CHECKS) and "arcee" not in FAMILIES
    source = (tmp_path / "arcee.py").read_text()
    assert source in shown
    (tmp_path / "wrong.py").write_text(source.replace("mlp.up_proj", "mlp.gate_proj"))
    assert main(["arcee", "--family", str(tmp_path / "wrong.py")]) == 1
    assert "differs qlora" in capsys.readouterr().out


def test_a_family_that_needs_work_is_not_written(tmp_path, capsys):
    assert main(["qwen3_moe", "--out", str(tmp_path / "x.py")]) == 1
    assert "missing routed experts" in capsys.readouterr().out and not (tmp_path / "x.py").exists()
