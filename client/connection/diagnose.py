"""Why a coordinator can or cannot be reached: name, proxy, connection, certificate, clock, each in one sentence.

Certificates are read without trust only to say who issued them; nothing is ever sent over such a connection.
"""

from __future__ import annotations

import base64
import datetime
import http.client
import socket
import ssl
import urllib.parse
import urllib.request
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509

from client.config import Coordinator
from common.errors import instead
from common.process.address import is_loopback
from common.types import BadInput

MAX_AHEAD_S, MAX_BEHIND_S = 4.0, 300.0
"""Flower refuses a signature from 5 seconds ahead or 305 behind; a Date header is good to a second."""
WARN_DAYS = 14
_EXPIRED, _NOT_YET, _WRONG_NAME, _WRONG_ADDRESS = 10, 9, 62, 64


@dataclass(frozen=True)
class Presented:
    """What a server showed of itself, not trusted."""

    issuer: str
    names: tuple[str, ...]
    not_before: datetime.datetime
    not_after: datetime.datetime


def proxy_for(coordinator: Coordinator) -> str | None:
    """The proxy that HTTPS_PROXY names for this address, unless NO_PROXY covers it; loopback needs none."""
    if is_loopback(coordinator.address.host) or urllib.request.proxy_bypass(str(coordinator.address)):
        return None
    proxies = urllib.request.getproxies()
    proxy = proxies.get("https") or proxies.get("all")
    return None if not proxy else proxy if "://" in proxy else f"http://{proxy}"


def open_tls(coordinator: Coordinator, context: ssl.SSLContext, timeout_s: float = 10.0) -> http.client.HTTPSConnection:
    """A connection whose TLS handshake is done, through the proxy where there is one. Raises OSError."""
    host, port = coordinator.address.host, coordinator.address.port
    proxy = proxy_for(coordinator)
    if proxy is None:
        connection = http.client.HTTPSConnection(host, port, context=context, timeout=timeout_s)
    else:
        via = urllib.parse.urlsplit(proxy)
        connection = http.client.HTTPSConnection(via.hostname or "", via.port or 80, context=context, timeout=timeout_s)
        connection.set_tunnel(host, port, headers=_proxy_headers(via))
    try:
        connection.connect()
    except BaseException:
        connection.close()
        raise
    return connection


def trusting(ca: Path) -> ssl.SSLContext:
    """A context that trusts this authority alone. Raises BadInput where the file holds no certificate."""
    try:
        return ssl.create_default_context(cafile=str(ca))
    except (OSError, ssl.SSLError) as error:
        raise BadInput(f"coordinator.ca: expected a PEM certificate in {ca}{instead(error)}") from error


