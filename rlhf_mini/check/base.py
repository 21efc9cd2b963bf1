"""Checks of chapter 4, the base model: attention, packing, the loss."""
