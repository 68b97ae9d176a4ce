"""The doctor fails where running would be unsafe or impossible, and says what to do."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable, Iterable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from fedtailor.cli import doctor
from fedtailor.cli.doctor import Finding, examine_ray


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No Ray around, no token, no public interface."""
    for name in [name for name in os.environ if name.startswith("RAY_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(psutil, "net_connections", lambda kind: [])
    monkeypatch.setattr(psutil, "net_if_addrs", lambda: {"eth0": [SimpleNamespace(address="10.0.0.7")]})
    monkeypatch.setattr(doctor, "DASHBOARD", 1)  # nobody listens there


@pytest.fixture
def listen(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, int], None]:
    def at(ip: str, port: int) -> None:
        found = SimpleNamespace(status=psutil.CONN_LISTEN, laddr=SimpleNamespace(ip=ip, port=port))
        monkeypatch.setattr(psutil, "net_connections", lambda kind: [found])

    return at


@pytest.fixture
def dashboard() -> Iterator[Callable[[int], int]]:
    """Starts something that answers every request with one status; returns its port."""
    servers: list[HTTPServer] = []

    def start(status: int) -> int:
        class Answer(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.send_response(status)
                self.end_headers()

            def log_message(self, *_: object) -> None: ...

        servers.append(HTTPServer(("127.0.0.1", 0), Answer))
        threading.Thread(target=servers[-1].serve_forever, daemon=True).start()
        return int(servers[-1].server_port)

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def of(what: str, findings: Iterable[Finding]) -> Finding:
    (found,) = [finding for finding in findings if finding.what == what]
    return found


def test_without_any_ray_all_is_well() -> None:
    assert [finding.level for finding in examine_ray(None)] == ["ok"]


@pytest.mark.parametrize("ip", ["0.0.0.0", "::", "10.0.0.7", "::ffff:10.0.0.7"])
@pytest.mark.parametrize("port", [8265, 10001, 6379])
def test_a_port_beyond_loopback_without_tokens_fails(listen: Callable[[str, int], None], ip: str, port: int) -> None:
    listen(ip, port)
    found = of("ray exposure", examine_ray(None))
    assert found.level == "fail"
    assert f"port {port} listens beyond loopback without tokens" in found.text
    assert "--dashboard-host=127.0.0.1 and RAY_AUTH_MODE=token" in found.text


@pytest.mark.parametrize("ip", ["127.0.0.1", "127.0.0.9", "::1", "::ffff:127.0.0.1"])
def test_a_port_on_loopback_is_fine(listen: Callable[[str, int], None], ip: str) -> None:
    listen(ip, 8265)
    assert of("ray exposure", examine_ray(None)).level == "ok"


def test_with_tokens_such_a_port_is_noted_and_fails_at_a_public_address(
    listen: Callable[[str, int], None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    listen("0.0.0.0", 6379)
    own(tmp_path / ".ray/auth_token", 0o600)  # where there is a token, Ray uses it by itself
    assert of("ray exposure", examine_ray(None)).level == "note"
    monkeypatch.setattr(psutil, "net_if_addrs", lambda: {"eth0": [SimpleNamespace(address="8.8.4.4")]})
    found = of("ray exposure", examine_ray(None))
    assert (found.level, "public address (8.8.4.4)" in found.text) == ("fail", True)
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    assert "without tokens" in of("ray exposure", examine_ray(None)).text


@pytest.mark.parametrize(("status", "level"), [(200, "note"), (401, "ok"), (403, "ok"), (404, "note")])
@pytest.mark.parametrize("form", ["http://127.0.0.1:{port}", "127.0.0.1:6379", "ray://localhost:10001", None])
def test_the_dashboard_is_asked_without_a_token(
    dashboard: Callable[[int], int], monkeypatch: pytest.MonkeyPatch, form: str | None, status: int, level: str
) -> None:
    monkeypatch.setattr(doctor, "DASHBOARD", port := dashboard(status))
    found = of("ray dashboard", examine_ray(form and form.format(port=port)))
    assert (found.level, str(port) in found.text) == (level, True)


def test_a_dashboard_elsewhere_that_answers_without_a_token_fails(
    dashboard: Callable[[int], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    port = dashboard(200)
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    resolve = socket.gethostbyname
    # To the doctor the host is another machine, to the connection it is this one.
    monkeypatch.setattr(socket, "gethostbyname", lambda host: "10.1.2.3" if host == "localhost" else resolve(host))
    found = of("ray dashboard", examine_ray(f"http://localhost:{port}"))
    assert (found.level, "whoever reaches it runs code there" in found.text) == ("fail", True)


def test_what_this_process_believes_does_not_count_against_an_open_dashboard(
    dashboard: Callable[[int], int], listen: Callable[[str, int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    port = dashboard(200)
    monkeypatch.setattr(doctor, "DASHBOARD", port)
    monkeypatch.setattr(doctor, "PORTS", {port: "dashboard and jobs"})
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    listen("0.0.0.0", port)
    assert "without tokens" in of("ray exposure", examine_ray(None)).text


@pytest.mark.parametrize(
    ("address", "level", "told"),
    [
        ("ray://8.8.8.8:10001", "fail", "public address"),
        ("8.8.8.8:6379", "fail", "public address"),
        ("10.255.255.1:6379", "fail", "joined without tokens"),
        ("127.0.0.1:6379", "ok", "loopback"),
        ("no.such.host.invalid:6379", "fail", "cannot be resolved"),
    ],
)
def test_an_address_to_join_must_be_private_and_ask_for_a_token(
    monkeypatch: pytest.MonkeyPatch, address: str, level: str, told: str
) -> None:
    monkeypatch.setattr(doctor, "_status", lambda url: None)
    found = of("ray address", examine_ray(address))
    assert (found.level, told in found.text) == (level, True), found.text


def own(path: Path, mode: int) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text("0" * 64)
    path.chmod(mode)
    return path


@pytest.mark.parametrize(("mode", "level"), [(0o600, "ok"), (0o644, "fail"), (0o640, "fail"), (0o604, "fail")])
def test_a_token_that_others_can_read_fails(monkeypatch: pytest.MonkeyPatch, mode: int, level: str) -> None:
    import tempfile

    with tempfile.TemporaryDirectory(dir="/tmp") as name:
        Path(name).chmod(0o755)
        path = own(Path(name) / "token", mode)
        monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(path))
        found = of("ray token", examine_ray(None))
        assert found.level == level
        assert (f"chmod 600 {path}" in found.text) == (level == "fail")
        Path(name).chmod(0o700)  # nobody gets to it
        assert of("ray token", examine_ray(None)).level == "ok"


def test_a_token_that_is_wanted_and_not_there_fails(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    assert of("ray token", examine_ray(None)).level == "fail"
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "none"))
    assert "no token there" in of("ray token", examine_ray(None)).text
    (tmp_path / "none").touch()
    assert of("ray token", examine_ray(None)).level == "fail"


def test_a_token_in_the_environment_is_noted_and_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", "deadbeef" * 8)
    found = of("ray token", examine_ray(None))
    assert (found.level, "deadbeef" in found.text) == ("note", False)


def test_a_misspelt_mode_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "tokens")
    found = of("ray token", examine_ray(None))
    assert (found.level, "none of token, disabled" in found.text) == ("fail", True)


@pytest.mark.parametrize(("version", "level"), [("2.53.9", "fail"), ("2.54.0", "ok"), ("2.60.0", "ok")])
def test_a_ray_with_open_delete_endpoints_fails(monkeypatch: pytest.MonkeyPatch, version: str, level: str) -> None:
    monkeypatch.setattr(doctor, "version", lambda name: version if name == "ray" else "99")
    assert of("ray", doctor._versions()).level == level
