"""The report as one HTML page: what stands on it as plain records, and `render`, which writes them.

    html = render(Page(title="...", figures=(Section("attention", "Attention maps", cards=(...)),), ...))

The template escapes everything but the charts, which `report_curves.py` makes and escapes itself, and the style sheet,
which is written into the page; pictures are files beside it, and there is no script: the page needs no network.
"""

from dataclasses import dataclass
from importlib import resources

from jinja2 import Environment, StrictUndefined

TEMPLATE, STYLE = "report.html.jinja", "report.css"


@dataclass(frozen=True)
class Line:
    """A line below a picture: who says it, what, and whether it is right."""

    label: str
    text: str
    state: str = ""
    """"right", "wrong" or "" where there is no verdict."""


@dataclass(frozen=True)
class Card:
    """One picture with its lines."""

    image: str
    """Path relative to the page; empty for lines alone."""
    alternative: str
    """What is to be seen, for those who cannot."""
    lines: tuple[Line, ...] = ()
    size_px: tuple[int, int] = (0, 0)
    """(width, height) of the picture, so that the page does not jump while it loads."""
    panels: int = 1
    """How many panels the picture has side by side: how wide it is shown."""


@dataclass(frozen=True)
class Section:
    """Pictures of one subject."""

    anchor: str
    title: str
    note: str = ""
    cards: tuple[Card, ...] = ()
    missing: str = ""
    """Why there is nothing, or less than expected."""


@dataclass(frozen=True)
class Chart:
    """The curves of one stage."""

    title: str
    facts: str
    svgs: tuple[str, ...]
    missing: str = ""


@dataclass(frozen=True)
class Table:
    """Numbers as text: the first column names the row."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class TargetRow:
    """One target as shown."""

    label: str
    measured: str
    required: str
    state: str
    """"reached", "not reached" or "not measured"."""
    control: str = ""
    note: str = ""


@dataclass(frozen=True)
class Page:
    """Everything on the page."""

    title: str
    lead: str
    verdict: tuple[str, ...]
    """Sentences, the first of which is the headline."""
    targets: tuple[TargetRow, ...]
    charts: tuple[Chart, ...]
    tables: tuple[Table, ...]
    examples: tuple[Section, ...]
    figures: tuple[Section, ...]
    times: Table
    machine: Table
    limits: tuple[str, ...]


def render(page: Page) -> str:
    """The page as HTML."""
    files = resources.files("evaluation")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(files.joinpath(TEMPLATE).read_text(encoding="utf-8"))
    style = files.joinpath(STYLE).read_text(encoding="utf-8")
    return template.render(page=page, style=style)
