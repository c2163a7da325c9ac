"""What a part has to work with."""

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
        """Calls it; one that raises, or for which no time is left, is on record and the part goes on."""
        if self.seconds_left < 1:
            self.rows.not_run(what, "no time left", ours=False)
            return False
        try:
            function()
        except Exception as error:
            traceback.print_exc()
            self.rows.not_run(what, reason(error), ours)
            self.meter.sync()  # after a sticky error this raises: the rest of the part would only repeat it
            return False
        return True
