# SPDX-FileCopyrightText: Copyright (c) 2026 the kvpress-merging authors
# SPDX-License-Identifier: Apache-2.0
"""One HTML page with all of a report: it needs no other file and no network."""

from __future__ import annotations

import math
from typing import Any

import pandas as pd
from jinja2 import Environment, PackageLoader, StrictUndefined

from evaluation.tables import arrow, number, p_value


def render_page(**content: Any) -> str:
    """
    Fill the template.

    Parameters
    ----------
    **content
        What ``templates/report.html.j2`` names. All text is escaped; SVG is taken as it is.

    Returns
    -------
    str
        HTML.
    """
    environment = Environment(
        loader=PackageLoader("evaluation"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        arrow=arrow, number=number, p_value=p_value, sort_key=_sort_key, sorts_as=_sorts_as, records=_records
    )
    return environment.get_template("report.html.j2").render(**content)


def _records(table: pd.DataFrame) -> list[dict[str, Any]]:
    return table.to_dict("records")


def _sorts_as(text: Any, value: Any) -> bool:
    """Whether a cell's text is sorted as its value would be, so that the page need not say the value too."""
    try:
        return float(text) == float(_sort_key(value))
    except ValueError:
        return str(text) == _sort_key(value)


def _sort_key(value: Any) -> str:
    """What a cell is sorted by; nothing for NaN, which comes last."""
    if isinstance(value, float):
        return "" if math.isnan(value) else f"{value:.8g}"
    return str(value)
