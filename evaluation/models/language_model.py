"""The contract of a language model under evaluation: a transformers folder with a name."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class LanguageModel:
    """A language model that tasks on text fine-tune or measure.

    Attributes:
        name: The model's name in results.
        pretrained: Where its weights come from, as typed by the user; together with `name` it identifies the model.
        folder: A folder that `transformers.AutoModelFor...from_pretrained` loads (config.json, weights, tokenizer).
    """

    name: str
    pretrained: str
    folder: str
