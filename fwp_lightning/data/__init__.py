"""LightningDataModules: what is drawn or read, cut into batches."""
