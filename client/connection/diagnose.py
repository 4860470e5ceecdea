"""Explains, in one sentence each, why a coordinator cannot be reached: name, proxy, connection, certificate, clock.

A certificate that does not verify is read only to say who issued it; nothing is sent over such a connection.

One failure is final: a certificate of another authority or for another name. Everything else may pass by itself or be
mended elsewhere while a site waits: a damaged record, a proxy without a coordinator behind it, an expired certificate
that is renewed, a clock that is set.
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
AUTHORITY_WARN_DAYS = 90
_EXPIRED, _NOT_YET, _WRONG_NAME, _WRONG_ADDRESS = 10, 9, 62, 64


@dataclass(frozen=True)
class PresentedCertificate:
    """A server's certificate, which is not trusted.

    Attributes:
        issuer: name of the authority that it claims.
        names: host names and addresses that it is for.
        not_before: start of its validity, UTC.
        not_after: end of its validity, UTC.
    """

    issuer: str
    names: tuple[str, ...]
    not_before: datetime.datetime
    not_after: datetime.datetime


@dataclass(frozen=True)
class Diagnosis:
    """The reason why a coordinator does not answer.

    Attributes:
        sentence: the reason, and what to do, for a person.
        is_final: no further try helps.
        is_tls: the connection was made and the TLS handshake on it failed.
    """

    sentence: str
    is_final: bool = False
    is_tls: bool = False


def find_proxy(coordinator: Coordinator) -> str | None:
    """Returns the proxy that HTTPS_PROXY names for the coordinator; None where NO_PROXY covers it, or for loopback."""
    if is_loopback(coordinator.address.host) or urllib.request.proxy_bypass(str(coordinator.address)):
        return None
    proxies = urllib.request.getproxies()
    proxy = proxies.get("https") or proxies.get("all")
    return None if not proxy else proxy if "://" in proxy else f"http://{proxy}"


def open_tls(coordinator: Coordinator, context: ssl.SSLContext, timeout_s: float = 10.0) -> http.client.HTTPSConnection:
    """Returns a connection after its TLS handshake, through the proxy where there is one.

    Args:
        coordinator: the coordinator to connect to.
        context: which authorities are trusted.
        timeout_s: longest wait for each step, in seconds.

    Raises:
        OSError: the connection or the handshake fails.
    """
    host, port = coordinator.address.host, coordinator.address.port
    proxy = find_proxy(coordinator)
    if proxy is None:
        connection = http.client.HTTPSConnection(host, port, context=context, timeout=timeout_s)
    else:
        via = urllib.parse.urlsplit(proxy)
        connection = http.client.HTTPSConnection(via.hostname or "", via.port or 80, context=context, timeout=timeout_s)
        connection.set_tunnel(host, port, headers=_build_proxy_headers(via))
    try:
        connection.connect()
    except BaseException:
        connection.close()
        raise
    return connection


def create_trusting_context(ca: Path) -> ssl.SSLContext:
    """Returns a TLS context that trusts the authorities in one file alone.

    Raises:
        BadInput: the file holds no certificate.
    """
    try:
        return ssl.create_default_context(cafile=str(ca))
    except (OSError, ssl.SSLError) as error:
        raise BadInput(f"coordinator.ca: expected a PEM certificate in {ca}{instead(error)}") from error


def read_authorities(ca: Path) -> list[x509.Certificate]:
    """Returns the authorities in a PEM file that a site trusts, at least one.

    Raises:
        OSError: the file cannot be read.
        ValueError: it holds no certificate.
    """
    try:
        return x509.load_pem_x509_certificates(ca.read_bytes())
    except x509.InvalidVersion as error:
        raise ValueError("expected a certificate of a known version") from error


def read_presented_certificate(coordinator: Coordinator) -> PresentedCertificate:
    """Returns the certificate that the coordinator's address presents, whoever issued it.

    Raises:
        OSError: the connection fails.
        ValueError: the certificate cannot be parsed.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    connection = open_tls(coordinator, context)
    try:
        raw = connection.sock.getpeercert(binary_form=True)
    finally:
        connection.close()
    try:
        certificate = x509.load_der_x509_certificate(raw or b"")
    except x509.InvalidVersion as error:
        raise ValueError("expected a certificate of a known version") from error
    return PresentedCertificate(
        issuer=certificate.issuer.rfc4514_string(),
        names=_read_names(certificate),
        not_before=certificate.not_valid_before_utc,
        not_after=certificate.not_valid_after_utc,
    )


def is_tls_error(error: BaseException | None) -> bool:
    """Returns whether a TLS failure is the error or any of its causes."""
    while error is not None:
        if isinstance(error, ssl.SSLError):
            return True
        error = error.__cause__ or error.__context__
    return False


def diagnose_connection(coordinator: Coordinator) -> Diagnosis | None:
    """Returns why a connection to a coordinator fails, found by a fresh TLS handshake; None where that succeeds."""
    try:
        open_tls(coordinator, create_trusting_context(coordinator.ca)).close()
    except BadInput as error:
        return Diagnosis(str(error), is_tls=True)
    except ssl.SSLCertVerificationError as error:
        return _diagnose_certificate(coordinator, error)
    except ssl.SSLError as error:
        return Diagnosis(_explain_handshake_failure(coordinator, error), is_tls=True)
    except (OSError, http.client.HTTPException) as error:
        return Diagnosis(explain_connection_failure(coordinator, error))
    return None


