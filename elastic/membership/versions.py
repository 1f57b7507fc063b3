"""Warns of an etcd that others than the hosts of its jobs may write to: without a login, or of a version with known holes in logins."""

from __future__ import annotations

import re

from elastic.membership.endpoint import EtcdEndpoint

_HOLES = "CVE-2026-33413, CVE-2026-59818"
_MENDED = {(3, 5): 32, (3, 6): 13}  # the first patch release without them


def unprotected(endpoint: EtcdEndpoint) -> str | None:
    """Returns a warning if this etcd is used without login or client certificate, and others may reach it; else None."""
    if endpoint.path is not None or endpoint.user is not None or endpoint.cert is not None:
        return None
    return (
        f"warning: {endpoint.title} is used without a login: anybody who reaches its port can stop this job or take its name, but not join "
        "it or read its state. Give etcd a password (etcd='user@host:port', etcd_password_file=), or let it ask for client certificates "
        "(etcd_cert=)"
    )


def warning(endpoint: EtcdEndpoint, version: str | None) -> str | None:
    """Returns a warning if other hosts or users may reach this etcd and its version has holes; None if it has none, or is not known."""
    found = re.match(r"(\d+)\.(\d+)\.(\d+)", version or "")
    if found is None or endpoint.path is not None:
        return None
    major, minor, patch = map(int, found.groups())
    mended = _MENDED.get((major, minor))
    if (major, minor) > max(_MENDED) or (mended is not None and patch >= mended):
        return None
    return (
        f"warning: {endpoint.title} has version {version}, in which anybody who reaches its port may get around its passwords ({_HOLES}) "
        "and stop this job or take its name: upgrade it to 3.5.32 or 3.6.13, or let only the hosts of its jobs reach it, with client "
        "certificates (etcd_cert=)"
    )
