"""Check of the Host header of a server without API keys: protection against DNS rebinding.

A web page can have its own name resolve to 127.0.0.1 or to an address of the local network, and then reads this server
as if it were its own origin. The browser still sends the page's name as the Host, so names that a page can have are
refused.

These are accepted:

- IP addresses, of any kind. Rebinding changes the address that a name resolves to; an address is not resolved. A
  browser sends an address as the Host only if it connects to that very address, so a page whose origin is an address
  was served from there. So monitoring can call a replica by its IP address, whichever of its networks it is in.
- "localhost", which browsers resolve to a loopback address.
- If the server listens on other addresses than loopback: names without a dot, as containers and machines of a local
  network have. Nobody can register one.
- The names in `serve.allowed_hosts`.
"""

import logging
import re
from collections.abc import Collection
from ipaddress import ip_address

from bdh.errors import BDHError
from bdh.serving.api.errors import ApiError

ANY = "*"
HOST = re.compile(r"(?P<name>\[[0-9a-f:.]+(%[0-9a-z._~-]+)?\]|[0-9a-z._-]+)(:[0-9]{1,5})?", re.IGNORECASE)
MAX_LOGGED_NAMES = 16  # of refused hosts, each once

log = logging.getLogger(__name__)


class HostCheck:
    """Refuses requests whose Host header is not a name of this server.

    Args:
        address: The address that the server listens on.
        names: Other names by which it may be called; "*" allows all.
    """

    def __init__(self, address: str, names: Collection[str]):
        self.accepts_plain_names = not is_loopback(address)
        self.names = {normalized(name) for name in names}
        self._logged: set[str] = set()

    def check(self, headers: Collection[tuple[bytes, bytes]]) -> None:
        """Raises ApiError 403 if a Host header has another name. A client that sends none is not a browser."""
        if ANY in self.names:
            return
        for name, value in headers:
            host = value.decode("latin-1").strip()
            if name == b"host" and not self.is_allowed(host):
                message = f"the Host {host[:100]!r} is not a name of this server, which has no API keys; {hint(host)}"
                self._log_once(host, message)
                raise ApiError(403, message, code="host_not_allowed", reason="host")

    def is_allowed(self, host: str) -> bool:
        """Whether a Host header, as "name" or "name:port", is one of this server."""
        if not host:
            return True
        match = HOST.fullmatch(host)
        if match is None:
            return False
        name = normalized(match["name"])
        if name == "localhost" or name in self.names:
            return True
        try:
            ip_address(name)
        except ValueError:
            return self.accepts_plain_names and "." not in name
        return True

    def _log_once(self, host: str, message: str) -> None:
        """Logs a refused name the first time: its client may not show the answer to anybody."""
        if host not in self._logged and len(self._logged) < MAX_LOGGED_NAMES:
            self._logged.add(host)
            log.warning("%s", message)


def hint(host: str) -> str:
    """The setting that makes the server accept a refused host."""
    match = HOST.fullmatch(host)
    name = "NAME" if match is None else match["name"]
    return (
        f"""call it by its IP address, set serve.allowed_hosts (BDH_SERVE__ALLOWED_HOSTS='["{name}"]'), """
        "or use keys (bdh keys add)"
    )


def normalized(name: str) -> str:
    return name.strip().strip("[]").removesuffix(".").lower()


def is_loopback(address: str) -> bool:
    """Whether only this machine can reach an address to listen on."""
    try:
        return ip_address(address).is_loopback
    except ValueError:
        return address == "localhost"


def check_names(names: Collection[str]) -> None:
    """Raises BDHError for a setting that is not the name of a host."""
    for name in names:
        if name != ANY and (HOST.fullmatch(name) is None or name.rpartition(":")[2].isdecimal()):
            raise BDHError(
                f"serve.allowed_hosts has {name!r}; give names without scheme, port or path, as bdh.example.org, or *"
            )
