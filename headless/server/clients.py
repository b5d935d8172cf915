"""A browser that listens, and what waits to be sent to it: in order, and never more than fits."""

from __future__ import annotations

import asyncio
import collections
import contextlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from aiohttp import web

from . import messages

MAX_UNSENT = 50_000
"""messages to a client that does not read; then it is let go"""
MAX_UNSENT_PREVIEWS = 4
MAX_UNSENT_STATES = 32
"""of those messages that hold everything that an older one held"""


class Event(NamedTuple):
    """A text frame before it is written: a client that lags may never need it."""

    kind: str
    data: Mapping[str, Any]


@dataclass(eq=False, slots=True)
class Client:
    """One WebSocket and the queue before it. All of it belongs to the event loop."""

    socket: web.WebSocketResponse
    transport: asyncio.Transport | None = None
    wants_logs: bool = False
    _unsent: collections.deque[list[Event | bytes]] = field(default_factory=collections.deque)
    """each in a list of its own, which is empty when a later message took its place"""
    _states: collections.deque[list[Event | bytes]] = field(default_factory=collections.deque)
    """the ``progress_state`` messages among them, oldest first"""
    _num_previews: int = 0
    _wake: asyncio.Event = field(default_factory=asyncio.Event)

    def push(self, message: Event | bytes) -> None:
        if len(self._unsent) >= MAX_UNSENT:
            if self.transport is not None:
                self.transport.abort()  # it reads nothing: a word of farewell would not be read either
            return
        if isinstance(message, bytes):
            if self._num_previews >= MAX_UNSENT_PREVIEWS:
                return  # previews of a slow connection are the first to go
            self._num_previews += 1
        place: list[Event | bytes] = [message]
        if isinstance(message, Event) and message.kind == "progress_state":
            self._states.append(place)
            if len(self._states) > MAX_UNSENT_STATES:
                self._states.popleft().clear()
        self._unsent.append(place)
        self._wake.set()

    async def write_out(self) -> None:
        """Send what is pushed, until the connection ends."""
        with contextlib.suppress(ConnectionError):
            while not self.socket.closed:
                await self._wake.wait()
                self._wake.clear()
                while self._unsent and not self.socket.closed:
                    place = self._unsent.popleft()
                    if self._states and self._states[0] is place:
                        self._states.popleft()
                    for message in place:
                        await self._send(message)

    async def _send(self, message: Event | bytes) -> None:
        if isinstance(message, bytes):
            self._num_previews -= 1
            await self.socket.send_bytes(message)
        else:
            await self.socket.send_str(messages.text(message.kind, message.data))
