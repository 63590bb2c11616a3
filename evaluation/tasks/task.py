"""The contract of a task: its name, the kind of model that it measures, and the function that measures.

A new task is a value of `Task`. Ours are listed in `registry.py`; another package adds its own by an entry point:

    [options.entry_points]
    evaluation.tasks =
        my_task = my_package.my_module:TASK
"""

import dataclasses
import enum
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from teachercache.core.errors import UserError, closest
from teachercache.core.ranges import MOST

if TYPE_CHECKING:
    from teachercache.data.manifest import Manifest

Metric = float | int | str | None | list[dict[str, Any]]
Metrics = dict[str, Metric]


class Kind(enum.Enum):
    """The kind of model that a task measures, which also decides the arguments of the task's function."""

    ENCODER = "encoder"  # function(Encoder, Manifest)
    ANSWERER = "answerer"  # function(Answerer, Manifest)
    MATCHER = "matcher"  # function(Matcher, Path): the local folder of the published data set
    GENERATOR = "generator"  # function(Generator, Manifest)
    LANGUAGE_MODEL = "language model"  # function(str, str): a transformers folder, and --data as typed


@dataclasses.dataclass(frozen=True)
class Option:
    """A numeric option that a user may write behind a task's name, as in `glue:lr=1e-4,epochs=3`."""

    convert: Callable[[str], float]  # int or float; raises ValueError if the text is not a number
    zero: bool = False  # whether 0 is allowed
    most: float = MOST  # the largest number


@dataclasses.dataclass(frozen=True)
class Selection:
    """How a task chooses the best checkpoint during training (`--eval-every`)."""

    usable: Callable[["Manifest"], Sequence[bool]]  # for each row, whether the task can measure it
    needs: str  # what a usable row has, for error messages: "text", "label"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """A benchmark that `student eval --task NAME` runs.

    `function(model, data, **options)` returns the metrics as a flat dict. Values are numbers, except that a metric
    that cannot be computed is None or a text that starts with "skipped: " and gives the reason; it is never 0.
    Scores are shares between 0 and 1, ties count as misses, and unreadable rows are left out and counted. The function
    gets all rows of the data and chooses those that it measures (`evaluation.data.splits.rows_or_only_split`). An ENCODER
    task with a `selection` also accepts `split=`, the name of the split to measure. A GENERATOR task adds the key
    `results` with one JSON object for each generated text.

    Attributes:
        name: The name on the command line and in results.
        kind: The kind of model that is measured; see `Kind` for the arguments of `function`.
        function: Measures one model. Import heavy dependencies inside it: the registry is read by `--help`.
        doc: One line for lists of tasks.
        short: A second, shorter name.
        options: Options that a user may set behind the name; each is a keyword of `function`.
        headline: The metrics whose mean summarizes the task in one number.
        columns: Metrics that the tables of `--task all` and `student compare` show, with their headings.
        lower: Metrics whose smaller value is the better one.
        answers: Of an ANSWERER task that measures in another way what is answered to "vcr", "snli_ve" or "vqa": that name.
            Runs that were trained on it and caches are measured. Empty for the task's own name.
        selection: How the task chooses checkpoints; None if it cannot.
        class_names: Class names of labeled rows, for figures; None to use the names of the folders.
    """

    name: str
    kind: Kind
    function: Callable[..., Metrics]
    doc: str
    short: str = ""
    options: Mapping[str, Option] = dataclasses.field(default_factory=dict)
    headline: tuple[str, ...] = ()
    columns: tuple[tuple[str, str], ...] = ()
    lower: tuple[str, ...] = ()
    answers: str = ""
    selection: Selection | None = None
    class_names: Callable[["Manifest", Sequence[int]], Mapping[str, str]] | None = None


def parse_options(task: Task, text: str) -> dict[str, float]:
    """Parse `a=1,b=2` with the task's options.

    Raises:
        UserError: If the task has no such option, it is set twice, or the value is not a number that it allows.
    """
    values: dict[str, float] = {}
    choices = ", ".join(f"{name}=NUMBER" for name in task.options)
    choose = f"choose from {choices}" if choices else f"{task.name} has no options"
    for pair in text.split(","):
        key, _, value = (part.strip() for part in pair.partition("="))
        where = f"--task {task.name}:{pair}"
        if key not in task.options:
            raise UserError(f"{where}: {closest(key, task.options)}{choose}")
        if key in values:
            raise UserError(f"{where}: {key} is set twice")
        option = task.options[key]
        try:
            values[key] = option.convert(value)
        except (ValueError, OverflowError) as error:
            raise UserError(f"{where}: {choose}") from error
        least = "of 0 or more" if option.zero else "above 0"
        if not (0 < values[key] <= option.most or (option.zero and values[key] == 0)):
            raise UserError(f"{where}: give a number {least} and up to {option.most:,}")
    return values
