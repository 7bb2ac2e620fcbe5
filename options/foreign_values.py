"""Translations of foreign settings whose values mean something else here, or that go together."""

from __future__ import annotations

import math

from options.foreign import Settings, Translate, Translation, is_off
from options.methods import METHODS

# Names of optimizers of transformers, axolotl and DeepSpeed, in lower case.
OPTIMIZERS = {
    "adamw": "adamw",
    "adamw_torch": "adamw",
    "adamw_hf": "adamw",
    "adamw_torch_fused": "fused_adamw",
    "fused_adam": "fused_adamw",
    "fusedadam": "fused_adamw",
    "deepspeedcpuadam": "adamw",
    "adam": "adam",
    "adamw_8bit": "adamw_8bit",
    "adamw_bnb_8bit": "adamw_8bit",
    "paged_adamw": "paged_adamw_32bit",
    "paged_adamw_32bit": "paged_adamw_32bit",
    "paged_adamw_8bit": "paged_adamw_8bit",
    "sgd": "sgd",
    "adadelta": "adadelta",
}
CONSTANT, COSINE_END = "constant", "cosine ends at a tenth of --lr, not at 0"
# Schedules of transformers, axolotl and DeepSpeed, in lower case.
SCHEDULES = {
    "constant": CONSTANT,
    "constant_with_warmup": CONSTANT,
    "warmuplr": CONSTANT,
    "linear": "linear",
    "linear_with_warmup": "linear",
    "warmupdecaylr": "linear",
    "cosine": "cosine",
    "cosine_with_warmup": "cosine",
    "cosine_with_min_lr": "cosine",
    "warmupcosinelr": "cosine",
}
ADAPTERS = ("", "none", "lora", "qlora", "dora", "qdora", "full", "freeze")  # and kinds of training
KINDS_OF_TRAINING = ("use_peft", "adapter", "finetuning_type", "full_finetuning", "use_llama_pro")
FREEZES = ("freeze_trainable_layers", "freeze_trainable_modules")
SMALLEST, LARGEST = 1e-12, 1e12
OFF_TARGETS = ("", "none", "[]")  # of report_to


def as_number(text: str) -> float | None:
    """Return a number of ordinary size, with which one can reckon; None if the text is none."""
    try:
        number = float(text)
    except ValueError:
        return None
    return number if number == 0 or SMALLEST <= abs(number) <= LARGEST else None


def whole(number: float) -> str:
    """Return a whole number as text: 3.0 -> "3"."""
    return str(int(number))


def first(given: Settings, *names: str) -> str:
    """Return the value of the first of these names that is given; "" if none is."""
    return next((given[name] for name in names if name in given), "")


def is_on(given: Settings, *names: str) -> bool:
    """Whether one of these settings is given and not switched off."""
    return any(not is_off(given.get(name, "")) for name in names)


def train_type(given: Settings, _settings: Settings) -> Translation:
    """Translate what is trained, over which weights: adapters, bits, Llama-Pro."""
    adapter = first(given, "finetuning_type", "adapter").lower()
    expands = is_on(given, "use_llama_pro")
    bits, method, note = _quantizer(given, adapter)
    dora = adapter in ("dora", "qdora") or is_on(given, "use_dora", "peft_use_dora", "qdora")
    if adapter not in ADAPTERS:
        return Translation(note=f"{adapter}: only LoRA, DoRA, Llama-Pro and full training", lost=True)
    if not expands and (adapter == "freeze" or set(given) <= set(FREEZES)):
        return Translation(note="layers cannot be frozen one by one", lost=True)
    if not (bits or dora or set(given) & set(KINDS_OF_TRAINING)):
        return Translation(note="--train_type says what is trained, and over which weights")
    asks_for_adapter = adapter in ("lora", "qlora") or is_on(given, "use_peft") or dora
    full = adapter == "full" or is_on(given, "full_finetuning")
    kind = None if full or expands or not (asks_for_adapter or bits) else "dora" if dora else "lora"
    quantizer = None if full or not bits else method
    name = next(
        name
        for name, row in METHODS.items()
        if (row.quantizer, row.adapter, row.expansion) == (quantizer, kind, expands)
    )
    options = {"train_type": name} | ({"n_bits": bits} if quantizer == "hqq" and bits != "4" else {})
    if expands:
        note = "block_expansion.py makes the expanded model, whose config.json names the new layers"
    return Translation(options, note)


