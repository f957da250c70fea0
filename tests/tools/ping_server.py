"""A small server that plays healthchecks: it takes start, success, fail and log, and judges by them
whether nights were missed. It can be slow, dead, out of order, or send its answer drop by drop."""

from __future__ import annotations

import contextlib
import ssl
import threading
import time
import uuid
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

# What it keeps of a body, bytes (healthchecks, "Attaching logs").
BODY_LIMIT = 100_000


@dataclass(frozen=True)
class Ping:
    """A signal as it came in: of which check ("/5f3c"), what it says, of which run, by which
    method, with which body, and when."""

    check: str
    signal: str
    run_id: str
    method: str
    body: bytes
    at: datetime


class Healthchecks:
    """behaviour: "" for a good server, or an answer's status, "slow", "dead" (takes connections and
    never answers), "drip", or "redirect URL".

    pings: those that it took; requests: every "METHOD target", also of those that it refused
    now: the time, as it sees it; None: the real one
    """

    def __init__(self, tls: ssl.SSLContext | None = None) -> None:
        self.pings: list[Ping] = []
        self.requests: list[str] = []
        self.behaviour, self.seconds = "", 0.3
        self.now: datetime | None = None
        self.ending = threading.Event()
        owner = self

        class Handler(BaseHTTPRequestHandler):
            def answer(self) -> None:
                length = int(self.headers.get("Content-Length") or 0)
                owner.handle(self, self.rfile.read(length))

            do_GET = do_HEAD = do_POST = answer

            def log_message(self, *args: Any) -> None:
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, *args: Any) -> None:
                """Those who hang up on a slow server are expected."""

        self._server = Server(("127.0.0.1", 0), Handler)
        self.url = f"http{'s' if tls else ''}://127.0.0.1:{self._server.server_port}"
        if tls:
            self._server.socket = tls.wrap_socket(self._server.socket, server_side=True)
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    @classmethod
    @contextlib.contextmanager
    def running(cls, tls: ssl.SSLContext | None = None) -> Iterator[Healthchecks]:
        server = cls(tls)
        try:
            yield server
        finally:
            server.stop()

    def stop(self) -> None:
        self.ending.set()
        self._server.shutdown()
        self._server.server_close()

    def handle(self, request: BaseHTTPRequestHandler, body: bytes) -> None:
        self.requests.append(f"{request.command} {request.path}")
        behaviour = self.behaviour
        if behaviour in ("slow", "dead"):
            self.ending.wait(self.seconds if behaviour == "slow" else 60)
        if behaviour == "dead":
            request.close_connection = True
        elif behaviour == "drip":
            request.wfile.write(b"HTTP/1.0 ")
            while not self.ending.wait(0.05):
                request.wfile.write(b"2")
        elif behaviour.startswith("redirect"):
            self._reply(request, 302, behaviour.split()[1])
        elif behaviour.isdigit():
            self._reply(request, int(behaviour))
        elif request.path == "/":
            self._reply(request, 404)
        else:
            self._reply(request, 200 if self._take(request, body) else 400)

    def _reply(self, request: BaseHTTPRequestHandler, status: int, place: str = "") -> None:
        request.send_response(status)
        if place:
            request.send_header("Location", place)
        request.end_headers()

    def _take(self, request: BaseHTTPRequestHandler, body: bytes) -> bool:
        parts = urlsplit(request.path)
        check, signal = parts.path, "success"
        for one in ("start", "fail", "log"):
            if check.endswith(f"/{one}"):
                check, signal = check.removesuffix(f"/{one}"), one
        query = parse_qs(parts.query)
        if query.get("status"):  # as Uptime Kuma has it
            signal = query["status"][0]
        run_id = query.get("rid", [""])[0]
        if run_id:
            try:
                uuid.UUID(run_id)
            except ValueError:
                return False
        at = self.now or datetime.fromtimestamp(time.time())
        self.pings.append(
            Ping(check, signal, run_id, request.command, body[:BODY_LIMIT], at)
        )
        return True

    @property
    def signals(self) -> list[str]:
        return [one.signal for one in self.pings]

    def tries(self) -> Counter[str]:
        """How often each target was asked for."""
        return Counter(self.requests)

    def verdict(self, check: str, now: datetime, period: timedelta, grace: timedelta) -> str:
        """What it says of a check: "new", "started", "up", "late" or "down"; the rules are those of
        healthchecks ("Configuring checks", "Measuring script run time")."""
        mine = [one for one in self.pings if one.check == check and one.signal != "log"]
        ends = [one for one in mine if one.signal != "start"]
        starts = [one for one in mine if one.signal == "start"]
        open_runs = [one for one in starts if one.run_id not in {end.run_id for end in ends}]
        if any(now > one.at + grace for one in open_runs if not ends or one.at > ends[-1].at):
            return "down"
        if not ends:
            return "started" if open_runs else "new"
        if ends[-1].signal in ("fail", "down") or now > ends[-1].at + period + grace:
            return "down"
        return "late" if now > ends[-1].at + period else "up"
