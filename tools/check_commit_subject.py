"""Refuses a commit message whose subject is longer than 72 characters: the commit-msg hook.

python tools/check_commit_subject.py .git/COMMIT_EDITMSG
"""

from __future__ import annotations

import sys
from pathlib import Path

LONGEST = 72


def subject_of(message: str) -> str:
    """The first line that git keeps: not empty, and no comment."""
    lines = (line.strip() for line in message.splitlines())
    return next((line for line in lines if line and not line.startswith("#")), "")


if __name__ == "__main__":
    length = len(subject_of(Path(sys.argv[1]).read_text(encoding="utf-8")))
    if length > LONGEST:
        sys.exit(f"error: the subject has {length} characters; at most {LONGEST}, and reasons in the body")
