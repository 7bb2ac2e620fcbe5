"""A chat template that writes today's date (`strftime_now`), made to write the day of the run.

transformers gives templates a clock. Another day's text is another text: a run resumed after midnight would not train
on the rows it began with. transformers takes no other clock, but it takes another template: this one, behind a macro
of the same name.
"""

from __future__ import annotations

import datetime
import json
import re

CLOCK = "strftime_now"
DIRECTIVE = re.compile(r"%[-_0^#]?[A-Za-z]")  # of strftime, with glibc's flags


def with_day(template: str, day: str | None) -> str:
    """The template with `strftime_now` telling midnight of that day, YYYY-MM-DD; None: as it is, today."""
    if day is None or CLOCK not in template:
        return template
    moment = datetime.datetime.fromisoformat(day)
    directives = dict.fromkeys(DIRECTIVE.findall(template))
    # A doubled % stands aside until all others are replaced.
    pairs = [("%%", "\uf8ff"), *((d, moment.strftime(d)) for d in directives), ("\uf8ff", "%")]
    told = "".join(f" | replace({json.dumps(old)}, {json.dumps(new)})" for old, new in pairs)
    # jinja2 removes the line break behind a block, so that the template begins at the start of a line, as it does alone.
    return f"{{% macro {CLOCK}(format) %}}{{{{ format{told} }}}}{{% endmacro %}}\n{template}"
