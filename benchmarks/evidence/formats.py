"""Numbers for the pages."""

from nvamp.study.metrics import Estimate


def plain(value: Estimate | None, decimals: int = 3) -> str:
    """`4.473 ± 0.012`: mean and half of the 95% interval; "–" if there is no value."""
    if value is None:
        return "–"
    half = "" if value.half_width is None else f" ± {value.half_width:.{decimals}f}"
    return f"{value.mean:.{decimals}f}{half}".replace("-", "−")


def mean_only(value: Estimate | None, decimals: int = 3) -> str:
    """`+0.035`: a difference, if the interval of few seeds would say nothing."""
    return "–" if value is None else f"{value.mean:+.{decimals}f}".replace("-", "−")


def size(value: Estimate | None, decimals: int = 3) -> str:
    """`0.035`: how large a difference is, for a sentence that says which way it goes."""
    return "–" if value is None else f"{abs(value.mean):.{decimals}f}"


def signed(value: Estimate | None, decimals: int = 3) -> str:
    """`+0.035 (−0.049 to +0.119)`: a difference and its 95% interval; "–" if there is no value."""
    if value is None:
        return "–"
    low_high = ""
    if (half := value.half_width) is not None:
        low_high = f" ({value.mean - half:+.{decimals}f} to {value.mean + half:+.{decimals}f})"
    return f"{value.mean:+.{decimals}f}{low_high}".replace("-", "−")


def starred(value: Estimate | None, decimals: int = 1) -> str:
    """`−1.8*`: a difference, with a star if its 95% interval excludes zero."""
    clear = value is not None and value.half_width is not None and abs(value.mean) > value.half_width
    return mean_only(value, decimals) + ("*" if clear else "")
