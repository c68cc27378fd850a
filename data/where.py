"""A `where` clause: one SQL condition over manifest and score columns, checked before it runs.

`quantile(p)` in a comparison stands for the p-quantile of what it is compared with, over all rows of the manifest:
`motion > quantile(0.25)` drops the quarter that moves least. `quantile(column, p)` may stand anywhere.
"""

import difflib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import duckdb

from conf.errors import first_line
from data.curation.columns import WRITTEN_BY

_ORDERINGS = (
    "COMPARE_LESSTHAN",
    "COMPARE_LESSTHANOREQUALTO",
    "COMPARE_GREATERTHAN",
    "COMPARE_GREATERTHANOREQUALTO",
)
_SUBQUERIES = ("SUBQUERY", "WINDOW", "LAMBDA", "STAR", "PARAMETER", "POSITIONAL_REFERENCE")


class WhereError(ValueError):
    """The clause is not one valid condition over the columns there are."""


@dataclass(frozen=True)
class Quantile:
    """One quantile that a clause needs: SQL of the expression it is over, and the probability."""

    expression: str
    probability: float


class Where:
    """A parsed clause.

    Args:
        text: the SQL condition.

    Attributes:
        columns: names of the columns it uses, lower-cased, in order.
        quantiles: the quantiles whose values `sql` needs, in order.
    """

    def __init__(self, text: str) -> None:
        self.text = text
        self._database = duckdb.connect(config={"enable_external_access": "false"})
        self._condition = self._parse_condition()
        self.columns: list[str] = []
        self._nodes: list[dict[str, Any]] = []
        self.quantiles: list[Quantile] = []
        self._visit(self._condition, None)

    def sql(self, values: Iterable[float | None]) -> str:
        """The clause as plain SQL, with these values for the quantiles."""
        values = list(values)
        assert len(values) == len(self._nodes)
        replaced = iter(values)

        def replace(node: Any) -> Any:
            if isinstance(node, dict):
                if _is_quantile(node):
                    value = next(replaced)
                    sql = "NULL" if value is None else f"CAST('{float(value)!r}' AS DOUBLE)"
                    return self._parse(f"SELECT {sql}")["select_list"][0]
                return {k: replace(v) for k, v in node.items()}
            return [replace(v) for v in node] if isinstance(node, list) else node

        return self._deparse(replace(self._condition))

    def check_columns(self, available: Iterable[str]) -> None:
        """Raise WhereError for the first column that is not among those available."""
        names = sorted(available)
        lower = {name.lower() for name in names}
        for column in self.columns:
            if column not in lower:
                raise WhereError(
                    f"where={self.text!r}: there is no column {column!r}; {_hint(column, names)}there are: "
                    f"{', '.join(names)}; `millrace curate` writes columns of scores"
                )

    def conjuncts(self) -> list["Where"]:
        """The conditions that all must hold, in order: the parts that AND joins at the top, or the clause itself."""
        waiting, parts = [self._condition], []
        while waiting:
            node = waiting.pop(0)
            if node.get("type") == "CONJUNCTION_AND":
                waiting = [*node["children"], *waiting]
            else:
                parts.append(Where(_bare(self._deparse(node))))
        return parts

    def threshold(self, values: Iterable[float | None]) -> tuple[str, float] | None:
        """The column and the number, if the clause is a comparison (<, <=, >, >=) of one column with one number.

        Args:
            values: of the clause's quantiles; there is no threshold where that value is None.
        """
        node = self._parse(f"SELECT 1 FROM rows WHERE ({self.sql(values)}\n)")["where_clause"]
        sides = [node.get("left"), node.get("right")]
        if node.get("type") not in _ORDERINGS or len(self.columns) != 1:
            return None
        column, number = sides if sides[0]["class"] == "COLUMN_REF" else sides[::-1]
        if column["class"] != "COLUMN_REF":
            return None
        try:
            row = self._database.execute("SELECT CAST(" + self._deparse(number) + " AS DOUBLE)").fetchone()
        except duckdb.Error:  # not a number, or the same column once more
            return None
        return (self.columns[0], float(row[0])) if row is not None and row[0] is not None else None

    def _visit(self, node: Any, compared_with: dict[str, Any] | None) -> None:
        if isinstance(node, list):
            for child in node:
                self._visit(child, compared_with)
            return
        if not isinstance(node, dict):
            return
        kind = node.get("class")
        if kind in _SUBQUERIES:
            raise WhereError(
                f"where={self.text!r}: only a condition on a row's own columns is allowed ({str(kind).lower()} found)"
            )
        if kind == "COLUMN_REF":
            name = node["column_names"][-1].lower()
            if name not in self.columns:
                self.columns.append(name)
            return
        if _is_quantile(node):
            self._add_quantile(node, compared_with)
            return
        if kind == "COMPARISON":
            self._visit(node["left"], node["right"])
            self._visit(node["right"], node["left"])
            return
        if kind == "BETWEEN":
            self._visit(node["input"], None)
            self._visit([node["lower"], node["upper"]], node["input"])
            return
        for child in node.values():
            self._visit(child, compared_with)

    def _add_quantile(self, node: dict[str, Any], compared_with: dict[str, Any] | None) -> None:
        arguments = [a.get("expression", a) for a in node.get("arguments", node.get("children", []))]
        over = compared_with if len(arguments) == 1 else arguments[0] if len(arguments) == 2 else None
        if over is None or _contains_quantile(over):
            raise WhereError(f"where={self.text!r}: write `column > quantile(p)` or `quantile(column, p)`")
        try:
            value = self._database.execute("SELECT " + self._deparse(arguments[-1])).fetchone()
            probability = float(value[0]) if value is not None else -1.0
        except (duckdb.Error, TypeError, ValueError) as error:
            raise WhereError(f"where={self.text!r}: a quantile's probability must be a number") from error
        if not 0 <= probability <= 1:
            raise WhereError(f"where={self.text!r}: a quantile's probability must be in [0, 1], got {probability}")
        self._visit(over, None)
        self._nodes.append(node)
        self.quantiles.append(Quantile(self._deparse(over), probability))

    def _parse_condition(self) -> dict[str, Any]:
        node = self._parse(f"SELECT 1 FROM rows WHERE ({self.text}\n)")
        plain = self._parse("SELECT 1 FROM rows WHERE (true\n)")
        condition = node.pop("where_clause", None)  # absent in a UNION
        del plain["where_clause"]
        if node != plain:  # the clause closes our parenthesis and goes on with GROUP BY, LIMIT ...
            raise WhereError(f"where={self.text!r} is not one SQL condition")
        assert condition is not None
        return condition

    def _parse(self, sql: str) -> dict[str, Any]:
        """The syntax tree of one SELECT statement."""
        try:
            row = self._database.execute("SELECT json_serialize_sql(?::VARCHAR)", [sql]).fetchone()
        except duckdb.Error as error:
            raise WhereError(f"where={self.text!r}: {first_line(error)}") from error
        assert row is not None
        parsed = json.loads(row[0])
        if parsed["error"]:
            raise WhereError(f"where={self.text!r} is not one SQL condition: {parsed['error_message']}")
        if len(parsed["statements"]) != 1:
            raise WhereError(f"where={self.text!r} is not one SQL condition but several statements")
        return parsed["statements"][0]["node"]

    def _deparse(self, expression: dict[str, Any]) -> str:
        """SQL of an expression's syntax tree."""
        node = self._parse("SELECT 1")
        node["select_list"] = [expression]
        statement = {"error": False, "statements": [{"node": node, "named_param_map": []}]}
        row = self._database.execute("SELECT json_deserialize_sql(?::JSON)", [json.dumps(statement)]).fetchone()
        assert row is not None
        return row[0].removeprefix("SELECT ")


