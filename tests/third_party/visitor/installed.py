"""What the entry points name in the tests: the package as the pages show it, made strict."""

import dataclasses

from visitor import recipes, students, teachers
from visitor.strict import mortal, strict_constants, strict_module
from visitor.tasks import BRIGHTNESS

for module in (teachers.Pool, teachers.Affinity, students.Two, students.Chooser):
    strict_module(module)
for constants in (recipes.PairConstants, recipes.QuestionConstants):
    strict_constants(constants)

GRID, PAIR_TEACHER = teachers.GRID, teachers.PAIRS
TWO, CHOOSER = students.TWO, students.CHOOSER
PAIRS, QUESTIONS = dataclasses.replace(recipes.PAIRS, loss=mortal(recipes.pair_loss)), recipes.QUESTIONS
__all__ = ["BRIGHTNESS", "CHOOSER", "GRID", "PAIRS", "PAIR_TEACHER", "QUESTIONS", "TWO"]
