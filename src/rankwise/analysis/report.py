"""A run's folder as one HTML page that needs no network: everything it shows is inside it."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from importlib.resources import files
from pathlib import Path
from string import Template

from plotly.offline import get_plotlyjs

from rankwise import __version__
from rankwise.analysis import sections
from rankwise.analysis.comparison import comparison_section
from rankwise.analysis.drift_figure import drift_section
from rankwise.analysis.place_tables import place_section
from rankwise.analysis.retention import retention_section
from rankwise.analysis.runfolder import Run, read_run
from rankwise.files import write_text


def write_report(run_folder: Path) -> Path:
    """Write ``report.html`` into a run's folder, in one step, and return its path.

    Raises:
        UserError: the folder is no run's, or one of its files is not what it should be.
    """
    folder = Path(run_folder)
    page = render(read_run(folder))
    path = folder / "report.html"
    write_text(path, page)
    return path


def render(run: Run) -> str:
    """The whole page of a run."""
    body = [
        sections.results_section(run),
        comparison_section(run),
        sections.curves_section(run),
        retention_section(run),
        sections.ranks_section(run),
        sections.history_section(run),
        place_section(run),
        drift_section(run),
        f'<div class="pair">\n{sections.counts_section(run)}\n{sections.cost_section(run)}\n</div>',
        sections.settings_section(run),
        sections.versions_section(run),
        sections.absent_section(run),
    ]
    return page(_name(run), _header(run), body)


def page(title: str, header: str, sections_: Sequence[str]) -> str:
    """A whole page that needs no network.

    Args:
        title: of the page, as text.
        header: HTML.
        sections_: HTML of each; empty ones are left out.
    """
    joined = "\n".join(part for part in sections_ if part)
    return Template(_part("page.html")).substitute(
        title=escape(title),
        style=_part("page.css"),
        header=header,
        sections=joined,
        footer=f"Written by rankwise {__version__}. This page holds everything it shows and loads nothing.",
        scripts=(_scripts() if 'class="plot"' in joined else "")
        + (f"\n<script>\n{_part('sort.js')}</script>" if "sortable" in joined else ""),
    )


def _name(run: Run) -> str:
    return str(run.recipe.get("name") or run.folder.resolve().name)


def _header(run: Run) -> str:
    found = "".join(
        f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in sections.facts(run).items()
    )
    finding, folder = sections.lead(run), run.folder.resolve().name
    return (
        f'<p class="kind">rankwise run in {escape(folder)}</p>\n<h1>{escape(_name(run))}</h1>\n'
        + (f'<p class="lead">{finding}</p>\n' if finding else "")
        + (f'<dl class="facts">{found}</dl>' if found else "")
    )


def _scripts() -> str:
    """plotly.js, once, and the script that draws the figures; the tables need neither."""
    missing = "<noscript><p>The figures need JavaScript; every table is complete without it.</p></noscript>"
    return f"{missing}\n<script>{get_plotlyjs()}</script>\n<script>\n{_part('page.js')}</script>"


def _part(name: str) -> str:
    return files("rankwise.analysis").joinpath("page", name).read_text(encoding="utf-8")
