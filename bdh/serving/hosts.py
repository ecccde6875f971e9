"""Which names a server without API keys answers to: protection against DNS rebinding.

A web page can have its own name resolve to 127.0.0.1, and then reads this server as if it were its own origin. The
browser still sends the page's name as the Host. An address as the Host, and a name without a dot, are no name that
somebody else can register.
"""

import re
from collections.abc import Collection
from ipaddress import ip_address

from bdh.errors import BDHError
from bdh.serving.errors import ApiError

ANY = "*"
HOST = re.compile(r"(?P<name>\[[0-9a-f:.]+\]|[0-9a-z._-]+)(:[0-9]{1,5})?", re.IGNORECASE)


class HostCheck:
    """Refuses requests whose Host header is not a name of this server.

    Args:
        address: That the server listens on.
        names: Other names by which it may be called; "*" allows all.
    """

    def __init__(self, address: str, names: Collection[str]):
        self.is_local = is_local(address)
        self.names = {normalized(name) for name in names}

    def check(self, headers: Collection[tuple[bytes, bytes]]) -> None:
        """Raises ApiError 403 if a Host header has another name. A client that sends none is no browser."""
        if ANY in self.names:
            return
        for name, value in headers:
            if name == b"host" and not self.is_allowed(value.decode("latin-1").strip()):
                raise ApiError(
                    403,
                    f"the Host {value.decode('latin-1')[:100]!r} is not a name of this server, which has no API keys; "
                    "call it by its address, name it in serve.allowed_hosts, or use keys (bdh keys add)",
                    code="host_not_allowed",
                    reason="host",
                )

    def is_allowed(self, host: str) -> bool:
        """Whether a Host header, as "name" or "name:port", is one of this server."""
        if not host:
            return True
        found = HOST.fullmatch(host)
        if found is None:
            return False
        name = normalized(found["name"])
        if name == "localhost" or name in self.names:
            return True
        try:
            address = ip_address(name)
        except ValueError:
            return not self.is_local and "." not in name
        return address.is_loopback or not self.is_local


def normalized(name: str) -> str:
    return name.strip().strip("[]").removesuffix(".").lower()


def is_local(address: str) -> bool:
    """Whether only this machine reaches an address."""
    try:
        return ip_address(address).is_loopback
    except ValueError:
        return address == "localhost"


def check_names(names: Collection[str]) -> None:
    """Raises BDHError for a setting that is no name of a host."""
    for name in names:
        if name != ANY and (HOST.fullmatch(name) is None or name.rpartition(":")[2].isdecimal()):
            raise BDHError(
                f"serve.allowed_hosts has {name!r}; give names without scheme, port or path, as bdh.example.org, or *"
            )
