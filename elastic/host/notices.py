"""Notices that this machine is about to be taken away: where they appear, and how much time they leave.

    aws     PUT /latest/api/token (IMDSv2), GET /latest/meta-data/spot/instance-action: 404, or {"action", "time"}. A rebalance
                recommendation is no notice: the machine may live on for hours.
    azure   GET /metadata/scheduledevents, with events of this machine and others; a Freeze only pauses it
    gcp     GET /computeMetadata/v1/instance/preempted: FALSE or TRUE; 30 s are left
    URL     204 or 404, or 200 with anything; the time that is left, if it is given, is a number of seconds or an ISO 8601 time, alone or
                as "time" of a JSON object
    file    it exists; its content is as that of a URL

No clock is trusted: times are compared with the one that the server's answer has, if it has one.
"""

from __future__ import annotations

import json
import re
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime, timezone
from email.utils import parsedate_to_datetime
from http.client import HTTPException
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

from elastic.errors import SettingsError

_LINK_LOCAL = "http://169.254.169.254"
_HOMES = {"aws": _LINK_LOCAL, "azure": _LINK_LOCAL, "gcp": "http://metadata.google.internal"}
_ANSWER_S = 2.0
_MOST_BYTES = 1 << 16
_TOKEN_S = 6 * 3600
_GCP_LEAVES_S = 30.0
_EVENTS = frozenset({"Preempt", "Terminate", "Redeploy", "Reboot"})
_FORMS = "'file:PATH', 'http://...', 'aws', 'azure', 'gcp', or one of these with another address, such as 'aws=http://127.0.0.1:8080'"


