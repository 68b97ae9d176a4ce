"""The comparison as one self-contained page with the look of a run's report."""

from __future__ import annotations

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from fedtailor.report.compare_content import Comparison, behind, cell_text, pair_clients, pair_text, pair_title
from fedtailor.report.compare_pairs import rule
from fedtailor.report.names import method_name, pool_name
from fedtailor.report.page import inline_svg
from fedtailor.report.significance import budget_title
from fedtailor.report.style import Drawing


def page(content: Comparison, drawing: Drawing, svg: str) -> str:
    """The page as text; every value from the runs is HTML-escaped.

    Args:
        content: what is shown.
        drawing: the figure, for its title and caption.
        svg: the figure's file.
    """
    environment = _environment()
    grids = [(table, grid) for table in content.tables if (grid := content.grid(table.pool))]
    text: str = environment.get_template("compare.html.jinja").render(
        run_ids=content.run_ids, facts=content.facts, changed=content.changed, notes=content.notes,
        tables=content.tables, grids=grids, wandb=content.wandb, drawing=drawing, table_rule=content.table_rule,
        pair_rule=rule(content.measure), svg=inline_svg(svg, "f0", drawing.title), style=_style(environment),
    )  # fmt: skip
    return text


def _environment() -> Environment:
    loaders = [PackageLoader("fedtailor.report", "."), PackageLoader("fedtailor.report", ".")]
    environment = Environment(
        loader=ChoiceLoader(loaders), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {
        "method": method_name, "pool": pool_name, "budget": budget_title, "cell": cell_text, "behind": behind,
        "pair": pair_text, "pair_title": pair_title, "pair_clients": pair_clients,
    }  # fmt: skip
    return environment


def _style(environment: Environment) -> Markup:
    """The style sheet of a report, so that both pages look alike."""
    return Markup(environment.get_template("style.css.jinja").render())
