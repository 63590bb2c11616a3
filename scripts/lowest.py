"""Write constraints that pin every dependency in setup.cfg to its floor, for tests with the lowest versions.

python -m scripts.lowest > lowest.txt
python -m pip install --constraint lowest.txt --editable '.[cpu,demo,dev]'
"""

import configparser
import dataclasses
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
OURS = "teachercache"
REQUIREMENT = re.compile(r"(?P<name>[\w.-]+)(\[(?P<extras>[\w, -]+)\])?(>=(?P<floor>[\w.]+))?$")


@dataclasses.dataclass(frozen=True)
class Requirement:
    """A line of setup.cfg: a distribution, its extras, and its lowest version ("" without one)."""

    name: str
    extras: tuple[str, ...]
    floor: str


def canonical(name: str) -> str:
    """Return the normalized name of a distribution (PEP 503)."""
    return re.sub(r"[-_.]+", "-", name).lower()


def parse(line: str) -> Requirement:
    """Return the parts of a requirement; raise a ValueError if it has another form than NAME[EXTRAS]>=FLOOR."""
    found = REQUIREMENT.match(line.strip())
    if not found:
        raise ValueError(f"setup.cfg: {line.strip()}: write NAME>=FLOOR or NAME[EXTRA]>=FLOOR")
    extras = tuple(extra.strip() for extra in (found["extras"] or "").split(",") if extra.strip())
    return Requirement(found["name"], extras, found["floor"] or "")


def read_setup() -> dict[str, list[Requirement]]:
    """Return the requirements in setup.cfg: install_requires under "", and those of each extra.

    An extra that names others (`teachercache[eval,s3]`) has their requirements.
    """
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg", encoding="utf-8")
    texts = {"": config["options"]["install_requires"], **config["options.extras_require"]}
    lists = {
        extra: [parse(line) for line in text.splitlines() if line.strip()] for extra, text in texts.items()
    }

    def expanded(extra: str) -> list[Requirement]:
        return [
            one
            for requirement in lists[extra]
            for one in (
                [inner for name in requirement.extras for inner in expanded(name)]
                if requirement.name == OURS
                else [requirement]
            )
        ]

    return {extra: expanded(extra) for extra in lists}


def constraints() -> list[str]:
    """Return a line `NAME==FLOOR` for each distribution of setup.cfg.

    Raises:
        ValueError: A requirement has no floor, or two requirements of one distribution have different ones.
    """
    floors: dict[str, str] = {}
    for requirement in [one for group in read_setup().values() for one in group]:
        name = canonical(requirement.name)
        if not requirement.floor:
            raise ValueError(f"setup.cfg: {requirement.name} has no floor: write {requirement.name}>=VERSION")
        if floors.setdefault(name, requirement.floor) != requirement.floor:
            raise ValueError(f"setup.cfg: {name} has two floors: {floors[name]} and {requirement.floor}")
    return [f"{name}=={floor}" for name, floor in sorted(floors.items())]


def main() -> int:
    """Print the constraints, and return the exit status."""
    print(*constraints(), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
