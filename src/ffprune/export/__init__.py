"""Models for others: what a folder holds, and what other programs read."""
