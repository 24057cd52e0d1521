"""The run directory: checkpoints, metrics, the finished editor, and how each file is written safely."""
