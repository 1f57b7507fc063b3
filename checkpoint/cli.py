"""`elastic checkpoint`, also `python -m elastic.checkpoint`: look into checkpoints of any format, compare, convert and clean up."""

from __future__ import annotations

import json
import re
import sys
import time
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import Progress as Bar

from elastic.checkpoint.cli_show import as_json, show, show_differences, show_outline
from elastic.checkpoint.convert.compare import compare
from elastic.checkpoint.convert.formats import TARGETS
from elastic.checkpoint.convert.ours import garbage, retire
from elastic.checkpoint.convert.output import run_bytes
from elastic.checkpoint.convert.rules import Rules, load_rules
from elastic.checkpoint.convert.run import DEFAULT_MEMORY, Outline, Request, convert, open_any, plan
from elastic.checkpoint.convert.verify import verify
from elastic.checkpoint.objects import place
from elastic.errors import ElasticError

app = typer.Typer(
    help="Look into checkpoints of any format, compare, convert and clean up.", no_args_is_help=True, pretty_exceptions_enable=False
)

Where = Annotated[str, typer.Argument(help="Directory or file, whose format is detected; or a URL of our own format.")]
Trust = Annotated[bool, typer.Option("--trust-pickle", help="Run pickles that are not on the list of harmless ones. They can do anything.")]
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
    """Bytes of `2GiB`, `500 MB`, `1048576`."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    if match is None or match[2].upper() not in _UNITS:
        raise typer.BadParameter(f"{text!r} is no amount of memory; write it such as 500MiB or 2GiB")
    return int(float(match[1]) * _UNITS[match[2].upper()])


@app.command("inspect")
def inspect_command(
    path: Where, as_json_: Annotated[bool, typer.Option("--json", help="As JSON.")] = False, trust_pickle: Trust = False
) -> None:
    """Format, step, tensors, bytes, tensor-parallel slices and optimizer groups."""
    detected, source = open_any(place(path), trust_pickle=trust_pickle)
    slicings = getattr(source, "slicings", {})
    try:
        if as_json_:
            typer.echo(json.dumps(as_json(detected, source.contents, slicings)))
        else:
            show(Console(), detected, source.contents, slicings)
    finally:
        source.close()


@app.command("verify")
def verify_command(path: Where, trust_pickle: Trust = False, max_memory: Memory = "256MiB") -> None:
    """Reads everything and checks what checksums there are."""
    detected, source = open_any(place(path), trust_pickle=trust_pickle)
    try:
        typer.echo(f"{path}: {detected.name}: {verify(source, limit=run_bytes(parse_bytes(max_memory)))}")
    finally:
        source.close()


@app.command("diff")
def diff_command(first: Where, second: Where, trust_pickle: Trust = False, max_memory: Memory = "256MiB") -> None:
    """What differs between two checkpoints of any formats; exit status 1 if something does."""
    _, left = open_any(place(first), trust_pickle=trust_pickle)
    try:
        _, right = open_any(place(second), trust_pickle=trust_pickle)
        try:
            differs = show_differences(Console(soft_wrap=True), compare(left, right, limit=run_bytes(parse_bytes(max_memory))))
        finally:
            right.close()
    finally:
        left.close()
    if differs:
        raise typer.Exit(1)


@app.command("convert")
def convert_command(
    source: Where,
    target: Annotated[str, typer.Argument(help="What to write; nothing may be there, except for our own format.")],
    to: Annotated[str, typer.Option("--to", help=f"One of {', '.join(TARGETS)}.")],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be written, and write nothing.")] = False,
    max_memory: Memory = f"{DEFAULT_MEMORY >> 30}GiB",
    rules: Annotated[
        Path | None, typer.Option("--rules", help="TOML or JSON file of renames, splits, merges, slices; see checkpoint/convert/rules.py.")
    ] = None,
    tensor_parallel: Annotated[
        int | None, typer.Option("--tensor-parallel", min=1, help="Keep slices for this many ranks, by the rules; 1 (or not given): whole.")
    ] = None,
    trust_pickle: Trust = False,
    no_verify: Annotated[bool, typer.Option("--no-verify", help="Do not read again what was written.")] = False,
) -> None:
    """Converts a checkpoint with its optimizer state, tensor by tensor."""
    request = Request(
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
    with Bar(console=Console(stderr=True), transient=True) as bar:
        writing = bar.add_task("writing", total=None)

        def told(planned: Outline) -> None:
            bar.update(writing, total=planned.size)

        checking = bar.add_task("checking", total=None, visible=request.verify)
        planned = convert(
            request,
            progress=lambda _, count: bar.update(writing, advance=count),
            checking=lambda what, _: bar.update(checking, description=f"checking {what}"),
            told=told,
        )
    show_outline(console, planned, to, done=request.target)


@app.command("gc")
def gc_command(
    path: Annotated[str, typer.Argument(help="A directory, or URL, of our own checkpoints.")],
    older_than: Annotated[float, typer.Option("--older-than", help="Seconds since an unfinished save last wrote.")] = 3600.0,
    keep_last: Annotated[int | None, typer.Option("--keep-last", min=1, help="Keep this many newest checkpoints.")] = None,
    keep_every: Annotated[
        int | None, typer.Option("--keep-every", min=1, help="Keep checkpoints of steps that are multiples of it.")
    ] = None,
) -> None:
    """Removes what unfinished saves left behind and, if asked to, old checkpoints; never the last good one."""
    removed = garbage(place(path), older_than_s=older_than, now=time.time()) + retire(place(path), last=keep_last, every=keep_every)
    typer.echo("\n".join(f"removed {name}" for name in removed) if removed else "nothing to remove")


def main() -> None:
    """Runs the command; an error that is ours is one line and exit status 2."""
    try:
        app(prog_name="checkpoint")
    except ElasticError as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(2)
