"""Two processes against one: the same gradients, the same parameters after steps, the same losses of a whole run.

The processes are started once for the module; each test reads what they wrote.
"""

import dataclasses
import multiprocessing.connection
import os
import shutil
import socket
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import own_recipes
import own_teachers
import pytest
import torch
from processes import start
from safetensors.torch import load_file
from small import contained, read_lines, train_here, train_words, zero_noise
from small_bart import micro_bart

from student.distributed import first_row, gather, mean_over_ranks, num_ranks
from student.models.seq2seq.model import Seq2Seq
from student.models.seq2seq.texts import Marks, Reader
from student.models.two_tower.loading import TINY, build_two_tower
from student.models.two_tower.model import TwoTower
from student.recipe import Optim, Progress, Run, Setting
from student.recipes.clip import CLIP
from student.recipes.clip_kd import CLIP_KD
from student.recipes.psd import PSD
from student.recipes.sds_clip import SDS_CLIP, freeze_all_but_norms
from student.recipes.vlkd import VLKD
from student.training import checkpoint
from student.training.batch_norm import set_up_batch_norm
from student.training.engine import clamp_scales, learning_rate, start_engine
from student.training.step import TrainStep
from teachercache.data.manifest import make_manifest
from teachercache.data.sample import Sample
from teachercache.teachers.clip.loading import build_module

WORLD, ROWS = 2, 8
WIDTHS = {
    "clip": None,
    "psd": None,
    "clip_kd-equal": 64,
    "clip_kd-differing": 16,
    "clip_kd-all": 16,
    "sds_clip": None,
    "vlkd": 16,
    "rn50": None,
    "rn50-norms": None,
}  # vit-micro is 64 wide
ENGINES = [(name, 0) for name in WIDTHS]
ENGINES += [("vlkd", 2)]
ENGINES += [(name, stage) for name in ("clip_kd-differing", "clip_kd-all") for stage in (1, 2, 3)]
ENGINES += [("sds_clip", stage) for stage in (2, 3)]
ALL = {
    "fd": 10.0,
    "mfd": 10.0,
    "gd": 0.1,
    "afd": 1.0,
    "cross": 1.0,
    "hidden": 10.0,
    "hidden_image": "0:3",
    "hidden_text": "0:1",
}
FIELDS = {
    "image_emb": 16,
    "text_emb": 16,
    "image_hidden_3": 24,
    "text_hidden_1": 64,
    "image_emb@1": 64,
    "text_emb@1": 64,
    "image_hidden_3@1": 16,
    "text_hidden_1@1": 16,
}
OPTIM = Optim(
    lr=1e-3, warmup=0.0, eps=1e-4
)  # a large eps: Adam divides rounding errors of tiny gradients by themselves
STEPS = 2
HALF_PSD = dataclasses.replace(
    PSD, constants=dataclasses.replace(PSD.constants, schedule="constant", alpha_end=0.5)
)


def make_step(name: str, world: int = 1) -> TrainStep:
    """The same step in every process, as `student train` makes it."""
    torch.manual_seed(3)
    if name == "sds_clip":
        return make_sds_step()
    if name.startswith("rn50"):
        return make_resnet_step(world, norms_only=name == "rn50-norms")
    if WIDTHS[name] is None:
        return TrainStep(CLIP if name == "clip" else HALF_PSD, build_two_tower("vit-micro"), None)
    if name == "vlkd":
        return make_vlkd()
    changes = ALL if name == "clip_kd-all" else {"fd": 10.0}  # 2000 would hide the other terms' errors
    constants = dataclasses.replace(CLIP_KD.constants, model="vit-micro", **changes)
    recipe = dataclasses.replace(CLIP_KD, constants=constants)
    shapes = {field: (width,) for field, width in fields_of(name).items()}
    student = CLIP_KD.student(constants, setting_of(shapes))
    heads = CLIP_KD.distill_heads(constants, student, shapes)
    return TrainStep(recipe, student, heads)


