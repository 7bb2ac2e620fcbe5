"""Print the command of train.py for configurations of other training programs.

python -m tools.migrate axolotl.yml | accelerate.yaml | ds_config.json | TRL's YAML | LLaMA-Factory's YAML

The command goes to stdout; what was decided and what has no equal goes to stderr, as comments. Several files
make one command: a program's own and those of accelerate and DeepSpeed.
"""

from __future__ import annotations

import re
import shlex
import sys
from dataclasses import dataclass, field
from pathlib import Path

from options.command_line import Parser
from options.config import ADAPTER_OPTIONS, FIELDS
from options.errors import DONE, REFUSED, UserError, describe
from options.foreign import Rule, Translation, is_off
from options.foreign_data import translate_data
from options.foreign_files import (
    LAUNCHERS,
    ForeignFile,
    add_adapter_defaults,
    add_defaults,
    list_settings,
    read_foreign_file,
)
from options.foreign_rules import FOREIGN
from options.foreign_sets import describe_value
from options.foreign_values import as_number
from options.methods import METHODS
from options.train import parse

# Foreign settings without which there is no equal command, if they have no equal themselves.
DECISIVE = ("rl", "reward_model", "process_reward_model", "stage", "finetuning_type", "adapter")
# Parts of DeepSpeed's files that tune its kernels, buckets and logs, and parts that change what is computed.
DEEPSPEED_TUNING = ("zero_optimization", "zero_allow_untested_optimizer", "fp16", "bf16", "optimizer",
                    "scheduler", "activation_checkpointing", "comms_config", "monitor_config", "aio",
                    "communication_data_type", "prescale_gradients", "zero_force_ds_cpu_optimizer",
                    "flops_profiler", "comms_logger", "data_types")  # fmt: skip
DEEPSPEED_FEATURES = ("amp", "curriculum_learning", "data_efficiency", "progressive_layer_drop", "elasticity",
                      "sparse_attention", "compression_training", "tensor_parallel", "pipeline")  # fmt: skip
LORA = ("adapter", "train_embeddings", "lora_rank", "lora_alpha", "use_rslora", "lora_dropout",
        "lora_target_modules", "lora_expert_rank", "train_router", "lora_plus_ratio")  # fmt: skip
UNPAGED = {"paged_adamw_32bit": "adamw", "paged_adamw_8bit": "adamw_8bit"}
WIDTH = 100  # columns of a line of the command


@dataclass
class Migration:
    """The command, and what is said about it.

    Attributes:
        file: the training program's configuration, for errors.
        options: the options of train.py, {name: value}.
        decided: where an option differs from the setting that it comes from.
        lost: settings that have no equal.
        needless: names of settings that need none.
        unknown: settings that are not in the table.
        defaults: options that come from the program's defaults.
    """

    file: Path
    options: dict[str, str] = field(default_factory=dict)
    decided: list[str] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
    needless: list[str] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)
    defaults: list[str] = field(default_factory=list)

    def command(self) -> str:
        """Return the shell command, with the options in the order of --help."""
        words = [_write(name, self.options[name]) for name in FIELDS if name in self.options]
        lines, line = [], "python train.py"
        for word in words:
            if len(line) + len(word) > WIDTH:
                lines.append(f"{line} \\")
                line = " "
            line += f" {word}"
        return "\n".join([*lines, line])

    def comments(self) -> list[str]:
        """Return what was decided, lost and left out, as lines of a shell script."""
        lines = []
        for title, entries in (
            ("decided", self.decided),
            ("no equal here", self.lost),
            ("not known to this tool", self.unknown),
        ):
            lines += [f"# {title}:", *(f"#   {each}" for each in dict.fromkeys(entries))] if entries else []
        for title, names in (
            ("not in the files, so the program's own defaults", self.defaults),
            ("not needed here", self.needless),
        ):
            lines += [f"# {title}: {', '.join(names)}"] if names else []
        return [_escape(line) for line in lines]


def _write(name: str, value: str) -> str:
    """Return an option in a shell's syntax. A value that looks like an option is joined with =."""
    number = re.fullmatch(r"-\d+(\.\d+)?", value)
    separator = "=" if value.startswith("-") and not number else " "
    return f"--{name}{separator}{shlex.quote(value)}"


