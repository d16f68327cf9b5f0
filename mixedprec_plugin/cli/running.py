"""What a running server says of its plan (serving/live.py)."""

from __future__ import annotations

import os

from mixedprec_plugin.errors import Problem, UsageError
from mixedprec_plugin.serving.settings import DOCUMENT_ADDRESS, PLAN_ADDRESS

_KEY = "MIXEDPREC_API_KEY"
# a plan of 70,000 layers takes some
_SECONDS = 60


def is_address(named: str) -> bool:
    """Whether an argument is a server's address."""
    return named.startswith(("http://", "https://"))


def ask(address: str, *, document: bool = False) -> tuple[str, str]:
    """Ask a server for its plan, as `mixedprec plan --json` prints it, or as the page's document.

    It is told the API key of MIXEDPREC_API_KEY. Returns the JSON, and the address it came from.
    """
    import httpx

    url = f"{address.rstrip('/')}{DOCUMENT_ADDRESS if document else PLAN_ADDRESS}"
    key = os.environ.get(_KEY, "")
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    try:
        answer = httpx.get(url, timeout=_SECONDS, headers=headers)
        answer.raise_for_status()
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        remedy = "is it a server with --load-format mixedprec, and is it up?"
        if isinstance(error, httpx.HTTPStatusError) and error.response.status_code == 401:
            remedy = f"set {_KEY} to the server's --api-key"
        raise UsageError(Problem(url, f"gave no plan ({error})", remedy)) from error
    return answer.text, url
