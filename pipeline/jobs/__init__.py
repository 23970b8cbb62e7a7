"""Jobs that are independent but for an order, done by this process, by others of the machine, or by a Ray cluster."""
