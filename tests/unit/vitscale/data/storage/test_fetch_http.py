"""What stands between a URL and its bytes: redirects, certificates, proxies."""

from __future__ import annotations

import datetime
import ipaddress
import socket
import ssl
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers import bad_http
from tests.helpers.bad_http import BadServer, bad_server
from vitscale.config.schema import StorageConfig
from vitscale.data.storage import transfer
from vitscale.data.storage.fetch import open_files
from vitscale.data.storage.files import StorageSilentError

DATA = bytes(range(256)) * 40
STORAGE = StorageConfig(request_timeout_s=5, total_timeout_s=10)
IMPATIENT = StorageConfig(request_timeout_s=0.5, total_timeout_s=1)


@pytest.fixture(autouse=True)
def no_pauses_and_proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "FIRST_PAUSE_S", 0.01)
    for name in ("http_proxy", "https_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


@pytest.fixture
def server() -> Iterator[BadServer]:
    with bad_server() as running:
        running.files["a.tar"] = DATA
        yield running


@pytest.fixture
def other() -> Iterator[BadServer]:
    with bad_server() as running:
        running.files["a.tar"] = DATA
        yield running


@pytest.fixture
def secure(tmp_path: Path) -> Iterator[BadServer]:
    """A server whose certificate is signed by itself, and lies in ``authority.pem``."""
    certificate, key = tmp_path / "authority.pem", tmp_path / "key.pem"
    _write_certificate(certificate, key)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    with bad_server(context) as running:
        running.files["a.tar"] = DATA
        yield running


def _write_certificate(certificate: Path, key: Path) -> None:
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    secret = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "127.0.0.1")])
    now = datetime.datetime.now(datetime.UTC)
    signed = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(secret.public_key())
        .serial_number(1)
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(hours=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), False)
        .sign(secret, hashes.SHA256())
    )
    certificate.write_bytes(signed.public_bytes(serialization.Encoding.PEM))
    key.write_bytes(
        secret.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
    )


# Redirects


@pytest.mark.parametrize("code", [301, 302, 303, 307, 308])
def test_a_redirect_is_followed_with_the_range(server: BadServer, other: BadServer, code: int) -> None:
    server.rule = lambda number: bad_http.status(code, Location=f"{other.url}/a.tar?signed=1")
    files = open_files(server.url, STORAGE)
    assert files.read("a.tar", 100, 50) == DATA[100:150]
    assert files.size("a.tar") == len(DATA)
    assert other.asked_for("a.tar") == ["bytes=100-149", "bytes=0-0"]
    assert other.requests[0].path.endswith("?signed=1")


def test_a_redirect_may_be_relative(server: BadServer) -> None:
    server.script = [bad_http.status(302, Location="../elsewhere/a.tar")]
    assert open_files(server.url, STORAGE).read_all("a.tar") == DATA
    assert [request.path for request in server.requests] == ["/sets/train/a.tar", "/sets/elsewhere/a.tar"]


def test_a_password_stays_with_its_host(server: BadServer, other: BadServer) -> None:
    url = server.url.replace("//", "//user:secret@")
    server.script = [bad_http.status(302, Location="/moved/a.tar"), bad_http.status(302, Location=f"{other.url}/a.tar")]
    assert open_files(url, STORAGE).read_all("a.tar") == DATA
    assert ["authorization" in request.headers for request in server.requests] == [True, True]
    assert "authorization" not in other.requests[0].headers


@pytest.mark.parametrize(
    ("target", "text"),
    [
        ("file:///etc/passwd", "redirects to 'file:///etc/passwd', which cannot be read"),
        ("ftp://user:secret@host/a", "redirects to 'ftp://host/a', which cannot be read"),
        ("http://host:port/", "which cannot be read"),
        ("a.tar", "more than 5 redirects"),
    ],
)
def test_a_redirect_that_leads_nowhere_is_an_error(server: BadServer, target: str, text: str) -> None:
    server.rule = lambda number: (
        bad_http.ranged if server.requests[-1].name == "index.json" else bad_http.status(302, Location=target)
    )
    with pytest.raises(OSError, match=text):
        open_files(server.url, STORAGE).read_all("a.tar")


