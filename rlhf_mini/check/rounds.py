"""Checks of chapter 11, around again."""
