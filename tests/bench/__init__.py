"""Measurements, each runnable by itself: python -m tests.bench.NAME."""
