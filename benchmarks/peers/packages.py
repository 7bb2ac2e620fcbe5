"""Print versions of Python and of the packages on the command line as JSON; null if not installed.

A peer's own interpreter runs this.
"""

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
