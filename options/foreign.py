"""Options of other training programs, and what they are here: the parts of a rule, and errors made of rules.

The rules themselves are the table RULES in options/foreign_rules.py. The command line, YAML files,
`python -m tools.migrate` and docs/migrate.md use that one table.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

# Values as texts, by foreign name. A list is written with commas. Names of nested files have dots.
Settings = Mapping[str, str]

# The columns of docs/migrate.md. LLaMA-Factory and axolotl take transformers' names as well.
TOOLS = ("transformers, TRL, unsloth", "axolotl", "LLaMA-Factory", "accelerate, DeepSpeed")
OFF = ("", "false", "no", "none", "null", "off", "0", "0.0")  # values that switch something off
MAX_ERROR_LENGTH = 200  # characters of an error that explains several options


@dataclass(frozen=True)
class Translation:
    """What a foreign setting is here.

    Attributes:
        options: the options here, {name: value}; empty = none is needed, or there is none.
        note: beside options, what differs; without options, why there are none.
        lost: whether the setting changes something elsewhere that nothing changes here.
        is_advice: whether the note says what to give instead, so that leaving it out is not enough.
    """

    options: Mapping[str, str] = field(default_factory=dict)
    note: str = ""
    lost: bool = False
    is_advice: bool = False

    def describe(self, write: Callable[[str, str], str]) -> str:
        """Return it as the end of an error line. write(option, value) returns an option as text."""
        if self.options:
            note = f" ({self.note})" if self.note else ""
            return f"here it is {' '.join(write(*item) for item in self.options.items())}{note}"
        kind = "has no equal here" if self.lost else "is not needed here"
        if self.is_advice:
            return f"{kind}: {self.note}"
        return f"{kind}: {self.note}; leave it out" if self.note else f"{kind}; leave it out"


Translate = Callable[[Settings, Settings], Translation]


@dataclass(frozen=True)
class Rule:
    """What one or several foreign options are here.

    Attributes:
        here: the options here, for docs/migrate.md; "" = none.
        names: the foreign names of each column of TOOLS.
        translate: translate(the settings with these names, all foreign settings) returns a Translation.
        note: what docs/migrate.md says of it.
    """

    here: str
    names: tuple[tuple[str, ...], ...]
    translate: Translate
    note: str = ""

    @property
    def all_names(self) -> tuple[str, ...]:
        """Its foreign names, each once, in the order of columns."""
        return tuple(dict.fromkeys(name for names in self.names for name in names))

    def apply(self, settings: Settings, known: Settings | None = None) -> Translation | None:
        """Return what these settings are here; None if none of them has a name of this rule.

        known: options of this program that are given beside them.
        """
        given = {name: settings[name] for name in self.all_names if name in settings}
        return self.translate(given, {**(known or {}), **settings}) if given else None


class ForeignOptions:
    """A table of rules, by name."""

    def __init__(self, rules: tuple[Rule, ...]):
        self.rules = rules
        self.by_name: dict[str, Rule] = {}
        for rule in rules:
            for name in rule.all_names:
                assert name not in self.by_name, f"two rules for {name}"
                self.by_name[name] = rule

    def explain(
        self,
        unknown: Settings,
        known: Settings,
        write: Callable[[str, str], str],
        prefix: str = "",
        file: str = "",
    ) -> str:
        """Return an error line for unknown options whose first one is foreign; "" if it is not.

        Args:
            unknown: the options that are not this program's, with their values.
            known: the other options, with their values.
            write: write(option, value) returns an option of this program as text.
            prefix: what stands before a name: "--" on command lines.
            file: the file that they are in; "" = the command line.
        """
        if not unknown or next(iter(unknown)) not in self.by_name:
            return ""
        settings = {name: value for name, value in unknown.items() if name in self.by_name}
        parts = []
        for rule in dict.fromkeys(self.by_name[name] for name in settings):
            names = ", ".join(f"{prefix}{name}" for name in rule.all_names if name in settings)
            translation = rule.apply(settings, known)
            assert translation is not None
            parts.append(f"{names}: {translation.describe(write)}")
        line = "; ".join(parts)
        if len(line) <= MAX_ERROR_LENGTH or len(parts) == 1:
            return line
        whole_file = f"`python -m tools.migrate {file or 'FILE'}` translates a whole file"
        return f"{parts[0]}; and {len(parts) - 1} more such options: {whole_file}"

    def value_here(self, option: str, value: str) -> str:
        """Return what another program's value of an option that has the same name here is here; or "".

        It is a value of the option, or else options: "--train_type qlora" for axolotl's adapter. What differs
        follows in brackets.
        """
        rule = self.by_name.get(option) if value.strip() else None
        translation = rule.apply({option: value}) if rule else None
        if not translation or translation.options.get(option) == value:
            return ""
        here = translation.options.items()
        text = " ".join(each if name == option else f"--{name} {each}" for name, each in here)
        return f"{text} ({translation.note})" if text and translation.note else text


def is_off(value: str) -> bool:
    """Whether a value switches its option off."""
    return value.strip().lower() in OFF


def same(option: str, note: str = "") -> Translate:
    """Return a translation to an option with the same value."""
    return lambda given, _: Translation({option: next(iter(given.values()))}, note)


def switch(option: str, note: str = "") -> Translate:
    """Return a translation of a switch to a switch of the same meaning, false by default."""

    def translate(given: Settings, _settings: Settings) -> Translation:
        on = not all(map(is_off, given.values()))
        return Translation({option: "true"}, note) if on else Translation(note="false is the default")

    return translate


def lost(reason: str, harmless: Mapping[str, tuple[str, ...]] | None = None) -> Translate:
    """Return a translation of settings that nothing here is equal to. Switched off, they are not needed.

    harmless: {name: values, in lower case, that change nothing}.
    """

    def translate(given: Settings, _settings: Settings) -> Translation:
        for name, value in given.items():
            values = (harmless or {}).get(name, ())
            if not is_off(value) and not all(each.strip().lower() in values for each in value.split(",")):
                return Translation(note=reason, lost=True)
        return Translation(note="it changes nothing")

    return translate


def needless(reason: str) -> Translate:
    """Return a translation of settings that are not needed here."""
    return lambda _given, _settings: Translation(note=reason)
