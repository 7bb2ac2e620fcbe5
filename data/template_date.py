"""Makes a chat template that writes today's date (`strftime_now`) write the day of the run.

Without that, a run that is resumed after midnight would train on other texts than it began with.
transformers' clock cannot be replaced, so the template gets a macro `strftime_now` that shadows it.
"""

from __future__ import annotations

import datetime
import json
import re

CLOCK = "strftime_now"
DIRECTIVE = re.compile(r"%[-_0^#]?[A-Za-z]")  # of strftime, with glibc's flags


def with_day(template: str, day: str | None) -> str:
    """Returns the template with `strftime_now` at midnight of that day, YYYY-MM-DD; unchanged for None."""
    if day is None or CLOCK not in template:
        return template
    moment = datetime.datetime.fromisoformat(day)
    directives = dict.fromkeys(DIRECTIVE.findall(template))
    # A doubled % stands aside until all others are replaced.
    pairs = [("%%", "\uf8ff"), *((d, moment.strftime(d)) for d in directives), ("\uf8ff", "%")]
    told = "".join(f" | replace({json.dumps(old)}, {json.dumps(new)})" for old, new in pairs)
    # jinja2 removes the line break behind a block, so that the template begins at the start of a line, as it
    # does alone.
    return f"{{% macro {CLOCK}(format) %}}{{{{ format{told} }}}}{{% endmacro %}}\n{template}"
