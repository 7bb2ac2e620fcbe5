"""Errors of the huggingface_hub library: the hub cannot be reached, or answers with an error."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RevisionNotFoundError,
)

from files.names import split_revision
from options.errors import UserError

# A broken connection raises the base class of HfHubHTTPError, which is the HTTP client's: httpx.HTTPError
# (huggingface_hub 1) or httpx2.HTTPError (2). OSError: no login, offline mode, the disk.
HUB_ERRORS: tuple[type[Exception], ...] = (OSError, *HfHubHTTPError.__bases__)


@contextmanager
def translate_hub_errors(option: str, name: str) -> Iterator[None]:
    """Raise UserError in place of any error of the hub within the context.

    Args:
        option: the option that `name` was given by, for messages.
        name: `owner/name`, or `owner/name@revision`.
    """
    repository, revision = split_revision(name)
    try:
        yield
    except HFValidationError:
        raise UserError(f"{option} {name}: no such folder, and not a hub id (owner/name)") from None
    except LocalEntryNotFoundError:
        raise UserError(f"{option} {name}: no such folder, and the hub cannot be reached") from None
    except RevisionNotFoundError:
        raise UserError(
            f"{option} {name}: on the hub {repository} has no branch, tag or commit {revision}"
        ) from None
    except HfHubHTTPError as e:
        status = getattr(e.response, "status_code", None)
        reason: dict[int | None, str] = {
            401: "does not exist, or needs `hf auth login`",
            403: "is gated: ask for access on its page",
        }
        problem = reason.get(
            status, "does not exist" if status == 404 else f"could not be fetched ({status})"
        )
        raise UserError(f"{option} {name}: no such folder, and on the hub it {problem}") from None
    except HUB_ERRORS as e:
        raise UserError(f"{option} {name}: could not be fetched from the hub ({e})") from None
