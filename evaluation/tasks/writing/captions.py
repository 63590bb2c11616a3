"""Captioning: BLEU, METEOR, ROUGE-L, CIDEr and SPICE of generated captions against reference captions.

For COCO's Karpathy test split, NoCaps (also by domain), and any images with texts. The prompt is VLKD's (section 4.3.1).
"""

import json
from collections.abc import Sequence

from evaluation.data.same_pictures import by_picture
from evaluation.data.splits import TEST_FIRST, rows_to_measure
from evaluation.metrics.captions import METRICS, score_captions
from evaluation.models.generator import CAPTIONING, Generator, caption_prompt, generate_for_rows
from evaluation.tasks.task import Metrics
from teachercache.core.errors import UserError
from teachercache.data.manifest import Manifest


def evaluate(
    generator: Generator,
    manifest: Manifest,
    masks: int = CAPTIONING.masks,
    beams: int = CAPTIONING.beams,
    *,
    java: int = 1,
    only: Sequence[str] = METRICS,
) -> Metrics:
    """Caption the test split (otherwise val, otherwise all rows) and score the captions, also in each domain.

    Args:
        generator: The model.
        manifest: Images with their reference captions.
        masks: Number of [MASK]s in the prompt.
        beams: Beam size.
        java: 0 to compute nothing with Java, so neither METEOR nor SPICE.
        only: Metrics to compute.

    Returns:
        The metrics, and `results` in COCO's format. Unreadable images are left out and counted.

    Raises:
        UserError: If the data have no captions or no readable image.
    """
    references = [[text for text in group if text.strip()] for group in manifest.column("texts")]
    rows = [row for row in rows_to_measure(manifest, TEST_FIRST).tolist() if references[row]]
    if not rows:
        raise UserError(f"{manifest.data} has no captions to compare with: pass a file that has some")
    groups_of_rows = by_picture(manifest, rows)
    rows = [group[0] for group in groups_of_rows]
    for group in groups_of_rows:
        references[group[0]] = [text for row in group for text in references[row]]
    generated = generate_for_rows(generator, manifest, rows, [caption_prompt(masks)] * len(rows), beams=beams)
    captions = generated.texts
    samples = [manifest.row(row) for row in generated.rows]
    domains: dict[str, list[int]] = {}
    for i, sample in enumerate(samples):
        domains.setdefault(json.loads(sample.task or "{}").get("domain", ""), []).append(i)
    groups = {f"domain={name}": domains[name] for name in sorted(domains) if name}
    truth = [references[row] for row in generated.rows]
    metrics: Metrics = {**score_captions(captions, truth, groups, only=only, java=bool(java))}
    return metrics | {
        "masks": masks,
        "beams": beams,
        "num_images": len(captions),
        "num_different": len(set(captions)),
        "num_skipped": len(generated.skipped),
        "results": [
            {"image_id": int(sample.key) if sample.key.isdigit() else sample.key, "caption": caption}
            for sample, caption in zip(samples, captions, strict=True)
        ],
    }
