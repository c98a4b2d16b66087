"""Routing: which model serves a call, and how a candidate takes over; engines, clocks and randomness come in."""
