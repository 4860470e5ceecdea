"""Host and port, read and written in one place for both sides.

An address has no scheme: a site speaks nothing but TLS. An IPv6 address stands in brackets before its port.
"""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from typing import Annotated

from pydantic import AfterValidator, BeforeValidator, Field, PlainSerializer, WithJsonSchema

Port = Annotated[int, Field(ge=1, le=65535)]


@dataclass(frozen=True)
class Address:
    """A host and a port; `str` gives the text that `parse` reads.

    Attributes:
        host: DNS name or IP address; an IPv6 address without its brackets.
        port: 1 to 65535.
    """

    host: str
    port: int

    @classmethod
    def parse(cls, text: str) -> Address:
        """Returns the address that a text of the form `host:port` or `[ipv6]:port` names.

        Raises:
            ValueError: it has another form, or the host can be no DNS name and no IP address.
        """
        host, separator, port = text.rpartition(":")
        bracketed = host.startswith("[") and host.endswith("]")
        host = host[1:-1] if bracketed else host
        is_port = port.isascii() and port.isdecimal() and len(port) <= 5 and 0 < int(port) < 65536
        if not separator or not host or not is_port or (":" in host) != bracketed:
            raise ValueError(
                "expected HOST:PORT, such as federation.example.org:9092, without http:// or https:// (it is always "
                f"TLS), got {text!r}"
            )
        return cls(check_host(host), int(port))

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def check_host(host: str) -> str:
    """Returns the host where it is a DNS name or an IP address, and so can stand in a certificate.

    Raises:
        ValueError: it is neither.
    """
    labels = host.rstrip(".").split(".")
    plain = all(label and len(label) <= 63 and label.replace("-", "").isalnum() and label.isascii() for label in labels)
    if not plain and not is_ip(host):
        raise ValueError(f"expected a DNS name or an IP address, got {host!r}")
    return host


def is_ip(host: str) -> bool:
    """Returns whether a host is an IP address rather than a name."""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def is_loopback(host: str) -> bool:
    """Returns whether a host is this machine, as far as its name says."""
    return ipaddress.ip_address(host).is_loopback if is_ip(host) else host == "localhost"


def _parse_value(value: object) -> object:
    return Address.parse(value) if isinstance(value, str) else value


def _check_bindable(address: Address) -> Address:
    if not is_ip(address.host):
        raise ValueError(f"expected IP:PORT of this machine, such as 0.0.0.0:9092, got {str(address)!r}")
    return address


AddressText = Annotated[
    Address, BeforeValidator(_parse_value), PlainSerializer(str, return_type=str), WithJsonSchema({"type": "string"})
]
"""An address in a settings file, where it is a text."""

BindAddressText = Annotated[AddressText, AfterValidator(_check_bindable)]
"""The same, of this machine: the host is an IP address."""

HostText = Annotated[str, AfterValidator(check_host)]
"""A DNS name or an IP address in a settings file."""
