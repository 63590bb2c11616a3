"""Report a run while it trains: metrics, loss curve, speed, TensorBoard and W&B."""
