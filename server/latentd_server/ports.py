"""Why a port cannot be opened. gRPC says only that it cannot."""

import socket


def why_not_bound(address: str) -> str:
    """What the system says to binding HOST:PORT, e.g. `Address already in use`, in words for whoever starts the server.

    The answer is of now, so that it may be another than a moment ago.
    """
    host, _, port = address.rpartition(":")
    try:
        found = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        for family, kind, protocol, _, where in found:
            with socket.socket(family, kind, protocol) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as gRPC does
                probe.bind(where)
                probe.listen()  # two may bind a port that one may listen on
    except OSError as error:
        return error.strerror or str(error)
    return "gRPC could not bind it, but the system finds nothing wrong with it now"
