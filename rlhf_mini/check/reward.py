"""Checks of chapter 6, the reward model."""
