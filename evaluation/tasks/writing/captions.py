"""Captions by a model that writes: BLEU, METEOR, ROUGE-L, CIDEr, SPICE against what people wrote. Not for retrieval.

COCO's Karpathy test split, NoCaps (also by domain), any pictures with texts. The prompt is VLKD's, 4.3.1.
"""

import json
from collections.abc import Sequence
from typing import Any

from evaluation.metrics.captions import METRICS, score_captions
from evaluation.models.generator import Generator, caption_prompt, written
from teachercache.core.errors import UserError
from teachercache.data.manifest import Manifest

SPLITS = ("test", "val", "validation")
MASKS, BEAMS = 6, 6  # VLKD, 4.3.1 and table 11
LONGEST = 24  # sub-words


def evaluate(
    generator: Generator,
    manifest: Manifest,
    masks: int = MASKS,
    beams: int = BEAMS,
    *,
    java: int = 1,
    only: Sequence[str] = METRICS,
) -> dict[str, Any]:
    """Scores over the test split (else val, else all rows), of each domain too; `results` in COCO's own form.

    Pictures that cannot be read are left out and counted. With `java` 0 nothing is computed by it, METEOR least of all.
    """
    references = [[text for text in group if text.strip()] for group in manifest.column("texts")]
    rows = [row for row in rows_of(manifest) if references[row]]
    if not rows:
        raise UserError(f"{manifest.data} has no captions to compare with: pass a file that has some")
    prompts = [caption_prompt(masks)] * len(rows)
    said, kept, skipped = written(generator, manifest, rows, prompts, beams=beams, longest=LONGEST)
    samples = [manifest.row(row) for row in kept]
    domains: dict[str, list[int]] = {}
    for i, sample in enumerate(samples):
        domains.setdefault(json.loads(sample.task or "{}").get("domain", ""), []).append(i)
    groups = {f"domain={name}": domains[name] for name in sorted(domains) if name}
    return score_captions(said, [references[row] for row in kept], groups, only=only, java=bool(java)) | {
        "masks": masks,
        "beams": beams,
        "num_images": len(said),
        "num_different": len(set(said)),
        "num_skipped": len(skipped),
        "results": [
            {"image_id": int(sample.key) if sample.key.isdigit() else sample.key, "caption": text}
            for sample, text in zip(samples, said, strict=True)
        ],
    }


def rows_of(manifest: Manifest) -> list[int]:
    """Rows of the only split, else of test, else of val."""
    there = set(manifest.column("split"))
    if len(there) == 1:
        return list(range(len(manifest)))
    found = next((split for split in SPLITS if split in there), None)
    if found is None:
        raise UserError(
            f"{manifest.data} has the splits {', '.join(sorted(there))} but neither test nor val: pass the "
            "file of one split"
        )
    return manifest.rows_of_split(found).tolist()
