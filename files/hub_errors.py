"""Exceptions of the huggingface_hub library if the hub cannot be reached or answers with an error."""

from __future__ import annotations

from huggingface_hub.errors import HfHubHTTPError

# A broken connection raises the base class of HfHubHTTPError, which is the HTTP client's: httpx.HTTPError
# (huggingface_hub 1) or httpx2.HTTPError (2). OSError: no login, offline mode, the disk.
HUB_ERRORS: tuple[type[Exception], ...] = (OSError, *HfHubHTTPError.__bases__)