# Certificates


@pytest.mark.parametrize("variable", ["SSL_CERT_FILE", "AWS_CA_BUNDLE"])
def test_an_authority_can_be_named(
    secure: BadServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    monkeypatch.setenv(variable, str(tmp_path / "authority.pem"))
    secure.script = [bad_http.cut(5000)]
    assert open_files(secure.url, STORAGE).read("a.tar", 10, 9000) == DATA[10:9010]
    assert len(secure.requests) == 2


def test_a_certificate_that_is_not_accepted_stops_the_run_at_once(secure: BadServer) -> None:
    files = open_files(secure.url, STORAGE)
    with pytest.raises(StorageSilentError, match=r"certificate is not accepted .*self-signed.*SSL_CERT_FILE"):
        files.read("a.tar", 0, 10)
    assert secure.requests == []


def test_authorities_that_cannot_be_read_are_named(secure: BadServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_CA_BUNDLE", "/nowhere/authority.pem")
    with pytest.raises(OSError, match=r"AWS_CA_BUNDLE=/nowhere/authority.pem holds no certificates") as raised:
        open_files(secure.url, STORAGE).read_all("index.json")
    assert not isinstance(raised.value, FileNotFoundError)


def test_a_certificate_of_another_host_is_not_accepted(
    secure: BadServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "authority.pem"))
    url = secure.url.replace("127.0.0.1", "localhost")
    with pytest.raises(StorageSilentError, match=r"certificate is not accepted .*localhost"):
        open_files(url, STORAGE).read("a.tar", 0, 10)


def test_a_server_without_tls_is_told_so(server: BadServer) -> None:
    url = server.url.replace("http:", "https:")
    with pytest.raises(StorageSilentError, match="TLS failed"):
        open_files(url, IMPATIENT).read_all("index.json")


def test_a_server_that_never_shakes_hands_is_given_up() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"https://127.0.0.1:{listener.getsockname()[1]}/set"
        with pytest.raises(StorageSilentError, match=r"no whole answer in 0.5 s"):
            open_files(url, IMPATIENT).read_all("index.json")


# Proxies: "other" is one of them, and sees what it is asked for


def test_http_goes_through_a_proxy(server: BadServer, other: BadServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", f"http://user:secret@{other.host}")
    files = open_files("http://nowhere.invalid/sets?x=1", STORAGE)
    assert files.read("a.tar", 10, 20) == DATA[10:30]
    assert other.requests[0].path == "http://nowhere.invalid/sets/a.tar?x=1"
    assert other.requests[0].headers["proxy-authorization"] == "Basic dXNlcjpzZWNyZXQ="
    assert other.requests[0].headers["host"] == "nowhere.invalid"
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    assert open_files(server.url, STORAGE).read("a.tar", 10, 20) == DATA[10:30]
    assert len(server.requests) == 1


def test_https_goes_through_the_tunnel_of_a_proxy(
    secure: BadServer, other: BadServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "authority.pem"))
    monkeypatch.setenv("HTTPS_PROXY", f"http://user:secret@{other.host}")
    files = open_files(secure.url, STORAGE)
    assert files.read("a.tar", 10, 20) == files.read("a.tar", 10, 20) == DATA[10:30]
    (asked,) = other.requests
    assert (asked.method, asked.path) == ("CONNECT", secure.host)
    assert asked.headers["Proxy-Authorization"] == "Basic dXNlcjpzZWNyZXQ="
    assert [request.path for request in secure.requests] == ["/sets/train/a.tar"] * 2
    assert "proxy-authorization" not in secure.requests[0].headers


def test_a_proxy_that_refuses_is_named(other: BadServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTPS_PROXY", f"http://user:secret@{other.host}")
    other.script = [bad_http.status(407)]
    with pytest.raises(PermissionError, match=rf"the proxy {other.host} answered 407") as raised:
        open_files("https://nowhere.invalid/set", STORAGE).read_all("index.json")
    assert "secret" not in str(raised.value)
