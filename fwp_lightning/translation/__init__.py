"""Translation inside fairseq 0.12.2: its compatibility, the registry's attentions as its modules, its command lines."""
