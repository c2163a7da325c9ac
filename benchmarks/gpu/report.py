"""The results of a part in a few lines of plain text."""

from collections.abc import Sequence

from benchmarks.gpu.rows import Row

SHOWN = 24  # lines of a table


def summary(part: str, status: str, seconds: float, why: str, rows: list[Row]) -> str:
    lines = [f"== {part}: {status}{', ' + why if why else ''} ({seconds:.0f} s)"]
    of = {
        kind: [row for row in rows if row["kind"] == kind] for kind in ("timing", "check", "bar", "not run")
    }
    for row in rows:
        if row["kind"] in ("machine", "ceilings", "note"):
            lines.append(
                "  " + ", ".join(f"{k} {cell(v)}" for k, v in row.items() if k not in ("part", "kind"))
            )
    lines += [
        f"  {row['what']} spills {row['spills']} registers"
        for row in rows
        if row["kind"] == "kernel" and row["spills"]
    ]
    lines += timings(of["timing"])
    lines += not_run(of["not run"])
    wrong = [row for row in of["check"] if not row["met"]]
    lines += [
        f"  WRONG    {row['what']}: {cell(row['measured'])}, at most {cell(row['limit'])} {row['note']}"
        for row in wrong
    ]
    if of["check"]:
        lines.append(f"  {len(of['check']) - len(wrong)} of {len(of['check'])} checks right")
    lines += [
        f"  {'met' if row['met'] else 'missed':6}   {row['what']}: {cell(row['measured'])}, "
        f"at most {cell(row['limit'])} ({row['by']})"
        for row in of["bar"]
    ]
    return "\n".join(lines) + "\n"


def not_run(rows: list[Row]) -> list[str]:
    """One line for each reason."""
    reasons: dict[str, list[str]] = {}
    for row in rows:
        reasons.setdefault(row["why"], []).append(row["what"])
    return [
        f"  not run  {', '.join(names[:3])}{f' and {len(names) - 3} more' if names[3:] else ''}: {why}"
        for why, names in reasons.items()
    ]


def timings(rows: list[Row]) -> list[str]:
    """A table of times. Rows with a `case` are a sweep: only the library's own choice and the best appear."""
    swept = [row for row in rows if "case" in row]
    return table([row for row in rows if "case" not in row]) + table(best(swept))


def best(rows: list[Row]) -> list[Row]:
    found = []
    for case in dict.fromkeys(row["case"] for row in rows):
        of_case = [row for row in rows if row["case"] == case]
        fastest = min(of_case, key=lambda row: float(row["graph_ms"] or row["ms"]))
        found += [row for row in of_case if row.get("own") or row is fastest]
    return found


def table(rows: Sequence[Row]) -> list[str]:
    known = ("graph_ms", "ms", "host_ms", "extra_MiB", "TB_per_s", "TFLOP_per_s")
    columns = tuple(c for c in known if any(row.get(c) is not None for row in rows))
    cells = [("", *columns)]
    cells += [(row["what"], *(cell(row.get(column)) for column in columns)) for row in rows[:SHOWN]]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns) + 1)]
    lines = [
        "  "
        + line[0].ljust(widths[0])
        + "".join(f"  {x:>{w}}" for x, w in zip(line[1:], widths[1:], strict=True))
        for line in cells
    ]
    left_out = [f"  and {len(rows) - SHOWN} more"] if len(rows) > SHOWN else []
    return lines + left_out if rows else []


def cell(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else "" if value is None else str(value)
