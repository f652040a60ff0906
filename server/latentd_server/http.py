"""The HTTP port: `/metrics` for Prometheus and `/healthz` for humans and load balancers."""

import json
import logging
import socket
import sys
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from prometheus_client import CONTENT_TYPE_LATEST

log = logging.getLogger(__name__)

Health = Callable[[], str]
"""Why the server does not serve; empty if it does. Called on a thread of the HTTP server."""


class HttpServer:
    """Answers on threads of its own, so that a scrape never waits for the event loop."""

    def __init__(self, host: str, port: int, exposition: Callable[[], bytes], health: Health) -> None:
        """Bind and start.

        Raises:
            OSError: the address cannot be bound.
        """
        kind = _ServerV6 if ":" in host else _Server
        self._server = kind((host, port), _handler(exposition, health))
        self._thread = threading.Thread(target=self._server.serve_forever, name="latentd-http", daemon=True)
        self._thread.start()

    @property
    def port(self) -> int:
        """The port it is bound to."""
        return int(self._server.server_address[1])

    def close(self) -> None:
        """Stop answering."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that hung up is not worth a line; the library would print a stack past the log's format."""
        if not isinstance(sys.exception(), OSError):
            log.exception("an HTTP request from %s failed", client_address)


class _ServerV6(_Server):
    address_family = socket.AF_INET6


def _handler(exposition: Callable[[], bytes], health: Health) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        timeout = 10  # seconds a silent client may hold a thread

        def do_GET(self) -> None:
            path = self.path.partition("?")[0]
            if path == "/metrics":
                self._answer(200, CONTENT_TYPE_LATEST, exposition())
            elif path == "/healthz":
                why_not = health()
                body = {"status": "not serving", "reason": why_not} if why_not else {"status": "serving"}
                self._answer(503 if why_not else 200, "application/json", json.dumps(body).encode() + b"\n")
            else:
                self._answer(404, "text/plain; charset=utf-8", b"here are /metrics and /healthz\n")

        def _answer(self, status: int, content_type: str, body: bytes) -> None:
            self.send_response(status)
            self.send_header("Content-Type", content_type)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        do_HEAD = do_GET

        def log_message(self, format: str, *args: object) -> None:
            """Scrapes are not worth a line."""

    return Handler
