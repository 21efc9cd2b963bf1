"""Checks of chapter 12, evaluation."""
