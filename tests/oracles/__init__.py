"""Slow, obvious twins of the fast routines: float64, tiny sizes."""