def _hint(column: str, names: list[str]) -> str:
    """What may have been meant, of the columns there are and those that filters write; or which filter writes it."""
    if column in WRITTEN_BY:
        return f"`millrace curate filter={WRITTEN_BY[column]}` writes it; "
    near = difflib.get_close_matches(column, {*names, *WRITTEN_BY}, n=1, cutoff=0.6)
    if not near:
        return ""
    filter_of = "" if near[0] in names else f", which `millrace curate filter={WRITTEN_BY[near[0]]}` writes"
    return f"did you mean {near[0]!r}{filter_of}? "


def _bare(sql: str) -> str:
    """An expression without the parentheses around all of it, which DuckDB writes."""
    if not (sql.startswith("(") and sql.endswith(")")):
        return sql
    depth = 0
    for place, character in enumerate(sql):
        depth += (character == "(") - (character == ")")
        if depth == 0:
            return sql[1:-1] if place == len(sql) - 1 and "'" not in sql and '"' not in sql else sql
    return sql


def _is_quantile(node: dict[str, Any]) -> bool:
    return node.get("class") == "FUNCTION" and str(node.get("function_name")).lower() == "quantile"


def _contains_quantile(node: Any) -> bool:
    if isinstance(node, dict):
        return _is_quantile(node) or any(_contains_quantile(v) for v in node.values())
    return isinstance(node, list) and any(_contains_quantile(v) for v in node)
