"""Compute parts of an encoder with less work or memory and the same features."""
