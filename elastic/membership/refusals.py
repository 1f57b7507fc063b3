"""Classifies an error of etcd: an outage, which may pass; no space; a login that ran out; or a refusal, which a retry cannot change."""

from __future__ import annotations

import grpc

from elastic.errors import EtcdFull, EtcdRefused, EtcdUnavailable
from elastic.membership.endpoint import EtcdEndpoint

_LOGIN_RAN_OUT = ("invalid auth token", "auth token is not provided", "revision of auth store is old", "revision in header is old")
_WRONG_LOGIN = ("authentication failed", "user name is empty", "authentication is not enabled", "user name not found")
_NOT_CONNECTED = "failed to connect to all addresses"
_TOO_LARGE = ("request is too large", "larger than max", "too many operations")
_REFUSING = (
    grpc.StatusCode.UNAUTHENTICATED,
    grpc.StatusCode.PERMISSION_DENIED,
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.FAILED_PRECONDITION,
    grpc.StatusCode.UNIMPLEMENTED,
    grpc.StatusCode.ALREADY_EXISTS,
)


def login_ran_out(error: BaseException) -> bool:
    """Whether another login may help: the token is too old, etcd was restarted, or its users have changed."""
    return any(text in _text(error) for text in _LOGIN_RAN_OUT)


def may_answer_elsewhere(error: Exception) -> bool:
    """Whether another member of the same etcd may serve the call."""
    return isinstance(error, grpc.Call) and error.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)


def was_not_sent(error: Exception) -> bool:
    """Whether there was no connection, so that the call surely was not done."""
    return _NOT_CONNECTED in _text(error)


def meaning(endpoint: EtcdEndpoint, error: Exception, *, known: bool = False) -> EtcdUnavailable:
    """Returns the error to raise for an error of gRPC, or for a ValueError with etcd's reason for ending a watch.

    `known`: etcd has served this client before. Then a login or certificate that it refuses is an outage: it may become right again.
    """
    code = error.code() if isinstance(error, grpc.Call) else None
    text = _text(error)
    if "database space exceeded" in text:
        advice = "compact and defragment it, or raise its quota, and then disarm its alarm (etcdctl alarm disarm)"
        return EtcdFull(f"{endpoint.title} has no space left ({text})" + ("" if endpoint.private else f": {advice}"))
    if any(known in text for known in _TOO_LARGE):
        return EtcdRefused(f"{endpoint.title} refused a request as too large ({text}): raise its --max-request-bytes and --max-txn-ops")
    if code is grpc.StatusCode.PERMISSION_DENIED or "permission denied" in text:
        return EtcdRefused(f"{endpoint.title} refused ({text}): its user needs the right to read and write under /elastic/")
    if code is grpc.StatusCode.UNAUTHENTICATED or any(known in text for known in _WRONG_LOGIN):
        return _login_refused(endpoint, text, known=known)
    if code is grpc.StatusCode.UNIMPLEMENTED:
        return EtcdRefused(f"{endpoint.title} does not answer as etcd version 3 does ({text}): check that this is its client port")
    if code in _REFUSING:
        return EtcdRefused(f"{endpoint.title} refused ({text})")
    if code is grpc.StatusCode.NOT_FOUND:
        return EtcdUnavailable(f"{endpoint.title} no longer has this agent's lease ({text})")
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        text = "no answer in time"
    if (advice := _tls_advice(text)) is not None:
        return (EtcdUnavailable if known else EtcdRefused)(f"{endpoint.title} cannot be reached by TLS ({_short(text)}): {advice}")
    advice = "" if endpoint.private else ": check that it runs, and that this is its client port"
    if not endpoint.private and endpoint.path is None and ("closed" in text or "andshake" in text):
        advice += ", which " + ("does not require TLS (etcd_ca=)" if endpoint.ca is None else "serves TLS, as etcd_ca= asks for")
    return EtcdUnavailable(f"{endpoint.title} cannot be reached ({text}){advice}")


def _login_refused(endpoint: EtcdEndpoint, text: str, *, known: bool) -> EtcdUnavailable:
    where = "in etcd='user:password@host:port'" if endpoint.password_file is None else f"in {endpoint.password_file}"
    if not known or endpoint.user is None:
        return EtcdRefused(f"{endpoint.title} refused ({text}): check user and password {where}")
    mend = "set the old one again" if endpoint.password_file is None else f"write the new one into {endpoint.password_file}"
    return EtcdUnavailable(f"{endpoint.title} refused ({text}): its password has changed since this job began; {mend}")


def _text(error: BaseException) -> str:
    return str(error.details()) if isinstance(error, grpc.Call) else str(error)


def _tls_advice(text: str) -> str | None:
    """Returns what to do about a failed handshake that a retry cannot mend, None for other errors."""
    if "not in peer certificate" in text or "Hostname Verification" in text:
        return "its certificate does not name this address: give etcd= with a name that it has"
    if "CERTIFICATE_VERIFY_FAILED" in text:
        return "its certificate is not signed by etcd_ca=, or not valid now"
    if "_ALERT_" in text and ("CERTIFICATE" in text or "UNKNOWN_CA" in text):
        return "it wants a certificate of this client, by etcd_cert= and etcd_key=, that it trusts"
    return None


def _short(text: str) -> str:
    """Returns what OpenSSL or gRPC say of a handshake, without the addresses."""
    return text.rpartition("OPENSSL_internal:")[2].removesuffix(": OK") if "OPENSSL_internal:" in text else text.rpartition(" UNKNOWN: ")[2]
