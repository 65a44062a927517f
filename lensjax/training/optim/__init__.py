"""What moves beside the parameters: optimizers, schedules, moving statistics."""
