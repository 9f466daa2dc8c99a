"""Hooks for a fit: they observe, never change training."""
