"""Every command whose numbers are recorded, by the name of its result."""

import re
from collections.abc import Iterable, Mapping

# What a command makes -> the command, OUT in it being what it makes. A command waits for what its words name.

BUILD = "tc build --out OUT --workers 0 --device cpu --batch-size 8"
DRAWN = f"{BUILD} --data data/pairs"
LIMIT = f"{DRAWN} --limit 4 --weights random:0"
WORDS = "--outputs embeddings,tokens,random_tokens"
CLIP = "--data data/pairs --set model=vit-micro"
TRAIN = "student train --out OUT --seed 1 --steps 20 --batch-size 8 --set run.workers=0 --recipe"
PAIRS = f"{CLIP} --cache caches/pairs/tiny.zarr"
TD = f"{TRAIN} clip_td --data data/tasks/vcr1 --cache caches/vcr --set model=uniter-micro"
SDS = f"{TRAIN} sds_clip {CLIP} --cache caches/sd/sd-tiny.zarr --set optim.lr=1e-3"
BOTH = "--cache caches/pairs/tiny.zarr,caches/pairs/wide.zarr"
VLKD = f"{TRAIN} vlkd --data data/pairs --cache caches/pairs/tiny.zarr --set max_text=32"
KD = f"{TRAIN} clip_kd {PAIRS}"
ALONE = {"crd": 1, "fd": 2000, "icl": 1, "mfd": 2000, "gd": 1000, "afd": 1, "cross": 1}  # beside the task
TERMS = " ".join(f"--set {term}={weight}" for term, weight in ALONE.items())
HIDDEN = "--set hidden=2000 --set hidden_image=0:0,0:1 --set hidden_text=0:1"
TASKS = {"vcr": "data/tasks/vcr1", "snli_ve": "data/tasks/snli_ve", "vqa": "data/vqa"}

