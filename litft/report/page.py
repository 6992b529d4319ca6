"""`report.html`: a run, or several side by side, as one page that asks nothing of a network and runs no script."""

from __future__ import annotations

import base64
import hashlib
import sys
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup

from litft.data.shown import visible
from litft.errors import UserError
from litft.report import facts
from litft.report.charts import COLOURS, Line, bar_chart, line_chart, swatch
from litft.report.gather import Run, read_run

HERE = Path(__file__).parent
MARK = '<meta name="generator" content="litft '
"""By which a page of litft is told from a file that must not be overwritten."""
MOST = 3 * COLOURS
"""Runs on one page: lines beyond that could not be told apart."""
SIDES = (("val_", "held out"), ("", "training"))
CURVES = (
    ("lr", "learning rate", ""),
    ("grad_norm", "gradient norm", "before clipping"),
    ("tokens_per_s", "throughput, tokens a second", "since the record before; validation and checkpoints left out"),
    ("memory_gb", "peak memory, GB", "highest so far: on the GPU where there is one, else of the process"),
)


@dataclass
class Chart:
    """A chart and the words around it."""

    title: str
    svg: Markup
    note: str = ""
    legend: Sequence[tuple[Markup, str]] = ()


def write_report(folders: Sequence[str | Path], out: str | Path | None = None) -> Path:
    """Write the report of a run, or one that lays several side by side.

    Args:
        folders: of the runs.
        out: the file; the run's own `report.html` where None, which takes a single run.

    Returns:
        The file.

    Raises:
        UserError: a folder is no run, a run is named twice, or `out` is missing, is no page of litft's, or can't be
            written.
    """
    runs = [read_run(folder) for folder in folders]
    if not runs or len(runs) > MOST:
        raise UserError(f"litft report: {len(runs)} runs; name 1 to {MOST}")
    if out is None:
        if len(runs) > 1:
            raise UserError("several runs need --out: where shall the page go?\nmend: --out compare.html")
        out = runs[0].folder / "report.html"
    file = Path(out).expanduser()
    if file.exists() and (file.is_dir() or MARK not in file.read_text(encoding="utf-8", errors="replace")[:2000]):
        raise UserError(
            f"--out {file}: is there, and no page of litft's; it is not overwritten\nmend: name another file"
        )
    text = run_page(runs[0]) if len(runs) == 1 else compare_page(_named(runs))
    beside = file.with_name(f".{file.name}-{uuid.uuid4().hex[:8]}")
    try:
        beside.write_text(text, encoding="utf-8")
        beside.replace(file)
    except OSError as error:
        beside.unlink(missing_ok=True)
        raise UserError(f"{file}: cannot be written: {error.strerror or error}") from error
    return file


def report_of_run(folder: Path) -> Path | None:
    """Write a run's own report at its end; what the run came to doesn't hang on it, so a failure is only said."""
    if not (folder / "run.json").exists():  # it ended before it began
        return None
    try:
        return write_report([folder])
    except Exception as error:
        print(
            f"report.html is not written: {type(error).__name__}: {str(error).partition(chr(10))[0]}", file=sys.stderr
        )
        return None


def run_page(run: Run) -> str:
    """The page of one run."""
    rows = run.facts.get("rows") or {}
    return _render(
        "run.html",
        run=run,
        summary=facts.summary(run),
        outcome=facts.outcome(run),
        done=run.facts.get("outcome") == "done",
        figures=facts.figures(run),
        charts=_run_charts(run),
        answers=run.facts.get("answers") or [],
        data=facts.data(run),
        skipped=run.plan.get("skipped") or [],
        lengths=_lengths(rows.get("lengths")),
        examples=rows.get("examples") or [],
        timing=facts.timing(run),
        environment=facts.environment(run),
        method=facts.method(run),
    )


