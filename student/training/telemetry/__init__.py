"""What a run reports while it trains: metrics, curve, speed, TensorBoard and W&B."""