COMMANDS: dict[str, str] = {
    # drawn data
    "data/pairs": "-m scripts.datasets.scenes --out OUT --num 64 --size 64 --seed 0 --test 0.2",
    "data/tasks": "-m scripts.datasets.scene_vcr_snli_ve --out OUT --num 24 --size 64 --seed 3 --test 0.25",
    "data/vqa": "-m scripts.datasets.easy_vqa --out OUT --limit 4",
    "data/compositions": "-m scripts.datasets.scene_winoground_aro --out OUT --num 6",
    "data/noisy.parquet": "tc manifest data/pairs --noise shuffle=0.4 --noise-seed 1 --out OUT",
    "data/partial.parquet": "tc manifest data/pairs --noise partial=0.4 --noise-seed 1 --out OUT",
    "data/near.parquet": "tc manifest data/pairs --noise near=0.4 --noise-seed 1 --out OUT",
    # random teachers in open_clip's folders: width, seed
    "teachers/tiny": "save_clip OUT 16 0",
    "teachers/wide": "save_clip OUT 24 1",
    # the clip family
    "caches/pairs/tiny.zarr": f"{DRAWN} --teacher teachers/tiny --outputs embeddings,patches,hidden:0+1",
    "caches/pairs/wide.zarr": f"{DRAWN} --teacher teachers/wide --outputs embeddings,hidden",
    "caches/pairs/bf16.zarr": f"{DRAWN} --teacher teachers/wide --precision bf16",
    "caches/pairs/noisy.zarr": f"{BUILD} --teacher teachers/tiny --data data/noisy.parquet",
    "caches/pairs/words.zarr": f"{DRAWN} --teacher teachers/tiny --outputs embeddings,tokens:2,random_tokens",
    "caches/pairs/views.zarr": f"{DRAWN} --teacher teachers/tiny --views 3 --augment flip=0.3 "
    "--augment scale_min=0.5",
    "caches/pairs/run.zarr": f"{DRAWN} --teacher runs/clip",
    "caches/pairs/towers.zarr": f"{DRAWN} --teacher clip-lite-towers",
    "caches/pairs/lite.zarr": f"{DRAWN} --teacher clip-lite --weights models/clip-lite "
    "--outputs embeddings,patches,hidden,tokens,random_tokens",
    "caches/random/b32.zarr": f"{LIMIT} --teacher clip-vit-b32 "
    "--outputs embeddings,patches,hidden:3+11,tokens,random_tokens",
    "caches/random/b16.zarr": f"{LIMIT} --teacher clip-vit-b16 --outputs embeddings,patches,hidden",
    "caches/random/l14.zarr": f"{LIMIT} --teacher clip-vit-l14 --outputs embeddings,hidden",
    "caches/random/l14-336.zarr": f"{LIMIT} --teacher clip-vit-l14-336",
    "caches/random/rn50.zarr": f"{LIMIT} --teacher clip-rn50 --outputs embeddings,patches",
    "caches/random/rn50x16.zarr": f"{LIMIT} --teacher clip-rn50x16",
    **{
        f"caches/{task}/clip.zarr": f"{BUILD} --teacher teachers/tiny --data {data} {WORDS}"
        for task, data in TASKS.items()
    },
    # regions and diffusion
    **{
        f"caches/{task}/regions.zarr": f"{BUILD} --teacher regions-lite --data {data} --outputs regions:4"
        for task, data in TASKS.items()
    },
    "caches/random/regions-lite.zarr": f"{DRAWN} --teacher regions-lite --limit 8",
    "caches/random/regions.zarr": f"{LIMIT} --teacher regions --outputs regions:6",
    "caches/random/regions-vcr.zarr": f"{BUILD} --teacher regions --weights random:0 --limit 4 "
    "--data data/tasks/vcr1",
    "caches/sd/sd-tiny.zarr": f"{DRAWN} --teacher sd-tiny --outputs "
    "text_states,latents,unet_features:100+out,scores:2+seed=1+t=200-800",
    "caches/random/sd-v1-4.zarr": f"{LIMIT} --teacher sd-v1-4 --limit 1",
    "caches/random/sd-tiny.zarr": f"{LIMIT} --teacher sd-tiny --outputs text_states,unet_features,scores:2",
    # indexes beside a cache
    "caches/pairs/tiny.image_emb.faiss": "tc index caches/pairs/tiny.zarr",
    "caches/pairs/tiny.text_emb.faiss": "tc index caches/pairs/tiny.zarr --field text_emb --kind hnsw",
    "caches/pairs/wide.image_emb.faiss": "tc index caches/pairs/wide.zarr --kind ivf",
    # clip, psd
    "runs/clip": f"{TRAIN} clip {PAIRS}",
    "runs/clip_views": f"{TRAIN} clip {CLIP} --cache caches/pairs/views.zarr",
    "runs/clip_checkpointing": f"{TRAIN} clip {PAIRS} --set run.grad_checkpointing=true --set run.workers=1",
    "runs/clip_heads": f"{TRAIN} clip {CLIP} --cache caches/pairs/towers.zarr --set model=clip-lite-heads",
    "models/clip-lite": "save_lite OUT runs/clip_heads",
    "runs/clip_lite": f"{TRAIN} clip {CLIP} --cache caches/pairs/lite.zarr --steps 5 "
    "--set init=models/clip-lite",
    "runs/psd": f"{TRAIN} psd {PAIRS}",
    "runs/psd_cache": f"{TRAIN} psd {PAIRS} --set teacher=cache --set schedule=linear",
    "runs/psd_constant": f"{TRAIN} psd {PAIRS} --data data/noisy.parquet --cache caches/pairs/noisy.zarr "
    "--set schedule=constant --set teacher_temperature=0.2",
    # clip_kd
    "runs/clip_kd": KD,
    "runs/clip_kd_all": f"{KD} {TERMS} {HIDDEN}",
    **{
        f"runs/clip_kd_{term}": f"{KD} --set crd=0 --set fd=0 --set icl=0 --set {term}={weight}"
        for term, weight in ALONE.items()
    },
    "runs/clip_kd_hidden": f"{KD} --set crd=0 --set fd=0 --set icl=0 {HIDDEN}",
    "runs/clip_kd_average": f"{KD} {TERMS} {BOTH}",
    "runs/clip_kd_concat": f"{KD} {TERMS} {BOTH} --set ensemble=concat",
    "runs/clip_kd_views": f"{KD} --cache caches/pairs/views.zarr --set mfd=2000 --set mask_ratio=0.5",
    "runs/clip_kd_live": f"{KD} --live",
    "runs/clip_kd_bf16": f"{KD} --set run.precision=bfloat16 --set optim.max_grad_norm=1.0 --set optim.schedule=linear",
    "runs/clip_kd_init": f"{KD} --set init=runs/clip --eval-every 10 --set run.eval_task=zeroshot",
    # clip_td: students, tasks, stages, switches
    **{
        f"runs/clip_td_{task}_{student}_{stage}": f"{TRAIN} clip_td --data {data} --cache caches/{task} --set model={student}-micro --set stage={stage}"
        for task, data in TASKS.items()
        for student in ("uniter", "vl-bert", "villa")
        for stage in ("task", "adapt")
    },
    "runs/clip_td_adapted": f"{TD} --set init=runs/clip_td_vcr_uniter_adapt --set regime=low:4",
    "runs/clip_td_tiny": f"{TD} --set model=vl-bert-tiny",
    "runs/clip_td_semi": f"{TD} --set regime=semi:4 --set confidence=false --set choices=correct",
    "runs/clip_td_semi_adapt": f"{TD} --set regime=semi:4 --set stage=adapt",
    "runs/clip_td_zero": f"{TD} --set regime=zero --set select=random --set num_words=1 --set normalize=false",
    "runs/clip_td_qa2r": f"{TD} --set mode=qa2r --set select=none --set image_term=0",
    "runs/clip_td_bert": f"{TD} --set model=bert-micro --set distill_weight=0",
    "runs/clip_td_clip-1-linear": f"{TD} --set model=clip-1-linear --set fusion=cosine",
    "runs/clip_td_clip-3-linear": f"{TD} --set model=clip-3-linear",
    "runs/clip_td_clip-transformer": f"{TD} --set model=clip-transformer",
    "runs/clip_td_clip-tuned": f"{TD} --set model=clip-tuned --set init=teachers/tiny",
    # sds_clip
    "runs/sds_clip": f"{SDS} --set init=runs/clip --set sds_weight=0.1",
    "runs/sds_clip_sds": f"{SDS} --set init=runs/clip --set sds_weight=1 --set grad=sds --set latent_init=unit "
    "--set unet_rows=3",
    "runs/sds_clip_all": f"{SDS} --set train=all --set checkpoint=true --set latent_init=zero --set unit_embedding=false",
    "runs/sds_clip_bf16": f"{SDS} --set init=runs/clip --set unet_precision=bfloat16 --set t_min=200 "
    "--set t_max=500",
    "runs/sds_clip_features": f"{SDS} --set init=runs/clip --set objective=features --set sds_weight=1",
    "runs/sds_clip_none": f"{SDS} --set init=runs/clip --set objective=none",
    # vlkd
    "runs/vlkd": VLKD,
    "runs/vlkd_patches": f"{VLKD} --set visual=patches --set itcl=0 --set data_share=0.5",
    "runs/vlkd_scratch": f"{VLKD} --set scratch=true --set icti=0 --set tau=0.1",
    "runs/vlkd_caption": f"{VLKD} --set stage=caption --set init=runs/vlkd",
    "runs/vlkd_scst": f"{VLKD} --set stage=scst --set init=runs/vlkd_caption --steps 6",
    "runs/vlkd_vqa": f"{VLKD} --data data/vqa --cache caches/vqa/clip.zarr --set stage=vqa "
    "--set init=runs/vlkd",
    # exports
    **{
        f"exports/{run}-{form}": f"student export runs/{run} --format {form} --out OUT"
        for run in ("clip", "clip_kd", "sds_clip", "psd")
        for form in ("open_clip", "hf")
    },
    **{
        f"exports/{run}-{form}": f"student export runs/{run} --format {form} --out OUT"
        for run, form in (("clip_lite", "open_clip"), ("vlkd_vqa", "hf"))
    },
    # what commands print
    **{
        f"prints/{task}": f"student eval {models} --task {task} --data {data} --json"
        for task, models, data in (
            ("retrieval", "runs/clip_kd exports/clip-open_clip", "data/pairs"),
            ("zeroshot", "runs/clip_kd_init teachers/tiny", "data/pairs"),
            ("vcr", "runs/clip_td_vcr_uniter_task runs/clip_td_tiny caches/vcr/clip.zarr", TASKS["vcr"]),
            ("snli_ve", "runs/clip_td_snli_ve_vl-bert_task", TASKS["snli_ve"]),
            ("vqa", "runs/clip_td_vqa_villa_task", TASKS["vqa"]),
            ("aro", "runs/clip_kd_all teachers/tiny", "data/compositions/aro"),
            ("winoground", "runs/clip_kd sd-tiny --samples 2", "data/compositions/winoground"),
            ("captions", "runs/vlkd_caption", "data/pairs"),
        )
    },
    "prints/generate": "student generate runs/vlkd_caption --image data/pairs/test/heart/scene_000002.png",
    "prints/answer": "student generate exports/vlkd_vqa-hf --image data/pairs/test/heart/scene_000002.png "
    "--question 'What color is the heart?'",
    "prints/search": "tc search caches/pairs/tiny.zarr 'a red circle' --key test/heart/scene_000002 --json",
    "prints/verify": "tc verify caches/pairs/views.zarr --json",
    "reports/pairs": "tc analyze caches/pairs/tiny.zarr --against caches/pairs/wide.zarr --out OUT",
}

