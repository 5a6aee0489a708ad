"""Claims of methods of attention."""
