"""Text in columns."""

from collections.abc import Sequence


def columns(rows: Sequence[Sequence[str]]) -> str:
    """Names to the left, values to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip() for row in rows
    )
