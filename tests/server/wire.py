"""A connection that a test can break: a relay between client and server that resets both sides on demand."""

import contextlib
import socket
import struct
import threading

_RESET = struct.pack("ii", 1, 0)
"""SO_LINGER of nothing: closing sends RST instead of FIN."""


class Wire:
    """Relays one connection to `target`, HOST:PORT."""

    def __init__(self, target: str) -> None:
        host, _, port = target.rpartition(":")
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self._server = socket.create_connection((host, int(port)))
        self._client: socket.socket | None = None
        self._is_cut = False
        self._threads = [threading.Thread(target=self._serve, daemon=True)]
        self._threads[0].start()

    def _serve(self) -> None:
        with contextlib.suppress(OSError):  # cut before a client came
            self._client, _ = self._listener.accept()
            if self._is_cut:
                self._client.close()
                return
            back = threading.Thread(target=self._relay, args=(self._server, self._client), daemon=True)
            self._threads.append(back)
            back.start()
            self._relay(self._client, self._server)

    def _relay(self, source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):  # the wire was cut
            while data := source.recv(65536):
                target.sendall(data)

    def reset(self) -> None:
        """Cut it, as a firewall does or a host that went down: both sides hear RST, and nobody answers any more."""
        self._is_cut = True
        self._listener.close()
        for side in (self._server, self._client):
            if side is not None:
                side.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
                with contextlib.suppress(OSError):  # the relays wake up; the other side may have left
                    side.shutdown(socket.SHUT_RD)
                side.close()
        for thread in self._threads:
            thread.join(10)
