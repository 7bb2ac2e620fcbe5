"""A Family as the source of its file: what was found of a model, and the text to commit."""

from __future__ import annotations

import runpy
import tempfile
from dataclasses import dataclass, field, fields
from pathlib import Path

from models.family import ATTENTION, GATED_MLP, Family

WIDTH = 110
DEFAULTS = {f.name: f.default for f in fields(Family)}
# What the settings mean, for the docstring of the file.
DIFFERENCES = {
    "linears": "linears of other names",
    "changed_results": "results of linears that are changed in place",
    "identity_init": "norms after attention and MLP",
    "attention": "attention that PyTorch's kernels do not compute",
    "passes_row_bounds": "masks between packed rows",
    "passes_window": "masks for a sliding window",
    "constant_buffers": "a constant of the config in a buffer",
    "logit_scale": "scaled logits",
    "logit_cap": "a cap on the logits",
    "layers": "other names for its modules",
}


@dataclass
class Draft:
    """What was found of a model.

    Attributes:
        model_type: of the config.
        module: of transformers, that defines the classes.
        model_class, rotary_class: their names.
        settings: {attribute of Family: its value, or for a function its source}, unless it is the default.
        missing: what has to be written by hand before the family can work.
        remarks: what a reader should know.
    """

    model_type: str
    module: str
    model_class: str
    rotary_class: str
    settings: dict[str, object] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)

    def set(self, name: str, value: object) -> None:
        """Set an attribute of the family, unless it has this value by default."""
        if value != DEFAULTS[name]:
            self.settings[name] = value

    def source(self) -> str:
        """Return the text of models/<model_type>.py."""
        names = [name for name in ("ATTENTION", "GATED_MLP") if name in self._linears()]
        lines = [
            *self._docstring(),
            "",
            *(["import torch"] if "constant_buffers" in self.settings else []),
            _import(self.module, [self.model_class, self.rotary_class]),
            "",
            f"from models.family import {', '.join([*names, 'Family'])}",
            "",
            "FAMILY = Family(",
            f"    model_class={self.model_class},",
            f"    rotary_class={self.rotary_class},",
            *(self._setting(name, value) for name, value in self.settings.items()),
            ")",
            "",
        ]
        return "\n".join(lines)

    def family(self) -> Family:
        """Return the family that the source defines."""
        return family_from_source(self.source())

    def _docstring(self) -> list[str]:
        """Return the lines of the file's docstring, which names the differences from Llama."""
        name = self.model_class.partition("For")[0]
        found = [text for setting, text in DIFFERENCES.items() if setting in self.settings]
        line = f'"""{name}: {", ".join(found) or "modules and names are those of Llama"}."""'
        if len(line) <= WIDTH:
            return [line]
        return [f'"""{name}, and what differs from Llama:', "", *(f"- {text}" for text in found), '"""']

    def _linears(self) -> str:
        linears = self.settings.get("linears", ())
        assert isinstance(linears, tuple)
        if not linears:
            return ""
        parts = [f'"{linear}"' for linear in linears]
        for name, group in (("ATTENTION", ATTENTION), ("GATED_MLP", GATED_MLP)):
            starts = [i for i in range(len(linears)) if linears[i : i + len(group)] == group]
            for i in starts:  # at most once: names do not repeat
                first = parts.index(f'"{linears[i]}"')
                parts[first : first + len(group)] = [f"*{name}"]
        return parts[0].removeprefix("*") if parts[0] == "*ATTENTION" and len(parts) == 1 else _join(parts)

    def _setting(self, name: str, value: object) -> str:
        if name == "linears":
            text = self._linears()
        elif name in ("changed_results", "constant_buffers", "logit_scale", "logit_cap"):
            text = str(value)
        else:
            text = _literal(value)
        return f"    {name}={text},"


def family_from_source(source: str) -> Family:
    """Return FAMILY of a file in models/. source: its text, which is run."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "family.py")
        path.write_text(source, encoding="utf-8")
        family = runpy.run_path(str(path)).get("FAMILY")
    assert isinstance(family, Family)
    return family


def _import(module: str, names: list[str]) -> str:
    line = f"from {module} import {', '.join(names)}"
    if len(line) <= WIDTH:
        return line
    return f"from {module} import (\n" + "".join(f"    {name},\n" for name in names) + ")"


def _literal(value: object) -> str:
    if isinstance(value, tuple):
        return _join([_literal(part) for part in value])
    return f'"{value}"' if isinstance(value, str) else repr(value)


def _join(parts: list[str]) -> str:
    line = f"({', '.join(parts)}{',' * (len(parts) == 1)})"
    if len(line) <= WIDTH - 30:
        return line
    return "(\n" + "".join(f"        {part},\n" for part in parts) + "    )"
