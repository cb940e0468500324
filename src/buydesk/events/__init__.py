"""Events that reach clients: their webhooks (Standard Webhooks 1.0), and the delivery to them."""
