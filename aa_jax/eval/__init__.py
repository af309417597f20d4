"""Evaluation: statistics with intervals, and the graders of each world and benchmark."""
