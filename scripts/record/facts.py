"""Digest what the record keeps of a cache, a run, an export or printed output, and list differences.

A digest is the first 16 hex digits of a sha256. Losses of runs are kept as they are. Documentation strings, versions,
format numbers, times and checksums are left out.
"""

import hashlib
import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

DROPPED = re.compile(
    r"doc|command|checksum|format|versions?|\w+_version|meta|identity|seconds|seconds_\w+|\w+_seconds",
    re.IGNORECASE,
)

CARDS = ("README.md", "digests.json")  # they follow from the other files


def digest(*parts: bytes | str) -> str:
    """Return 16 hex digits of a sha256."""
    found = hashlib.sha256()
    for part in parts:
        found.update(part.encode() if isinstance(part, str) else part)
    return found.hexdigest()[:16]


def plain(value: Any) -> Any:
    """Return a JSON value without what is no number of ours: versions, times, wording."""
    if isinstance(value, dict):
        return {key: plain(inner) for key, inner in value.items() if not DROPPED.fullmatch(key)}
    return [plain(inner) for inner in value] if isinstance(value, list) else value


def of_json(text: str) -> str:
    """Return the digest of a JSON text's values, whatever their order."""
    return digest(json.dumps(plain(json.loads(text)), sort_keys=True))


def of_tensors(path: Path) -> dict[str, str]:
    """Return a digest of the tensors in a safetensors file sorted by name, and a digest without the names."""
    import torch
    from safetensors.torch import load_file

    found = {}
    for name, value in sorted(load_file(path).items()):
        raw = value.contiguous().flatten().view(torch.uint8).numpy().tobytes()
        found[name] = digest(str(value.dtype), str(tuple(value.shape)), raw)
    return {"named": digest(json.dumps(found)), "values": digest(*sorted(found.values()))}


def of_table(path: Path) -> str:
    """Return the digest of a Parquet file's values."""
    import pyarrow.parquet

    return digest(repr(pyarrow.parquet.read_table(path).to_pydict()))


def of_file(path: Path) -> Any:
    """Return the digest of a file by what it holds."""
    if path.suffix == ".safetensors":
        return of_tensors(path)
    if path.name in ("tokenizer.json", "vocab.json"):  # words may be called what is dropped elsewhere
        return digest(json.dumps(json.loads(path.read_text()), sort_keys=True))
    if path.suffix == ".json":
        return of_json(path.read_text())
    return of_table(path) if path.suffix == ".parquet" else digest(path.read_bytes())


def of_folder(folder: Path) -> dict[str, Any]:
    """Return the digest of each file but model cards, digests.json, pages and figures of a report."""
    left_out = (".html", ".png") if folder.parent.name == "reports" else ()
    paths = [path for path in files_of(folder) if path.name not in CARDS and path.suffix not in left_out]
    return {path.relative_to(folder).as_posix(): of_file(path) for path in paths}


def files_of(folder: Path) -> list[Path]:
    """Return every file below a folder, sorted."""
    return [path for path in sorted(folder.rglob("*")) if path.is_file()]


OF_THE_MACHINE = ("build.log", ".lock", "pictures")  # they hold times


def of_cache(cache: Path) -> dict[str, Any]:
    """Return digests of every array's values and chunk files, of the attributes and of every other file."""
    import zarr

    found: dict[str, Any] = {}
    for place in sorted(cache.glob("*/zarr.json")):
        folder = place.parent
        values: Any = zarr.open_array(folder, mode="r")[:]
        raw = repr(values.tolist()) if values.dtype.kind in ("O", "T", "U") else values.tobytes()
        chunks = [path for path in files_of(folder) if path != place]
        parts = [part for path in chunks for part in (path.relative_to(cache).as_posix(), path.read_bytes())]
        found[folder.name] = {"values": f"{values.dtype} {values.shape} {digest(raw)}"}
        found[folder.name] |= {"chunks": digest(*parts), "zarr.json": of_json(place.read_text())}
    names = {path.relative_to(cache).as_posix(): path for path in files_of(cache)}
    rest = [name for name in names if name.split("/")[0] not in (*found, *OF_THE_MACHINE, "zarr.json")]
    about = json.loads((cache / "zarr.json").read_text())["attributes"]
    about = plain(about | {f"spec.{key}": value for key, value in about.pop("spec").items()})
    attributes = {key: digest(json.dumps(value, sort_keys=True)) for key, value in about.items()}
    return {"arrays": found, "files": {name: of_file(names[name]) for name in rest}, "attributes": attributes}


