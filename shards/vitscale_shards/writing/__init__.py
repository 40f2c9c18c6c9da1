"""Put a plan on disk, by any number of workers, and mend what was put there."""
