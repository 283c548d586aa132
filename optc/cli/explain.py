"""``optc explain``: why each layer of an artifact has the format it has."""

from __future__ import annotations

from pathlib import Path

import click

from optc.cli.options import json_option, print_json
from optc.cli.terminal import stdout
from optc.cli.values import TEXT
from optc.errors import ArtifactError, OptcError

PLOTS = (".png", ".svg", ".pdf")


@click.command("explain")
@click.argument("artifact", type=TEXT)
@click.option("--plot", type=click.Path(path_type=Path, dir_okay=False), help=f"Draw it to a file: {', '.join(PLOTS)}.")
@click.option("-v", "--verbose", is_flag=True, help="A row for every format that was looked at.")
@json_option
def command(artifact: str, plot: Path | None, verbose: bool, as_json: bool) -> None:
    """Show what each layer of ARTIFACT costs in noise, latency and bytes, and why it has its format.

    Read from the artifact's manifest; nothing is loaded or run.
    """
    from optc.lowering.manifest import read_manifest
    from optc.report.account import (
        account_figure,
        account_reasons,
        account_summary,
        account_table,
        is_account,
        save_figure,
    )
    from optc.report.write import check_place

    if plot is not None and plot.suffix not in PLOTS:
        raise OptcError(f"cannot draw to '{plot}'", f"end its name in {', '.join(PLOTS)}")
    if plot is not None:
        check_place(plot, "the picture")
    manifest = read_manifest(Path(artifact))
    records = manifest.report.get("passes", ())
    found = [record for record in records if is_account(record.get("notes", {}).get("account"))]
    if not found:
        raise ArtifactError(
            f"no pass of '{artifact}' kept an account of its choices", "make the artifact with --passes fuse,quant"
        )
    record = found[-1]
    rows = record["notes"]["account"]
    options = ", ".join(f"{name}={value}" for name, value in record["options"].items() if value is not None)
    title = f"{manifest.model.get('name') or Path(artifact).name}: {record['name']} ({options})"
    if plot is not None:
        save_figure(account_figure(rows, title), plot)
    if as_json:
        print_json({"pass": record["name"], "options": record["options"], "account": rows})
        return
    console = stdout()
    console.print(account_table(rows, title, verbose))
    console.print("\nWhy", style="bold")
    for reason in account_reasons(rows):
        console.print(reason)
    console.print(f"\n{account_summary(rows)}.")
    if plot is not None:
        console.print(f"Drawn to {plot}")
