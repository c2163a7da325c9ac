"""The rooms of the library, and which of them may use which: arrows point one way."""

import ast
import re
from pathlib import Path

import nvamp

HERE = Path(nvamp.__file__).parent
# From the top down; a room uses those below it, and itself.
FLOORS = [
    ["__main__"],
    ["cli"],
    ["study"],
    ["integrations"],
    ["functional", "losses"],
    ["apply"],
    ["fused", "dtensors"],
    ["fused_kernels"],
    ["objectives", "engine"],
    ["options"],
    ["distributed"],
    ["ranks"],
]
LEVEL = {room: level for level, rooms in enumerate(FLOORS) for room in rooms}
# Imports inside a function, of what PyTorch or a user may be without, may look up.
LAZY = {("options", "engine"), ("engine", "dtensors")}


def room_of(module: str) -> str | None:
    """The room that a module of nvamp is in; None for `nvamp` itself."""
    parts = module.split(".")
    return parts[1] if parts[0] == "nvamp" and len(parts) > 1 else None


def imports(path: Path) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module == "nvamp":
            found += [f"nvamp.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.append(node.module)
    return found


def test_arrows_point_one_way() -> None:
    upward = []
    for path in HERE.rglob("*.py"):
        room = path.relative_to(HERE).with_suffix("").parts[0]
        if room == "__init__":
            continue
        for module in imports(path):
            other = room_of(module)
            if other is None or other == room or other not in LEVEL:
                continue
            if LEVEL[other] <= LEVEL[room] and (room, other) not in LAZY:
                upward.append(f"{path.relative_to(HERE)} imports {module}")
    assert upward == []


def test_every_room_is_on_a_floor() -> None:
    rooms = {path.relative_to(HERE).with_suffix("").parts[0] for path in HERE.rglob("*.py")}
    assert rooms - {"__init__"} == LEVEL.keys()


def test_contributing_draws_this_house() -> None:
    text = Path(__file__, "../../CONTRIBUTING.md").resolve().read_text(encoding="utf-8")
    drawn = re.findall(r"^    (\w+(?: · \w+)*) {2,}\w", text, re.MULTILINE)
    floors = [set(rooms) - {"__main__"} for rooms in FLOORS if rooms != ["__main__"]]
    assert [set(line.split(" · ")) for line in drawn if not line.startswith("make")] == floors
