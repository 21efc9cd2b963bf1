"""The town: a small world in which alignment can be measured."""

from rlhf_mini.town.build import Town, build_town
from rlhf_mini.town.files import load_town, validate_town, write_town
from rlhf_mini.town.grader import FAMILIES, Grade, beyond_ideal, grade, ideal_response
from rlhf_mini.town.labelers import Labeler
from rlhf_mini.town.prompts import reword

__all__ = ["FAMILIES", "Grade", "Labeler", "Town", "beyond_ideal", "build_town", "grade",
           "ideal_response", "load_town", "reword", "validate_town", "write_town"]