def of_run(run: Path) -> dict[str, Any]:
    """Return each loss, and digests of each other term over all steps, of the weights and of the whole state.

    `state` is the last checkpoint's: heads, moments and random states too. It takes much room and is removed.
    """
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    terms = sorted({name for line in lines for name in line} - {"loss", "step"})
    found: dict[str, Any] = {"loss": [line["loss"] for line in lines]}
    found["terms"] = {name: digest(repr([line.get(name) for line in lines])) for name in terms}
    found["weights"] = of_tensors(run / "model.safetensors")
    found["state"] = of_tensors(sorted((run / "checkpoints").glob("*.safetensors"))[-1])["values"]
    if (run / "best" / "model.safetensors").exists():
        found["best"] = of_tensors(run / "best" / "model.safetensors")
        found["evals"] = of_file(run / "evals.jsonl")
    shutil.rmtree(run / "checkpoints")
    return found


def leaves(value: Any, name: str = "") -> dict[str, Any]:
    """Return a nested value's numbers and words by their path; lists of numbers as they are."""
    if isinstance(value, list) and any(isinstance(inner, dict | list) for inner in value):
        value = {str(i): inner for i, inner in enumerate(value)}
    if not isinstance(value, dict):
        return {name: value}
    inner = [leaves(one, f"{name}.{key}") for key, one in value.items()]
    return {path: leaf for found in inner for path, leaf in found.items()}


def of_output(text: str) -> Any:
    """Return what a command printed: numbers and words of JSON lines, any other line as it is."""
    lines = text.splitlines()
    values: list[Any] = [plain(json.loads(line)) if line.startswith("{") else [line] for line in lines]
    if len(values) == 1 and set(values[0]) == {"results", "skipped"}:  # of `student eval`
        values = values[0]["results"]
    return leaves(values)


def facts_of(name: str, path: Path, output: Path) -> Any:
    """Return the facts about the result of a command or about its output."""
    if name.startswith("prints/"):
        return of_output(output.read_text())
    if name.startswith("runs/"):
        return of_run(path)
    if name.endswith(".zarr"):
        return of_cache(path)
    if name.endswith(".faiss"):
        return {"index": digest(path.read_bytes()), "facts": of_json(Path(f"{path}.json").read_text())}
    if name.startswith("data/") and path.is_dir():
        return digest(json.dumps(of_folder(path)))
    return of_folder(path) if path.is_dir() else of_file(path)


def machine() -> dict[str, str]:
    """Return what bits depend on besides the code."""
    import torch

    text = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    cpu = dict(re.findall(r"^(model name|cpu family|model)\s*: (.*)$", text, re.MULTILINE))
    known = torch.backends.cpu.get_cpu_capability()
    return {"torch": torch.__version__, "cpu": ", ".join(cpu.values()), "capability": known}


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Return a line for each value that differs, is missing or is new."""
    lines = []
    for name in sorted(old.keys() | new.keys()):
        before, after = (leaves(made.get(name, {})) for made in (old, new))
        if "" in after and isinstance(new[name], dict):
            lines.append(f"{name}: {after['']}")
            continue
        for path in sorted(before.keys() | after.keys()):
            was, now = before.get(path, "nothing"), after.get(path, "nothing")
            if was == now:
                continue
            if isinstance(was, list) and isinstance(now, list) and len(was) == len(now):
                step = next(i for i, pair in enumerate(zip(was, now, strict=True)) if pair[0] != pair[1])
                was, now, path = was[step], now[step], f"{path}[{step}]"
            lines.append(f"{name}{path}: {was} before, {now} now")
    return lines


def write_record(path: Path, made: Mapping[str, Any]) -> None:
    """Write the record, one line for each command."""
    lines = [f"  {json.dumps(name)}: {json.dumps(facts)}" for name, facts in sorted(made.items())]
    head = f'{{"machine": {json.dumps(machine())},\n "made": {{\n'
    path.write_text(head + ",\n".join(lines) + "\n}}\n")


def compare(path: Path, made: Mapping[str, Any], names: set[str]) -> int:
    """Say what differs from the record; return 1 if anything does."""
    record = json.loads(path.read_text())
    if record["machine"] != machine():
        print(f"WARNING: the record is of {record['machine']}, this is {machine()}: bits may differ")
    found = differences({name: facts for name, facts in record["made"].items() if name in names}, made)
    print(*found, sep="\n", end="\n" if found else "")
    count = {
        kind: sum(name.startswith(kind) and not name.endswith(".faiss") for name in made)
        for kind in ("runs/", "caches/", "exports/")
    }
    words = f"{count['runs/']} runs, {count['caches/']} caches, {count['exports/']} exports"
    print(f"{words} compared: {len(found)} differences" if found else f"{words} equal")
    return int(bool(found))
