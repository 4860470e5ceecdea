"""One parser of host and port for both sides."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from common.process.address import Address, AddressText, BindAddressText, is_loopback

HOSTS = st.one_of(
    st.ip_addresses().map(str), st.from_regex(r"[a-z0-9]([a-z0-9-]{0,8}[a-z0-9])?(\.[a-z]{1,5}){0,3}", fullmatch=True)
)


@given(host=HOSTS, port=st.integers(1, 65535))
def test_the_text_of_an_address_is_parsed_to_the_same_address(host: str, port: int) -> None:
    address = Address(host, port)
    assert Address.parse(str(address)) == address


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a",
        "a:",
        ":1",
        "a:0",
        "a:65536",
        "a:1٣",
        "a:" + "9" * 5000,
        "fd00::1:9092",
        "[a]:1",
        "[fd00::1]",
        "[]:1",
        "https://a:1",
        "a b:1",
        "a..b:1",
        "ä:1",
        "[[::1]]:1",
    ],
)
def test_what_is_no_address_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="expected"):
        Address.parse(text)


def test_a_settings_file_holds_an_address_as_text() -> None:
    settings = TypeAdapter(dict[str, AddressText])
    read = settings.validate_python({"address": "[fd00::1]:9092"})
    assert read == {"address": Address("fd00::1", 9092)}
    assert settings.dump_python(read, mode="json") == {"address": "[fd00::1]:9092"}
    assert TypeAdapter(AddressText).json_schema() == {"type": "string"}
    with pytest.raises(ValidationError):
        settings.validate_python({"address": 9092})


def test_an_address_to_listen_on_is_an_ip_address() -> None:
    with pytest.raises(ValidationError, match="IP:PORT"):
        TypeAdapter(BindAddressText).validate_python("example.org:1")


def test_loopback_is_told_by_name_or_number() -> None:
    assert [is_loopback(host) for host in ("localhost", "127.8.0.1", "::1", "10.0.0.1", "example.org")] == [
        *(True, True, True),
        *(False, False),
    ]