# The same once more: in two processes, in micro-batches, in both, and sharded
PARTS = {"@two": "", "@micro": "--micro-batch 4", "@both": "--micro-batch 2", "@zero3": "--set run.zero=3"}
REPEATED = {
    "runs/clip": ("@two", "@micro"),
    "runs/clip_kd": ("@two", "@micro", "@both", "@zero3"),
    "runs/clip_kd_all": ("@two", "@micro"),
    "runs/clip_kd_average": ("@two", "@micro"),
    "runs/clip_kd_concat": ("@two", "@micro"),
    "runs/clip_td_vcr_uniter_task": ("@two", "@micro"),
    "runs/clip_td_vcr_vl-bert_adapt": ("@two", "@micro"),
    "runs/clip_td_vqa_villa_task": ("@two", "@micro"),
    "runs/sds_clip": ("@two", "@micro"),
    "runs/sds_clip_features": ("@two", "@micro"),
    "runs/vlkd": ("@two", "@micro"),
    "runs/vlkd_scst": ("@two", "@micro"),
    "runs/psd": ("@two", "@micro"),
}


def commands() -> dict[str, str]:
    """Return every command, repeated ones under `NAME@HOW`."""
    names = [(name, how) for name, hows in REPEATED.items() for how in hows]
    return COMMANDS | {f"{name}{how}": f"{COMMANDS[name]} {PARTS[how]}" for name, how in names}


def needed_by(name: str, table: Mapping[str, str]) -> set[str]:
    """Return the commands whose results, or a folder of them, the words of this one name."""
    words = [word.rstrip("/") + "/" for word in re.split(r"[\s,=']+", table[name]) if "/" in word]
    others = {other: other + "/" for other in table if other != name and "@" not in other}
    return {
        other
        for other, path in others.items()
        if any(word.startswith(path) or path.startswith(word) for word in words)
    }


def with_needed(chosen: Iterable[str], table: Mapping[str, str]) -> list[str]:
    """Return the chosen commands and all that they need, in the table's order."""
    found, left = set(), list(chosen)
    while left:
        name = left.pop()
        if name not in found:
            found.add(name)
            left += needed_by(name, table)
    return [name for name in table if name in found]
