"""Reading checkpoints tensor by tensor: where their files are (`locate`), what they hold (`open`), one class for each format."""