def compare_page(runs: Sequence[Run]) -> str:
    """The page of several runs; curves of the same colour are of the same run."""
    charts = []
    own = dict.fromkeys(column for run in runs for column in _own_columns(run))
    columns = [("val_loss", "held-out loss", ""), ("loss", "training loss", "of each logged step")]
    columns += [(f"{of}{name}", f"{name.replace('_', ' ')}, {said}", "") for name in own for of, said in SIDES]
    columns += CURVES
    for column, title, note in columns:
        lines = [
            Line(run.name, run.metrics.get(column, []), index, dots=column.startswith("val_"))
            for index, run in enumerate(runs)
        ]
        if svg := line_chart(lines, label=title):
            charts.append(Chart(title, svg, note))
    return _render(
        "compare.html",
        runs=runs,
        marks=[swatch(index) for index in range(len(runs))],
        charts=charts,
        results=facts.results(runs),
        differences=facts.differences(runs),
    )


def _run_charts(run: Run) -> list[Chart]:
    train = Line("training", run.metrics.get("loss", []), 0)
    held_out = Line("held out", run.metrics.get("val_loss", []), 1, dots=True)
    lines = [line for line in (train, held_out) if line.points]
    charts = []
    if svg := line_chart(lines, label="loss"):
        lost = sum(not abs(y) < float("inf") for _, y in train.points)
        unit = "" if _own_columns(run) else "nats a trained token"  # other methods' losses have units of their own
        note = f"{lost} logged steps had no finite loss: the line is broken there" if lost else unit
        legend = [(swatch(line.style), line.name) for line in lines]
        charts.append(Chart("loss", svg, note, legend))
    for column in _own_columns(run):
        title = column.replace("_", " ")
        lines = [
            Line("training", run.metrics[column], 0),
            Line("held out", run.metrics.get(f"val_{column}", []), 1, True),
        ]
        if svg := line_chart(lines, label=title):
            legend = [(swatch(line.style), line.name) for line in lines if line.points]
            charts.append(Chart(title, svg, legend=legend))
    for column, title, note in CURVES:
        if svg := line_chart([Line(title, run.metrics.get(column, []))], label=title):
            charts.append(Chart(title, svg, note))
    return charts


def _own_columns(run: Run) -> list[str]:
    """What only this run's method measures, such as the accuracy of a reward model."""
    known = {"epoch", "loss", "tokens", "trained_tokens", "trained_tokens_per_s", "step_s", "data_s"}
    known |= {column for column, *_ in CURVES}
    return [column for column in run.metrics if column not in known and not column.startswith("val_")]


def _lengths(found: dict[str, Any] | None) -> Chart | None:
    if not found:
        return None
    svg = bar_chart(found["edges"], found["counts"], label="lengths of the rows", x_label="tokens in a row")
    note = f"rows to train on; half have up to {found['median']:,} tokens, the longest has {found['longest']:,}"
    return Chart("rows by length", svg, note)


def _named(runs: list[Run]) -> list[Run]:
    """The same runs under names that differ: those of the same folder name get as much of the path as it takes."""
    paths = [run.folder.absolute() for run in runs]
    if twice := next((path for path in paths if paths.count(path) > 1), None):
        raise UserError(f"{twice}: is named twice")
    depth = 1
    while len({path.parts[-depth:] for path in paths}) < len(paths):
        depth += 1
    for run, path in zip(runs, paths, strict=True):
        run.name = "/".join(path.parts[-depth:])
    return runs


def _render(template: str, **values: Any) -> str:
    """Fill a template: everything is escaped, and what could steer the page is shown as an escape."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    from litft import __version__

    def shown(value: Any) -> Any:
        return value if isinstance(value, Markup) else visible(str(value))

    style = (HERE / "style.css").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    environment = Environment(
        loader=FileSystemLoader(HERE), autoescape=True, finalize=shown, undefined=StrictUndefined, trim_blocks=True
    )
    page = environment.get_template(template)
    return page.render(style=Markup(style), digest=digest, version=__version__, **values)


__all__ = ["compare_page", "report_of_run", "run_page", "write_report"]
