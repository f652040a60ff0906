"""TLS and mutual TLS, with certificates made for the test."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
import trustme
from fake_server import FakeServer
from latentd_client import TLS, ServerUnavailable


@pytest.fixture
def authority() -> trustme.CA:
    """Who signs the certificates that both ends trust."""
    return trustme.CA()


@pytest.fixture
def server(authority: trustme.CA) -> Iterator[FakeServer]:
    """A fake server named latentd.test that wants to know its clients."""
    certificate = authority.issue_cert("latentd.test")
    chain = b"".join(blob.bytes() for blob in certificate.cert_chain_pems)
    credentials = grpc.ssl_server_credentials(
        [(certificate.private_key_pem.bytes(), chain)],
        root_certificates=authority.cert_pem.bytes(),
        require_client_auth=True,
    )
    running = FakeServer(credentials=credentials).start()
    yield running
    running.stop()


@pytest.fixture
def identity(authority: trustme.CA, tmp_path: Path) -> dict[str, Any]:
    """A client's files: whom to trust, its certificate and its key."""
    certificate = authority.issue_cert("client.test")
    files = {"ca": tmp_path / "ca.pem", "certificate": tmp_path / "chain.pem", "key": tmp_path / "key.pem"}
    authority.cert_pem.write_to_path(files["ca"])
    certificate.cert_chain_pems[0].write_to_path(files["certificate"])
    certificate.private_key_pem.write_to_path(files["key"])
    return files


def test_mutual_tls(connect: Callable[..., Any], identity: dict[str, Any]) -> None:
    """With the right files and name, calls work as ever, unary and streamed."""
    client = connect(tls=TLS(**identity, server_name="latentd.test"))
    assert len(client.sample("toy", 3)) == 3


def test_ready_made_credentials(connect: Callable[..., Any], identity: dict[str, Any]) -> None:
    """Credentials of gRPC's own are taken as they are."""
    credentials = TLS(**identity).credentials()
    client = connect(tls=credentials, channel_options=[("grpc.ssl_target_name_override", "latentd.test")])
    assert len(client.models()) == 2


@pytest.mark.parametrize("missing", ["server_name", "identity", "tls"])
def test_what_does_not_match_is_refused(connect: Callable[..., Any], identity: dict[str, Any], missing: str) -> None:
    """A server of another name, a client without a certificate and plaintext do not get through."""
    tls = {
        "server_name": TLS(**identity),
        "identity": TLS(ca=identity["ca"], server_name="latentd.test"),
        "tls": None,
    }[missing]
    with pytest.raises(ServerUnavailable):
        connect(tls=tls).models(timeout=10.0)
