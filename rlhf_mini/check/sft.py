"""Checks of chapter 5, supervised fine-tuning."""
