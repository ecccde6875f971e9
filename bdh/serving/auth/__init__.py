"""Authentication, rate limits and token usage of callers."""
