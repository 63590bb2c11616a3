"""VQA's answers made comparable, by the rules of its official evaluation. Not for scores: see `evaluation.tasks.vqa`."""


def normalise_answer(answer: str) -> str:
    """PLACEHOLDER."""
    return answer.lower().strip()
