"""Instant checks of the book's exercises: which property of an answer fails, never the answer."""

from rlhf_mini.check import base, judging, leash, ppo, reward, rounds, sft, theory, tokens, value
from rlhf_mini.check.core import EXERCISES, Report, check
from rlhf_mini.check.hunts import Hunt, hunt

__all__ = ["EXERCISES", "Hunt", "Report", "check", "hunt", "base", "judging", "leash", "ppo",
           "reward", "rounds", "sft", "theory", "tokens", "value"]
