"""Pages for a browser: `render` fills in the templates of report.html, compare.html and memory.html.

A page requests nothing from outside. Its Content-Security-Policy allows its own style sheet and script, by
their hashes, and nothing else: a browser would not even run a name that was not escaped. So there are no
style attributes. The templates escape every value.
"""

from __future__ import annotations

import base64
import hashlib
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from monitoring import report_charts as charts

MAX_PROMPTS = 50  # whose answers a page shows
TEMPLATE_FOLDER = Path(__file__).parent / "templates"
TEMPLATES = Environment(loader=FileSystemLoader(TEMPLATE_FOLDER), autoescape=True, undefined=StrictUndefined,
                        trim_blocks=True, lstrip_blocks=True)  # fmt: skip
TEMPLATES.filters |= {"count": "{:,}".format, "number": charts.number, "percent": "{:.1%}".format,
                      "short_duration": charts.short_duration}  # fmt: skip
TEMPLATES.policies["json.dumps_kwargs"] = {"separators": (",", ":")}


def duration(seconds: float) -> str:
    """Format a duration: 42.3 s, 12 min 5 s, 3 h 20 min."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, hours = divmod(round(seconds), 60), divmod(round(seconds / 60), 60)
    return f"{minutes[0]} min {minutes[1]} s" if seconds < 3600 else f"{hours[0]} h {hours[1]} min"


def short_count(count: float) -> str:
    """Format a count: 45,210; 12.3 M; 1.2 B."""
    for size, letter in ((10**9, "B"), (10**6, "M")):
        if count >= size:
            return f"{count / size:.1f} {letter}"
    return f"{count:,.0f}"


def render(
    template: str, *, style_names=("page.css",), script_names=("values.js", "page.js"), **values
) -> str:
    """Fill in a template with `values`, its style sheets and scripts, and the Content-Security-Policy."""
    style, script = (
        "".join((TEMPLATE_FOLDER / name).read_text(encoding="utf-8") for name in names)
        for names in (style_names, script_names)
    )
    policy = (
        f"default-src 'none'; style-src {_source_hash(style)}; script-src {_source_hash(script)};"
        " img-src data:;"
        " base-uri 'none'; form-action 'none'"
    )
    return TEMPLATES.get_template(template).render(
        policy=policy, style=Markup(style), script=Markup(script), **values
    )


def _source_hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
