"""Write the tables of docs/data.md from the code that reads the data, so that the page and the program agree.

python -m tools.make_data_doc
"""

from __future__ import annotations

import inspect
import re
from pathlib import Path

from data.formats import FORMATS
from data.recognition import list_candidates
from data.schemas import Auto, Schema
from data.sharegpt import CALLS, ROLES
from data.sources import Recipe

PAGE = Path(__file__).parent.parent / "docs" / "data.md"
BEGIN, END = "<!-- {}: python -m tools.make_data_doc -->", "<!-- end of {} -->"


def make_forms_table() -> str:
    """Return the table of the columns that are recognised, in the order in which they are tried."""
    recognised = list_candidates(has_template=True)
    otherwise = {schema.required: name for name, schema in list_candidates(has_template=False)}
    lines = ["| columns | format | learned |", "|---|---|---|"]
    for name, schema in recognised:
        form = f"`{name}`"
        learned = schema.learned or FORMATS[name].learned
        if schema.auto == Auto.WITH_TEMPLATE:
            other = otherwise[schema.required]
            form = f"`{name}` {schema.auto.value}, else `{other}`"
            learned = f"`{name}`: {learned}; `{other}`: {FORMATS[other].learned}"
        lines.append(f"| {describe_columns(schema)} | {form} | {learned} |")
    return "\n".join(lines)


def describe_columns(schema: Schema) -> str:
    """Return the columns of a schema, and what they hold, in Markdown."""
    text = ", ".join(f"`{column}`" for column in schema.required)
    text += f": {schema.note}" if schema.note else ""
    optional = ", ".join(f"`{column}`" for column in schema.optional)
    return text + (f"; optionally {optional}" if optional else "")


def make_formats_table() -> str:
    """Return the table of the columns that each format reads if the user names it."""
    lines = ["| `--dataset_format` | columns that it reads |", "|---|---|"]
    for name, form in FORMATS.items():
        sets = [
            " + ".join(f"`{column}`" for column in schema.required)
            + (f" (+ {', '.join(f'`{column}`' for column in schema.optional)})" if schema.optional else "")
            for schema in form.schemas
        ]
        lines.append(f"| `{name}` | {', or '.join(dict.fromkeys(sets))} |")
    return "\n".join(lines)


def make_roles_table() -> str:
    """Return the table of the values of ShareGPT's `from`."""
    names: dict[str, list[str]] = {}
    for name, role in ROLES.items():
        names.setdefault(f"`{role}`", []).append(f"`{name}`")
    names["`assistant`, with `tool_calls`"] = [f"`{name}`" for name in CALLS]
    lines = ["| `from` | role |", "|---|---|"]
    return "\n".join(lines + [f"| {', '.join(each)} | {role} |" for role, each in names.items()])


def make_recipe_table() -> str:
    """Return the table of a recipe's keys, from the docstring of Recipe."""
    attributes = inspect.cleandoc(Recipe.__doc__ or "").partition("root.\n")[2]
    meanings = dict(re.findall(r"^    (\w+): (.*(?:\n        .*)*)", attributes, re.MULTILINE))
    lines = ["| key | unset | |", "|---|---|---|"]
    for key, default in vars(Recipe()).items():
        if key != "root":
            unset = f"`{default!r}`" if default else ""
            lines.append(f"| `{key}` | {unset} | {' '.join(meanings[key].split())} |")
    return "\n".join(lines)


TABLES = {
    "forms": make_forms_table,
    "formats": make_formats_table,
    "names of from": make_roles_table,
    "recipe keys": make_recipe_table,
}


def replace_tables(page: str) -> str:
    """Return the text of docs/data.md with each table between its two marks."""
    for name, make_table in TABLES.items():
        begin, end = BEGIN.format(name), END.format(name)
        before, _, rest = page.partition(begin)
        page = f"{before}{begin}\n\n{make_table()}\n\n{end}{rest.partition(end)[2]}"
    return page


if __name__ == "__main__":
    PAGE.write_text(replace_tables(PAGE.read_text("utf-8")), "utf-8")
