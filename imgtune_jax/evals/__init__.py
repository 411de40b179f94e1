"""Evaluators: frozen dataclasses that score a trained model, one a file."""
