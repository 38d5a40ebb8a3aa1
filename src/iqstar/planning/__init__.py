"""What a run will take of its devices, before any weight is loaded."""
