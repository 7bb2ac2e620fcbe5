"""The versions of the packages that are named on the command line, and of Python, as one line of JSON; null where one
is not installed. Run by a peer's own interpreter."""

import importlib.metadata
import json
import platform
import sys

versions = {"python": platform.python_version()}
for name in sys.argv[1:]:
    try:
        versions[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        versions[name] = None
print(json.dumps(versions))