def setting_of(shapes: dict[str, tuple[int, ...]]) -> Setting:
    """Of one row, which these students do not look at."""
    manifest = make_manifest("one", Path(), [Sample(key="0", image="", texts=("a",))])
    return Setting(shapes, manifest, np.zeros(1, int))


def make_resnet_step(world: int, *, norms_only: bool) -> TrainStep:
    """CLIP with a small ResNet, whose BatchNorm sees the rows of all processes, or is frozen where norms are tuned."""
    cfg = {**TINY["vit-micro"], "vision_cfg": {"image_size": 64, "layers": [1, 1, 1, 1], "width": 8}}
    module, preprocess = build_module(cfg, {})
    for layer in module.modules():
        if isinstance(layer, torch.nn.BatchNorm2d):  # open_clip begins with zeros, which hide gradients
            for values in (layer.weight, layer.bias, layer.running_mean, layer.running_var):
                torch.nn.init.uniform_(values, 0.5, 1.5)
    for block in list(module.modules()):  # smooth: a ReLU beside 0 makes another gradient of a rounding error
        for name, layer in list(block.named_children()):
            if isinstance(layer, torch.nn.ReLU):
                setattr(block, name, torch.nn.SiLU())
    student = TwoTower(module, cfg, preprocess, None)
    if norms_only:
        freeze_all_but_norms(student)
    step = TrainStep(CLIP, student, None)
    set_up_batch_norm(step, micro_batches=False, ranks=world, device="cpu")
    return step


def make_sds_step() -> TrainStep:
    """LayerNorms and h_w behind a UNet that is a matrix; the regulariser weighs as much as the task."""
    constants = dataclasses.replace(
        SDS_CLIP.constants, model="vit-micro", sds_weight=1.0, unet_rows=3, init=""
    )
    recipe = dataclasses.replace(SDS_CLIP, constants=constants)
    shapes = {"latent": own_teachers.LATENT}
    student = recipe.student(constants, setting_of(shapes))
    heads = recipe.distill_heads(constants, student, shapes)
    module = own_teachers.make_diffusion(unet=own_teachers.LinearUNet(own_teachers.random_matrix().float()))
    return TrainStep(recipe, student, heads, gradient_teacher=SimpleNamespace(module=module))


def make_vlkd() -> TrainStep:
    """Of vlkd, which reads ids here and needs no tokenizer for it."""
    bart = micro_bart(dropout=0.0)[0]
    reader = Reader(None, Marks(0, 1, 2, 4), np.empty(0), stage="distil", masks=6, share=0.15, max_text=16)
    student = Seq2Seq(bart, reader, visual="cls")
    student.connect(16)
    constants = dataclasses.replace(VLKD.constants, ttdm=10.0)
    heads = VLKD.distill_heads(constants, student, {"image_emb": (16,), "text_emb": (16,)})
    return TrainStep(dataclasses.replace(VLKD, constants=constants), student, heads)


def fields_of(name: str) -> dict[str, int]:
    """Teacher fields and their widths: of two teachers where all terms are on."""
    if name == "clip_kd-all":
        return FIELDS
    return {} if WIDTHS[name] is None else dict.fromkeys(("image_emb", "text_emb"), WIDTHS[name])