def migrate(files: list[ForeignFile]) -> Migration:
    """Return the command for these files together.

    Raises UserError if two files are of the same kind, if they train in a way that this program does not
    have, or if train.py refuses a value.
    """
    files = sorted(files, key=lambda file: file.program in LAUNCHERS)  # the program's own file wins
    _check_together(files)
    result, read = Migration(files[0].path), set[str]()
    settings: dict[str, str] = {}
    for file in reversed(files):
        data = translate_data(file)
        read |= data.read
        result.options |= data.options
        result.decided += data.notes
        result.lost += data.lost
        settings |= {name: value for name, value in list_settings(file).items() if value != ""}
        settings |= data.settings
    settings = {name: value for name, value in settings.items() if name.partition(".")[0] not in read}
    program = files[0].program
    defaults = add_defaults(settings, program)
    train_type = FOREIGN.by_name["use_peft"].apply(settings)
    trains_adapter = bool(train_type and METHODS[train_type.options.get("train_type", "full")].adapter)
    if trains_adapter:
        defaults |= add_adapter_defaults(settings, program)
    _translate(settings, defaults, result)
    if trains_adapter and program == "axolotl" and "adapter" not in result.options:
        _report_missing(result)
    _make_consistent(result)
    _check_accepted(result)
    return result


def _report_missing(result: Migration) -> None:
    """Record options of an adapter for which axolotl has no default: it does not train without them."""
    for name in ("lora_rank", "lora_alpha", "lora_target_modules"):
        if name not in result.options:
            default = FIELDS[name].default
            result.lost.append(f"no setting for --{name}, and axolotl has no default: ours, {default}, holds")


def _check_together(files: list[ForeignFile]) -> None:
    """Raise UserError if two of the files are of the same program, or of two training programs."""
    kinds: dict[str, ForeignFile] = {}
    for file in files:
        kind = file.program if file.program in LAUNCHERS else "training program"
        if kind in kinds:
            other = kinds[kind]
            raise UserError(
                f"{file.path}: of {file.program}, and {other.path} is of {other.program}; give one"
            )
        kinds[kind] = file


def _known_name(name: str) -> str:
    """Return the name in the table that a setting of a nested file has: its own, or that of its head."""
    head = name.partition(".")[0]
    is_own = name in FOREIGN.by_name or name in FIELDS or head in DEEPSPEED_TUNING
    return name if is_own or head not in FOREIGN.by_name else head


def _translate(settings: dict[str, str], defaults: set[str], result: Migration) -> None:
    """Add what these settings are here to the result.

    Args:
        settings: {foreign name: value}.
        defaults: names among them that no file has.
        result: what they are added to.
    """
    known: dict[str, str] = dict(settings)
    for name, value in settings.items():
        if "." in name and (head := _known_name(name)) != name:
            known[head] = f"{known[head]},{value}" if head in known else value
    done: set[Rule] = set()
    for name in known:
        rule = FOREIGN.by_name.get(name)
        if rule and rule not in done:
            done.add(rule)
            _add(rule, known, defaults, result)
        elif not rule and name in FIELDS:
            result.options.setdefault(name, known[name])
            result.defaults += [name] if name in defaults else []
        elif not rule and _known_name(name) == name:
            _add_unknown(name, known, result)


def _add(rule: Rule, settings: dict[str, str], defaults: set[str], result: Migration) -> None:
    """Add what a rule makes of the settings."""
    translation = rule.apply(settings)
    assert translation is not None
    given = {name: settings[name] for name in rule.all_names if name in settings}
    written = ", ".join(f"{name}: {describe_value(name, value)}" for name, value in given.items())
    if translation.lost:
        if decisive := [name for name in given if name in DECISIVE]:
            name = decisive[0]
            raise UserError(f"{result.file}: {name}: {describe_value(name, given[name])}: {translation.note}")
        result.lost.append(f"{written}: {translation.note}")
    elif translation.options:
        result.options |= translation.options
        is_default = defaults >= set(given)
        result.defaults += translation.options if is_default else []
        if translation.note:
            result.decided.append(f"{_options(translation)} ({written}): {translation.note}")
    else:
        result.needless += [
            name for name, value in given.items() if not is_off(value) and name not in defaults
        ]


