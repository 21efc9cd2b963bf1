"""rlhf-mini: the InstructGPT recipe (SFT, reward model, PPO, evaluation), small enough to read."""

__version__ = "0.2.0"
