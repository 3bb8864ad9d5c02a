"""What is tuned, and on what: base model, data, partition, prompt, metric."""
