"""Where clauses: what is refused, in one sentence, and what is left of quantiles."""

import duckdb
import pytest

from data.where import Where, WhereError


@pytest.mark.parametrize(
    ("clause", "words"),
    [
        ("a >", "not one SQL condition"),
        ("a > 1; DROP TABLE rows", "not one SQL condition"),
        ("a > 1) GROUP BY (a", "not one SQL condition"),
        ("a > 1) LIMIT (3", "not one SQL condition"),
        ("true) UNION SELECT 1 FROM rows WHERE (true", "not one SQL condition"),
        ("a > (SELECT max(a) FROM rows)", "own columns"),
        ("EXISTS (SELECT 1)", "own columns"),
        ("row_number() OVER () < 3", "own columns"),
        ("a = ?", "own columns"),
        ("* > 3", "own columns|not one SQL condition"),
        ("quantile(1.5) < a", r"in \[0, 1\], got 1.5"),
        ("a > quantile(a)", "probability must be a number"),
        ("quantile(0.5) < quantile(0.25)", r"column > quantile\(p\)"),
        ("quantile(0.5)", r"column > quantile\(p\)"),
        ("a > quantile(1, 2, 3)", r"column > quantile\(p\)"),
        ("a > quantile('x')", "probability must be a number"),
    ],
)
def test_what_is_no_condition_on_a_row_is_refused_in_one_sentence(clause, words):
    with pytest.raises(WhereError, match=words) as raised:
        Where(clause)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("clause", "quantiles"),
    [
        ("a > quantile(0.25)", [("a", 0.25)]),
        ("quantile(1/4) <= a AND b < quantile(0.9)", [("a", 0.25), ("b", 0.9)]),
        ("a BETWEEN quantile(0.1) AND quantile(0.9)", [("a", 0.1), ("a", 0.9)]),
        ("a * b >= quantile(0.5)", [("(a * b)", 0.5)]),
        ("b > 2 * quantile(a, 0.5) -- a comment", [("a", 0.5)]),
        ("NOT (a > QUANTILE(0.5)) OR c IN ('x', 'y')", [("a", 0.5)]),
        ("a > 3", []),
    ],
)
def test_quantiles_are_found_and_replaced(clause, quantiles):
    where = Where(clause)
    assert [(q.expression, q.probability) for q in where.quantiles] == quantiles
    sql = where.sql([1.5] * len(quantiles))
    assert "quantile" not in sql.lower()
    database = duckdb.connect()
    database.execute("CREATE TABLE rows AS SELECT 2.0 AS a, 3.0 AS b, 'x' AS c")
    assert database.execute(f"SELECT count(*) FROM rows WHERE {sql}").fetchone() is not None


def test_columns_are_known_without_regard_to_case():
    where = Where("Width * height > 4 AND caption ILIKE '%Cat%' AND \"odd name\" IS NOT NULL")
    assert where.columns == ["width", "height", "caption", "odd name"]
    where.check_columns(["WIDTH", "height", "caption", "odd name"])
    with pytest.raises(WhereError, match="no column 'caption'; did you mean 'captions'"):
        where.check_columns(["width", "height", "captions", "odd name"])


def test_files_cannot_be_read():
    sql = Where("caption = 'x' OR read_text('/etc/passwd') IS NOT NULL").sql([])
    database = duckdb.connect(config={"enable_external_access": "false"})
    with pytest.raises(duckdb.Error):
        database.execute(f"SELECT 1 FROM (SELECT 'y' AS caption) WHERE {sql}").fetchall()


def test_a_column_that_a_filter_writes_is_told_by_the_filter():
    there = ["caption", "height", "sharpness", "width"]
    with pytest.raises(WhereError, match="no column 'motion'; `millrace curate filter=motion` writes it; there are"):
        Where("motion > 1").check_columns(there)
    with pytest.raises(WhereError, match="did you mean 'clip_aesthetic', which `millrace curate filter=aesthetic`"):
        Where("clip_aestetic > 1").check_columns(there)
    with pytest.raises(WhereError, match=r"did you mean 'sharpness'\? there are"):
        Where("sharpnes > 1").check_columns(there)
    with pytest.raises(WhereError, match="no column 'xyz'; there are"):
        Where("xyz > 1").check_columns(there)
