"""Claims of methods that make attention sparse, one file each."""