def presented(coordinator: Coordinator) -> Presented:
    """The certificate a server shows, whoever issued it. Raises OSError."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    connection = open_tls(coordinator, context)
    try:
        raw = connection.sock.getpeercert(binary_form=True)
    finally:
        connection.close()
    certificate = x509.load_der_x509_certificate(raw or b"")
    return Presented(
        issuer=certificate.issuer.rfc4514_string(),
        names=_names(certificate),
        not_before=certificate.not_valid_before_utc,
        not_after=certificate.not_valid_after_utc,
    )


def is_tls_error(error: BaseException | None) -> bool:
    """Whether a TLS failure stands anywhere behind an error."""
    while error is not None:
        if isinstance(error, ssl.SSLError):
            return True
        error = error.__cause__ or error.__context__
    return False


def tls_sentence(coordinator: Coordinator) -> str:
    """Why the TLS handshake with a coordinator fails, found by trying again."""
    try:
        open_tls(coordinator, trusting(coordinator.ca)).close()
    except ssl.SSLCertVerificationError as error:
        return _certificate_sentence(coordinator, error)
    except ssl.SSLError as error:
        if error.reason in ("WRONG_VERSION_NUMBER", "HTTP_REQUEST", "RECORD_LAYER_FAILURE"):
            return (
                f"{coordinator.address} answers without TLS; this site joins over TLS only: "
                "check the port, or ask the coordinator's staff to start with certificates"
            )
        return f"{coordinator.address}: the TLS handshake fails ({error.reason}); ask the coordinator's staff"
    except OSError as error:
        return f"{coordinator.address}: the TLS connection breaks off ({type(error).__name__}); try again"
    return f"{coordinator.address}: the TLS handshake failed once and now succeeds; try again"


def skew_sentence(skew_s: float | None) -> str | None:
    """What is wrong with this machine's clock, seen from the coordinator's; None where nothing is known to be."""
    if skew_s is None or -MAX_BEHIND_S < skew_s < MAX_AHEAD_S:
        return None
    side = "ahead of" if skew_s > 0 else "behind"
    return (
        f"this machine's clock is {abs(skew_s):.0f} s {side} the coordinator's, and signatures carry the time: "
        "set the clock (timedatectl set-ntp true)"
    )


def _certificate_sentence(coordinator: Coordinator, error: ssl.SSLCertVerificationError) -> str:
    try:
        shown = presented(coordinator)
    except (OSError, ValueError) as other:
        return f"{coordinator.address}: the certificate does not verify and cannot be read ({type(other).__name__})"
    if error.verify_code == _EXPIRED:
        return (
            f"the coordinator's certificate expired on {shown.not_after:%Y-%m-%d %H:%M} UTC (this machine's clock says "
            f"{utc_now():%Y-%m-%d %H:%M}): its staff renew it with `python -m server renew`"
        )
    if error.verify_code == _NOT_YET:
        return (
            f"the coordinator's certificate is valid from {shown.not_before:%Y-%m-%d %H:%M} UTC and this machine's "
            f"clock says {utc_now():%Y-%m-%d %H:%M}: set the clock (timedatectl set-ntp true)"
        )
    if error.verify_code in (_WRONG_NAME, _WRONG_ADDRESS):
        return (
            f"the certificate is for {', '.join(shown.names) or 'no name'}, not for {coordinator.address.host}: "
            "correct coordinator.address, or ask for a certificate with this name (`python -m server renew`)"
        )
    expected = x509.load_pem_x509_certificate(coordinator.ca.read_bytes()).subject.rfc4514_string()
    if shown.issuer == expected:
        return (
            f"the certificate names the federation's authority ({expected}) but is not signed by the one in "
            f"{coordinator.ca}: the kit is from another federation or out of date, ask for a new one"
        )
    return (
        f"the certificate of {coordinator.address} was issued by {shown.issuer}, not by the federation's authority "
        f"({expected}): a proxy on the way intercepts TLS (have {coordinator.address} exempted from inspection), or "
        "coordinator.ca is another federation's"
    )


def connect_sentence(coordinator: Coordinator, error: OSError) -> str:
    """Why no connection comes about."""
    proxy = proxy_for(coordinator)
    way = f" through the proxy {_without_password(proxy)}" if proxy else ""
    if isinstance(error, socket.gaierror):
        what = _without_password(proxy) if proxy else coordinator.address.host
        return f"the name {what} cannot be resolved: check coordinator.address, HTTPS_PROXY and the name server"
    if isinstance(error, TimeoutError):
        return f"no answer from {coordinator.address}{way}: have outward connections to this port allowed"
    if isinstance(error, ConnectionRefusedError):
        return f"{coordinator.address} refuses connections{way}: is the coordinator running, is the port right?"
    return f"{coordinator.address} cannot be reached{way}: {error}; HTTPS_PROXY and NO_PROXY name the way out"


def _names(certificate: x509.Certificate) -> tuple[str, ...]:
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return ()
    return tuple(str(name.value) for name in names)


def _proxy_headers(via: urllib.parse.SplitResult) -> dict[str, str]:
    if via.username is None:
        return {}
    user = f"{urllib.parse.unquote(via.username)}:{urllib.parse.unquote(via.password or '')}"
    return {"Proxy-Authorization": f"Basic {base64.b64encode(user.encode()).decode()}"}


def _without_password(proxy: str | None) -> str:
    via = urllib.parse.urlsplit(proxy or "")
    return f"{via.hostname}:{via.port or 80}"


def utc_now() -> datetime.datetime:
    """What this machine's clock says."""
    return datetime.datetime.now(datetime.UTC)
