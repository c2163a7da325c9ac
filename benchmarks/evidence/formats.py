"""Numbers for the pages."""

from nvamp.study.metrics import Estimate


def _shown(value: float, decimals: int, sign: str = "") -> str:
    """A number with its decimals, and no sign if these are all zero."""
    rounded = round(value, decimals) or 0.0  # not −0.0
    return f"{rounded:{sign if rounded else ''}.{decimals}f}".replace("-", "−")


def plain(value: Estimate | None, decimals: int = 3) -> str:
    """`4.473 ± 0.012`: mean and half of the 95% interval; "–" if there is no value."""
    if value is None:
        return "–"
    half = "" if value.half_width is None else f" ± {_shown(value.half_width, decimals)}"
    return _shown(value.mean, decimals) + half


def mean_only(value: Estimate | None, decimals: int = 3) -> str:
    """`+0.035`: a difference, if the interval of few seeds would say nothing."""
    return "–" if value is None else _shown(value.mean, decimals, "+")


def size(value: Estimate | None, decimals: int = 3) -> str:
    """`0.035`: how large a difference is, for a sentence that says which way it goes."""
    return "–" if value is None else _shown(abs(value.mean), decimals)


def signed(value: Estimate | None, decimals: int = 3) -> str:
    """`+0.035 (−0.049 to +0.119)`: a difference and its 95% interval; "–" if there is no value."""
    if value is None or value.half_width is None:
        return mean_only(value, decimals)
    low, high = (_shown(value.mean + side * value.half_width, decimals, "+") for side in (-1, 1))
    return f"{_shown(value.mean, decimals, '+')} ({low} to {high})"


def around(value: Estimate | None, decimals: int = 1) -> str:
    """`+0.4 ± 0.8`: the same, short enough for a table."""
    if value is None or value.half_width is None:
        return mean_only(value, decimals)
    return f"{_shown(value.mean, decimals, '+')} ± {_shown(value.half_width, decimals)}".replace(
        " ", "\u00a0"
    )


def starred(value: Estimate | None, decimals: int = 1) -> str:
    """`−1.8*`: a difference, with a star if its 95% interval excludes zero."""
    clear = value is not None and value.half_width is not None and abs(value.mean) > value.half_width
    return mean_only(value, decimals) + ("*" if clear else "")
