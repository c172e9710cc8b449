"""Networks: attention in context, without losses or optimisers."""
