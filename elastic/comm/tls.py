"""What TLS between the hosts of a job needs: certificates, and the contexts of both roles.

By default the certificate is the job's own (`job_certificate.py`): every host has the same, and accepts no other. Given certificates are
accepted if the given authority has signed them. Names in certificates are not compared with addresses, since the handshake by the job's
secret proves who is at the other end, and is bound to the certificates of both sides.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import socket
import ssl
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field

from elastic.comm.streams import TlsStream
from elastic.errors import SettingsError

_END = "-----END CERTIFICATE-----"


@dataclass(frozen=True, slots=True, kw_only=True)
class Credentials:
    """PEM texts: this side's certificate, with those between it and the authority's if there are any; its key; the authority's."""

    certificate: str
    key: str = field(repr=False)
    authority: str

    def to_json(self) -> dict[str, str]:
        return asdict(self)


class Tls:
    """The links of one process are encrypted with these credentials.

    Raises SettingsError if they are no certificate, its own key without a passphrase, and an authority's certificate.
    """

    def __init__(self, credentials: Credentials) -> None:
        self._dialer = _context(credentials, ssl.PROTOCOL_TLS_CLIENT)
        self._acceptor = _context(credentials, ssl.PROTOCOL_TLS_SERVER)
        self._own = ssl.PEM_cert_to_DER_cert(_first(credentials.certificate))

    @classmethod
    def of(cls, credentials: Mapping[str, str] | None) -> Tls | None:
        """Returns what `Credentials.to_json` describes; None for None."""
        return None if credentials is None else cls(Credentials(**credentials))

    def stream(self, sock: socket.socket, *, dials: bool) -> TlsStream:
        """Returns a stream over a connected socket, whose handshake has not begun."""
        return TlsStream(sock, self._dialer if dials else self._acceptor, server_side=not dials)

    def bound(self, secret: bytes, stream: TlsStream, *, dials: bool) -> bytes:
        """Returns the secret for a handshake inside this stream: it is the same at both ends only if nobody is in between.

        It depends on the certificates that each end has, and gets from the other one. Who stands in between has another certificate, since
        it has neither key.
        """
        mine, theirs = (hashlib.sha256(each).digest() for each in (self._own, stream.certificate()))
        both = mine + theirs if dials else theirs + mine
        return hmac.new(secret, b"inside TLS" + both, hashlib.sha256).digest()


def _context(credentials: Credentials, role: int) -> ssl.SSLContext:
    context = ssl.SSLContext(role)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname = False
    context.verify_mode = ssl.CERT_REQUIRED
    try:
        context.load_verify_locations(cadata=credentials.authority)
    except (ssl.SSLError, ValueError) as error:
        raise SettingsError("tls_ca= has no certificate in PEM form") from error
    _load(context, credentials)
    if role == ssl.PROTOCOL_TLS_SERVER:
        context.num_tickets = 0  # no link is resumed
    return context


def _load(context: ssl.SSLContext, credentials: Credentials) -> None:
    """Loads certificate and key, which `ssl` takes only from files: from one in memory that has no name."""
    descriptor = os.memfd_create("elastic-tls", os.MFD_CLOEXEC)
    try:
        os.write(descriptor, f"{credentials.certificate}\n{credentials.key}\n".encode())
        context.load_cert_chain(f"/proc/self/fd/{descriptor}", password="")
    except ssl.SSLError as error:
        why = "are not a certificate and its own key, without a passphrase, in PEM form"
        raise SettingsError(f"tls_cert= and tls_key= {why} ({error.reason})") from error
    finally:
        os.close(descriptor)


def _first(certificates: str) -> str:
    """Returns the first certificate of a PEM text."""
    begin = certificates.index("-----BEGIN CERTIFICATE-----")
    return certificates[begin : certificates.index(_END, begin) + len(_END)]
