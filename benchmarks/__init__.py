"""Side by side with what a user would pick instead, in one process, alternating.

``python -m benchmarks`` runs the short form of everything and prints one ratio a line.
"""
