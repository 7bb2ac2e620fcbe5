"""The headers of safetensors files on the hub, fetched by range requests, without the weights."""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, SafetensorsParsingError

from files.hub_errors import HUB_ERRORS, translate_hub_errors
from files.names import INDEX, SINGLE_FILE, split_revision
from files.tensors import DTYPES, StoredTensor
from options.errors import UserError

CONNECTIONS = 16  # a 405B model has 191 files, each a round trip or two


def fetch_headers(name: str, commit: str, files: Iterable[str]) -> dict[str, dict[str, StoredTensor]] | None:
    """Return {file: its tensors by name} of a hub model's weight files; None if the hub cannot be reached.

    Args:
        name: `owner/name`, or `owner/name@revision`, as it was given.
        commit: the commit to read.
        files: names of the weight files.

    Raises:
        UserError: the hub refuses, or a file is missing or is no safetensors file.
    """
    repository, _ = split_revision(name)
    hub = HfApi()

    def fetch(file: str) -> tuple[str, dict[str, StoredTensor]]:
        try:
            header = hub.parse_safetensors_file_metadata(repository, file, revision=commit)
        except SafetensorsParsingError as e:
            raise UserError(f"--model_name {name}: {file} is not a safetensors file ({e})") from None
        except HfHubHTTPError as e:
            if getattr(e.response, "status_code", None) != 404:
                raise
            if file == SINGLE_FILE:
                raise UserError(f"--model_name {name}: no weights there ({SINGLE_FILE} or {INDEX})") from None
            raise UserError(f"--model_name {name}: {file} is missing; {INDEX} names it") from None
        # Only the header was read, so the offset of the data is not known here; a plan does not need it.
        return file, {
            key: StoredTensor(file, tuple(tensor.shape), DTYPES.get(tensor.dtype, tensor.dtype))
            for key, tensor in header.tensors.items()
        }

    with translate_hub_errors("--model_name", name), ThreadPoolExecutor(CONNECTIONS) as pool:
        try:
            return dict(pool.map(fetch, files))
        except HfHubHTTPError:  # an answer of the hub
            raise
        except HUB_ERRORS:  # no connection, or offline mode
            return None
