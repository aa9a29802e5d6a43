"""``python -m ffprune``."""

from ffprune.cli import main

main()