def make_batch(name: str, number: int, rank: int, world: int) -> dict:
    """This rank's rows of a batch that is the same for all."""
    random = torch.Generator().manual_seed(100 + number)
    size = 64 if name.startswith("rn50") else 32
    batch = {"image": torch.randn(ROWS, 3, size, size, generator=random)}
    batch["text"] = torch.randint(1, 5000, (ROWS, 16), generator=random)
    for field, width in fields_of(name).items():
        batch[field] = torch.randn(ROWS, width, generator=random)
    batch["mask_noise"] = torch.rand(ROWS, 16, generator=random)
    if name == "sds_clip":
        batch |= {
            "t": torch.randint(0, 1000, (ROWS,), generator=random),
            "noise": torch.randn(ROWS, *own_teachers.LATENT, generator=random),
            "text_states": torch.randn(ROWS, 6, 16, generator=random),
        }
    if name == "vlkd":
        for key in ("text", "source"):  # of other lengths
            batch[key] = torch.randint(5, 280, (ROWS, 9), generator=random)
            batch[key][torch.arange(9) > torch.arange(ROWS)[:, None] + 2] = 1
        batch["prompt_length"] = torch.zeros(ROWS, dtype=torch.long)
    share = ROWS // world
    batch = {key: value[rank * share : (rank + 1) * share] for key, value in batch.items()}
    scales = {
        "clip": {},
        "psd": {},
        "sds_clip": {},
        "vlkd": {},
        "clip_kd-all": {"logit_scale": 3.0, "logit_scale@1": 2.0},
    }.get(name, {"logit_scale": 3.0})
    return batch | {key: torch.tensor(value) for key, value in scales.items()}


def trained(step: TrainStep) -> list:
    """Names and parameters that are not frozen."""
    return [(name, parameter) for name, parameter in step.named_parameters() if parameter.requires_grad]


def gradients(name: str, rank: int, world: int) -> dict[str, torch.Tensor]:
    """What data-parallel engines do: backward on each rank, then the mean over ranks."""
    step = make_step(name, world)
    loss, terms, notes = step(make_batch(name, 0, rank, world), Progress(0, 1))
    loss.backward()
    found = {"loss": loss.detach(), **{key: value.detach() for key, value in (terms | notes).items()}}
    for key, parameter in trained(step):
        found[f"grad {key}"] = mean_over_ranks(parameter.grad)
    moved = {key: value for key, value in step.named_buffers() if "running" in key}
    return found | {f"buffer {key}": value.clone() for key, value in moved.items()}


