"""Checks of chapter 7, policy gradients and the clip."""