def _options(translation: Translation) -> str:
    return " ".join(_write(*item) for item in translation.options.items())


def _escape(line: str) -> str:
    """Return a line without characters that end it or control a terminal."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in line)


def _add_unknown(name: str, settings: dict[str, str], result: Migration) -> None:
    """Add a setting that the table does not have."""
    head, value = name.partition(".")[0], settings[name]
    if head in DEEPSPEED_FEATURES:
        if head not in result.lost and not is_off(settings.get(f"{head}.enabled", "true")):
            result.lost.append(head)
    elif is_off(value):
        return
    elif head in DEEPSPEED_TUNING:
        result.needless.append(describe_value("", name))
    else:
        result.unknown.append(f"{describe_value('', name)}: {describe_value(name, value)}")


def _make_consistent(result: Migration) -> None:
    """Remove options that have no effect beside the others, which train.py refuses."""
    options = result.options
    if not METHODS[options.get("train_type", "bnb_dora")].adapter:
        for name in LORA:
            options.pop(name, None)
    if "adapter" in options:
        for name in ADAPTER_OPTIONS:
            options.pop(name, None)
    if "eval_share" in options and "eval_dataset" in options:
        del options["eval_share"]
    if "eval_share" not in options and "eval_dataset" not in options:
        dropped = [name for name in ("eval_every", "early_stopping_patience") if options.pop(name, "")]
        if dropped:
            names = ", ".join(f"--{name}" for name in dropped)
            result.lost.append(f"{names}: no rows to evaluate on; --eval_share 0.05 splits some off")
    if "eval_every" not in options and options.pop("early_stopping_patience", ""):
        result.lost.append("--early_stopping_patience: counts evaluations; --eval_every sets when they are")
    if options.get("use_cpu_offload") == "true" and options.get("optimizer") in UNPAGED:
        options["optimizer"] = UNPAGED[options["optimizer"]]
        result.decided.append(
            f"--optimizer {options['optimizer']}: with --use_cpu_offload paging has no effect"
        )
    if "num_epochs" in options and (as_number(options.get("max_steps", "")) or 0) > 0:
        options["num_epochs"] = options["max_steps"]
        note = "max_steps counts alone there, and rows are repeated; an epoch has at least one step"
        result.decided.append(f"--num_epochs {options['num_epochs']}: {note}")
    if "resume" in options and options.pop("overwrite", ""):
        result.decided.append("--resume auto, not --overwrite: they contradict one another")
    if options.get("dataset_format", "chat") != "chat" and options.pop("chat_template", ""):
        result.decided.append(f"no --chat_template: rows of {options['dataset_format']} have no turns")
    if options.get("lr_scheduler") == "constant" and options.get("lr_warmup") == "0":
        del options["lr_warmup"]
    if "model_name" not in options:
        result.lost.append("no model in these files: add --model_name, or the demo's is trained")


def _check_accepted(result: Migration) -> None:
    """Raise UserError if train.py refuses the command, or a value in it would control a terminal."""
    for name, value in result.options.items():
        if not value.isprintable():
            raise UserError(f"{result.file}: --{name}: has characters that cannot be printed")
    argv = [f"--{name}={value}" for name, value in result.options.items()]
    try:
        parse(argv)
    except UserError as e:
        raise UserError(f"{result.file}: {e}") from None


def main(argv: list[str]) -> int:
    """Print the command for the files in `argv`; return the exit status."""
    try:
        parser = Parser(prog="python -m tools.migrate", description=__doc__.partition("\n")[0])
        kinds = "axolotl's, TRL's or LLaMA-Factory's YAML, accelerate's YAML, DeepSpeed's JSON"
        parser.add_argument("files", metavar="FILE", nargs="+", help=kinds)
        files = [read_foreign_file(name) for name in parser.parse_args(argv).files]
        result = migrate(files)
    except UserError as e:
        print(f"error: {describe(e)}", file=sys.stderr)
        return REFUSED
    print(result.command())
    for line in result.comments():
        print(line, file=sys.stderr)
    return DONE


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
