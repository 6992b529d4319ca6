"""`litft report RUN...`: the page of a run, or several runs side by side."""

from __future__ import annotations

from litft.cli.parsing import Parser, waiting


def main(argv: list[str]) -> int:
    """Run the verb; returns the exit code."""
    parser = Parser(
        "litft report",
        "Write a run's report.html again, or one page that lays several runs side by side: their curves, what they\n"
        "came to and what differs between them. The page is one file that needs no network.",
        "litft report runs/0001-lora runs/0002-full --out compare.html",
    )
    parser.add_argument("RUN", nargs="+", help="a run folder")
    parser.add_argument("--out", metavar="FILE", help="the page to write (report.html in the run folder, for one run)")
    args = parser.parse(argv)
    with waiting("reading the runs"):
        from litft.report.page import write_report

        file = write_report(args.RUN, args.out)
    print(file)
    return 0
