"""From records to batches: what every task shares."""