def _quantizer(given: Settings, adapter: str) -> tuple[str, str, str]:
    """Return (bits of the frozen weights or "", quantizer, note)."""
    bits, method = first(given, "quantization_bit"), first(given, "quantization_method").lower()
    if is_off(bits):
        packed = adapter in ("qlora", "qdora") or is_on(given, "load_in_4bit", "qdora")
        bits = "4" if packed else "8" if is_on(given, "load_in_8bit") else ""
    if bits and bits != "4" and method != "hqq":
        return bits, "hqq", f"{bits}-bit weights are HQQ's"
    return bits, "hqq" if method == "hqq" else "bnb", ""


def target_modules(given: Settings, _settings: Settings) -> Translation:
    """Translate the linears that get adapters."""
    names = first(given, "lora_target_modules", "target_modules", "lora_target")
    everything = names in ("all", "all-linear") or is_on(given, "lora_target_linear")
    if everything or is_off(names):
        options = {"lora_target_modules": "all"} if everything else {}
        return Translation(options, "" if everything else "all is the default")
    if not all(c.isalnum() or c in "_,." for c in names):
        return Translation(note="a pattern; --lora_target_modules takes names with commas", lost=True)
    return Translation({"lora_target_modules": names})


def lora_plus_ratio(given: Settings, _settings: Settings) -> Translation:
    """Translate LoRA+'s ratio of learning rates, which is off if it is 0 or none."""
    value = next(iter(given.values()))
    return Translation(note="it is off") if is_off(value) else Translation({"lora_plus_ratio": value})


def epochs(given: Settings, _settings: Settings) -> Translation:
    """Translate a number of epochs, which may have a fraction elsewhere."""
    text = next(iter(given.values()))
    number = as_number(text)
    if number is None or number <= 0 or number == int(number):
        return Translation({"num_epochs": text if number is None else whole(number)})
    note = f"whole epochs only; {text} of them end by --max_steps"
    return Translation({"num_epochs": whole(math.ceil(number))}, note)


def optimizer(given: Settings, _settings: Settings) -> Translation:
    """Translate the name of an optimizer."""
    name = next(iter(given.values()))
    here = OPTIMIZERS.get(name.lower())
    return (
        Translation({"optimizer": here})
        if here
        else Translation(note="--optimizer adamw, the default, stays", lost=True)
    )


def schedule(given: Settings, settings: Settings) -> Translation:
    """Translate the name of a learning rate's schedule."""
    name = next(iter(given.values()))
    here = SCHEDULES.get(name.lower())
    if not here:
        note = f"{name}; --lr_scheduler constant, the default, holds; linear and cosine are the others"
        return Translation(note=note, lost=True)
    if (
        here == "cosine"
        and first(settings, "cosine_min_lr_ratio", "lr_scheduler_kwargs.min_lr_rate") == "0.1"
    ):
        return Translation({"lr_scheduler": here})
    return Translation({"lr_scheduler": here}, COSINE_END if here == "cosine" else "")


def warmup(given: Settings, settings: Settings) -> Translation:
    """Translate a warm-up in steps, or as a share, to the share that --lr_warmup is."""
    ratio, steps = as_number(given.get("warmup_ratio", "")), None
    for name in ("warmup_steps", "scheduler.params.warmup_num_steps"):
        steps = as_number(given[name]) if name in given and steps is None else steps
    if steps is not None and 0 < steps < 1:  # a share, since transformers 5
        ratio, steps = steps, None
    if not steps:
        text = next(iter(given.values()))
        return Translation({"lr_warmup": text if ratio is None and steps is None else f"{ratio or 0:g}"})
    total = as_number(first(settings, "scheduler.params.total_num_steps", "max_steps"))
    if total and total >= steps:
        return Translation({"lr_warmup": f"{steps / total:.4g}"}, f"{steps:g} of {total:g} steps")
    note = f"--lr_warmup is a share: {steps:g} / the steps of the run; unset it is 0.1, with constant 0"
    return Translation(note=note, lost=True)


