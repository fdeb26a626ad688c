"""Two models' figures as a table of text."""

Row = tuple[str, float, float]


def side_by_side(rows: list[Row], headers: tuple[str, str]) -> str:
    """Rows of (name, figure of the first, figure of the second), with the ratio of the second to the first."""
    width = max(len(name) for name, _, _ in rows)
    lines = [f"{'':{width}}  {headers[0]:>9}  {headers[1]:>9}  {'ratio':>6}"]
    lines += [f"{name:{width}}  {a:9.2f}  {b:9.2f}  {b / a:6.3f}" for name, a, b in rows]
    return "\n".join(lines)
