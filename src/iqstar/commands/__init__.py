"""Sub-commands of ``iqstar`` that are not Lightning's: one small module each."""
