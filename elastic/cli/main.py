"""The `elastic` command."""

from __future__ import annotations

import typer

import elastic
from elastic.cli.commands import Entry, LazyGroup
from elastic.observe.encodings import replace_unencodable

_SAYS = "Elastic training: the same steps, bit for bit, with any workers."


def version() -> None:
    """Prints the version."""
    print(elastic.__version__)


class _Elastic(LazyGroup):
    table = {  # noqa: RUF012 its base says that it belongs to the class
        "run": Entry(
            where="elastic.cli.run:run",
            help="Runs a train function on several workers; prints the leader's return value as JSON.",
            exit_codes=True,
        ),
        "agent": Entry(
            where="elastic.cli.agent:agent",
            help="Takes part in a job with the workers of this host: founds it, or joins it.",
            exit_codes=True,
        ),
        "top": Entry(
            where="elastic.cli.top:top_command",
            help="Shows how a job stands: workers and what they do, hosts, stages, step times, memory, links, the last events.",
        ),
        "status": Entry(where="elastic.cli.asking:status", help="Shows hosts, workers and progress of a job."),
        "events": Entry(
            where="elastic.cli.looking:events", help="Shows what has happened to a job: incidents, changes of its members, messages, saves."
        ),
        "logs": Entry(
            where="elastic.cli.looking:logs",
            help="Shows what workers have printed, with their numbers; equal lines of a second are one line with a count.",
        ),
        "report": Entry(
            where="elastic.cli.top:report",
            help="Writes one HTML page about a job, running or ended: loss, throughput, layout, incidents, memory.",
        ),
        "scale": Entry(where="elastic.cli.asking:scale", help="Changes the number of workers, at a step boundary; no step is taken again."),
        "drain": Entry(
            where="elastic.cli.asking:drain", help="Lets the other hosts take over what the workers of one host own; then its agent ends."
        ),
        "kill": Entry(
            where="elastic.cli.asking:kill",
            help="Ends the process of one worker at once; the others go on as after any death, and a new worker takes its place.",
        ),
        "stop": Entry(
            where="elastic.cli.asking:stop",
            help="Stops a job at the next step boundary, where a Trainer with a checkpoint directory saves.",
        ),
        "doctor": Entry(
            where="elastic.cli.doctor:doctor", help="Examines this machine, and with --etcd, --job and --secret-file the way to a job."
        ),
        "plan": Entry(
            where="elastic.cli.plan:plan",
            help="Prints the best plan, stage by stage: for a train function on this machine, or for a cluster and a workload from files.",
        ),
        "checkpoint": Entry(
            where="elastic.cli.checkpoint:checkpoint",
            help="Shows, compares and converts checkpoints of any format, and cleans up their directories.",
            settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []},
        ),
        "chaos": Entry(where="elastic.cli.chaos:app", help="Trains under real faults, and says, with evidence, whether it was hurt."),
        "energy": Entry(
            where="elastic.cli.energy:energy", help="Shows joules per step and per token by stage, and what other clocks would give."
        ),
        "power-daemon": Entry(
            where="elastic.cli.power:power_daemon",
            help="Lets named users lock the clocks of named GPUs, and restores them when their jobs end.",
        ),
        "version": Entry(where="elastic.cli.main:version", help="Prints the version."),
    }


app = typer.Typer(cls=_Elastic, no_args_is_help=True, rich_markup_mode=None, help=_SAYS)


@app.callback()
def _main() -> None:
    """Makes `app` a group."""


def main() -> None:
    """Entry point of the console script."""
    replace_unencodable()
    app()


if __name__ == "__main__":
    main()