def gradient_norm(given: Settings, _settings: Settings) -> Translation:
    """Translate the norm that gradients are clipped to; 0 means none elsewhere."""
    value = next(iter(given.values()))
    if is_off(value):
        return Translation({"apply_gradient_clipping": "false"})
    return Translation({"grad_norm": value})


def adam_betas(given: Settings, _settings: Settings) -> Translation:
    """Accept Adam's constants if they are torch's, which this program uses."""
    default = {"adam_beta1": 0.9, "adam_beta2": 0.999, "adam_epsilon": 1e-8, "optimizer.params.eps": 1e-8}
    for name, value in given.items():
        if name == "optimizer.params.betas":
            same = [as_number(part) for part in value.split(",")] == [0.9, 0.999]
        else:
            same = as_number(value) == default[name]
        if not same:
            return Translation(note="betas are 0.9 and 0.999, eps is 1e-8", lost=True)
    return Translation(note="these are the defaults")


def steps_between(option: str, name: str, *strategies: str) -> Translate:
    """Return a translation of a number of steps that counts only where a strategy says so.

    Args:
        option: the option here.
        name: the foreign number of steps between two saves or evaluations.
        strategies: names of the setting that says no, steps or epoch.
    """

    def translate(given: Settings, _settings: Settings) -> Translation:
        when, steps = first(given, *strategies).lower(), given.get(name, "")
        if when == "no" or (is_off(steps) and when != "epoch"):
            return Translation(note=f"--{option} counts steps; 0 is the default")
        number = as_number(steps)
        if when == "epoch":
            return Translation(note=f"once an epoch: --{option} counts steps", lost=True)
        if number is not None and 0 < number < 1:
            return Translation(note=f"a share of the run: --{option} counts steps", lost=True)
        return Translation({option: steps if number is None else whole(number)})

    return translate


def logs(given: Settings, _settings: Settings) -> Translation:
    """Translate where metrics go beside metrics.jsonl: one place at most."""
    targets = {each.strip().lower() for each in given.get("report_to", "").split(",")} - set(OFF_TARGETS)
    switches = {"use_wandb": "wandb", "use_tensorboard": "tensorboard"}
    targets |= {target for name, target in switches.items() if is_on(given, name)}
    here = next((target for target in ("wandb", "tensorboard") if targets & {target, "all"}), "")
    others = ", ".join(sorted(targets - {here, "all"}))
    note = f"not to {others}; metrics.jsonl is always written" if others else ""
    if here:
        return Translation({"log_to": here}, note)
    return Translation(note=note or "metrics.jsonl is always written", lost=bool(others))


def wandb_project(given: Settings, _settings: Settings) -> Translation:
    """Translate wandb's project, which turns wandb on in axolotl."""
    value = next(iter(given.values()))
    return Translation({"log_to": "wandb", "project_name": value}) if value else Translation(note="it is off")


def trained_modules(given: Settings, _settings: Settings) -> Translation:
    """Translate modules that are trained in full beside the adapter: the embedding and the head."""
    names = {each.strip() for value in given.values() for each in value.split(",")} - {""}
    others = ", ".join(sorted(names - {"embed_tokens", "lm_head"}))
    if others:
        return Translation(
            note=f"{others}: only the embedding and the head, by --train_embeddings", lost=True
        )
    return Translation({"train_embeddings": "true"}) if names else Translation(note="it is off")


def resumed(given: Settings, _settings: Settings) -> Translation:
    """Translate how a run goes on."""
    value = next(iter(given.values()))
    if is_off(value):
        return Translation(note="it is off")
    if value.lower() == "true":
        return Translation({"resume": "auto"})
    return Translation(note="only checkpoints of train.py are continued, by --resume RUN", lost=True)


def model(given: Settings, _settings: Settings) -> Translation:
    """Translate a model and its revision."""
    name = first(given, "model_name_or_path", "base_model")
    revision = first(given, "model_revision", "revision_of_model")
    at = f"@{revision}" if revision not in ("", "main") else ""
    if not name:
        return Translation(note="it is part of --model_name, as owner/name@revision", lost=bool(at))
    return Translation({"model_name": name + at})
