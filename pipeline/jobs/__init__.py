"""Jobs that are independent but for an order, done by this process or by a Ray cluster."""
