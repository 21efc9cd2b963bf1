"""Studies: each criticism of the method, put to the test over several seeds."""

from rlhf_mini.experiments import (
    control,
    instructions,
    machinery,
    noise,
    overoptimisation,
    preferences,
    stability,
    tax,
)
from rlhf_mini.experiments.lab import Lab
from rlhf_mini.experiments.study import (
    Study,
    effect,
    find_rows,
    over_seeds,
    read_rows,
    run_study,
    seed_interval,
    show_interval,
)

STUDIES: dict[str, Study] = {module.STUDY.name: module.STUDY for module in (
    control, noise, preferences, instructions, stability, overoptimisation, tax,
    machinery)}

__all__ = ["STUDIES", "Lab", "Study", "effect", "find_rows", "over_seeds", "read_rows",
           "run_study", "seed_interval", "show_interval"]