def _explain_handshake_failure(coordinator: Coordinator, error: ssl.SSLError) -> str:
    if error.reason in ("WRONG_VERSION_NUMBER", "HTTP_REQUEST", "RECORD_LAYER_FAILURE"):
        return (
            f"{coordinator.address} answers without TLS: a proxy on the way has no coordinator behind it, or the port "
            "is wrong; this site joins over TLS only"
        )
    return (
        f"{coordinator.address}: the TLS handshake breaks off ({error.reason or type(error).__name__}): the line "
        "damages what is sent, or what answers is no coordinator"
    )


def explain_clock_skew(skew_s: float | None) -> str | None:
    """Returns what is wrong with this machine's clock.

    Args:
        skew_s: seconds by which it is ahead of the coordinator's clock; None where that is not known.

    Returns:
        A sentence with the remedy; None where nothing is known to be wrong.
    """
    if skew_s is None or -MAX_BEHIND_S < skew_s < MAX_AHEAD_S:
        return None
    side = "ahead of" if skew_s > 0 else "behind"
    return (
        f"this machine's clock is {abs(skew_s):.0f} s {side} the coordinator's, and signatures carry the time: "
        "set the clock (timedatectl set-ntp true)"
    )


def _diagnose_certificate(coordinator: Coordinator, error: ssl.SSLCertVerificationError) -> Diagnosis:
    try:
        shown = read_presented_certificate(coordinator)
        authorities = read_authorities(coordinator.ca)
    except (OSError, ValueError) as other:
        sentence = f"{coordinator.address}: the certificate does not verify and cannot be read ({type(other).__name__})"
        return Diagnosis(sentence, is_tls=True)
    passing = error.verify_code in (_EXPIRED, _NOT_YET)
    return Diagnosis(_explain_certificate(coordinator, error.verify_code, shown, authorities), not passing, is_tls=True)


def _explain_certificate(
    coordinator: Coordinator, code: int, shown: PresentedCertificate, authorities: list[x509.Certificate]
) -> str:
    clock = f"this machine's clock says {utc_now():%Y-%m-%d %H:%M}"
    if code == _EXPIRED and shown.not_after > utc_now():
        newest = max(authority.not_valid_after_utc for authority in authorities)
        return (
            f"the federation's authority in {coordinator.ca} expired on {newest:%Y-%m-%d %H:%M} UTC ({clock}): "
            "ask the coordinator's staff for a new kit"
        )
    if code == _EXPIRED:
        return (
            f"the coordinator's certificate expired on {shown.not_after:%Y-%m-%d %H:%M} UTC ({clock}): "
            "its staff renew it with `headwater coordinator renew`"
        )
    if code == _NOT_YET:
        return (
            f"the coordinator's certificate is valid from {shown.not_before:%Y-%m-%d %H:%M} UTC and {clock}: "
            "set the clock (timedatectl set-ntp true)"
        )
    if code in (_WRONG_NAME, _WRONG_ADDRESS):
        return (
            f"the certificate is for {', '.join(shown.names) or 'no name'}, not for {coordinator.address.host}: "
            "correct coordinator.address, or ask for a certificate with this name (`headwater coordinator renew`)"
        )
    expected = [authority.subject.rfc4514_string() for authority in authorities]
    if shown.issuer in expected:
        return (
            f"the certificate names the federation's authority ({shown.issuer}) but is not signed by the one in "
            f"{coordinator.ca}: the kit is from another federation or out of date, ask for a new one"
        )
    return (
        f"the certificate of {coordinator.address} was issued by {shown.issuer}, not by the federation's authority "
        f"({' or '.join(dict.fromkeys(expected))}): a proxy on the way intercepts TLS (have {coordinator.address} "
        "exempted from inspection), or coordinator.ca is another federation's"
    )


def explain_connection_failure(coordinator: Coordinator, error: Exception) -> str:
    """Returns why a connection to a coordinator fails, with what to check."""
    proxy = find_proxy(coordinator)
    way = f" through the proxy {_strip_password(proxy)}" if proxy else ""
    if isinstance(error, socket.gaierror):
        what = _strip_password(proxy) if proxy else coordinator.address.host
        return f"the name {what} cannot be resolved: check coordinator.address, HTTPS_PROXY and the name server"
    if isinstance(error, TimeoutError):
        return f"no answer from {coordinator.address}{way}: have outward connections to this port allowed"
    if isinstance(error, ConnectionRefusedError):
        return f"{coordinator.address} refuses connections{way}: is the coordinator running, is the port right?"
    return f"{coordinator.address} cannot be reached{way}: {error}; HTTPS_PROXY and NO_PROXY name the way out"


def _read_names(certificate: x509.Certificate) -> tuple[str, ...]:
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return ()
    return tuple(str(name.value) for name in names)


def _build_proxy_headers(via: urllib.parse.SplitResult) -> dict[str, str]:
    if via.username is None:
        return {}
    user = f"{urllib.parse.unquote(via.username)}:{urllib.parse.unquote(via.password or '')}"
    return {"Proxy-Authorization": f"Basic {base64.b64encode(user.encode()).decode()}"}


def _strip_password(proxy: str | None) -> str:
    via = urllib.parse.urlsplit(proxy or "")
    return f"{via.hostname}:{via.port or 80}"


def utc_now() -> datetime.datetime:
    """Returns the time of this machine's clock, UTC."""
    return datetime.datetime.now(datetime.UTC)
