"""Answers other than 200: a status and a reason in ComfyUI's shape."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


class Refused(Exception):
    """A request that gets an answer other than 200; ``body`` is JSON."""

    def __init__(self, status: int, body: Mapping[str, Any]) -> None:
        self.status, self.body = status, body
        super().__init__(status)


def refused(status: int, what: str, kind: str = "bad_request") -> Refused:
    return Refused(status, {"error": {"type": kind, "message": what, "details": "", "extra_info": {}}})
