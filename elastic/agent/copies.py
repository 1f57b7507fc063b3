"""Says how many copies of the state there are, where there are fewer than the job wants."""

from __future__ import annotations

from typing import TYPE_CHECKING

from elastic.view import outlives

if TYPE_CHECKING:
    from elastic.view import View


def copies_said(view: View, before: int | None, *, shared: bool) -> str | None:
    """Returns a sentence if the view has fewer copies of the state than wanted, or as many again; `before` is how many there were.

    Returns None if nothing has changed, and for a job of one host (not `shared`) that has asked for no more than the usual 2.
    """
    kept, wanted = view.copies_kept, view.site.copies
    if kept == before or (wanted == 2 and not shared) or (kept == wanted and before is None):
        return None
    if kept == wanted:
        return f"there are {wanted} copies of the state again"
    hosts = len({member.host for member in view.members})
    count, what = (hosts, "host") if hosts > 1 or outlives(view.members) else (len(view.members), "worker")
    there = f"there {'is' if count == 1 else 'are'} {count} {what}{'s' * (count != 1)}"
    copies = f"{kept} cop{'y' if kept == 1 else 'ies'} of the state instead of copies={wanted}"
    lost = f"this {what} is lost" if kept == 1 else f"{kept} {what}s are lost at once"
    return f"{there}, so there {'is' if kept == 1 else 'are'} {copies}: if {lost}, the job goes on from a checkpoint"
