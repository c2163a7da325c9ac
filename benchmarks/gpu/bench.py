"""The equipment of a part: its meter, its rows, its shapes and its time."""

import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field

from benchmarks.gpu.meter import Meter
from benchmarks.gpu.plan import Shape
from benchmarks.gpu.rows import Rows, reason


@dataclass
class Bench:
    meter: Meter
    rows: Rows
    shapes: list[Shape]
    toy: bool = False  # sizes for a CPU
    peers: bool = True
    deadline: float = field(default_factory=lambda: time.monotonic() + 600)

    @property
    def seconds_left(self) -> float:
        return self.deadline - time.monotonic()

    def attempt(self, what: str, function: Callable[[], object], ours: bool = True) -> bool:
        """Calls the function. If it raises, or no time is left, that is recorded and the part goes on."""
        if self.seconds_left < 1:
            self.rows.not_run(what, "no time left", ours=False)
            return False
        try:
            function()
        except Exception as error:
            traceback.print_exc()
            self.rows.not_run(what, reason(error), ours)
            self.meter.sync()  # raises after a sticky error, which the rest of the part would only repeat
            return False
        return True
