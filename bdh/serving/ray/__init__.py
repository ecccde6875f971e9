"""Replicas of the server under Ray Serve."""
