"""What a run adapts, as PEFT's adapter_config.json names it: target_modules, exclude_modules and others.

PEFT adapts each module whose dotted name ends with a target, unless exclude_modules matches the whole name.
target_modules is a plain list: some servers refuse a regular expression there.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from torch import nn

from files.names import EXPERT_PARAMETERS
from models.family import Family, unwrapped_name
from models.routers import peft_routers
from models.vision_parts import vision_matrices, vision_targets
from models.vocabulary import peft_modules_to_save
from options.config import Config


def peft_targets(family: Family, target_modules: str) -> list[str]:
    """Return --lora_target_modules as PEFT's list of name endings; `all`, `default`: the family's names."""
    if target_modules == "all":
        return [linear.rpartition(".")[2] for linear in family.linears]
    if target_modules == "default":
        return list(family.default_targets)
    return [pattern.strip() for pattern in target_modules.split(",")]


def peft_target_modules(model: nn.Module, family: Family, config: Config) -> list[str]:
    """Return PEFT's target_modules: `peft_targets`, and names for the linears of --vision_targets.

    A linear of the tower that another target does not match gets its last name, if no other module has that,
    and else its whole name.

    Args:
        model: the model, with or without its adapters.
        family: its family.
        config: the run's options.
    """
    targets, adapted = peft_targets(family, config.lora_target_modules), vision_targets(model, family, config)
    names = [unwrapped_name(name) for name, _ in model.named_modules()]
    missing = [name for name in adapted if not _matches(name, targets)]
    for last in dict.fromkeys(name.rpartition(".")[2] for name in missing):
        others = {name for name in names if _matches(name, [last])} - {*adapted}
        targets += [name for name in missing if _matches(name, [last])] if others else [last]
    return targets


def peft_full_modules(model: nn.Module, family: Family, config: Config) -> list[str] | None:
    """Return PEFT's modules_to_save: the modules that are trained in full; None without any.

    Args: as for `peft_target_modules`.
    """
    vocabulary = peft_modules_to_save(family) if config.train_embeddings else []
    return vocabulary + (peft_routers(model) if config.train_router else []) or None


def peft_target_parameters(family: Family, config: Config) -> list[str] | None:
    """Return PEFT's target_parameters: bare matrices and experts with adapters; None without any.

    The names of the projector's matrices are those of their module and of the parameter, as PEFT's
    documentation has them.
    """
    names = [".".join(name.split(".")[-2:]) for name in vision_matrices(family, config)]
    return names + list(EXPERT_PARAMETERS if config.lora_expert_rank else ()) or None


def peft_rank_pattern(config: Config) -> dict[str, int] | None:
    """Return PEFT's rank_pattern: the rank of adapters on experts; None without any."""
    rank = config.lora_expert_rank
    return dict.fromkeys(EXPERT_PARAMETERS, rank) if rank else None


def peft_exclusions(model: nn.Module, family: Family, config: Config) -> str | None:
    """Return PEFT's exclude_modules: a regular expression for what gets no adapter beside the text model.

    The linears there may have the same last names as those of the text model, and in the tower the same as
    those of the projector. A part without an adapter is excluded as a whole. None without such parts.

    Args: as for `peft_target_modules`; the model may lack the parts.
    """
    adapted = vision_targets(model, family, config) + vision_matrices(family, config)
    targets = peft_target_modules(model, family, config)
    names = [unwrapped_name(name) for name, _ in model.named_modules()]
    excluded = []
    for part in family.unused:
        if not _is_above(part, adapted):
            excluded.append(part)
            continue
        others = (n for n in names if n.startswith(f"{part}.") and n not in adapted and _matches(n, targets))
        excluded += [_highest_without(name, adapted) for name in others]
    return exclude_parts(list(dict.fromkeys(excluded)))


def _highest_without(name: str, adapted: Sequence[str]) -> str:
    """Return the highest module around a module, or itself, that has none of the adapted ones."""
    segments = name.split(".")
    above = (".".join(segments[:depth]) for depth in range(1, len(segments) + 1))
    return next(module for module in above if not _is_above(module, adapted))


def exclude_parts(parts: Sequence[str]) -> str | None:
    """Return a regular expression for the modules in these parts of a wrapper; None without any."""
    names = [re.escape(part.removeprefix("model.")) for part in parts]
    return rf"(.*\.)?({'|'.join(names)})(\..*)?" if names else None


def _is_above(module: str, names: Iterable[str]) -> bool:
    return any(f"{name}.".startswith(f"{module}.") for name in names)


def _matches(name: str, targets: Iterable[str]) -> bool:
    return any(f".{name}".endswith(f".{target}") for target in targets)
