"""Which kernel serves a layer: a latency model, the machine, the decision, timing."""
