"""The run sheet: all parts, the most important first, and the time limit of each.

The parent imports this and nothing from PyTorch, so that it survives whatever happens to the device.
"""

from dataclasses import dataclass

Shape = tuple[int, int, int]  # N, D, V

SHAPES: dict[str, Shape] = {
    "x".join(map(str, shape)): shape
    for shape in (
        (8192, 4096, 128256),
        (16384, 2048, 151936),
        (4096, 8192, 262144),
        (32768, 576, 49152),
        (16384, 768, 50257),  # rows at odd addresses
    )
}
TOY: dict[str, Shape] = {"24x16x129": (24, 16, 129)}  # for the dry run


@dataclass(frozen=True)
class Part:
    """An entry of the run sheet, which runs in a process of its own."""

    name: str  # "hazards", or "linear:8192x4096x128256"
    limit: float  # seconds after which it is ended
    least: float = 12.0  # with fewer seconds left it is not started

    @property
    def group(self) -> str:
        return self.name.partition(":")[0]

    @property
    def shape(self) -> str:
        return self.name.partition(":")[2]


def sheet(shapes: list[str]) -> list[Part]:
    """All parts, with the contests of these shapes: correctness first, then the speed that matters most."""
    contests = [(Part(f"logits:{s}", 60, 20), Part(f"linear:{s}", 80, 25)) for s in shapes]
    first, others = contests[:1], contests[1:]
    policies = [Part(f"policy:{s}", 60, 20) for s in shapes]
    return [
        Part("machine", 45, 5),
        Part("hazards", 75),
        *(part for pair in first for part in pair),
        *policies[:1],
        Part("overhead", 30),
        Part("accuracy", 90, 20),
        Part("graphs", 45),
        *(part for pair in others for part in pair),
        Part("small", 30),
        *policies[1:],
        Part("kernels", 60),
        Part("chunks", 60),
        Part("compile", 60, 25),
        Part("odd", 30),
        Part("products", 30),
    ]


GROUPS = list(dict.fromkeys(part.group for part in sheet(["any"])))


def chosen(parts: list[Part], only: list[str]) -> list[Part]:
    """The parts with these names or groups, or all if there are none; always the one for the machine."""
    return [p for p in parts if not only or p.name in only or p.group in [*only, "machine"]]