def after_steps(name: str, stage: int, rank: int, world: int) -> dict[str, torch.Tensor]:
    """Losses and parameters after some steps of the DeepSpeed engine."""
    from deepspeed.utils import safe_get_full_fp32_param

    run = Run(data="", cache="", out="", zero=stage)
    engine = start_engine(make_step(name, world), OPTIM, run, ROWS // world)
    found = {}
    for number in range(STEPS):
        for group in engine.optimizer.param_groups:
            group["lr"] = learning_rate(OPTIM, number, STEPS)
        loss, _, _ = engine(make_batch(name, number, rank, world), Progress(number, STEPS))
        engine.backward(loss)
        engine.step()
        clamp_scales(engine)
        found[f"loss {number}"] = loss.detach().clone()
    for key, parameter in trained(engine.module):
        value = safe_get_full_fp32_param(parameter) if stage else parameter.detach()
        found[key] = value.clone()
    engine.destroy()
    return found


def restored(out: Path, rank: int) -> torch.Tensor:
    """Whether a rank's random numbers go on where they were when a checkpoint was saved."""
    engine = start_engine(make_step("clip"), OPTIM, Run(data="", cache="", out=""), ROWS // WORLD)
    torch.manual_seed(10 + rank)  # as in a run, where dropout differs between ranks
    before = torch.get_rng_state()
    checkpoint.save(engine, out, 1)
    torch.manual_seed(99)
    assert checkpoint.resume_newest(engine, out) == 1
    return torch.tensor(torch.equal(torch.get_rng_state(), before))


def gather_cases(rows: torch.Tensor, weights: torch.Tensor) -> dict[str, torch.Tensor]:
    """Scalars of gathered rows whose gradients a gather can get wrong: uneven weights, rows that meet, a shared sum."""
    whole = gather(rows)
    twice = gather(rows) + gather(2 * rows)  # one gradient tensor for both
    return {
        "linear": (whole * weights).sum(),
        "pairs": ((whole @ whole.T) ** 2 * weights[:, :1]).sum(),
        "sum": whole.sum(),
        "shared": (twice * weights).sum(),
    }


def gather_gradients(rank: int, world: int) -> dict[str, torch.Tensor]:
    random = torch.Generator().manual_seed(0)
    everything = torch.randn(ROWS, 3, generator=random, dtype=torch.float64)
    weights = torch.randn(ROWS, 3, generator=random, dtype=torch.float64)
    share = ROWS // world
    found = {}
    for name in ("linear", "pairs", "sum", "shared"):
        rows = everything[rank * share : (rank + 1) * share].clone().requires_grad_()
        gather_cases(rows, weights)[name].backward()
        found[name] = rows.grad
    facts = {
        "num_ranks": num_ranks(),
        "first_row": first_row(share),
        "mean": mean_over_ranks(torch.tensor(float(rank))),
    }
    return found | {name: torch.as_tensor(value) for name, value in facts.items()}


def work(rank: int, port: int, out: Path, words: list[str], stopping: list[str]) -> None:
    """One of two processes."""
    from student.cli import main
    from student.training.engine import start_distributed

    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(WORLD),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    torch.set_num_threads(1)
    start_distributed("cpu")
    torch.save(gather_gradients(rank, WORLD), out / f"gather-{rank}.pt")
    for name in WIDTHS:
        torch.save(gradients(name, rank, WORLD), out / f"gradients-{name}-{rank}.pt")
    code = main(words)
    torch.save(torch.tensor(code), out / f"code-{rank}.pt")
    code = main([*words, "--micro-batch", "2", "--eval-every", "2", "--out", str(out / "micro")])
    torch.save(torch.tensor(code), out / f"micro-{rank}.pt")
    for stage in ("0", "3"):
        code = main(
            [*stopping, "--set", f"run.zero={stage}", "--out", str(out / f"halved-{stage}"), "--resume"]
        )
        torch.save(torch.tensor(code), out / f"resumed-{stage}-{rank}.pt")
    upward = train_words(
        Path(words[4]),
        Path(words[6]),
        out / "upward",
        "--steps",
        3,
        "--set",
        "run.zero=3",
        "--set",
        "optim.lr=0.02",
        "--set",
        "optim.warmup=0",
        recipe="own_recipes:UPWARD",
    )
    torch.save(torch.tensor(main(upward)), out / f"upward-{rank}.pt")
    (out / "saved").mkdir(exist_ok=True)
    torch.save(restored(out / "saved", rank), out / f"restored-{rank}.pt")
    for name, stage in ENGINES:
        torch.save(after_steps(name, stage, rank, WORLD), out / f"engine-{name}-{stage}-{rank}.pt")
    if rank == 0:  # schedulers signal one process, or all at different steps
        os.environ[own_recipes.STOP_VARIABLE] = "1"
    torch.save(torch.tensor(main(stopping)), out / f"stopped-{rank}.pt")


def start_two(target, *arguments) -> list:
    """Two fresh processes; rank first, then a port, then the arguments."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    return [start(target, rank, port, *arguments) for rank in range(WORLD)]


def join_all(processes: list) -> None:
    """Wait until all processes end. When one fails, end the others, which would wait for it in a collective.

    No deadline is needed: a rank that ends closes its connections, so that the others fail, and gloo has a timeout.
    """
    running = {process.sentinel: process for process in processes}
    try:
        while running:
            for sentinel in multiprocessing.connection.wait(running):
                if running.pop(sentinel).exitcode:
                    return
    finally:
        for process in processes:
            process.kill()
            process.join()


@pytest.fixture(scope="module")
def pair(tmp_path_factory, squares, cache):
    """What two processes found, by name and rank."""
    out = tmp_path_factory.mktemp("pair")
    words = train_words(squares, cache, out / "run", "--steps", 4)
    with pytest.MonkeyPatch.context() as environment:  # runs of one process, for two to go on with
        environment.setenv(own_recipes.STOP_VARIABLE, "2")
        for stage in (0, 3):
            half = out / f"halved-{stage}"
            assert train_here(squares, cache, half, "--steps", 6, recipe="own_recipes:STOPPING") == 143
    stopping = train_words(squares, cache, out / "stopped", "--steps", 6, recipe="own_recipes:STOPPING")
    processes = start_two(work, out, words, stopping)
    join_all(processes)
    return out


def found(pair: Path, name: str, rank: int = 0) -> dict[str, torch.Tensor]:
    path = pair / f"{name}-{rank}.pt"
    assert path.exists(), f"the processes ended before {name}; see their stderr above"
    return torch.load(path, weights_only=True)


def unseen(key: str) -> bool:
    """A bias of attention's keys moves all of a softmax's logits alike: its gradient is rounding alone."""
    return key.endswith("k_proj.bias")  # also of a ResNet's attention pool


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


# ----------------------------------------------------------------------------------------------------
# Gather


def test_ranks_know_their_rows(pair):
    for rank in (0, 1):
        facts = found(pair, "gather", rank)
        assert (int(facts["num_ranks"]), int(facts["first_row"]), float(facts["mean"])) == (2, rank * 4, 0.5)


@pytest.mark.parametrize("name", ["linear", "pairs", "sum", "shared"])
def test_the_gradient_of_gather_is_world_times_the_true_one(pair, name):
    """Both ranks compute the same whole loss; the mean over ranks that an engine takes divides by world again."""
    expected = gather_gradients(0, 1)[name]
    ours = torch.cat([found(pair, "gather", rank)[name] for rank in (0, 1)])
    torch.testing.assert_close(ours, WORLD * expected, rtol=1e-12, atol=1e-12)


def test_on_one_process_everything_is_the_identity():
    rows = torch.randn(3, 2, requires_grad=True)
    assert gather(rows) is rows
    assert mean_over_ranks(rows) is rows
    assert (num_ranks(), first_row(5)) == (1, 0)


# ----------------------------------------------------------------------------------------------------
# Gradients and steps


@pytest.mark.parametrize("name", list(WIDTHS))
def test_gradients_of_two_ranks_are_those_of_one(pair, name):
    one = gradients(name, 0, 1)
    for rank in (0, 1):
        two = found(pair, f"gradients-{name}", rank)
        assert two.keys() == one.keys()
        for key, value in one.items():
            if unseen(key):
                continue
            assert value.norm() > 0, key
            bar = 3e-5 if name == "rn50" else 1e-5  # nine BatchNorms of a few values magnify rounding
            assert relative(two[key], value) < bar, f"rank {rank}, {key}"
    heads = {key for key in one if key.startswith("grad heads")}
    assert len(heads) == {
        "clip": 0,
        "psd": 0,
        "clip_kd-equal": 1,
        "clip_kd-differing": 5,
        "clip_kd-all": 22,
        "sds_clip": 1,
        "vlkd": 1,
    }.get(name, 0)


@pytest.mark.parametrize(("name", "stage"), ENGINES)
def test_steps_of_two_ranks_are_those_of_one(pair, name, stage):
    with contained():
        one = after_steps(name, 0, 0, 1)
    before = dict(make_step(name).named_parameters())
    for rank in (0, 1):
        two = found(pair, f"engine-{name}-{stage}", rank)
        assert two.keys() == one.keys()
        for key, value in one.items():
            if key.startswith("loss"):
                assert relative(two[key], value) < 1e-5, key
                continue
            if unseen(key):
                continue
            moved = (value - before[key].detach()).norm()
            assert moved > 0, key
            assert (two[key] - value).norm() < 1e-3 * moved, f"rank {rank}, {key}"


def test_ranks_hold_the_same_parameters(pair):
    for name, stage in ENGINES:
        left, right = (found(pair, f"engine-{name}-{stage}", rank) for rank in (0, 1))
        assert all(torch.equal(left[key], right[key]) for key in left), (name, stage)


@pytest.mark.parametrize("rank", [0, 1])
def test_the_random_numbers_of_every_rank_are_restored(pair, rank):
    assert bool(found(pair, "restored", rank))


def test_a_whole_run_of_two_processes_has_the_losses_of_one(pair, squares, cache, tmp_path):
    assert [int(found(pair, "code", rank)) for rank in (0, 1)] == [0, 0]
    assert train_here(squares, cache, tmp_path / "one", "--steps", 4) == 0
    one, two = read_lines(tmp_path / "one"), read_lines(pair / "run")
    assert [line["step"] for line in two] == [0, 1, 2, 3]
    for a, b in zip(one, two, strict=True):
        assert a.keys() == b.keys()
        for key, value in a.items():
            assert b[key] == pytest.approx(value, rel=1e-4), key


def test_micro_batches_of_two_processes_have_the_losses_of_whole_batches(pair):
    assert [int(found(pair, "micro", rank)) for rank in (0, 1)] == [0, 0]
    whole, micro = read_lines(pair / "run"), read_lines(pair / "micro")
    assert len(micro) == 4
    assert (
        len((pair / "micro" / "evals.jsonl").read_text().splitlines()) == 2
    )  # one of them evaluates, both wait
    assert {path.name for path in (pair / "micro" / "best").iterdir()} == {
        "run.json",
        "model.safetensors",
        "digests.json",
    }
    for a, b in zip(whole, micro, strict=True):
        for key, value in a.items():
            assert b[key] == pytest.approx(value, rel=1e-4), key


def test_scales_are_clamped_in_two_processes_at_zero_3(pair):
    """A scale is one number: two ranks cannot share it evenly."""
    assert [int(found(pair, "upward", rank)) for rank in (0, 1)] == [0, 0]
    lines = read_lines(pair / "upward")
    assert max(line["scale"] for line in lines) == pytest.approx(100, rel=1e-5)
    assert max(line["icl_scale"] for line in lines) == pytest.approx(100, rel=1e-5)


@pytest.fixture(scope="module")
def whole_run(squares, cache, tmp_path_factory):
    """Six steps of one process that nothing stopped."""
    out = tmp_path_factory.mktemp("whole") / "run"
    assert train_here(squares, cache, out, "--steps", 6, recipe="own_recipes:STOPPING") == 0
    return out


def compare_runs(run: Path, whole: Path) -> None:
    """Losses and weights are the same but for rounding."""
    lines = read_lines(run)
    assert [line["step"] for line in lines] == [0, 1, 2, 3, 4, 5]
    for a, b in zip(lines, read_lines(whole), strict=True):
        for key, value in b.items():
            assert a[key] == pytest.approx(value, rel=1e-4), key
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (run, whole))
    assert ours.keys() == theirs.keys()
    for (
        name,
        tensor,
    ) in theirs.items():  # the gradient of the keys' bias is 0 but for rounding, which Adam scales up
        if not name.endswith("in_proj_bias"):
            assert relative(ours[name], tensor) < 1e-4, name


@pytest.mark.parametrize("stage", [0, 3])
def test_two_processes_go_on_where_one_stopped(pair, whole_run, stage):
    """The moments of Adam too: without them the steps behind the resume would be several times as long."""
    assert [int(found(pair, f"resumed-{stage}", rank)) for rank in (0, 1)] == [0, 0]
    compare_runs(pair / f"halved-{stage}", whole_run)


@zero_noise
@pytest.mark.parametrize("stage", [0, 2, 3])
def test_one_process_goes_on_where_two_stopped(pair, whole_run, stage, squares, cache, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(pair / "stopped", run)
    words = ("--steps", 6, "--resume", "--set", f"run.zero={stage}")
    assert train_here(squares, cache, run, *words, recipe="own_recipes:STOPPING") == 0
    compare_runs(run, whole_run)


def test_a_stop_of_one_process_stops_all_at_the_same_step(pair, squares, cache, tmp_path):
    assert [int(found(pair, "stopped", rank)) for rank in (0, 1)] == [143, 143]
    steps = [line["step"] for line in read_lines(pair / "stopped")]
    assert steps in ([0, 1], [0, 1, 2])
    names = [path.name for path in (pair / "stopped" / "checkpoints").iterdir()]
    assert names == [f"step-{len(steps):08d}.safetensors"]
