"""The command that scores samples or a checkpoint, and its flags."""
