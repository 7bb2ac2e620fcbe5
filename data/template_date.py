"""Make a chat template that writes today's date (`strftime_now`) write the day of the run.

Otherwise a run that is resumed after midnight would train on other texts than before. The clock of
transformers cannot be replaced, so the template gets a macro `strftime_now` that shadows it.
"""

from __future__ import annotations

import datetime
import json
import re

CLOCK = "strftime_now"
DIRECTIVE = re.compile(r"%[-_0^#]?[A-Za-z]")  # of strftime, with glibc's flags


def set_template_date(template: str, day: str | None) -> str:
    """Return the template with a `strftime_now` fixed at midnight of `day`, YYYY-MM-DD; None = unchanged."""
    if day is None or CLOCK not in template:
        return template
    moment = datetime.datetime.fromisoformat(day)
    directives = dict.fromkeys(DIRECTIVE.findall(template))
    # A private character replaces each doubled % until all directives are replaced.
    pairs = [("%%", "\uf8ff"), *((d, moment.strftime(d)) for d in directives), ("\uf8ff", "%")]
    filters = "".join(f" | replace({json.dumps(old)}, {json.dumps(new)})" for old, new in pairs)
    # jinja2 removes the line break after a block, so the template still begins at the start of a line.
    return f"{{% macro {CLOCK}(format) %}}{{{{ format{filters} }}}}{{% endmacro %}}\n{template}"
