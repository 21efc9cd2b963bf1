"""Checks of chapter 3, tokens: masks, log-probabilities, temperature."""
