"""Measurements anyone can re-run; what they found is kept in results/."""
