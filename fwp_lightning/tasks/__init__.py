"""LightningModules: loss, metrics, optimiser and stop rule of each experiment."""
