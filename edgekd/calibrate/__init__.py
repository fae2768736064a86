"""Latency tables: which models to build and time on a target, so that every other shape's latency is predicted."""
