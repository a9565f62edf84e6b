"""What an optimiser step of PPO is made of: its batch, its losses, and samples of another policy."""
