"""Parameter-efficient fine-tuning: labs 701 to 714."""
