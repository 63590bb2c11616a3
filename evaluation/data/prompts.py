"""Prompt templates of PSD's zero-shot evaluation (supplement, table 4), and how a class name is put into one.

"ImageNet+" there stands for every data set without templates of its own. CLIP's 80 ImageNet prompts, which
`--task imagenet` takes, come with open_clip. Not for class names: those come with the data.
"""

import re

# The first half says "a", the second "the"
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
    part.format(article)
    for article in ("a", "the")
    for part in (
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
    "A photo the {}",  # as the table has it
    "itap of a {}.",
    "a bad photo of the {}.",
    "a origami {}.",
    "a photo of the large {}.",
    "a {} in a video game.",
    "art of the {}.",
    "a photo of the small {}.",
)


def fill(template: str, name: str) -> str:
    """The prompt; an "a" right before a name that starts with a vowel becomes "an", as the supplement says."""
    if name[:1].lower() in tuple("aeiou"):
        template = re.sub(r"\b([aA]) \{\}", r"\1n {}", template)
    return template.format(name)
