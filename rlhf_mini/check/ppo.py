"""Checks of chapter 10, PPO."""
