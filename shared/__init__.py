"""What both sides must agree on; it imports nothing of ours from outside this package."""

__version__ = "0.1.0"
