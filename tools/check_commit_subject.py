"""The commit-msg hook: refuse a commit message whose subject is longer than 72 characters.

python tools/check_commit_subject.py .git/COMMIT_EDITMSG
"""

from __future__ import annotations

import sys
from pathlib import Path

MAX_LENGTH = 72


def find_subject(message: str) -> str:
    """Return the first line that git keeps (not empty, and no comment), or "" if there is none."""
    lines = (line.strip() for line in message.splitlines())
    return next((line for line in lines if line and not line.startswith("#")), "")


if __name__ == "__main__":
    length = len(find_subject(Path(sys.argv[1]).read_text(encoding="utf-8")))
    if length > MAX_LENGTH:
        sys.exit(f"error: the subject has {length} characters; at most {MAX_LENGTH}, and reasons in the body")
