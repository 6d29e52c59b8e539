"""Thin adapters to the model libraries that users know; each is imported on demand only."""
