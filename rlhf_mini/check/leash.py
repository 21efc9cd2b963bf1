"""Checks of chapter 8, the KL leash."""
