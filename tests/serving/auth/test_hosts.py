"""A server without keys answers to its own names only, whatever a web page's name resolves to (DNS rebinding)."""

from pathlib import Path

import httpx
import pytest

from bdh.errors import BDHError
from bdh.serving.api.errors import ApiError
from bdh.serving.auth.host_check import HostCheck
from bdh.serving.config import ModelSettings, ServeConfig, validate
from tests.serving.guarded import Guarded
from tests.serving.running import Running, running

ADDRESSES = [
    *("127.0.0.1", "127.0.0.1:8000", "192.168.0.7:8000", "203.0.113.9", "[::1]:8000", "[fd00::7]"),
    *("[fe80::1%25eth0]:8000", "[fe80::1%eth0]", "[::ffff:10.0.0.1]"),
]
EVIL = ["evil.example", "evil.example:80", "127.0.0.1.nip.io", "localhost.evil.example", "127.0.0.1@evil", "x", "a b"]


@pytest.mark.parametrize("host", [*EVIL, "host.docker.internal:8000", "127.0.0.1:8000, evil.example", "é", "127.1"])
@pytest.mark.parametrize("path", ["/v1/sessions", "/", "/metrics", "/openapi.json", "/v1/models", "/nowhere"])
def test_a_local_server_is_called_by_a_local_name(server: Running, host: str, path: str) -> None:
    refused = httpx.get(server.url + path, headers={b"Host": host.encode()})
    assert refused.status_code == 403 and refused.json()["error"]["code"] == "host_not_allowed"
    message = refused.json()["error"]["message"]
    assert "set serve.allowed_hosts (BDH_SERVE__ALLOWED_HOSTS=" in message and "bdh keys add" in message


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:1", "localhost.", *ADDRESSES])
def test_its_own_names_are_answered(server: Running, host: str) -> None:
    for path in ("/v1/sessions", "/", "/metrics"):
        assert httpx.get(server.url + path, headers={"Host": host}).status_code == 200


@pytest.mark.parametrize("host", EVIL)
def test_probes_and_callers_with_keys_may_use_any_name(server: Running, guarded: Guarded, host: str) -> None:
    assert httpx.get(f"{server.url}/health/live", headers={"Host": host}).status_code == 200
    named = httpx.get(f"{guarded.url}/v1/models", headers={**guarded.headers(), "Host": host})
    assert named.status_code == 200


def test_a_refused_name_is_logged_once_with_the_setting(caplog: pytest.LogCaptureFixture) -> None:
    check = HostCheck("0.0.0.0", [])
    for number in range(100):
        for host in (b"bdh.default.svc.cluster.local:8000", b"name-%d.example" % number):
            with pytest.raises(ApiError) as refused:
                check.check([(b"host", host)])
            assert refused.value.status == 403
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == len(set(lines)) == 16 and all("\n" not in line for line in lines)
    assert "BDH_SERVE__ALLOWED_HOSTS='[\"bdh.default.svc.cluster.local\"]'" in lines[0]


def test_names_can_be_added() -> None:
    check = HostCheck("127.0.0.1", ["BDH.example.org", "internal"])
    for host in ("bdh.example.org", "bdh.example.org:443", "internal:80", "localhost"):
        assert check.is_allowed(host)
    assert not check.is_allowed("example.org") and not check.is_allowed("www.bdh.example.org")
    HostCheck("127.0.0.1", ["*"]).check([(b"host", b"evil.example")])


def test_one_that_is_open_to_a_network_is_called_by_addresses_and_plain_names() -> None:
    check = HostCheck("0.0.0.0", [])
    for host in (*ADDRESSES, "bdh:8000", "localhost"):
        assert check.is_allowed(host)
    for host in ("evil.example", "127.0.0.1.nip.io", "evil.example.:80"):
        assert not check.is_allowed(host)


@pytest.mark.parametrize("name", ["https://a.example", "a.example:80", "a/b", "", "a b"])
def test_what_is_no_name_is_refused(name: str) -> None:
    config = ServeConfig(models=[ModelSettings("x")], allowed_hosts=[name])
    with pytest.raises(BDHError, match="allowed_hosts has"):
        validate(config)


def test_a_proxy_that_passes_on_the_host(export: Path, tmp_path: Path) -> None:
    flags = ("--model", f"tiny={export}", "--serve.allowed_hosts", '["bdh.example.org"]')
    with running(tmp_path, *flags, ready=False) as it:
        assert httpx.get(f"{it.url}/openapi.json", headers={"Host": "bdh.example.org"}).status_code == 200
        assert httpx.get(f"{it.url}/openapi.json", headers={"Host": "evil.example"}).status_code == 403
        it.process.kill()
