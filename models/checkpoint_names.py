"""The names of a checkpoint's tensors, turned into the names of the model's parameters.

Files of one model come in several spellings: that of older versions of transformers, which the hub still has
(`language_model.model.layers...`), that of a model without its head (`layers...`), or with other names for
experts (Mixtral's w1, w2, w3). transformers' own rules (transformers/conversion_mapping.py) are read here for
the model at hand. The code behind this module knows the names of parameters alone.
`WeightHeaders.stored_names` leads back: written files keep the spelling of those that were read.
"""

from __future__ import annotations

from functools import cached_property

from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    rename_source_key,
)

from files.config_parts import text_config
from files.expert_stacks import STACKS
from files.weight_headers import WeightHeaders
from models.family import Family
from models.moe import Experts

# transformers' parameter of stacked experts -> the linears of one expert (models/moe.py) that are stacked in
# it, in the order of the files' tensors.
EXPERT_LINEARS = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}
WEIGHT = ".weight"
MAX_NAME = 1000  # characters; the rules' regular expressions take quadratic time


class ParameterNames:
    """Maps names in files to names of parameters, as transformers does when it loads a model."""

    def __init__(self, model: PreTrainedModel, stacks_experts: bool = False):
        """model: on meta or not; from `build_on_meta`, before a method changes it.

        stacks_experts: value of Family.stacks_experts. Stacks then count as parameters.
        """
        self.model = model
        self.parameters = dict(model.named_parameters(remove_duplicate=False))
        for path, module in model.named_modules() if stacks_experts else ():
            if isinstance(module, Experts):
                self.parameters |= {f"{path}.{stack}": next(module.parameters()) for stack in STACKS}

    @cached_property
    def _rules(self) -> tuple[list[WeightRenaming], list[WeightConverter]]:
        """transformers' rules for this model; read only if a name is not a parameter's already."""
        rules = get_model_conversion_mapping(self.model)
        renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
        return renamings, [rule for rule in rules if isinstance(rule, WeightConverter)]

    def parameter_name(self, stored: str) -> str:
        """Return the name of the parameter that a file's tensor fills; of others, what the rules make of it.

        The tensors that bitsandbytes adds to a packed weight (`....weight.absmax`) follow their weight.
        """
        weight, dot, suffix = stored.partition(f"{WEIGHT}.")
        if dot:
            return f"{self.parameter_name(f'{weight}{WEIGHT}')}.{suffix}"
        if stored in self.parameters or len(stored) > MAX_NAME:
            return stored
        renamings, _ = self._rules
        prefix = self.model.base_model_prefix
        name, _ = rename_source_key(stored, renamings, [], prefix, self.parameters)
        return name if name in self.parameters else self._expert_name(name)

    def _expert_name(self, name: str) -> str:
        """Return the name of one expert's weight, as models/moe.py has it; other names unchanged.

        transformers stacks experts' weights, here each has its own parameter.
        """
        for rule in self._rules[1]:
            if not isinstance(rule.operations[0], MergeModulelist):
                continue
            _, source = rule.rename_source_key(name)
            linears = EXPERT_LINEARS.get(rule.target_patterns[0].rpartition(".")[2])
            if source is None or linears is None:
                continue
            path = name.removesuffix(WEIGHT).rpartition(".")[0]
            expert = f"{path}.{linears[rule.source_patterns.index(source)]}{WEIGHT}"
            with_prefix = f"{self.model.base_model_prefix}.{expert}"  # files without the head class's prefix
            return with_prefix if with_prefix in self.parameters else expert
        return name


def rename_tensors(model: PreTrainedModel, family: Family, files: WeightHeaders) -> None:
    """Rename the tensors of `files` to the parameters of `model`, and set those of parts not built apart.

    Extra layers behind the model's are such parts, too (`Family.extra_layers`). Stacks of experts become the
    parameters of each expert.

    Raises UserError if two tensors would fill the same parameter, or a stack has not the shape of one.

    Args:
        model: from `build_on_meta`.
        family: its family.
        files: the model's weights, changed in place.
    """
    names, count = ParameterNames(model, family.stacks_experts), len(family.decoder_layers(model))
    extra = range(count, count + family.extra_layers(text_config(model.config)))
    files.rename(
        names.parameter_name,
        lambda name: family.is_unused(name) or family.locate_layer(name)[0] in extra,
        family.is_of_vision,
    )
    if family.stacks_experts:
        files.split_experts()
