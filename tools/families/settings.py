"""Settings of a Family that experiments with a whole model decide: attention, buffers, logits, compilation.

tools/families/derive.py calls these, and looks at the modules itself.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Iterator
from itertools import product
from typing import cast

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PretrainedConfig, PreTrainedModel
from transformers.masking_utils import sdpa_mask

from models.attention import attend_fused
from models.family import FUSED
from options.errors import describe
from tools.families.calls import IDS, MAX_REASON, Call, is_close, record_calls
from tools.families.draft import Draft

PROBE = "probed_sdpa"  # name of an attention in transformers' registry
FACTORS = "scal|mult|factor|logit|cap|base"  # parts of the names of a config's values that are factors


def find_attention(model: PreTrainedModel, logits: Tensor, draft: Draft) -> None:
    """Set attention, to the first that gives eager attention's logits, beyond the window: ours, sdpa, eager.

    Ours stands for the kernel for packed rows too, which needs the rows' bounds and the window: sets
    passes_row_bounds and passes_window.
    """
    for name in (FUSED, "sdpa"):
        try:
            other = _with_attention(model, name)
            result = record_calls(other)[1]
        except (ValueError, KeyError, ImportError, AttributeError) as e:
            draft.remarks.append(f"attention: {name} cannot be used: {describe(e)[:MAX_REASON]}")
            continue
        if is_close(result, logits):
            draft.set("attention", name)
            if name == FUSED:
                _find_passed_arguments(other, draft)
            return
        draft.remarks.append(f"attention: {name} gives other logits than eager")
    draft.set("attention", "eager")


def _find_passed_arguments(model: PreTrainedModel, draft: Draft) -> None:
    """Set passes_row_bounds and passes_window: what each layer hands on to its attention.

    The model is called with bounds of packed rows. A layer has a window if its mask hides the first token
    from the last one.
    """
    passed: dict[str, list[bool]] = {"passes_row_bounds": [], "passes_window": []}

    def probe(module, query, key, value, attention_mask, **others):
        is_hidden = attention_mask is not None and not attention_mask[0, 0, -1, 0]
        passed["passes_row_bounds"].append(others.get("cu_seq_lens_q") is not None)
        passed["passes_window"].append((others.get("sliding_window") is not None) == bool(is_hidden))
        return attend_fused(module, query, key, value, attention_mask, **others)

    AttentionInterface.register(PROBE, probe)
    AttentionMaskInterface.register(PROBE, sdpa_mask)
    model.set_attn_implementation(PROBE)
    bounds = torch.tensor([0, IDS.shape[1], IDS.numel()], dtype=torch.int32)
    with torch.no_grad():
        model(input_ids=IDS, use_cache=False, cu_seq_lens_q=bounds, max_length_q=IDS.shape[1])
    for name, values in passed.items():
        draft.set(name, all(values))


def _with_attention(model: PreTrainedModel, name: str) -> PreTrainedModel:
    config = copy.deepcopy(model.config)
    config._attn_implementation = name
    other = type(model)(config).float()
    other.load_state_dict(model.state_dict(), strict=False)
    other.tie_weights()
    return other.eval()


def find_buffers(model: nn.Module, rotary: str, config: PretrainedConfig, draft: Draft) -> None:
    """Set constant_buffers: those that no file holds, besides the rotary tables."""
    stored, entries = model.state_dict().keys(), []
    missing: dict[str, None] = {}
    for name, buffer in model.named_buffers():
        if name.startswith(f"{rotary}."):
            continue
        source = _scalar_source(buffer, config) if buffer.numel() == 1 else None
        every = re.sub(r"\.\d+\.", ".*.", name)  # the same of all layers
        if name in stored:
            missing[f"{every}: a buffer that files hold: write match_checkpoint and fixed_parameters"] = None
        elif source is None:
            missing[f"constant_buffers: what {every} {list(buffer.shape)} holds"] = None
        else:
            entries.append(f'"{name}": torch.tensor({source})')
    draft.missing += missing
    if entries:
        draft.settings["constant_buffers"] = f"lambda config: {{{', '.join(entries)}}}"


def _scalar_source(buffer: Tensor, config: PretrainedConfig) -> str | None:
    """Return the expression of config whose value the buffer holds."""
    return next(
        (s for s, value in _config_factors(config) if math.isclose(value, buffer.item(), rel_tol=1e-5)), None
    )


def _config_factors(config: PretrainedConfig) -> Iterator[tuple[str, float]]:
    """Yield (expression, value) of the config's numbers that may be factors, their inverses and roots."""
    yield "config.hidden_size**0.5", config.hidden_size**0.5
    for name, value in config.to_dict().items():
        if type(value) in (int, float) and value > 0 and re.search(FACTORS, name):
            yield f"config.{name}", value
            yield f"1 / config.{name}", 1 / value
            yield f"config.{name} / config.hidden_size", value / config.hidden_size


def find_compiles(calls: list[Call], layers: str, draft: Draft) -> None:
    """Set compiles: whether the first layer is traced as one graph."""
    call = next(c for c in calls if c.name == f"{layers}.0")
    try:
        compiled = torch.compile(call.module, fullgraph=True, backend="eager", dynamic=False)
        call.repeat(cast(nn.Module, compiled))
    except Exception as e:  # torch raises whatever the layer's code runs into
        draft.set("compiles", False)
        draft.remarks.append(f"compiles=False: {describe(e)[:MAX_REASON]}")
    torch.compiler.reset()


def find_logits(model: PreTrainedModel, logits: Tensor, config: PretrainedConfig, draft: Draft) -> None:
    """Set logit_scale and logit_cap, by which the head's result becomes the logits."""
    head = model.get_output_embeddings()
    with torch.no_grad():
        plain = head(_last_hidden_states(model))
    scales = [("1.0", 1.0), *_config_factors(config)]
    caps = [("None", None), *((s, v) for s, v in _config_factors(config) if "cap" in s and "/" not in s)]
    for (scale, factor), (cap, bound) in product(scales, caps):
        z = plain * factor
        if is_close(z if bound is None else bound * torch.tanh(z / bound), logits):
            if factor != 1.0:
                draft.settings["logit_scale"] = f"lambda config: {scale}"
            if bound is not None:
                draft.settings["logit_cap"] = f"lambda config: {cap}"
            return
    draft.missing.append(
        "logit_scale or logit_cap: the logits are not the head's result, nor a multiple of it"
    )


def _last_hidden_states(model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        return model.base_model(input_ids=IDS, use_cache=False).last_hidden_state


def find_norm(model: PreTrainedModel, calls: list[Call], draft: Draft) -> str:
    """Return the name of the last norm, whose result is the last hidden states."""
    last = _last_hidden_states(model)
    for call in reversed(calls):
        is_norm = "norm" in type(call.module).__name__.lower()
        if is_norm and call.result is not None and torch.equal(call.result, last):
            return call.name
    draft.missing.append("norm: no norm's result is the last hidden states")
    return "model.norm"