class Unclear(Exception):
    """It cannot be seen whether there is a notice: no answer, or one of another form. It is not a notice."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Notice:
    """A notice of termination: `why` in a few words, and the seconds that were left when it was read, None if it does not say so."""

    why: str
    left_s: float | None = None


class NoticeSource(Protocol):
    """A place where a notice may appear. `title` names it in messages."""

    title: str

    def look(self) -> Notice | None:
        """Returns the notice, None if there is none yet. Raises Unclear. It may take `_ANSWER_S` for each request."""
        ...


def notice_source(text: str) -> NoticeSource:
    """Returns the source that `--drain-on` names. Raises SettingsError."""
    kind, given, address = text.partition("=")
    if kind in _HOMES:
        home = _checked(address if given else _HOMES[kind], text)
        return {"aws": AwsNotices, "azure": AzureNotices, "gcp": GcpNotices}[kind](home.rstrip("/"))
    if text.startswith("file:"):
        return FileNotices(Path(text.removeprefix("file:")).absolute(), text)
    if text.startswith(("http://", "https://")):
        return UrlNotices(_checked(text, text))
    raise SettingsError(f"drain_on={text!r}: use {_FORMS}")


def _checked(url: str, text: str) -> str:
    with suppress(ValueError):
        parts = urlsplit(url)
        if parts.scheme in ("http", "https") and parts.hostname and (parts.port is None or parts.port > 0) and url.isprintable():
            return url
    raise SettingsError(f"drain_on={text!r}: {url!r} is no URL; use {_FORMS}")


class FileNotices:
    """A file that appears. Raises SettingsError if its directory does not exist."""

    def __init__(self, path: Path, text: str) -> None:
        if path.is_dir():
            raise SettingsError(f"drain_on={text!r}: {str(path)!r} is a directory; name a file that does not exist until the notice")
        if not path.parent.is_dir():
            raise SettingsError(f"drain_on={text!r}: there is no directory {str(path.parent)!r} in which the file could appear")
        self.title, self._path = f"file {path}", path

    def look(self) -> Notice | None:
        try:
            with self._path.open("rb") as file:
                content = file.read(_MOST_BYTES).decode(errors="replace")
        except FileNotFoundError:
            return None
        except OSError as error:
            raise Unclear(error.strerror or str(error)) from error
        return Notice(why=f"{self.title} is there", left_s=_left(content, time.time()))


class UrlNotices:
    """A URL that answers 404 or 204 until there is a notice, and then 200."""

    def __init__(self, url: str) -> None:
        self.title, self._url = url, url

    def look(self) -> Notice | None:
        answer = _asked(self._url)
        if answer.status in (204, 404):
            return None
        return Notice(why=f"{self.title} answers 200", left_s=_left(answer.expected(200), answer.now))


class AwsNotices:
    """The instance action of an EC2 spot instance."""

    def __init__(self, home: str) -> None:
        self.title, self._home, self._token = f"the AWS metadata service at {home}", home, ""

    def look(self) -> Notice | None:
        path = "/latest/meta-data/spot/instance-action"
        answer = _asked(self._home + path, self._headers())
        if answer.status == 401:  # the token ran out
            self._token = ""
            answer = _asked(self._home + path, self._headers())
        if answer.status == 404:
            return None
        action = answer.record()
        if not isinstance(action.get("action"), str) or not isinstance(action.get("time"), str):
            raise Unclear(f"an instance action without action and time: {answer.short}")
        return Notice(why=f"AWS: this spot instance gets the action {action['action']!r}", left_s=_left(action["time"], answer.now))

    def _headers(self) -> dict[str, str]:
        if not self._token:
            wanted = {"X-aws-ec2-metadata-token-ttl-seconds": str(_TOKEN_S)}
            self._token = _asked(f"{self._home}/latest/api/token", wanted, method="PUT").expected(200)
            if not (self._token.isascii() and self._token.isprintable()):
                raise Unclear("a token that is none")
        return {"X-aws-ec2-metadata-token": self._token}


class AzureNotices:
    """The scheduled events of a virtual machine. Events of other machines of its group are listed too, and are not meant."""

    _HEADERS: Mapping[str, str] = {"Metadata": "true"}

    def __init__(self, home: str) -> None:
        self.title, self._home, self._name = f"the Azure metadata service at {home}", home, ""

    def look(self) -> Notice | None:
        answer = _asked(f"{self._home}/metadata/scheduledevents?api-version=2020-07-01", self._HEADERS)
        events = answer.record().get("Events")
        if not isinstance(events, list) or not all(isinstance(event, dict) for event in events):
            raise Unclear(f"an answer without events: {answer.short}")
        for event in events:
            if event.get("EventType") in _EVENTS and self._own_name() in (event.get("Resources") or ()):
                not_before = event.get("NotBefore")
                left = _left(not_before, answer.now) if isinstance(not_before, str) else None
                return Notice(why=f"Azure: the event {event['EventType']} is scheduled for this machine", left_s=left)
        return None

    def _own_name(self) -> str:
        if not self._name:
            path = "/metadata/instance/compute/name?api-version=2021-02-01&format=text"
            self._name = _asked(self._home + path, self._HEADERS).expected(200).strip()
        return self._name


class GcpNotices:
    """Whether a Compute Engine instance is preempted."""

    def __init__(self, home: str) -> None:
        self.title, self._home = f"the Google metadata service at {home}", home

    def look(self) -> Notice | None:
        answer = _asked(f"{self._home}/computeMetadata/v1/instance/preempted", {"Metadata-Flavor": "Google"})
        value = answer.expected(200).strip()
        if value not in ("TRUE", "FALSE"):
            raise Unclear(f"neither TRUE nor FALSE: {answer.short}")
        return Notice(why="Google: this instance is preempted", left_s=_GCP_LEAVES_S) if value == "TRUE" else None


@dataclass(frozen=True, slots=True)
class _Answer:
    """An answer by HTTP. `now` is the server's time, this machine's if it sends none."""

    status: int
    text: str
    now: float = field(default_factory=time.time)

    @property
    def short(self) -> str:
        return repr(self.text if len(self.text) <= 60 else f"{self.text[:57]}...")

    def expected(self, status: int) -> str:
        """Returns the text of an answer of this status. Raises Unclear for another one."""
        if self.status != status:
            raise Unclear(f"it answers {self.status}")
        return self.text

    def record(self) -> dict[str, Any]:
        """Returns the JSON object that it is. Raises Unclear."""
        with suppress(ValueError, RecursionError):
            found = json.loads(self.expected(200))
            if isinstance(found, dict):
                return found
        raise Unclear(f"no JSON object: {self.short}")


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: Any) -> None:
        """Follows none: a metadata service sends none, and a login page of some network answers 200."""


_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}), _NoRedirects)  # metadata is never behind a proxy


def _asked(url: str, headers: Mapping[str, str] | None = None, *, method: str = "GET") -> _Answer:
    request = urllib.request.Request(url, headers=dict(headers or {}), method=method)
    try:
        try:
            found = _OPENER.open(request, timeout=_ANSWER_S)
        except urllib.error.HTTPError as error:
            found = error
        with found:
            text = found.read(_MOST_BYTES).decode(errors="replace")
            return _Answer(found.status or 0, text, _time_of(found.headers.get("Date")) or time.time())
    except TimeoutError as error:
        raise Unclear(f"no answer for {_ANSWER_S:g} s") from error
    except (OSError, HTTPException, ValueError) as error:
        reason = getattr(error, "reason", error)
        raise Unclear(
            f"no answer for {_ANSWER_S:g} s" if isinstance(reason, TimeoutError) else str(reason) or type(error).__name__
        ) from error


def _left(text: str, now: float) -> float | None:
    """Returns the seconds that a notice leaves: as a number, or until a time; at least 0, None if it says neither."""
    text = text.strip()
    with suppress(ValueError, RecursionError):
        found = json.loads(text)
        if isinstance(found, dict):
            text = str(found.get("time", ""))
    if re.fullmatch(r"\d+(\.\d+)?", text):
        return min(float(text), 1e9)
    at = _time_of(text)
    return None if at is None else max(0.0, at - now)


def _time_of(text: str | None) -> float | None:
    """Returns a time of ISO 8601 or of HTTP in seconds since 1970, None if it is none."""
    with suppress(ValueError, TypeError, OverflowError):
        at = datetime.fromisoformat((text or "").replace("Z", "+00:00"))
        return (at if at.tzinfo is not None else at.replace(tzinfo=timezone.utc)).timestamp()
    with suppress(ValueError, TypeError, OverflowError):
        return parsedate_to_datetime(text or "").timestamp()
    return None
