"""Callbacks of a fit: they observe and never change training."""
