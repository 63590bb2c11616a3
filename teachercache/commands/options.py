"""Options that several commands share."""

import click

from teachercache.core.command import text
from teachercache.core.ranges import MOST

DEMO_DATA = "data/demo"
NUMBER, SEED = click.IntRange(1, MOST), click.IntRange(0, 2**63 - 1)
json_option = click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")
field_option = click.option(
    "--field", type=text, help="The vector field; default: the one per image, else the one per text."
)
teacher_option = click.option(
    "--teacher",
    metavar="MODULE:ENTRY",
    type=text,
    help="The teacher of the cache, if it was built with a teacher that is not installed: package.module:ENTRY.",
)
