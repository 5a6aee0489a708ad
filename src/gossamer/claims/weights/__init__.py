"""Claims about sparse weights."""
