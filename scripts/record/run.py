"""A record of numbers: every teacher's cache, every recipe's losses and weights, every export, on drawn data.

    python -m scripts.record write                     # make everything anew, write tests/record.json
    python -m scripts.record compare                   # make everything anew, say what differs (exit code 1)
    python -m scripts.record compare --only 'runs/clip_kd*'

A change that moves code and changes no number leaves the record as it is. Bits are compared, so write and
compare on one machine with one torch; each process computes in one thread (OMP_NUM_THREADS=1), two processes
at a time. COMMANDS names every command once: where an option or a setting gets another name, it is changed
there alone. Nothing is downloaded. What is recorded, and what is left out: `facts.py`.
"""

import argparse
import fnmatch
import importlib.util
import json
import os
import re
import runpy
import shlex
import shutil
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from scripts.record.commands import commands, needed_by, with_needed
from scripts.record.facts import compare, facts_of, write_record

ROOT = Path(__file__).resolve().parents[2]
RECORD = ROOT / "tests" / "record.json"
MODULES = {"tc": "teachercache", "student": "student"}
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
ENVIRONMENT |= {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu", "HF_HUB_OFFLINE": "1"}

# --- running them ----------------------------------------------------------------------------------


def warm_up() -> None:
    """Import other people's packages once, and make sure that our own are those of this clone."""
    for module in MODULES.values():
        spec = importlib.util.find_spec(module)
        if spec is None or not spec.origin or not Path(spec.origin).resolve().is_relative_to(ROOT):
            sys.exit(f"error: {module} is {spec and spec.origin}, not the one in {ROOT}")
    for name in ("torch", "open_clip", "transformers", "deepspeed", "diffusers", "timm", "zarr", "pyarrow"):
        importlib.import_module(name)


def log_of(name: str, work: Path) -> Path:
    """Return where a command's log lies."""
    return work / "log" / f"{name.replace('/', '+')}.txt"


def call(words: list[str]) -> None:
    """Run one command in this process, as its own interpreter would."""
    first, sys.argv = words[0], words
    if first in globals():
        globals()[first](*words[1:])
    elif first in MODULES:
        runpy.run_module(MODULES[first], run_name="__main__", alter_sys=True)
    else:  # -m scripts....
        sys.argv = words[1:]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)


def attempt(function: Callable[..., None], *words: Any) -> int:
    """Run a function as a process of its own would be: return its exit code, its error goes to stderr."""
    try:
        function(*words)
    except SystemExit as error:
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    return 0


def write_facts(name: str, place: Path, out: Path) -> None:
    """Write the facts about a result next to its log."""
    place.with_suffix(".json").write_text(json.dumps(facts_of(name, out, place.with_suffix(".out"))))


def fork(name: str, command: str, work: Path, variables: Mapping[str, str]) -> int:
    """Run a command in a process of its own, which looks at what it made; return its number at once."""
    process = os.fork()
    if process:
        return process
    code = 1
    try:
        os.environ.update(variables)
        os.chdir(work)
        rank = variables.get("RANK", "0")
        place = log_of(name, work) if rank == "0" else log_of(f"{name}-{rank}", work)
        for suffix, number in ((".out", 1), (".txt", 2)):
            os.dup2(os.open(place.with_suffix(suffix), os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
        code = attempt(call, shlex.split(command))
        if rank == "0" and code == 0:
            code = attempt(write_facts, name, place, work / name)
    finally:
        os._exit(code)


def ranks_of(name: str) -> list[dict[str, str]]:
    """Return what torchrun puts into the environment of each process; nothing of a single one."""
    if not name.endswith(("@two", "@both", "@zero3")):
        return [{}]
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = str(sock.getsockname()[1])
    shared = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [{**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(2)]


def start(name: str, command: str, work: Path) -> list[int]:
    """Start a command's processes; return their numbers."""
    (work / name).parent.mkdir(parents=True, exist_ok=True)
    words = re.sub(r"\bOUT\b", name, command)
    return [fork(name, words, work, variables) for variables in ranks_of(name)]


def run_all(names: list[str], table: Mapping[str, str], work: Path) -> dict[str, Any]:
    """Run commands, two processes at a time, each when what it needs is there; return what each made."""
    made: dict[str, Any] = {}
    running: dict[int, str] = {}
    failed: set[str] = set()
    waiting, begin = list(names), time.monotonic()
    needs = {name: needed_by(name, table) & set(names) for name in names}
    while waiting or running:
        for name in [name for name in waiting if needs[name] <= set(made)]:
            if len(running) + len(ranks_of(name)) <= 2:
                waiting.remove(name)
                running |= dict.fromkeys(start(name, table[name], work), name)
        if not running:
            break
        process, status = os.wait()
        name = running.pop(process)
        if status and name not in failed:
            failed.add(name)
            last = log_of(name, work).read_text().strip().splitlines()[-1:]
            print(f"FAILED {name}: {''.join(last)}", flush=True)
        elif name not in failed and name not in running.values():
            made[name] = json.loads(log_of(name, work).with_suffix(".json").read_text())
            print(f"{time.monotonic() - begin:6.0f} s  {len(made):3} of {len(names)}  {name}", flush=True)
    return made | {name: {"": "failed"} for name in failed} | {name: {"": "not made"} for name in waiting}


def save_clip(out: str, width: str, seed: str) -> None:
    """Write a random CLIP of that embedding width as open_clip's folder."""
    import open_clip
    import torch
    from safetensors.torch import save_file

    vision = {"image_size": 16, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8}
    text = {"context_length": 32, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 2}
    config: dict[str, Any] = {"embed_dim": int(width), "vision_cfg": vision, "text_cfg": text}
    torch.manual_seed(int(seed))
    model = open_clip.CLIP(**json.loads(json.dumps(config)))
    Path(out).mkdir()
    save_file(model.state_dict(), Path(out, "open_clip_model.safetensors"))
    view = {"mean": [0.5] * 3, "std": [0.5] * 3}
    Path(out, "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": view}))


def save_lite(out: str, run: str) -> None:
    """Join the towers of clip-lite with the heads that a run trained, as scripts/teachers/clip_lite.py does."""
    from safetensors.torch import load_file

    from teachercache.teachers.clip.lite import assemble

    assemble(load_file(Path(run, "model.safetensors")), out)


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("action", choices=("write", "compare"))
    parser.add_argument("--only", default="*", metavar="GLOB", help="what is compared; what it needs is made")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="work in this new folder, and leave it")
    options = parser.parse_args()
    os.environ.update(ENVIRONMENT | {"PYTHONPATH": str(ROOT)})
    sys.path.insert(0, str(ROOT))
    warm_up()
    table = commands()
    chosen = {name for name in table if fnmatch.fnmatchcase(name, options.only)}
    work = options.keep.resolve() if options.keep else Path(tempfile.mkdtemp(prefix="record-"))
    (work / "log").mkdir(parents=True)
    made = run_all(with_needed(chosen, table), table, work)
    failed = [name for name, facts in made.items() if isinstance(facts, dict) and "" in facts]
    made = {name: facts for name, facts in made.items() if name in chosen}
    code = compare(RECORD, made, chosen) if options.action == "compare" else int(bool(failed))
    if options.action == "write" and not failed:
        earlier = json.loads(RECORD.read_text())["made"] if options.only != "*" and RECORD.exists() else {}
        write_record(RECORD, earlier | made)
        print(f"{RECORD}: {len(made)} written, {RECORD.stat().st_size / 1000:.0f} kB")
    if code or options.keep:
        print(f"logs and results are in {work}")
    else:
        shutil.rmtree(work)
    return code
