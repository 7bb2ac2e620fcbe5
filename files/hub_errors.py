"""What calls of the huggingface_hub library raise when the hub cannot be asked, or answers with an error."""

from __future__ import annotations

from huggingface_hub.errors import HfHubHTTPError

# Its base is the HTTP client's own, httpx.HTTPError (huggingface_hub 1) or httpx2.HTTPError (2), which a connection
# that breaks off raises as it is. OSError: no login, offline mode, the disk.
HUB_ERRORS: tuple[type[Exception], ...] = (OSError, *HfHubHTTPError.__bases__)
