"""Asking, quickly and quietly, whether a weight hub can be reached."""

from __future__ import annotations

import threading
import urllib.error
import urllib.request
from urllib.parse import urlsplit

TIMEOUT = 4.0


def unreachable(url: str, timeout: float = TIMEOUT) -> str | None:
    """Why ``url`` cannot be fetched right now, or ``None`` if it answers.

    One HEAD request through the configured proxies, without retries. It runs in a thread of its own because name
    resolution ignores socket timeouts.

    Args:
        timeout: seconds to wait at most.
    """
    reason: list[str | None] = [f"{urlsplit(url).hostname} did not answer within {timeout:g} s"]

    def ask() -> None:
        request = urllib.request.Request(url, method="HEAD", headers={"User-Agent": "optc"})
        try:
            with urllib.request.urlopen(request, timeout=timeout):
                reason[0] = None
        except urllib.error.HTTPError as error:
            reason[0] = f"{urlsplit(url).hostname} answered {error.code} {error.reason}"
        except (OSError, ValueError) as error:
            cause = getattr(error, "reason", error)
            reason[0] = f"{urlsplit(url).hostname}: {getattr(cause, 'strerror', None) or cause}"

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(timeout)
    return reason[0]
