"""The command `elastic checkpoint`, also `python -m elastic.checkpoint`: inspects, verifies, compares, converts and removes checkpoints."""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, NoReturn

import typer
from rich.console import Console
from rich.progress import Progress as Bar

from elastic.checkpoint.cli_show import as_json, differences_as_json, show, show_differences, show_outline, show_unread
from elastic.checkpoint.convert.compare import compare
from elastic.checkpoint.convert.detect import Detected
from elastic.checkpoint.convert.elastic_format import garbage, retire
from elastic.checkpoint.convert.formats import TARGETS
from elastic.checkpoint.convert.output import run_bytes
from elastic.checkpoint.convert.rules import Rules, load_rules
from elastic.checkpoint.convert.run import DEFAULT_MEMORY, Conversion, Outline, convert, open_any, plan, unread_of
from elastic.checkpoint.convert.verify import size_of, verify
from elastic.checkpoint.objects import place
from elastic.checkpoint.state import Source
from elastic.errors import CheckpointError, ElasticError
from elastic.observe.encodings import replace_unencodable

app = typer.Typer(
    help="Inspect, compare and convert checkpoints of any format, and clean up.", no_args_is_help=True, pretty_exceptions_enable=False
)

Where = Annotated[str, typer.Argument(help="Directory or file, whose format is detected; or a URL of our own format.")]
Trust = Annotated[bool, typer.Option("--trust-pickle", help="Load pickles with calls not known to be harmless. They can run any code.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
RulesFile = Annotated[Path | None, typer.Option("--rules", help="TOML or JSON file of rules; see docs/converters.md.")]
Memory = Annotated[str, typer.Option("--max-memory", help="Memory for values, such as 500MiB or 2GiB.")]

_UNITS = {
    "": 1,
    "B": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "KIB": 1 << 10,
    "MIB": 1 << 20,
    "GIB": 1 << 30,
    "K": 1 << 10,
    "M": 1 << 20,
    "G": 1 << 30,
}


def parse_bytes(text: str) -> int:
    """Parses an amount such as `2GiB`, `500 MB` or `1048576` into bytes. Raises CheckpointError if it is malformed."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    if match is None or match[2].upper() not in _UNITS:
        raise CheckpointError(f"{text!r} is not an amount of memory; write, for example, 500MiB or 2GiB")
    return int(float(match[1]) * _UNITS[match[2].upper()])


@app.command("inspect")
def inspect_command(path: Where, as_json_: Json = False, rules: RulesFile = None, trust_pickle: Trust = False) -> None:
    """Prints format, step, tensors, bytes, tensor-parallel slices and optimizer groups, and what cannot be read."""
    with _looked_into(path, rules, trust_pickle) as (detected, source):
        slicings = getattr(source, "slicings", {})
        if as_json_:
            typer.echo(json.dumps(as_json(detected, source.contents, slicings)))
        else:
            show(Console(), detected, source.contents, slicings)


@app.command("verify")
def verify_command(
    path: Where, as_json_: Json = False, rules: RulesFile = None, trust_pickle: Trust = False, max_memory: Memory = "256MiB"
) -> None:
    """Reads the whole checkpoint and checks all checksums that its format has."""
    limit = run_bytes(parse_bytes(max_memory))
    with _looked_into(path, rules, trust_pickle) as (detected, source):
        with _progress() as bar:
            reading = bar.add_task("reading", total=size_of(source))
            proved = verify(source, limit=limit, on_read=lambda count: bar.update(reading, advance=count))
        unread = unread_of(source.contents)
        if as_json_:
            typer.echo(json.dumps({"path": path, "format": detected.name, "checked": proved, "unread": list(unread)}))
        else:
            typer.echo(f"{path}: {detected.name}: {proved}")
            show_unread(Console(), unread)


@app.command("diff")
def diff_command(
    first: Where,
    second: Where,
    as_json_: Json = False,
    rules: Annotated[
        list[Path] | None,
        typer.Option("--rules", help="File of rules for both (docs/converters.md). Give it twice for one file each."),
    ] = None,
    trust_pickle: Trust = False,
    max_memory: Memory = "256MiB",
) -> None:
    """Prints the differences between two checkpoints of any formats; exit status 1 if there are any."""
    limit, files = run_bytes(parse_bytes(max_memory)), [*(rules or [None])]
    if len(files) > 2:
        raise CheckpointError("give --rules at most twice: once for both checkpoints, or once for each")
    with (
        _looked_into(first, files[0], trust_pickle) as (_, left),
        _looked_into(second, files[-1], trust_pickle) as (_, right),
        _progress() as bar,
    ):
        comparing = bar.add_task("comparing", total=size_of(left))
        found = compare(left, right, limit=limit, on_compared=lambda count: bar.update(comparing, advance=count))
        unread = [unread_of(source.contents) for source in (left, right)]
        if as_json_:
            report = differences_as_json(found, unread)
            differs = bool(report["different"])
            typer.echo(json.dumps(report))
        else:
            differs = show_differences(Console(soft_wrap=True), found)
            for which, texts in zip(("first", "second"), unread, strict=True):
                show_unread(Console(), texts, f" of the {which}, so not compared")
    if differs:
        raise typer.Exit(1)


@contextmanager
def _looked_into(path: str, rules: Path | None, trust_pickle: bool) -> Iterator[tuple[Detected, Source]]:
    """Opens a checkpoint leniently: what cannot be read is listed, not an error."""
    found = load_rules(rules) if rules else Rules()
    detected, source = open_any(place(path), trust_pickle=trust_pickle, rules=found, lenient=True)
    try:
        yield detected, source
    finally:
        source.close()


def _progress() -> Bar:
    """Returns a progress bar that shows on a terminal only, and disappears at the end."""
    return Bar(console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty())


@app.command("convert")
def convert_command(
    source: Where,
    target: Annotated[str, typer.Argument(help="What to write; nothing may be there, except for our own format.")],
    to: Annotated[str, typer.Option("--to", help=f"One of {', '.join(TARGETS)}.")],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would be written, and write nothing.")] = False,
    max_memory: Memory = f"{DEFAULT_MEMORY >> 30}GiB",
    rules: RulesFile = None,
    tensor_parallel: Annotated[
        int | None, typer.Option("--tensor-parallel", min=1, help="Keep slices for this many ranks, by the rules; default: whole tensors.")
    ] = None,
    trust_pickle: Trust = False,
    no_verify: Annotated[bool, typer.Option("--no-verify", help="Do not read back what was written.")] = False,
) -> None:
    """Converts a checkpoint with its optimizer state, tensor by tensor."""
    request = Conversion(
        source=place(source),
        target=place(target),
        to=to,
        max_memory=parse_bytes(max_memory),
        rules=load_rules(rules) if rules else Rules(),
        trust_pickle=trust_pickle,
        verify=not no_verify,
        tensor_parallel=tensor_parallel,
    )
    console = Console()
    if dry_run:
        show_outline(console, plan(request), to)
        return
    with _progress() as bar:
        writing = bar.add_task("writing", total=None)

        def on_plan(planned: Outline) -> None:
            bar.update(writing, total=planned.size)

        checking = bar.add_task("checking", total=None, visible=request.verify)
        planned = convert(
            request,
            progress=lambda _, count: bar.update(writing, advance=count),
            checking=lambda what, _: bar.update(checking, description=f"checking {what}"),
            on_plan=on_plan,
        )
    show_outline(console, planned, to, done=request.target)


@app.command("gc")
def gc_command(
    path: Annotated[str, typer.Argument(help="A directory, or URL, of our own checkpoints.")],
    older_than: Annotated[float, typer.Option("--older-than", help="Seconds since an unfinished save last wrote.")] = 3600.0,
    keep_last: Annotated[int | None, typer.Option("--keep-last", min=1, help="Keep this many of the newest checkpoints.")] = None,
    keep_every: Annotated[
        int | None, typer.Option("--keep-every", min=1, help="Keep checkpoints of steps that are multiples of it.")
    ] = None,
) -> None:
    """Removes what unfinished saves left behind and, on request, old checkpoints; never the last good one."""
    where = place(path)
    if isinstance(where, Path) and not where.is_dir():
        raise CheckpointError(f"{where} is not a directory, so it holds no checkpoints")
    removed = garbage(where, older_than_s=older_than, now=time.time()) + retire(where, last=keep_last, every=keep_every)
    typer.echo("\n".join(f"removed {name}" for name in removed) if removed else "nothing to remove")


def main(arguments: list[str] | None = None, prog_name: str = "checkpoint") -> None:
    """Runs the command. An error is printed as one line, with exit status 2."""
    replace_unencodable()
    try:
        app(arguments, prog_name=prog_name)
    except ElasticError as error:
        _refuse(str(error))
    except OSError as error:
        _refuse(f"{error.filename}: {error.strerror}" if error.filename else str(error))


def _refuse(text: str) -> NoReturn:
    typer.echo(f"error: {'; '.join(text.splitlines())}", err=True)
    sys.exit(2)
