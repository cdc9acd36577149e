"""The training run: one step (step), the epochs around it (loop), evaluation, checkpoints and scalars."""
