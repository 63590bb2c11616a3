"""Prompt templates of PSD's zero-shot evaluation (supplement, table 4), and how to put a class name into one.

The table's "ImageNet+" stands for every data set without templates of its own. CLIP's 80 ImageNet prompts, which
`--task imagenet` uses, come with open_clip.
"""

import re

# The first half with "a", the second half with "the"
CIFAR = tuple(
    f"{start} {article} {rest}"
    for article in ("a", "the")
    for start, rest in (
        ("a photo of", "{}."),
        ("a blurry photo of", "{}."),
        ("a black and white photo of", "{}."),
        ("a low contrast photo of", "{}."),
        ("a high contrast photo of", "{}."),
        ("a bad photo of", "{}."),
        ("a good photo of", "{}."),
        ("a photo of", "small {}."),
        ("a photo of", "big {}."),
    )
)
CALTECH = tuple(
    template.format(article)
    for article in ("a", "the")
    for template in (
        "a photo of {} {{}}.",
        "a painting of {} {{}}.",
        "{} plastic {{}}.",
        "a sculpture of {} {{}}.",
        "a sketch of {} {{}}.",
        "a tattoo of {} {{}}.",
        "{} toy {{}}.",
        "a rendition of {} {{}}.",
        "{} embroidered {{}}.",
        "{} cartoon {{}}.",
        "{} {{}} in a video game.",
        "{} plushie {{}}.",
        "{} origami {{}}.",
        "art of {} {{}}.",
        "graffiti of {} {{}}.",
        "a drawing of {} {{}}.",
        "a doodle of {} {{}}.",
    )
)
IMAGENET_PLUS = (
    "{}",
    "A photo of {}",
    "A photo the {}",  # as printed in the table
    "itap of a {}.",
    "a bad photo of the {}.",
    "a origami {}.",
    "a photo of the large {}.",
    "a {} in a video game.",
    "art of the {}.",
    "a photo of the small {}.",
)


def fill(template: str, name: str) -> str:
    """Put a name into a template; "a" before a name that starts with a vowel becomes "an", as in the supplement."""
    if name[:1].lower() in tuple("aeiou"):
        template = re.sub(r"\b([aA]) \{\}", r"\1n {}", template)
    return template.format(name)
