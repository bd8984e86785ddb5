"""What would stop a run on this machine: the checks of ``trainer.doctor``."""
